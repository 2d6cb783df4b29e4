"""pv.inference_gaps against closed forms on linear-Gaussian programs."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.programs import LinearGaussian

import pyro_vae as pv


def mean_field(program, *, shift=0.0, factor=1.0):
    """The best normal with independent dimensions, with shifted means and scaled standard deviations."""
    precision = torch.linalg.inv(program.L @ program.L.T)
    scale = factor * precision.diagonal().rsqrt()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ program.A.T + program.c + shift, scale).to_event(1))

    return guide, scale


def correlated(size, strength=0.4, seed=0):
    """A program with a correlated posterior, weak enough that a mean-field guide's weights have finite variance."""
    program = LinearGaussian(*size, seed=seed)
    return LinearGaussianWith(program, strength)


class LinearGaussianWith(LinearGaussian):
    """The program with smaller weights and the posterior for them."""

    def __init__(self, program, strength):
        vars(self).update(vars(program))
        self.W = strength * program.W
        eye = torch.eye(self.W.shape[1], dtype=torch.float64)
        covariance = torch.linalg.inv(eye + self.W.T @ self.W / self.sigma**2)
        self.A = covariance @ self.W.T / self.sigma**2
        self.c = -self.A @ self.b
        self.L = torch.linalg.cholesky(covariance)


def test_a_refined_guide_has_no_amortisation_gap():
    """log p(x) is exact, and the gap of the mixture is its own KL, estimated from other draws."""
    program = correlated((5, 2, 40))
    guide, _ = mean_field(program, shift=0.3, factor=1.4)
    refined = pv.refine(program.model, guide, program.x, num_steps=100, seed=0, progress=False)
    gaps = pv.inference_gaps(program.model, refined, program.x, 2000, seed=1, progress=False)
    assert (gaps.amortisation.value, gaps.amortisation.standard_error) == (0.0, 0.0)
    weights = pv.log_weights(program.model, refined, program.x, num_particles=4000)
    kl = program.log_evidence().mean() - weights.mean()
    error = math.hypot(weights.std(0).mean() / 4000**0.5, weights.std(0).mean() / 2000**0.5) / 40**0.5
    assert abs(gaps.total.value - kl) < 4.5 * error
    assert gaps.total.value > 0


def gap_of_mean_field(program):
    precision = torch.linalg.inv(program.L @ program.L.T)
    return 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision)).item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "seed"),
    [((5, 2, 100), 0), ((6, 3, 100), 1), ((8, 4, 80), 2)],
)
def test_mean_field_gaps(size, seed):
    program = correlated(size, seed=seed)
    exact = gap_of_mean_field(program)
    guide, scale = mean_field(program, shift=0.3, factor=1.4)
    gaps = pv.inference_gaps(program.model, guide, program.x, 1000, num_steps=600, seed=0)
    assert abs(gaps.approximation.value - exact) < 4 * gaps.approximation.standard_error
    best = mean_field(program)[1]
    loss = program.W.T @ program.W / program.sigma**2 + torch.eye(size[1], dtype=torch.float64)
    shift = torch.full_like(scale, 0.3)
    # The ELBO is quadratic in the means, and in the standard deviations up to their logarithm.
    amortisation = (
        0.5 * shift @ loss @ shift + (0.5 * loss.diagonal() * (scale**2 - best**2) - (scale / best).log()).sum()
    )
    assert abs(gaps.amortisation.value - amortisation) < 4 * gaps.amortisation.standard_error
    assert gaps.total.value == pytest.approx(gaps.approximation.value + gaps.amortisation.value)
    assert "approximation" in str(gaps)


@pytest.mark.slow
def test_exact_encoder_has_no_amortisation_gap():
    program = LinearGaussian(5, 3, 50)
    gaps = pv.inference_gaps(program.model, program.guide, program.x, 200, num_steps=200, seed=0)
    for estimate in (gaps.approximation, gaps.amortisation):
        assert abs(estimate.value) < 4 * estimate.standard_error + 1e-5
    program = correlated((5, 3, 100))
    gaps = pv.inference_gaps(program.model, mean_field(program)[0], program.x, 500, num_steps=600, seed=0)
    assert abs(gaps.amortisation.value) < 4 * gaps.amortisation.standard_error + 1e-4
    assert abs(gaps.approximation.value - gap_of_mean_field(program)) < 4 * gaps.approximation.standard_error


def test_a_better_log_likelihood_takes_its_place():
    program = correlated((5, 2, 20))
    better = pv.log_likelihood(program.model, program.guide, program.x, 2)
    gaps = pv.inference_gaps(
        program.model, mean_field(program)[0], program.x, 100, num_steps=20, log_likelihood=better, seed=0
    )
    assert torch.equal(gaps.log_likelihood, better.per_datum)


