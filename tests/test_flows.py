"""Flows as posteriors: densities against the change of variables, gradients against differences, and the refusals."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from helpers.programs import z_score

import pyro_vae as pv
from pyro_vae.networks import mlp

EVENT = (2, 2)
FLOWS = {
    "iaf": {"flow": "iaf"},
    "spline": {"flow": "spline"},
    "coupling": {"flow": "coupling"},
    "coupling, odd": {"flow": "coupling", "length": 3, "context_dim": 1},
    "no context": {"flow": "iaf", "context_dim": 0},
}
flows = pytest.mark.parametrize("name", FLOWS)


def build(name, latent_dim=2, event_shape=EVENT):
    """A posterior with random weights, in float64 while PyTorch's default type stays float32."""
    options = FLOWS[name]
    encoder = mlp(math.prod(event_shape), [8], pv.FlowPosterior.features_for(latent_dim, **options))
    posterior = pv.FlowPosterior(encoder, event_shape, latent_dim, hidden_dims=(8,), **options).double()
    with torch.no_grad():
        for parameter in posterior.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return posterior


def data(*batch):
    return torch.randn(*batch, *EVENT, dtype=torch.float64)


@flows
def test_embed_of_a_flow_is_the_image_of_the_mean(name):
    posterior, x = build(name, 3), data(5)
    features = posterior.encoder(x)
    q = posterior(x)
    z = features[:, :3]
    for transform in q.transforms:
        z = transform(z)
    torch.testing.assert_close(posterior.embed(x), z)
    wide = q.sample((2000,))  # roughly in the middle of the samples
    assert ((posterior.embed(x) - wide.mean(0)).abs() < 3 * wide.std(0)).all()


@flows
@pytest.mark.parametrize("latent_dim", [2, 3, 5])
def test_the_density_of_a_flow_is_a_change_of_variables(name, latent_dim):
    """The Jacobian is a finite difference of the sample with respect to the noise."""
    posterior, x = build(name, latent_dim), data(6)
    with torch.no_grad():
        loc, log_scale = posterior.encoder(x)[:, : 2 * latent_dim].chunk(2, -1)
        context = posterior.encoder(x)[:, 2 * latent_dim :]

        def push(noise):
            z = loc + log_scale.exp() * noise
            for transform in posterior.flow(context if context.shape[-1] else None):
                z = transform(z)
            return z

        noise, step = torch.randn(6, latent_dim, dtype=torch.float64), 1e-6
        unit = step * torch.eye(latent_dim, dtype=torch.float64)
        columns = [(push(noise + e) - push(noise - e)) / (2 * step) for e in unit]
        expected = dist.Normal(0.0, 1.0).log_prob(noise).sum(-1) - torch.stack(columns, -1).slogdet()[1]
        z, q = push(noise), posterior(x)
        torch.testing.assert_close(q.log_prob(z), expected, rtol=1e-5, atol=1e-5)
        # the density of its own sample, with and without cached results
        sampled = q.sample()
        torch.testing.assert_close(q.log_prob(sampled), posterior(x).log_prob(sampled.clone()), rtol=1e-8, atol=1e-8)
        for transform in reversed(q.transforms):
            z = transform.inv(z)
        torch.testing.assert_close(z, loc + log_scale.exp() * noise, rtol=1e-7, atol=1e-7)


@flows
def test_the_gradient_of_a_flow_at_a_fixed_value(name):
    """The gradient through the inverse, in the parameters and in the value, does not depend on cached results."""
    posterior, x = build(name), data(4)
    z = posterior(x).sample()
    parameters = list(posterior.parameters())

    def log_density():
        return posterior(x).log_prob(z).sum()

    with torch.no_grad():
        before = log_density()
    direction = [torch.randn_like(parameter) for parameter in parameters]
    gradients = torch.autograd.grad(log_density(), parameters)
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    ends = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            for parameter, d in zip(parameters, direction, strict=True):
                parameter += step * d
            ends.append(log_density())
            for parameter, d in zip(parameters, direction, strict=True):
                parameter -= step * d
    torch.testing.assert_close((ends[0] - ends[1]) / 2e-6, slope, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_density().detach(), before, rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(lambda value: posterior(x).log_prob(value), z.clone().requires_grad_(), atol=1e-4)


@flows
@pytest.mark.parametrize("gradient", ["score", "stl"])
def test_gradient_estimators_of_a_flow_agree_in_mean(name, gradient):
    """The cached results of a sample must not enter the score."""
    vae = pv.mlp_vae((2,), latent_dim=2, hidden_dims=(4,), likelihood="gaussian").double()
    vae.posterior = build(name, event_shape=(2,))
    x = torch.randn(2, dtype=torch.float64).expand(1000, 2)
    parameters = list(vae.posterior.parameters())
    means = []
    for objective in (pv.ELBO(1, "monte_carlo", gradient), pv.ELBO(1, "monte_carlo")):
        draws = []
        for _ in range(8):
            loss = objective.differentiable_loss(vae.model, vae.guide, x) / len(x)
            found = torch.autograd.grad(loss, parameters)
            draws.append(torch.cat([g.flatten() for g in found]))
        means.append(torch.stack(draws))
    difference = means[0] - means[1]
    scores = z_score(difference, 0.0)[difference.abs().amax(0) > 1e-9]
    assert scores.square().mean() < 3.5  # the mean of squares of Student's t with 7 degrees of freedom is 1.4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latent_dim": 1}, r"at least 2 latent dimensions.*latent_dim=1.*use DiagonalNormal"),
        ({"latent_dim": 2, "flow": "planar"}, r"flow to be one of 'iaf', 'spline', 'coupling', got 'planar'"),
        ({"latent_dim": 2, "length": 0}, r"length to be a positive integer, got 0"),
        ({"latent_dim": 9, "hidden_dims": (8,)}, r"of width latent_dim=9 or more.*hidden_dims=\(8,\)"),
        ({"latent_dim": 2, "hidden_dims": ()}, r"hidden_dims to be a sequence of one or more.*got \(\)"),
    ],
)
def test_wrong_flows_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        pv.FlowPosterior(mlp(4, [8], 6), EVENT, **arguments)
    if "flow" not in arguments:
        with pytest.raises(ValueError, match=message):
            pv.FlowPrior(**arguments)
