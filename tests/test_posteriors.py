"""Every posterior is a normalised density with the documented parameters, samples, gradients and KL."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.programs import z_score
from torch import nn
from torch.distributions import ComposeTransform

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
# Tolerances for the integral of the density on a grid. Densities of flows have kinks, and splines have many.
TOLERANCE = dict.fromkeys(NORMALS, 1e-6) | {"spline": 5e-3}
every = pytest.mark.parametrize("name", FAMILIES)
EVENT = (2, 2)


def build(name, latent_dim=2, given=0, event_shape=EVENT):
    """A posterior with random weights, in float64 while PyTorch's default type stays float32."""
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
    """A posterior whose encoder returns these features for any x."""

    class Constant(nn.Module):
        def forward(self, x):
            return features.expand(len(x), -1)

    arguments = (EVENT,) if latent_dim is None else (EVENT, latent_dim)
    return family(Constant(), *arguments, **options)


def grid_around(q, points=301):
    """A grid over two dimensions, denser around the mean of a distribution, and the areas of its cells."""
    z = q.sample((4000,)).reshape(-1, 2)
    t = torch.linspace(-3.7, 3.7, points, dtype=z.dtype)
    axes, widths = z.mean(0)[:, None] + z.std(0)[:, None] * t.sinh(), z.std(0)[:, None] * t.cosh() * (t[1] - t[0])
    return torch.cartesian_prod(*axes), torch.cartesian_prod(*widths).prod(-1)


@every
def test_shapes_with_any_batch(name):
    posterior = build(name, 3)
    for batch in ((), (5,), (4, 5)):
        x = data(*batch)
        q = posterior(x)
        assert q.batch_shape == batch
        assert q.event_shape == (3,)
        assert q.has_rsample
        z = q.rsample()
        assert z.shape == q.rsample().shape == (*batch, 3)
        assert z.dtype == q.log_prob(z).dtype == torch.float64
        assert q.log_prob(z).shape == batch
        assert q.rsample((7,)).shape == (7, *batch, 3)
        assert q.log_prob(torch.randn(7, *batch, 3, dtype=torch.float64)).shape == (7, *batch)
        assert posterior.embed(x).shape == (*batch, 3)
        assert not q.sample().requires_grad


@every
def test_conditions_differ_between_data_and_particles(name):
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


@every
def test_the_density_integrates_to_one_with_the_moments_of_the_samples(name):
    q = build(name)(data())
    grid, cell = grid_around(q)
    with torch.no_grad():
        mass = q.log_prob(grid).exp() * cell
    assert mass.sum().item() == pytest.approx(1, abs=TOLERANCE.get(name, 3e-4))
    z = q.sample((20_000,))
    moments = [lambda t: t, lambda t: t.square(), lambda t: t.prod(-1, keepdim=True), lambda t: (t > 0.2).double()]
    for moment in moments:
        exact = (mass[:, None] * moment(grid)).sum(0) / mass.sum()
        slack = 0.01 if moment is moments[-1] else 0.0  # a grid integrates a step function badly
        assert (z_score(moment(z), exact) - slack / (moment(z).std(0) / len(z) ** 0.5) < 4.5).all()