@pytest.mark.slow
def test_families_other_than_normal():
    """A log-normal guide of a positive latent and a multivariate normal guide both reach the posterior."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.log(), 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(torch.zeros_like(x), 1.0))

    x = torch.linspace(-1, 1, 20, dtype=torch.float64)
    gaps = pv.inference_gaps(model, guide, x, 500, num_steps=400, lr=0.05, seed=0)
    exact = dist.Normal(torch.zeros_like(x), 1.25**0.5).log_prob(x)
    torch.testing.assert_close(gaps.best_elbo, exact, rtol=0, atol=1e-3)

    program = LinearGaussian(4, 2, 20, wrong=True)
    gaps = pv.inference_gaps(program.model, program.guide, program.x, 500, num_steps=600, lr=0.05, seed=0)
    assert gaps.amortisation.value > 0.5
    assert abs(gaps.approximation.value) < 5e-3


def test_refusals_of_guides():
    x = torch.zeros(4, dtype=torch.float64)

    def two(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def chained(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x, 1.0))
            pyro.sample("b", dist.Normal(a, 1.0))

    with pytest.raises(ValueError, match="guide site 'b' depends on another site's sample"):
        pv.inference_gaps(two, chained, x, 10)

    def one(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def flow(x):
        with pyro.plate("data", len(x)):
            pyro.sample(
                "z", dist.TransformedDistribution(dist.Normal(x, 1.0), [dist.transforms.AffineTransform(0.0, 2.0)])
            )

    with pytest.raises(ValueError, match="guide site 'z' has a distribution whose parameters are not known"):
        pv.inference_gaps(one, flow, x, 10)

    def unit(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def uniform(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(0 * x, 1.0))

    with pytest.raises(ValueError, match=r"whose parameters are not known \(Uniform\)"):
        pv.inference_gaps(unit, uniform, x, 10)
    program = LinearGaussian(2, 1, 4)
    other = pv.log_likelihood(program.model, program.guide, program.x[:3], 5)
    for settings, match in (
        ({"num_samples": 1}, "num_samples to be an integer, at least 2"),
        ({"num_steps": 0}, "num_steps"),
        ({"lr": 0.0}, "positive lr"),
        ({"log_likelihood": other}, "of the same data, got 3 of them for 4 data"),
    ):
        with pytest.raises(ValueError, match=match):
            pv.inference_gaps(program.model, program.guide, program.x, **settings)


def test_where_the_search_fails_nothing_is_lost():
    """Where Adam improves nothing, the encoder's own guide is the best one, for the ELBO and for log p(x)."""
    program = LinearGaussian(4, 2, 30)
    gaps = pv.inference_gaps(program.model, program.guide, program.x, 100, num_steps=2, lr=1.0, seed=0)
    torch.testing.assert_close(gaps.log_likelihood, program.log_evidence(), rtol=0, atol=1e-6)
    assert abs(gaps.total.value) < 1e-6


