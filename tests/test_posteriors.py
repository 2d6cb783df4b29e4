"""Every posterior is a normalised density with the parameters, samples, gradients and KL that it says it has."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.programs import z_score
from torch import nn

import pyro_vae as pv
from pyro_vae.networks import Concatenated, mlp

FAMILIES = {
    "diagonal": (pv.DiagonalNormal, {}),
    "full": (pv.FullNormal, {}),
    "low rank": (pv.LowRankNormal, {"rank": 1}),
    "low rank, 2": (pv.LowRankNormal, {"rank": 2}),
    "mixture": (pv.MixturePosterior, {"components": 3}),
    "iaf": (pv.FlowPosterior, {"flow": "iaf"}),
    "spline": (pv.FlowPosterior, {"flow": "spline"}),
    "coupling": (pv.FlowPosterior, {"flow": "coupling"}),
    "coupling, odd": (pv.FlowPosterior, {"flow": "coupling", "length": 3, "context_dim": 1}),
    "no context": (pv.FlowPosterior, {"flow": "iaf", "context_dim": 0}),
}
FLOWS = [name for name, (family, _) in FAMILIES.items() if family is pv.FlowPosterior]
NORMALS = ["diagonal", "full", "low rank", "low rank, 2"]
every = pytest.mark.parametrize("name", FAMILIES)
flows = pytest.mark.parametrize("name", FLOWS)
EVENT = (2, 2)


def build(name, latent_dim=2, given=0, event_shape=EVENT):
    """A posterior with random weights, in float64 while PyTorch's default stays float32."""
    family, options = FAMILIES[name]
    inputs = math.prod(event_shape) + given
    encoder = mlp(inputs, [8], family.features_for(latent_dim, **options))
    if family is pv.FlowPosterior:
        options = {"latent_dim": latent_dim, "hidden_dims": (8,), **options}
    posterior = family(Concatenated(encoder) if given else encoder, event_shape, **options).double()
    with torch.no_grad():
        for parameter in posterior.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return posterior


def data(*batch):
    return torch.randn(*batch, *EVENT, dtype=torch.float64)


def fixed(family, features, latent_dim=None, **options):
    """A posterior whose encoder gives these features for any x."""

    class Constant(nn.Module):
        def forward(self, x):
            return features.expand(len(x), -1)

    arguments = (EVENT,) if latent_dim is None else (EVENT, latent_dim)
    return family(Constant(), *arguments, **options)


@every
def test_all_that_a_posterior_has_to_be(name, without_inductor):
    family, options = FAMILIES[name]
    options = {"hidden_dims": (8,), **options} if name in FLOWS else options
    pv.testing.check_posterior(family, compiled=name != "spline", **options)


@every
def test_three_dimensions_have_a_path(name):
    posterior = build(name, 3)
    for batch in ((), (5,), (4, 5)):
        q = posterior(data(*batch))
        assert q.has_rsample
        assert q.rsample().shape == posterior.embed(data(*batch)).shape == (*batch, 3)
        assert q.log_prob(torch.randn(7, *batch, 3, dtype=torch.float64)).shape == (7, *batch)


@every
def test_what_it_is_given_comes_for_each_datum_and_particle(name):
    posterior = build(name, 2, given=3)
    x, z = data(5), torch.randn(4, 5, 2, dtype=torch.float64)
    few, many = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 5, 3, dtype=torch.float64)
    assert posterior(x, few).batch_shape == (5,)
    assert posterior.embed(x, few).shape == (5, 2)
    q = posterior(x, many)
    assert q.batch_shape == (4, 5)
    assert q.rsample().shape == posterior.embed(x, many).shape == (4, 5, 2)
    one_by_one = [[posterior(x[None, n], many[k, None, n]).log_prob(z[k, None, n]) for n in range(5)] for k in range(4)]
    torch.testing.assert_close(q.log_prob(z), torch.stack([torch.cat(row) for row in one_by_one]))
    assert (posterior(x, few).log_prob(z[0]) != q.log_prob(z)[0]).all()


@pytest.mark.parametrize("name", [*NORMALS, "mixture"])
def test_embed_is_the_mean(name):
    posterior, x = build(name), data(5)
    torch.testing.assert_close(posterior.embed(x), posterior(x).mean)  # which check_posterior holds to be the density's


