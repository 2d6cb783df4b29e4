"""Objectives against closed forms: log p(x), the ELBO and their gradients on linear-Gaussian programs."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.programs import SIZES, LinearGaussian, draw_bounds, z_score

import pyro_vae as pv
from pyro_vae.likelihoods.binary import PixelBernoulli

ZERO_VARIANCE = [
    pv.ELBO(1, "monte_carlo"),
    pv.ELBO(5, "monte_carlo"),
    pv.ELBO(5, "monte_carlo", vectorize_particles=False),
    pv.IWAE(1),
    pv.IWAE(7),
    pv.IWAE(7, vectorize_particles=False),
]


FEW_SIZES = [SIZES[1], *(pytest.param(size, marks=pytest.mark.slow) for size in (SIZES[0], SIZES[2]))]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("objective", ZERO_VARIANCE, ids=repr)
def test_exact_posterior_gives_log_evidence_with_zero_variance(size, objective):
    program = LinearGaussian(*size)
    for _ in range(3):
        bound = objective.bound(program.model, program.guide, program.x)
        assert bound.dtype == torch.float64
        torch.testing.assert_close(bound, program.log_evidence(), rtol=0, atol=1e-9)
        loss = objective.loss(program.model, program.guide, program.x)
        assert loss == pytest.approx(-program.log_evidence().sum().item(), abs=1e-8)


@pytest.mark.parametrize("size", FEW_SIZES)
@pytest.mark.parametrize(("kl", "wrong"), [("analytic", False), ("analytic", True), ("monte_carlo", True)])
def test_elbo_is_log_evidence_minus_the_kl_to_the_posterior(size, kl, wrong):
    program = LinearGaussian(*size, wrong=wrong)
    right = LinearGaussian(*size)
    q = dist.MultivariateNormal(program.x @ program.A.T + program.c, scale_tril=program.L.tril())
    p = dist.MultivariateNormal(program.x @ right.A.T + right.c, scale_tril=right.L.tril())
    exact = program.log_evidence() - torch.distributions.kl_divergence(q, p)
    torch.testing.assert_close(exact, program.exact_elbo(), rtol=0, atol=1e-9)
    for num_particles in (1, 10):
        objective = pv.ELBO(num_particles, kl)
        assert (z_score(draw_bounds(objective, program, 5000), exact) < 4).all()
        losses = [objective.loss(program.model, program.guide, program.x) for _ in range(200)]
        assert z_score(torch.tensor(losses, dtype=torch.float64), -exact.sum()) < 4


@pytest.mark.parametrize("guide", ["near the prior", "near the posterior"])
def test_which_form_of_the_kl_varies_less(guide):
    """Each wins somewhere: by Monte Carlo, the KL's noise cancels the reconstruction's as q nears p(z|x)."""
    program = LinearGaussian(4, 2, 3)
    if guide == "near the prior":  # and the data say little about z: the reconstruction hardly varies
        program.W = 0.1 * program.W
        program.x = program.b + 0.1 * program.x
        program.A, program.c, program.L = 0 * program.A, 0 * program.c, 0.5 * torch.eye(2, dtype=torch.float64)
    else:
        program.c = program.c + 0.01
    closed, sampled = (draw_bounds(pv.ELBO(1, kl), program, 2000).std(0) for kl in ("analytic", "monte_carlo"))
    assert (closed < 0.5 * sampled if guide == "near the prior" else sampled < 0.5 * closed).all()


@pytest.mark.parametrize("size", FEW_SIZES)
def test_iwae_rises_with_particles_and_stays_below_log_evidence(size):
    program = LinearGaussian(*size, wrong=True)
    exact = program.log_evidence().mean()
    means, errors = [program.exact_elbo().mean()], [torch.zeros(())]
    for num_particles in (2, 8, 32, 128):
        bounds = draw_bounds(pv.IWAE(num_particles), program, 2000).mean(1)
        means.append(bounds.mean())
        errors.append(bounds.std() / math.sqrt(len(bounds)))
    for i in range(len(means) - 1):
        assert means[i + 1] - means[i] > -4 * torch.hypot(errors[i], errors[i + 1])
    assert means[-1] > means[0] + 4 * errors[-1]
    assert means[-1] < exact + 4 * errors[-1]
    assert exact - means[-1] < 0.5 * (exact - means[0])


@pytest.mark.parametrize("kl", ["analytic", "monte_carlo"])
def test_elbo_gradient_is_that_of_the_closed_form(kl):
    program = LinearGaussian(3, 2, 2, wrong=True)
    for parameter in program.parameters:
        parameter.requires_grad_()
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(-program.exact_elbo().sum(), program.parameters)])
    objective = pv.ELBO(20, kl)
    estimates = torch.stack([_gradient(objective, program) for _ in range(300)])
    moving = estimates.std(0) > 1e-12
    torch.testing.assert_close(estimates.mean(0)[~moving], exact[~moving], rtol=0, atol=1e-9)
    assert (z_score(estimates[:, moving], exact[moving]) < 4).all()


def test_iwae_value_and_gradient_are_those_of_quadrature():
    """One latent dimension, two particles: the expectation over both is an integral over the plane."""
    program = LinearGaussian(2, 1, 2, wrong=True)
    for parameter in program.parameters:
        parameter.requires_grad_()
    nodes, weights = map(torch.tensor, np.polynomial.hermite_e.hermegauss(60))
    weights = weights / weights.sum()
    loc, scale = program.x @ program.A.T + program.c, program.L[0, 0]
    z = (loc + scale * nodes)[..., None]  # (N, nodes, 1)
    log_w = dist.Normal(z @ program.W.T + program.b, program.sigma).log_prob(program.x[:, None]).sum(-1)
    log_w = log_w + dist.Normal(0.0, 1.0).log_prob(z[..., 0]) - dist.Normal(loc, scale).log_prob(z[..., 0])
    pairs = torch.logaddexp(log_w[:, :, None], log_w[:, None, :]) - math.log(2)
    exact = (pairs * weights[:, None] * weights).sum((1, 2))
    exact_gradient = torch.cat([g.flatten() for g in torch.autograd.grad(-exact.sum(), program.parameters)])
    objective = pv.IWAE(2)
    assert (z_score(draw_bounds(objective, program, 50_000), exact.detach()) < 4).all()
    program.x = program.x.repeat(100, 1)
    gradients = torch.stack([_gradient(objective, program) / 100 for _ in range(300)])
    assert (z_score(gradients, exact_gradient) < 4).all()


def _gradient(objective, program):
    for parameter in program.parameters:
        parameter.grad = None
    objective.loss_and_grads(program.model, program.guide, program.x)
    return torch.cat([parameter.grad.flatten() for parameter in program.parameters])


def test_loss_and_grads_adds_the_gradient_of_differentiable_loss():
    program = LinearGaussian(3, 2, 4, wrong=True)
    for objective in (pv.ELBO(3), pv.ELBO(3, "monte_carlo"), pv.IWAE(3)):
        for parameter in program.parameters:
            parameter.requires_grad_().grad = None
        pyro.set_rng_seed(1)
        loss = objective.loss_and_grads(program.model, program.guide, program.x)
        pyro.set_rng_seed(1)
        differentiable = objective.differentiable_loss(program.model, program.guide, program.x)
        assert loss == pytest.approx(differentiable.item(), rel=1e-12)
        expected = torch.autograd.grad(differentiable, program.parameters)
        for parameter, gradient in zip(program.parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)


def test_two_latent_sites_with_closed_form_kl_given_the_first():
    """z1 -> z2 -> x in model and guide: the ELBO with each site's KL given the sites before it, by quadrature."""

    def model(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x.new_zeros(()), 1.0))
            z2 = pyro.sample("z2", dist.Normal(z1, 0.5))
            pyro.sample("x", dist.Normal(z2, 0.3), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(0.5 * x, 0.6))
            pyro.sample("z2", dist.Normal(0.3 * x + 0.4 * z1, 0.4))

    x = torch.tensor([0.3, -1.2], dtype=torch.float64)
    nodes, weights = map(torch.tensor, np.polynomial.hermite_e.hermegauss(40))
    weights = (weights[:, None] * weights / weights.sum() ** 2)[..., None]
    z1 = 0.5 * x + 0.6 * nodes[:, None, None]
    z2 = 0.3 * x + 0.4 * z1 + 0.4 * nodes[None, :, None]
    log_w = dist.Normal(0.0, 1.0).log_prob(z1) + dist.Normal(z1, 0.5).log_prob(z2) + dist.Normal(z2, 0.3).log_prob(x)
    log_w = log_w - dist.Normal(0.5 * x, 0.6).log_prob(z1) - dist.Normal(0.3 * x + 0.4 * z1, 0.4).log_prob(z2)
    exact = (weights * log_w).sum((0, 1))
    for kl in ("analytic", "monte_carlo"):
        bounds = pv.ELBO(1, kl).bound(model, guide, x.repeat(20_000)).reshape(-1, 2)
        assert (z_score(bounds, exact) < 4).all()