def test_a_pair_s_own_normals_have_free_parameters():
    """Whose scales are refused where float32 has few digits of them."""
    pyro.set_rng_seed(0)
    vae = pv.mlp_vae((4,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
    gaps = pv.inference_gaps(vae, torch.randn(20, 4), 100, num_steps=100, seed=0, progress=False)
    assert gaps.amortisation.value > 4 * gaps.amortisation.standard_error
    assert gaps.best_elbo.isfinite().all()


class WithoutExpand(dist.TorchDistribution):
    """A normal of one's own, which a plate expands by a wrapper."""

    arg_constraints = dist.Normal.arg_constraints
    support = dist.Normal.support
    has_rsample = True

    def __init__(self, loc, scale, validate_args=None):
        self.loc, self.scale = torch.distributions.utils.broadcast_all(loc, scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def rsample(self, sample_shape=()):
        shape = self.shape(sample_shape)
        return self.loc + self.scale * torch.randn(shape, dtype=self.loc.dtype)

    def log_prob(self, value):
        return dist.Normal(self.loc, self.scale).log_prob(value)


@pytest.mark.parametrize(("shared", "vectorize"), [(True, True), (True, False), (False, True)])
def test_a_family_without_an_expand_has_free_parameters_for_each_datum(shared, vectorize):
    """The guide has the posterior's family; its own normal is shared by all data, or has another mean."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        loc = x.new_zeros(()) if shared else x
        with pyro.plate("data", len(x)):
            pyro.sample("z", WithoutExpand(loc, 0.8))

    x = torch.linspace(-2, 2, 10, dtype=torch.float64)
    settings = {"vectorize_particles": vectorize, "seed": 1, "progress": False}
    gaps = pv.inference_gaps(model, guide, x, 100, num_steps=50, lr=0.2, **settings)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x)
    # After few steps; with one parameter for all data, the first datum would be off by 1.
    torch.testing.assert_close(gaps.best_elbo, exact, rtol=0, atol=0.1)
    own = dist.Normal(0.0 * x if shared else x, 0.8)
    kl = torch.distributions.kl_divergence(own, dist.Normal(x / 2, 0.5**0.5))
    # The log-weight of a sample is log p(x) - log q(z) + log p(z|x), linear and quadratic in its noise.
    slope, curve = 2 * (own.loc - x / 2) * 0.8, 0.5 - 0.8**2
    assert (((gaps.elbo - exact + kl) / ((slope**2 + 2 * curve**2) / 100).sqrt()).abs() < 4).all()


def test_scales_change_no_gap():
    """Log p(x) has no scale, as in pv.log_likelihood: with a scale at one site, the gaps are those without it."""
    program = LinearGaussian(3, 2, 20, wrong=True)

    def scaled(x):
        with pyro.poutine.scale(scale=0.1):
            program.model(x)

    first, second = (
        pv.inference_gaps(model, program.guide, program.x, 100, num_steps=100, seed=0, progress=False)
        for model in (program.model, scaled)
    )
    assert torch.equal(first.best_elbo, second.best_elbo)
    assert torch.equal(first.log_likelihood, second.log_likelihood)


class Floored(dist.Normal):
    """A family with an argument that is no parameter of its density's constraints."""

    def __init__(self, loc, scale, floor=0.0):
        self.floor = floor
        super().__init__(loc, scale.clamp(min=floor))

    def expand(self, batch_shape, _instance=None):
        return Floored(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.floor)


@pytest.mark.parametrize("floor", [0.0, 1.0])
def test_a_family_whose_constructor_takes_more_than_its_parameters(floor):
    """To rebuild it without a floor would free its scale."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Floored(x / 2, torch.full_like(x, 0.5**0.5), floor))

    x = torch.randn(8, generator=torch.Generator().manual_seed(0))
    if floor:
        with pytest.raises(pv.PyroVAEError, match=r"whose parameters are not known \(Floored\)"):
            pv.inference_gaps(model, guide, x, num_steps=5, seed=0, progress=False)
        table = pv.active_units(model, guide, x, 100, vectorize_particles=False, seed=0)
        assert table["kl"].isna().all()
    else:
        gaps = pv.inference_gaps(model, guide, x, num_steps=5, seed=0, progress=False)
        torch.testing.assert_close(
            gaps.elbo, gaps.log_likelihood, rtol=0, atol=2e-3
        )  # the posterior; five steps move it


def test_a_continuous_bernoulli_is_rebuilt():
    """PyTorch keeps an argument of its constructor under another name. The guide is the posterior."""

    def program(observe):
        def body(x):
            with pyro.plate("data", len(x)):
                rate = torch.full_like(x, 0.5 if observe else 0.7)
                z = pyro.sample("z", dist.ContinuousBernoulli(rate))
                if observe:
                    pyro.factor("x", z * math.log(0.7 / 0.3))

        return body

    parts, x = (program(True), program(False)), torch.zeros(5)
    gaps = pv.inference_gaps(*parts, x, 1000, num_steps=5, lr=1e-3, seed=0, progress=False)
    torch.testing.assert_close(gaps.elbo, gaps.log_likelihood, rtol=0, atol=1e-3)
    tables = [pv.active_units(*parts, x, 100, vectorize_particles=each, seed=0) for each in (True, False)]
    assert tables[1]["kl"].item() == pytest.approx(tables[0]["kl"].item(), abs=1e-5)


class Unconstrained(dist.TorchDistribution):
    """A user's normal that names no constraints of its parameters."""

    support, has_rsample = dist.constraints.real, True

    def __init__(self, loc, scale):
        self.loc, self.scale = torch.broadcast_tensors(loc, torch.as_tensor(scale))
        super().__init__(self.loc.shape, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Unconstrained(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    def rsample(self, sample_shape=()):
        return self.loc + self.scale * torch.randn(*sample_shape, *self.loc.shape)

    sample = rsample

    def log_prob(self, value):
        return dist.Normal(self.loc, self.scale).log_prob(value)


def test_a_family_without_constraints():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 2.0)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Unconstrained(0.8 * x, 0.9))

    x = torch.randn(8, generator=torch.Generator().manual_seed(0))
    assert math.isfinite(pv.decompose_elbo(model, guide, x, 20, seed=0, progress=False).elbo.value)
    with pytest.raises(pv.PyroVAEError, match=r"whose parameters are not known \(Unconstrained\)"):
        pv.inference_gaps(model, guide, x, num_steps=5, progress=False)
    assert pv.active_units(model, guide, x, 20, vectorize_particles=False, seed=0)["kl"].isna().all()
