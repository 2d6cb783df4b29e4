"""pv.inference_gaps, pv.decompose_elbo and pv.active_units against closed forms on linear-Gaussian programs."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.programs import LinearGaussian
from torch.distributions import kl_divergence

import pyro_vae as pv


def mean_field(program, *, shift=0.0, factor=1.0):
    """The best normal with independent dimensions, its means moved and its deviations stretched."""
    precision = torch.linalg.inv(program.L @ program.L.T)
    scale = factor * precision.diagonal().rsqrt()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ program.A.T + program.c + shift, scale).to_event(1))

    return guide, scale


def correlated(size, strength=0.4, seed=0):
    """A program whose posterior is correlated, but not so much that a mean-field guide's weights have no variance."""
    program = LinearGaussian(*size, seed=seed)
    return LinearGaussianWith(program, strength)


class LinearGaussianWith(LinearGaussian):
    """The program with weaker weights, and the posterior that goes with them."""

    def __init__(self, program, strength):
        vars(self).update(vars(program))
        self.W = strength * program.W
        eye = torch.eye(self.W.shape[1], dtype=torch.float64)
        covariance = torch.linalg.inv(eye + self.W.T @ self.W / self.sigma**2)
        self.A = covariance @ self.W.T / self.sigma**2
        self.c = -self.A @ self.b
        self.L = torch.linalg.cholesky(covariance)


def gap_of_mean_field(program):
    precision = torch.linalg.inv(program.L @ program.L.T)
    return 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision)).item()


@pytest.mark.parametrize(("size", "seed"), [((5, 2, 100), 0), ((6, 3, 100), 1), ((8, 4, 80), 2)])
def test_mean_field_gaps(size, seed):
    program = correlated(size, seed=seed)
    exact = gap_of_mean_field(program)
    guide, scale = mean_field(program, shift=0.3, factor=1.4)
    gaps = pv.inference_gaps(program.model, guide, program.x, 1000, num_steps=600, seed=0)
    assert abs(gaps.approximation.value - exact) < 4 * gaps.approximation.standard_error
    best = mean_field(program)[1]
    loss = program.W.T @ program.W / program.sigma**2 + torch.eye(size[1], dtype=torch.float64)
    shift = torch.full_like(scale, 0.3)
    # ELBO is quadratic in the mean, and in the deviations apart from their logarithm.
    amortisation = (
        0.5 * shift @ loss @ shift + (0.5 * loss.diagonal() * (scale**2 - best**2) - (scale / best).log()).sum()
    )
    assert abs(gaps.amortisation.value - amortisation) < 4 * gaps.amortisation.standard_error
    assert gaps.total.value == pytest.approx(gaps.approximation.value + gaps.amortisation.value)
    assert "approximation" in str(gaps)


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


def test_families_other_than_normal():
    """A LogNormal guide of a positive latent, and a multivariate normal: both reach the posterior's neighbourhood."""

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


def mixture_log_prob(components, z):
    """log q(z) of z (S, N, D) under the mixture of N components, by brute force."""
    each = torch.stack([c.log_prob(z) for c in components])
    return each.logsumexp(0) - math.log(len(components))


@pytest.mark.parametrize("full", [False, True])
def test_decomposition_is_that_of_the_mixture(full):
    """Against many samples of the mixture written out; and its parts add up to the exact ELBO."""
    program = LinearGaussian(4, 2, 25, wrong=True)
    loc = program.x @ program.A.T + program.c
    scale = program.L.diagonal() if not full else None
    if full:
        guide, components = program.guide, [dist.MultivariateNormal(m, scale_tril=program.L.tril()) for m in loc]
        deviations = (program.L.tril() @ program.L.tril().T).diagonal().sqrt()
    else:
        deviations = scale
        components = [dist.Normal(m, scale).to_event(1) for m in loc]

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x @ program.A.T + program.c, scale).to_event(1))

    parts = pv.decompose_elbo(program.model, guide, program.x, 100, seed=0)
    z = torch.stack([c.sample((4000,)) for c in components], 1)
    own = torch.stack([c.log_prob(z[:, n]) for n, c in enumerate(components)], 1)
    mixed = mixture_log_prob(components, z)
    prior = dist.Normal(0.0, 1.0).log_prob(z)
    each = torch.stack([dist.Normal(m, deviations).log_prob(z) for m in loc]).logsumexp(0) - math.log(25)
    likelihood = dist.Normal(z @ program.W.T + program.b, program.sigma).log_prob(program.x).sum(-1)
    for estimate, values in (
        (parts.mutual_information, own - mixed),
        (parts.marginal_kl, mixed - prior.sum(-1)),
        (parts.dimension_wise_kl, (each - prior).sum(-1)),
        (parts.reconstruction, likelihood),
    ):
        reference = values.mean(0).mean().item()
        noise = math.sqrt((values.var(0) / 4000).sum()) / 25
        assert abs(estimate.value - reference) < 4 * math.hypot(estimate.standard_error, noise)
        # the error bar is that of the strata
        assert estimate.standard_error == pytest.approx(noise * math.sqrt(40), rel=0.15)
    total = parts.reconstruction.value - parts.mutual_information.value - parts.marginal_kl.value
    assert total == pytest.approx(parts.elbo.value)
    if full:
        assert abs(parts.elbo.value - program.exact_elbo().mean().item()) < 4 * parts.elbo.standard_error