@pytest.mark.parametrize("event_shape", [(7,), (1, 4, 4)])
def test_bernoulli_is_cross_entropy_and_gaussian_is_squared_error(event_shape):
    z = torch.randn(5, 3)
    binary = (torch.rand(5, *event_shape) > 0.5).float()
    bernoulli = pv.mlp_vae(event_shape, latent_dim=3).likelihood
    logits = bernoulli.decoder(z).reshape(binary.shape)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, binary, reduction="none")
    torch.testing.assert_close(bernoulli(z).log_prob(binary), -entropy.flatten(1).sum(1))

    x, sigma = torch.randn(5, *event_shape), 0.3
    gaussian = pv.mlp_vae(event_shape, latent_dim=3, likelihood="gaussian", scale=sigma).likelihood
    error = (x - gaussian.decoder(z).reshape(x.shape)).square().flatten(1).sum(1)
    constant = math.prod(event_shape) * 0.5 * math.log(2 * math.pi * sigma**2)
    torch.testing.assert_close(gaussian(z).log_prob(x), -error / (2 * sigma**2) - constant)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shapes", [((), ()), ((5,), ()), ((5,), (5,)), ((), (5,)), ((3, 5), (5,)), ((3, 1), (1,)), ((3, 5), (1, 5))]
)
def test_bernoulli_pixels_are_torchs(dtype, shapes):
    """Value and derivative, from underflow to overflow of e^l, with data that broadcast against the logits."""
    batch, rows = shapes
    extremes = torch.tensor([-1e3, -100, -41, -39, -20, -3, 0, 0.5, 3, 20, 39, 41, 100, 1e3], dtype=dtype)
    logits = (extremes.reshape(2, 7) + torch.randn(*batch, 2, 7, dtype=dtype)).requires_grad_()
    x = (torch.rand(*rows, 2, 7) > 0.5).to(dtype)
    values = []
    for family in (PixelBernoulli, dist.Bernoulli):
        pixels = family(logits=logits).to_event(2)
        wide = torch.broadcast_shapes(batch, rows)
        assert pixels.expand([4, *wide]).log_prob(x).shape == (4, *wide)
        value = pixels.log_prob(x)
        values.append((value, *torch.autograd.grad(value.sum(), logits)))
    for ours, torchs in zip(*values, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=2e-6 if dtype is torch.float32 else 1e-12, atol=1e-5)
    with pytest.raises(ValueError, match="support"):
        PixelBernoulli(logits=logits, validate_args=True).to_event(2).log_prob(torch.full_like(logits, 0.5))
