"""Calibration on simulated data: exact guides pass, others are told apart, and both bounds are exact in the mean."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.quick import slow_but
from pyro.infer.autoguide import AutoNormal
from scipy import stats
from torch.distributions import kl_divergence

import pyro_vae as pv

QUIET = {"seed": 0, "progress": False}
X = torch.zeros(1_500)
SD = 0.5**0.5  # of the posterior, N(x / 2, 1 / 2)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(shift=0.0, sd=SD):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + shift, sd))

    return guide


PRIOR = torch.tensor([0.2, 0.5, 0.3])


def discrete_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(PRIOR))
        pyro.sample("x", dist.Normal(z.float(), 1.0), obs=x)


def discrete_guide(temperature=1.0):
    def guide(x):
        logits = PRIOR.log() + dist.Normal(torch.arange(3.0), 1.0).log_prob(x[..., None])
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=temperature * logits))

    return guide


@pytest.mark.parametrize(
    ("shift", "sd", "verdict"),
    [
        (0.0, SD, "right as far as seen"),
        (0.0, 0.5, "too narrow"),
        (0.0, 1.0, "too wide"),
        (0.25, SD, "too high"),
        (-0.25, SD, "too low"),
    ],
)
def test_guides_are_told_apart(shift, sd, verdict):
    found = pv.calibrate(model, guide(shift, sd), X, **QUIET)
    assert found.dimensions.verdict.tolist() == [verdict]
    assert verdict in str(found)
    row = found.dimensions.iloc[0]
    assert abs(row.bias + shift / sd) < 4 * (SD / sd) / len(X) ** 0.5 + 0.02  # and what 100 draws leave in the tails
    assert row.spread == pytest.approx(SD / sd, rel=4 / (2 * len(X)) ** 0.5 + 0.03)
    p, q = dist.Normal(0.0, SD), dist.Normal(shift, sd)
    exact = (kl_divergence(p, q) + kl_divergence(q, p)).item()
    assert abs(found.kl.value - exact) < 4 * found.kl.standard_error + 1e-6
    share = found.coverage((0.9,)).loc[0.9]
    z = dist.Normal(0.0, 1.0)
    reach = z.icdf(torch.tensor(0.95)) * sd  # of the guide's central 90%
    covered = (z.cdf((reach + shift) / SD) - z.cdf((shift - reach) / SD)).item()
    # The ends of an interval of 100 draws are off by about 0.01 in rank.
    assert abs(share.guide - covered) < 4 * share.guide_se + 0.01


def test_both_bounds_are_exact_in_the_mean():
    """log p(x) of the simulated data is exact, and lies between the means; their errors are paired."""
    found = pv.calibrate(model, guide(0.2, 0.55), torch.zeros(4_000), 64, **QUIET)
    exact = dist.Normal(0.0, 2**0.5).log_prob(found.x)
    for k in (1, 4, 64):
        lower = found.log_weights[:k].logsumexp(0) - math.log(k)
        rows = torch.cat([found.true_log_weights[None], found.log_weights[: k - 1]])
        upper = rows.logsumexp(0) - math.log(k)
        below, above = pv.Estimate.of(exact - lower), pv.Estimate.of(upper - exact)
        assert below.value > -4 * below.standard_error
        assert above.value > -4 * above.standard_error
        assert found.bounds.loc[k, "lower"] == pytest.approx(lower.mean().item())
        assert found.bounds.loc[k, "upper"] == pytest.approx(upper.mean().item())
    # At K = 1 the two parts are the two divergences.
    p, q = dist.Normal(0.0, SD), dist.Normal(0.2, 0.55)
    below, above = pv.Estimate.of(exact - found.log_weights[0]), pv.Estimate.of(found.true_log_weights - exact)
    assert abs(below.value - kl_divergence(q, p)) < 4 * below.standard_error
    assert abs(above.value - kl_divergence(p, q)) < 4 * above.standard_error
    assert found.lower.mean <= found.upper.value
    assert found.gap.value == pytest.approx(found.upper.value - found.lower.mean)


@pytest.mark.parametrize(("program", "x"), [((model, guide()), X[:300]), ((discrete_model, discrete_guide()), X[:300])])
def test_ranks_of_an_exact_guide_are_uniform(program, x):
    """Twenty seeds: the p-values of Kolmogorov's test are uniform themselves, for ranks and for distances."""
    found = [pv.calibrate(program, x, 30, seed=seed, progress=False) for seed in range(20)]
    columns = [[f.ranks.to_numpy()[:, 0] for f in found], [f.distance_ranks.numpy() for f in found]]
    columns.append([f.weighted_ranks.to_numpy()[:, 0] for f in found])
    for ranks in columns:
        p = [stats.kstest(each, "uniform").pvalue for each in ranks]
        assert stats.kstest(p, "uniform").pvalue > 1e-3
        assert np.mean(np.less(p, 0.05)) < 0.3  # of 20, six: probability 3e-4
    assert all((f.log_weights - f.true_log_weights).abs().max() < 1e-4 for f in found)  # all weights are p(x)