@pytest.mark.parametrize("name", [*NORMALS, "mixture"])
def test_embed_is_the_mean(name):
    posterior, x = build(name), data()
    q = posterior(x)
    grid, cell = grid_around(q)
    mean = (q.log_prob(grid).exp()[:, None] * grid * cell[:, None]).sum(0)
    torch.testing.assert_close(posterior.embed(x), mean, rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("latent_dim", [1, 2])
@pytest.mark.parametrize("particles", [(), (5,)])
@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_the_pathwise_gradient_of_a_mixture_is_exact(latent_dim, particles, spread):
    """In logits, means and scales. The gradient of Pyro's class is biased in the logits."""
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
    """With a decoder that ignores z, the bound is a constant minus the KL. The sampled bound has the same mean."""
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
            else q.covariance_matrix  # the tests above compare it with the features
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
def test_a_vae_with_each_posterior_learns(posterior):
    """Every parameter moves, and the bound rises."""
    vae = pv.mlp_vae((4,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian", posterior=posterior)
    before = {name: value.detach().clone() for name, value in vae.named_parameters()}
    x = torch.randn(128, 1) * torch.tensor([2.0, -2.0, 1.0, 0.0])
    history = pv.fit(vae.model, vae.guide, x, pv.ELBO(1, "monte_carlo"), epochs=6, batch_size=16, lr=2e-2)
    assert history.train_bound.iloc[-1] > history.train_bound.iloc[0] + 0.5
    assert all((before[name] != value).any() for name, value in vae.named_parameters())


def test_an_unconditional_posterior_is_the_same_for_all_data():
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
    "diagonal": (
        lambda n: pv.DiagonalNormal(mlp(4, [], n), EVENT),
        5,
        r"encoder with 2 Z outputs \(Z means, then Z log scales\), got 5\. Change its last layer",
    ),
    "full": (
        lambda n: pv.FullNormal(mlp(4, [], n), EVENT),
        4,
        r"Z \(Z \+ 3\) / 2 outputs, got 4\. For Z = 2, use 5 outputs",
    ),
    "low rank": (
        lambda n: pv.LowRankNormal(mlp(4, [], n), EVENT, rank=1),
        7,
        r"encoder with 3 Z outputs \(Z means, Z log scales and 1 columns of length Z\), got 7",
    ),
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
        r"encoder with 6 outputs \(2 means, 2 log scales and a context of length 2\), got 4",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_encoder_with_the_wrong_number_of_outputs(name):
    make, outputs, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        make(outputs)(torch.randn(5, *EVENT))


@pytest.mark.parametrize("name", FAMILIES)
def test_features_for_is_the_number_of_encoder_outputs(name):
    family, options = FAMILIES[name]
    posterior = build(name, 4)
    number = family.features_for(4, **options)
    assert posterior.latent_distribution(torch.randn(5, number, dtype=torch.float64)).event_shape == (4,)


def test_a_posterior_of_the_user():
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


@pytest.mark.slow
@every
def test_pv_testing_accepts_each_posterior(name, without_inductor):
    family, options = FAMILIES[name]
    options = {"hidden_dims": (8,), **options} if name in FLOWS else options
    pv.testing.check_posterior(family, compiled=name != "spline", **options)


@pytest.mark.parametrize("log_scale", [-90.0, 89.0])
@pytest.mark.parametrize("family", [pv.DiagonalNormal, pv.MixturePosterior])
def test_a_scale_that_has_few_digits_in_float32_is_refused(family, log_scale):
    """At e^-90 a log-density was off by up to 0.06 nats, or NaN."""
    posterior = family(nn.Identity(), (1,))
    features = torch.full((1, family.features_for(2)), log_scale)
    with pytest.raises(ValueError, match="to satisfy the constraint"):
        posterior.latent_distribution(features)


def test_a_low_rank_variance_that_has_few_digits_in_float32_is_refused():
    posterior, log_scale = pv.LowRankNormal(nn.Identity(), (1,), rank=1), torch.tensor([0.0, -46.0])
    normal = posterior.latent_distribution(torch.cat([torch.zeros(2), log_scale, torch.ones(2)]))
    with pytest.raises(pv.PyroVAEError, match=r"expected variances between 1.2e-38 and 3.4e\+38, got 1.1e-40 to 1, of"):
        normal.log_prob(torch.zeros(2))


@pytest.mark.parametrize("shift", [-1.0, -15.0, 10.0])
@pytest.mark.parametrize("flow", ["coupling", "iaf", "spline"])
def test_a_flow_knows_the_density_of_its_samples_in_float32(flow, shift):
    """Within 1e-3 nats for 1,000 latents and 1e-5 of the density, against float64 at the same noise."""
    latent_dim = 10
    posterior = pv.FlowPosterior(nn.Identity(), (1,), latent_dim, flow)
    features = torch.randn(20, 3 * latent_dim)
    features[:, latent_dim : 2 * latent_dim] += shift
    narrow = posterior.latent_distribution(features)
    z = narrow.rsample()
    found, noise = narrow.log_prob(z).double(), z
    for transform in reversed(narrow.transforms):
        noise = transform.inv(noise)  # which the transform remembers
    wide = posterior.double().latent_distribution(features.double())
    exact = wide.log_prob(ComposeTransform(wide.transforms)(noise.double()))
    assert ((found - exact).abs() <= 1e-6 * latent_dim + 1e-5 * exact.abs()).all()