@flows
def test_embed_of_a_flow_is_where_the_mean_of_the_base_goes(name):
    posterior, x = build(name, 3), data(5)
    features = posterior.encoder(x)
    q = posterior(x)
    z = features[:, :3]
    for transform in q.transforms:
        z = transform(z)
    torch.testing.assert_close(posterior.embed(x), z)
    wide = q.sample((2000,))  # the middle of the samples, more or less
    assert ((posterior.embed(x) - wide.mean(0)).abs() < 3 * wide.std(0)).all()


def test_a_diagonal_normal_has_means_then_log_scales():
    features = torch.randn(6, dtype=torch.float64)
    q = fixed(pv.DiagonalNormal, features)(data(1))
    expected = dist.Normal(features[:3], features[3:].exp())
    z = torch.randn(1, 3, dtype=torch.float64)
    torch.testing.assert_close(q.log_prob(z), expected.log_prob(z).sum(-1))


def test_a_full_normal_has_the_rows_of_its_cholesky_factor():
    f = torch.randn(9, dtype=torch.float64)
    q = fixed(pv.FullNormal, f)(data(1))
    unit = torch.tensor([[1, 0, 0], [f[4] / 3, 1, 0], [f[6] / 3, f[7] / 3, 1]], dtype=torch.float64)
    factor = torch.stack([f[3], f[5], f[8]]).exp()[:, None] * unit
    torch.testing.assert_close(q.mean[0], f[:3])
    torch.testing.assert_close(q.covariance_matrix[0], factor @ factor.T)
    noise = torch.randn(50_000, 3, dtype=torch.float64)
    assert (z_score(q.sample((50_000,))[:, 0].prod(-1), (f[:3] + noise @ factor.T).prod(-1).mean()) < 6).all()


def test_a_low_rank_normal_is_a_diagonal_and_its_columns():
    f = torch.randn(12, dtype=torch.float64)
    q = fixed(pv.LowRankNormal, f, rank=2)(data(1))
    columns = torch.stack([f[6:9], f[9:]], -1)
    torch.testing.assert_close(q.mean[0], f[:3])
    torch.testing.assert_close(q.covariance_matrix[0], torch.diag((2 * f[3:6]).exp()) + columns @ columns.T)


