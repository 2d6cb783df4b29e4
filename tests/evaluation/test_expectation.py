"""Posterior expectations against exact posteriors: normal, discrete, nested, of several sites, refined."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.nn.functional import one_hot

import pyro_vae as pv

QUIET = {"seed": 0, "progress": False}
X = torch.linspace(-2, 2, 9)
Z_LIMIT = 4.5  # of the largest of up to 100 z-scores


def model(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("code", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * z)
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("code", dist.Normal(x / 3, 0.9))


def exact_guide(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("code", dist.Normal(x / 2, 0.5**0.5))


def z_scores(found, exact):
    return ((found.value - exact) / found.standard_error).abs().max().item()


NORMAL = dist.Normal(X.double() / 2, 0.5**0.5)  # the posterior


@pytest.mark.filterwarnings("ignore:.*Pareto k-hat above")
@pytest.mark.parametrize("options", [{}, {"refine": True}, {"vectorize_particles": False, "num_samples": 200}])
@pytest.mark.parametrize(
    ("function", "exact"),
    [
        ("code", NORMAL.mean),
        ("twice", 2 * NORMAL.mean),
        ("x", NORMAL.mean),
        (lambda z: z.square(), NORMAL.mean.square() + 0.5),
        (lambda z: z > 0.5, 1 - NORMAL.cdf(torch.tensor(0.5, dtype=torch.float64))),
        (lambda z: torch.stack([z, 1000 + z], -1), torch.stack([NORMAL.mean, 1000 + NORMAL.mean], -1)),
    ],
)
def test_expectations_are_exact_within_errors(function, exact, options):
    found = pv.expect(model, guide, X, function, **QUIET, **options)
    assert found.value.shape == exact.shape
    assert z_scores(found, exact) < Z_LIMIT
    if "num_samples" not in options:  # of few draws, k-hat has much noise
        assert found.share_high_k == 0


def test_both_ways_to_run_draw_the_same():
    together, apart = (pv.expect(model, guide, X, "code", 50, vectorize_particles=each, **QUIET) for each in (1, 0))
    torch.testing.assert_close(together.value, apart.value)
    torch.testing.assert_close(together.standard_error, apart.standard_error)


@pytest.mark.slow
def test_portions_sum_to_the_whole(monkeypatch):
    monkeypatch.setattr(pv.evaluation.pieces, "ELEMENTS_AT_ONCE", 4)  # of two draws each
    found = pv.expect(model, exact_guide, X, lambda z: 1e4 + z, 500, **QUIET)
    assert z_scores(found, 1e4 + NORMAL.mean) < Z_LIMIT
    # All weights are equal, so the error is the classical one.
    np.testing.assert_allclose(found.standard_error, (0.5 / 500) ** 0.5, rtol=4 / (2 * 500) ** 0.5)
    np.testing.assert_allclose(found.ess, 500, rtol=1e-5)


def test_a_weight_that_grows_in_a_later_portion_replaces_the_earlier_ones():
    log_w = torch.tensor([[-math.inf, 0.0, 0.2], [-800.0, 1.0, 0.0], [0.0, 700.0, 0.9], [1.0, 701.0, 0.7]]).double()
    f = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = pv.evaluation.expectation._Sums(log_w[:2], f[:2])
    for rows in (slice(0, 2), slice(2, 4)):
        sums.add(log_w[rows], f[rows])
    value, error, ess, _ = sums.result()
    w = log_w.softmax(0)[..., None]
    mean = (w * f).sum(0)
    torch.testing.assert_close(value, mean)
    torch.testing.assert_close(error, (4 / 3 * (w.square() * (f - mean).square()).sum(0)).sqrt())
    torch.testing.assert_close(ess, 1 / w.square().sum(0)[:, 0])


def test_classes_of_a_discrete_latent():
    prior = torch.tensor([0.2, 0.5, 0.3])

    def mixture(x):
        with pyro.plate("rows", len(x)):
            y = pyro.sample("y", dist.Categorical(prior))
            pyro.sample("x", dist.Normal(y.float(), 1.0), obs=x)

    def uniform(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Categorical(torch.ones(3) / 3))

    exact = (prior.log() + dist.Normal(torch.arange(3.0), 1.0).log_prob(X[:, None])).softmax(-1)
    found = pv.expect(mixture, uniform, X, lambda y: one_hot(y, 3), **QUIET)
    assert z_scores(found, exact) < Z_LIMIT


@pytest.mark.slow
def test_several_sites_come_as_a_dictionary_in_one_layout():
    def chain(x):
        with pyro.plate("rows", len(x), dim=-2):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with pyro.plate("columns", 2, dim=-1):
                b = pyro.sample("b", dist.Normal(a, 1.0))
                pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def own(x):
        with pyro.plate("rows", len(x), dim=-2):
            a = pyro.sample("a", dist.Normal(x.mean(-1, keepdim=True) / 2, 0.8))
            with pyro.plate("columns", 2, dim=-1):
                pyro.sample("b", dist.Normal((a + x) / 2, 0.5**0.5))

    x = torch.stack([X, X.flip(0) + 1], -1)
    # x = a + noise of variance 2 in each column, and b given a and x is their mean.
    a = x.double().sum(-1) / 4
    exact = torch.cat([a[:, None], (a[:, None] + x) / 2], -1)

    def both(z):
        assert z["a"].shape[1:] == (9,)
        assert z["b"].shape[1:] == (9, 2)
        return torch.cat([z["a"][..., None], z["b"]], -1)

    assert z_scores(pv.expect(chain, own, x, both, 20_000, **QUIET), exact) < Z_LIMIT
    assert z_scores(pv.expect(chain, own, x, both, refine=True, **QUIET), exact) < Z_LIMIT
    assert z_scores(pv.expect(chain, own, x, "a", 20_000, **QUIET), a) < Z_LIMIT


def test_missing_elements_are_those_of_impute():
    pyro.set_rng_seed(0)
    vae = pv.mlp_vae((6,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
    x, mask = torch.randn(5, 6), torch.rand(5, 6) > 0.4
    found = pv.expect(vae, (x, mask), "x", 20_000, **QUIET)
    filled = vae.impute(x, mask, 20_000)
    # Two independent estimates, whose errors are alike.
    apart = ((filled - found.value) / (2**0.5 * found.standard_error))[~mask]
    assert apart.abs().max() < Z_LIMIT


@pytest.mark.parametrize("power", [0.2, 0.45])
@pytest.mark.filterwarnings("ignore:.*Pareto k-hat above")
def test_k_hat_is_of_the_function_too(power):
    # If z is normal with variance 1/2, exp(2 c z^2) has the Pareto tail k = 2 c.
    x = torch.zeros(4)
    found = pv.expect(model, exact_guide, x, lambda z: (2 * power * z.square()).exp(), 20_000, **QUIET)
    assert (found.pareto_k - 2 * power).abs().max() < 0.2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Pareto k-hat above")
@pytest.mark.parametrize("columns", [1, 50, 1000])
def test_a_heavy_column_shows_among_many(columns):
    x = torch.zeros(4)

    def heavy(z):
        rest = (z[..., None] * torch.arange(1.0, columns + 1)).sin()
        return torch.cat([(0.9 * z.square()).exp()[..., None], rest], -1)

    found = pv.expect(model, exact_guide, x, heavy, 20_000, **QUIET)
    assert (found.pareto_k - 0.9).abs().max() < 0.3


@pytest.mark.filterwarnings("ignore:.*Pareto k-hat above")
def test_values_where_no_weight_is_do_not_count():
    def bounded(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("code", dist.Uniform(0.0, 1.0, validate_args=False))
            pyro.sample("x", dist.Normal(0.0 * z, 1.0), obs=x)

    def wider(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("code", dist.Uniform(-0.5, 1.0).expand([len(x)]))

    with pyro.validation_enabled(False):
        infinite, zero = (
            pv.expect(bounded, wider, torch.zeros(4), lambda z, at=at: torch.where(z < 0, at, z.abs() ** -0.9), **QUIET)
            for at in (math.inf, 0.0)
        )
    torch.testing.assert_close(infinite.value, zero.value)
    torch.testing.assert_close(infinite.pareto_k, zero.pareto_k)


def test_huge_values_have_an_error_too():
    found = pv.expect(model, guide, X, lambda z: 1e200 * z.double(), **QUIET)
    assert z_scores(found, 1e200 * NORMAL.mean) < Z_LIMIT


def test_masked_latents_are_refused():
    def masked(x):
        with pyro.plate("rows", len(x)), pyro.poutine.mask(mask=x > 0):
            z = pyro.sample("code", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="a masked latent has no posterior"):
        pv.expect(masked, pyro.poutine.mask(guide, mask=X > 0), X, "code", 30, **QUIET)


def test_a_high_k_hat_warns():
    with pytest.warns(UserWarning, match="neither it nor its error bar"):
        pv.expect(model, exact_guide, X, lambda z: z.square().exp(), **QUIET)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"refine": True}])
def test_intervals_cover(options):
    x = torch.full((2000,), 0.7)
    found = pv.expect(model, guide, x, "code", 400, **QUIET, **options)
    covered = ((found.value - 0.35) / found.standard_error).abs() < 1.96
    assert abs(covered.double().mean() - 0.95) < 3 * (0.95 * 0.05 / 2000) ** 0.5


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda z: z.mean(0), "shape \\(K, N, ...\\)"),
        (lambda z: 1.0, "a tensor of real numbers, got 1.0"),
        (lambda z: z[..., None][..., :0], "numbers of shape"),
        ("z", "one of \\['code', 'twice', 'x'\\]"),
        (3, "function of latents"),
        (lambda z: z.log(), "finite at every draw"),
    ],
)
def test_functions_that_are_refused(function, words):
    with pytest.raises((ValueError, FloatingPointError), match=words):
        pv.expect(model, guide, X, function, 30, **QUIET)


def test_an_error_of_the_function_says_how_it_was_called():
    with pytest.raises(IndexError) as caught:
        pv.expect(model, guide, X, lambda z: z[:, :, 3], 30, **QUIET)
    assert "called function with one argument, a tensor of shape (1, 9)" in caught.value.__notes__[0]


def test_few_draws_have_no_k_hat():
    assert "100.0% without" in str(pv.expect(model, guide, X, "code", 10, **QUIET))


def test_a_site_without_a_mean_is_refused():
    def heavy(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("code", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Cauchy(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="has no finite mean"):
        pv.expect(heavy, guide, X, "x", 30, **QUIET)


def test_only_weights_of_zero_are_refused():
    def bounded(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("code", dist.Normal(0.0, 1.0))
            pyro.factor("bound", torch.where(z > 50, 0.0, -math.inf))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="weights of zero for 9 of 9"):
        pv.expect(bounded, guide, X, "code", 30, **QUIET)