def test_decomposition_at_its_ends():
    """A guide that ignores x has no information; one whose components lie far apart has all of it, log N."""
    program = LinearGaussian(3, 2, 16)

    def blind(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))

    parts = pv.decompose_elbo(program.model, blind, program.x)
    for estimate in (parts.mutual_information, parts.marginal_kl, parts.dimension_wise_kl):
        assert abs(estimate.value) < 1e-12

    def far(x):
        with pyro.plate("data", len(x)):
            places = 1e3 * torch.arange(float(len(x)), dtype=torch.float64)[:, None].expand(-1, 2)
            pyro.sample("z", dist.Normal(places, 1.0).to_event(1))

    parts = pv.decompose_elbo(program.model, far, program.x)
    assert parts.mutual_information.value == pytest.approx(math.log(16))


def test_decomposition_in_pieces_and_of_several_sites(monkeypatch):
    from pyro_vae.evaluation import decomposition, pieces

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            b = pyro.sample("b", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(a + b.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(0.3 * x, 0.8))
            pyro.sample("b", dist.Normal(torch.stack([x, -x], -1) / 3, 0.6).to_event(1))

    x = torch.randn(23, dtype=torch.float64)
    whole = pv.decompose_elbo(model, guide, x, 60, seed=0)
    monkeypatch.setattr(decomposition, "DENSITIES_AT_ONCE", 100)
    monkeypatch.setattr(decomposition, "DATA_AT_ONCE", 5)
    monkeypatch.setattr(pieces, "ELEMENTS_AT_ONCE", 200)
    in_pieces = pv.decompose_elbo(model, guide, x, 60, seed=1)
    for name in ("elbo", "reconstruction", "mutual_information", "marginal_kl", "dimension_wise_kl"):
        first, second = getattr(whole, name), getattr(in_pieces, name)
        assert abs(first.value - second.value) < 4 * math.hypot(first.standard_error, second.standard_error)

    def chained(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.3 * x, 0.8))
            pyro.sample("b", dist.Normal(torch.stack([a, -x.expand(a.shape)], -1) / 3, 0.6).to_event(1))

    monkeypatch.undo()
    parts = pv.decompose_elbo(model, chained, x, 10)
    assert parts.dimension_wise_kl is None
    assert "dimension-wise unknown" in str(parts)
    with pytest.raises(ValueError, match="num_samples to be an integer, at least 2"):
        pv.decompose_elbo(model, guide, x, 1)


def test_active_units_and_their_kl():
    program = LinearGaussian(4, 3, 500, wrong=True)
    loc = program.x @ program.A.T + program.c
    keep = torch.tensor([1.0, 0.05, 0.0], dtype=torch.float64)
    scale = torch.tensor([0.5, 0.9, 1.0], dtype=torch.float64)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(keep * (x @ program.A.T + program.c), scale).to_event(1))

    table = pv.active_units(program.model, guide, program.x)
    assert table.index.tolist() == [("z", 0), ("z", 1), ("z", 2)]
    variance = (keep * loc).var(0)
    assert table.variance.tolist() == pytest.approx(variance.tolist())
    kl = kl_divergence(dist.Normal(keep * loc, scale), dist.Normal(0.0, 1.0))
    assert table.kl.tolist() == pytest.approx(kl.mean(0).tolist(), abs=1e-12)
    assert table.kl_se.tolist() == pytest.approx((kl.std(0) / math.sqrt(500)).tolist(), abs=1e-12)
    assert table.active.tolist() == [True, variance[1].item() > 0.01, False]
    # normal data: the variance of a variance is 2 v^2 / N
    assert table.variance_se.iloc[0] == pytest.approx(variance[0].item() * math.sqrt(2 / 500), rel=0.2)
    assert pv.active_units(program.model, guide, program.x, threshold=1e-9).active.tolist() == [True, True, False]
    with pytest.raises(ValueError, match="threshold of at least 0"):
        pv.active_units(program.model, guide, program.x, threshold=-1.0)


def test_active_units_where_means_are_sampled():
    """A site that follows another's sample, and collapses: the noise of its sampled mean is not taken for activity."""

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("b", dist.Normal(a, 1.0))

    x = torch.randn(2000, dtype=torch.float64)
    table = pv.active_units(model, guide, x, 4, seed=0)
    assert table.active.tolist() == [False, False]
    assert abs(table.variance["b", 0]) < 4 * 0.25 * math.sqrt(2 / 2000)
    assert table.kl.tolist() == [0.0, 0.0]


def test_active_units_of_families_without_a_mean_in_closed_form():
    """A transformed normal, whose mean is that of its samples, and a categorical, whose mean torch calls NaN."""

    def model(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros((), dtype=torch.float64), 1.0)
            s = pyro.sample("s", dist.TransformedDistribution(base, [dist.transforms.SigmoidTransform()]))
            c = pyro.sample("c", dist.Categorical(torch.ones(2, dtype=torch.float64)))
            pyro.sample("x", dist.Normal(s + c, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("s", dist.TransformedDistribution(dist.Normal(x, 1e-3), [dist.transforms.SigmoidTransform()]))
            pyro.sample("c", dist.Categorical(logits=torch.stack([0 * x, x], -1)))

    x = torch.randn(3000, dtype=torch.float64)
    table = pv.active_units(model, guide, x, 20, seed=0)
    exact = x.sigmoid().var().item()
    for site in ("s", "c"):
        assert abs(table.variance[site, 0] - exact) < 4 * max(table.variance_se[site, 0], 1e-3)
    assert table.active.all()


def test_where_the_search_fails_nothing_is_lost():
    """The encoder's own member then stands for the best one, in the ELBO and in log p(x) alike."""
    program = LinearGaussian(4, 2, 30)
    gaps = pv.inference_gaps(program.model, program.guide, program.x, 100, num_steps=2, lr=1.0, seed=0)
    torch.testing.assert_close(gaps.log_likelihood, program.log_evidence(), rtol=0, atol=1e-6)
    assert abs(gaps.total.value) < 1e-6