def test_a_mixture_has_logits_then_each_component():
    f = torch.randn(2 * 5, dtype=torch.float64)
    q = fixed(pv.MixturePosterior, f, components=2)(data(1))
    parts = [dist.Normal(part[:2], part[2:].exp()).to_event(1) for part in (f[2:6], f[6:])]
    z = torch.randn(7, 1, 2, dtype=torch.float64)
    weights = f[:2].softmax(0)
    expected = sum(weight * part.log_prob(z).exp() for weight, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(q.log_prob(z).exp(), expected)


@flows
@pytest.mark.parametrize("latent_dim", [2, 3, 5])
def test_the_density_of_a_flow_is_a_change_of_variables(name, latent_dim):
    """The Jacobian by finite differences of the sample with respect to the base's noise."""
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
        # what it sampled itself, with what it remembers, and as a value that it sees for the first time
        sampled = q.sample()
        torch.testing.assert_close(q.log_prob(sampled), posterior(x).log_prob(sampled.clone()), rtol=1e-8, atol=1e-8)
        for transform in reversed(q.transforms):
            z = transform.inv(z)
        torch.testing.assert_close(z, loc + log_scale.exp() * noise, rtol=1e-7, atol=1e-7)


@flows
def test_the_gradient_of_a_flow_at_a_fixed_value(name):
    """Through the inverse, in the parameters and in the value, whatever was computed at the same value before."""
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
def test_gradients_of_the_elbo_of_a_flow_have_one_mean(name, gradient):
    """What a transform remembers of its sample must not enter the score."""
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
    assert scores.square().mean() < 3.5  # of squares of Student's t with 7 degrees, 1.4 on average


@pytest.mark.parametrize("latent_dim", [1, 2])
@pytest.mark.parametrize("particles", [(), (5,)])
@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_the_pathwise_gradient_of_a_mixture_is_exact(latent_dim, particles, spread):
    """In logits, means and scales; Pyro's own is biased in the logits."""
    components, n = 3, 20_000
    number = pv.MixturePosterior.features_for(latent_dim, components=components)
    features = torch.randn(number, dtype=torch.float64)
    features[components:].view(components, 2, latent_dim)[:, 1].mul_(0.5).add_(math.log(spread))

    def f(z):
        first, last = z[..., 0], z[..., -1]
        return torch.cos(first + 0.5 * last + 0.3) + 0.3 * first * last + torch.sigmoid(4 * last)

    def q(features):
        return pv.MixturePosterior(nn.Identity(), EVENT, components).latent_distribution(features)

    one = features.clone().requires_grad_()
    axis = torch.linspace(-9, 9, 601, dtype=torch.float64)
    grid = torch.cartesian_prod(*[axis] * latent_dim).reshape(-1, latent_dim)
    total = (q(one[None]).log_prob(grid).exp() * f(grid)).sum() * 0.03**latent_dim
    (exact,) = torch.autograd.grad(total, one)
    rows = features.expand(n, -1).clone().requires_grad_()
    value = f(q(rows).rsample(particles))
    (estimates,) = torch.autograd.grad(value.sum(), rows)
    assert z_score(estimates / max(1, math.prod(particles)), exact).max() < 4.5
    assert z_score(value.detach().flatten(), total.detach()) < 4.5


def test_a_mixture_whose_components_coincide_has_gradients():
    features = torch.zeros(4, 3 * 5, requires_grad=True)
    z = pv.MixturePosterior(nn.Identity(), EVENT, 3).latent_distribution(features).rsample((2,))
    (gradient,) = torch.autograd.grad(z.square().sum(), features)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("name", NORMALS)
def test_the_closed_form_kl(name):
    """With a decoder that ignores z the bound is a constant less the KL, which has a formula; sampled, it is its mean."""
    vae = pv.mlp_vae((3,), latent_dim=2, hidden_dims=(4,), likelihood="gaussian").double()
    vae.posterior = build(name, event_shape=(3,))
    for parameter in vae.likelihood.decoder.parameters():
        parameter.data.zero_()
    x = torch.randn(5, 3, dtype=torch.float64)
    with torch.no_grad():
        q = vae.posterior(x)
        z = q.sample((5000,))
        centred = z - z.mean(0)
        covariance = (
            torch.diag_embed(q.variance)
            if name == "diagonal"
            else q.covariance_matrix  # which the tests above compare with the features
        )
        assert (z_score(centred.prod(-1), covariance[:, 0, 1]) < 4.5).all()
        trace, logdet = covariance.diagonal(dim1=-2, dim2=-1).sum(-1), covariance.logdet()
        kl = 0.5 * (trace + q.mean.square().sum(-1) - 2 - logdet)
        constant = vae.likelihood(torch.zeros(5, 2, dtype=torch.float64)).log_prob(x)
        closed = pv.ELBO().bound(vae.model, vae.guide, x)
        torch.testing.assert_close(closed, constant - kl)
        sampled = pv.ELBO(1, "monte_carlo").bound(vae.model, vae.guide, x.repeat(4000, 1)).reshape(-1, 5)
    assert (z_score(sampled, constant - kl) < 4.5).all()


@pytest.mark.parametrize("name", ["mixture", *FLOWS])
def test_no_closed_form_kl(name):
    vae = pv.mlp_vae(EVENT, latent_dim=2, hidden_dims=(4,), likelihood="gaussian").double()
    vae.posterior = build(name)
    with pytest.raises(pv.NoClosedFormError, match=r"no closed form at site 'z'.*Use kl='monte_carlo'"):
        pv.ELBO().loss(vae.model, vae.guide, data(5))
    assert math.isfinite(pv.ELBO(1, "monte_carlo").loss(vae.model, vae.guide, data(5)))


@pytest.mark.parametrize(
    "posterior", [pv.FullNormal, pv.LowRankNormal, pv.MixturePosterior, pv.FlowPosterior], ids=lambda p: p.__name__
)
def test_a_vae_with_it_learns(posterior):
    """Also by its class alone: every parameter moves, and the bound rises."""
    vae = pv.mlp_vae((4,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian", posterior=posterior)
    before = {name: value.detach().clone() for name, value in vae.named_parameters()}
    x = torch.randn(128, 1) * torch.tensor([2.0, -2.0, 1.0, 0.0])
    history = pv.fit(vae.model, vae.guide, x, pv.ELBO(1, "monte_carlo"), epochs=6, batch_size=16, lr=2e-2)
    assert history.train_bound.iloc[-1] > history.train_bound.iloc[0] + 0.5
    assert all((before[name] != value).any() for name, value in vae.named_parameters())


def test_an_unconditional_posterior_is_one_for_all_data():
    posterior = pv.Unconditional(2, EVENT).double()
    posterior.loc.data.normal_()
    posterior.log_scale.data.normal_()
    z = torch.randn(4, 5, 2, dtype=torch.float64)
    expected = dist.Normal(posterior.loc, posterior.log_scale.exp()).log_prob(z).sum(-1)
    torch.testing.assert_close(posterior(data(4, 5)).log_prob(z), expected)
    assert posterior(data()).batch_shape == ()
    vae = pv.VAE(
        prior=pv.StandardNormal(2), likelihood=pv.Gaussian(mlp(2, [4], 4), EVENT), posterior=posterior
    ).double()
    x = data(64)
    torch.testing.assert_close(vae.embed(x), posterior.loc.detach().expand(64, 2))
    pv.fit(vae.model, vae.guide, x, pv.ELBO(), epochs=30, batch_size=64, lr=5e-2)
    aggregate = pv.decompose_elbo(vae.model, vae.guide, x, num_samples=20, seed=0)
    assert abs(aggregate.mutual_information.value) < 1e-6


WRONG = {
    "diagonal": (lambda n: pv.DiagonalNormal(mlp(4, [], n), EVENT), 5, "encoder with 2 Z outputs.*got 5"),
    "full": (
        lambda n: pv.FullNormal(mlp(4, [], n), EVENT),
        4,
        r"Z \(Z \+ 3\) / 2 outputs, got 4\. With Z = 2, say, give it 5",
    ),
    "low rank": (lambda n: pv.LowRankNormal(mlp(4, [], n), EVENT, rank=1), 7, "encoder with 3 Z outputs.*got 7"),
    "mixture": (
        lambda n: pv.MixturePosterior(mlp(4, [], n), EVENT, 3),
        14,
        r"encoder with 3 \(2 Z \+ 1\) outputs.*got 14",
    ),
    "mixture without latents": (
        lambda n: pv.MixturePosterior(mlp(4, [], n), EVENT, 3),
        3,
        r"encoder with 3 \(2 Z \+ 1\) outputs.*got 3\.",
    ),
    "flow": (
        lambda n: pv.FlowPosterior(mlp(4, [], n), EVENT, 2),
        4,
        "encoder with 6 outputs, 2 means, as many log scales and a context of 2, got 4",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_encoder_with_the_wrong_number_of_outputs(name):
    make, outputs, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        make(outputs)(torch.randn(5, *EVENT))


@pytest.mark.parametrize("name", FAMILIES)
def test_features_for_is_what_it_takes(name):
    family, options = FAMILIES[name]
    posterior = build(name, 4)
    number = family.features_for(4, **options)
    assert posterior.latent_distribution(torch.randn(5, number, dtype=torch.float64)).event_shape == (4,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latent_dim": 1}, r"at least 2 latent dimensions.*latent_dim=1.*use DiagonalNormal"),
        ({"latent_dim": 2, "flow": "planar"}, r"flow of kind 'iaf', 'spline', 'coupling', got 'planar'"),
        ({"latent_dim": 2, "length": 0}, r"1 transform.*length=0"),
        ({"latent_dim": 9, "hidden_dims": (8,)}, r"no narrower than the latent.*hidden_dims=\(8,\)"),
        ({"latent_dim": 2, "hidden_dims": ()}, r"hidden_dims=\(\)"),
    ],
)
def test_a_flow_that_there_is_not(arguments, message):
    with pytest.raises(ValueError, match=message):
        pv.FlowPosterior(mlp(4, [8], 6), EVENT, **arguments)
    if "flow" not in arguments:
        with pytest.raises(ValueError, match=message):
            pv.FlowPrior(**arguments)


def test_a_posterior_of_ones_own():
    class Laplace(pv.Posterior):
        @classmethod
        def features_for(cls, latent_dim, **options):
            return 2 * latent_dim

        def latent_distribution(self, features):
            loc, log_scale = features.chunk(2, -1)
            return dist.Laplace(loc, log_scale.exp()).to_event(1)

    vae = pv.mlp_vae((4,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian", posterior=Laplace)
    x = torch.randn(6, 4)
    svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), loss=pv.ELBO(1, "monte_carlo"))
    assert math.isfinite(svi.step(x))
    torch.testing.assert_close(vae.embed(x), vae.posterior(x).mean)