@pytest.mark.parametrize("elements", slow_but([1], [1, 40_000]))
def test_distances_of_several_dimensions_are_uniform_for_an_exact_guide(elements):
    """Whatever the size of the minibatches, which depends on the number of elements of a datum."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(6), torch.arange(1.0, 7.0)).to_event(1))
            pyro.sample("x", dist.Normal(torch.zeros(elements), 1.0).to_event(1), obs=x)

    found = pv.calibrate(model, pyro.poutine.block(model, hide=["x"]), torch.zeros(100, elements), 60, **QUIET)
    assert stats.kstest(found.distance_ranks.numpy(), "uniform").pvalue > 1e-3


def test_weights_that_are_no_numbers_are_refused():
    def narrow(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0 * x, 1.0))

    def overflows(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, torch.where(z > 2, torch.nan, 1.0), validate_args=False), obs=x)

    with pytest.raises(pv.NotFiniteError, match="expected log-weights that are finite"):
        pv.calibrate(overflows, narrow, X[:200], 30, **QUIET)


def test_a_discrete_guide_that_is_too_sure():
    sure = pv.calibrate(discrete_model, discrete_guide(3.0), X, **QUIET)
    assert sure.dimensions.verdict.iloc[0] == "too narrow"
    logits = PRIOR.log() + dist.Normal(torch.arange(3.0), 1.0).log_prob(sure.x[:, None])
    p, q = dist.Categorical(logits=logits), dist.Categorical(logits=3 * logits)
    exact = (kl_divergence(p, q) + kl_divergence(q, p)).mean().item()
    assert abs(sure.kl.value - exact) < 4 * sure.kl.standard_error
    assert sure.gap.value > 0


def test_weighted_ranks_mend_a_wide_guide():
    found = pv.calibrate(model, guide(0.0, 1.0), X, 200, **QUIET)
    row = found.coverage().loc[0.9]
    assert abs(row.weighted - 0.9) < 4 * row.weighted_se + 0.01
    assert row.guide > 0.95
    with pytest.raises(pv.PyroVAEError, match="expected levels between 0 and 1, got 90"):
        found.coverage((90,))


def test_distances_show_a_guide_that_ignores_x():
    """Its marginal ranks are uniform, since it is the prior; TARP is in the joint of x and z (Lemos et al. 2023)."""

    def ignores(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0 * x, 1.0))

    found = pv.calibrate(model, ignores, X, **QUIET)
    assert found.dimensions.verdict.tolist() == ["right as far as seen"]
    exact = 1.0  # the mean over x ~ N(0, 2) of (1/2 + 3/4 x^2) / 2; the sandwich sees it
    assert abs(found.kl.value - exact) < 4 * found.kl.standard_error


def test_refined_proposals_close_the_sandwich():
    narrow = guide(0.2, 0.3)
    plain = pv.calibrate(model, narrow, X[:200], **QUIET)
    refined = pv.calibrate(model, narrow, X[:200], refine=True, **QUIET)
    assert "KL" in str(plain)
    assert "KL" not in str(refined)  # proposals are wide on purpose
    with pytest.raises(pv.PyroVAEError, match=r"For simulated data, as in pv.calibrate, pass the guide itself"):
        pv.calibrate(model, pv.refine(model, narrow, X[:20] + 1, num_steps=5, **QUIET), X[:20], **QUIET)
    assert plain.gap.value > 10 * refined.gap.value
    auto = AutoNormal(model, create_plates=lambda x: pyro.plate("data", len(x), dim=-1))
    auto(X[:50])
    with pytest.raises(pv.PyroVAEError, match=r"guide site 'z_unconstrained' is auxiliary.*Pass refine=True"):
        pv.calibrate(model, auto, X[:50], **QUIET)
    assert pv.calibrate(model, auto, X[:50], refine=True, **QUIET).gap.value < 0.05


Y = torch.zeros(40, 6)
SIZES = {"latent_dim": 3, "hidden_dims": (8,)}


@pytest.mark.parametrize(
    ("pair", "like"),
    [
        (lambda: pv.mlp_vae((6,), **SIZES), (Y,)),
        (lambda: pv.mlp_vae((6,), **SIZES), (Y, torch.ones(40, 6) > 0)),
        (lambda: pv.mlp_hierarchical_vae((6,), latent_dims=(3, 2), hidden_dims=(8,)), (Y,)),
        (lambda: pv.mlp_conditional_vae((6,), label_dim=2, **SIZES), (Y, torch.ones(40, 2))),
        (lambda: pv.mlp_semi_supervised_vae((6,), num_classes=2, **SIZES), (Y,)),
    ],
)
def test_pairs(pair, like):
    found = pv.calibrate(pair(), like, 20, **QUIET)
    assert found.gap.value > 0
    assert len(found.ranks) == 40
    assert found.ranks.columns.names == ["site", "dimension"]
    one_by_one = pv.calibrate(pair(), like, 5, vectorize_particles=False, **QUIET)
    assert one_by_one.log_weights.shape == (5, 40)


def test_refusals():
    with pytest.raises(pv.PyroVAEError, match="expected num_samples"):
        pv.calibrate(model, guide(), X, 1)
    with pytest.raises(pv.PyroVAEError, match="at least 2 data"):
        pv.calibrate(model, guide(), X[:1])
