"""Blame: the gap of a guide, split over its sites, where the posterior's conditionals are known."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch.distributions import kl_divergence

import pyro_vae as pv

QUIET = {"seed": 0, "progress": False}
X = 3**0.5 * torch.randn(200, generator=torch.Generator().manual_seed(0))
NEAR = 0.01  # of the fitted normal's own KL


def model(x):
    with pyro.plate("rows", len(x)):
        above = pyro.sample("above", dist.Normal(0.0, 1.0))
        below = pyro.sample("below", dist.Normal(above, 1.0))
        pyro.sample("x", dist.Normal(below, 1.0), obs=x)


SD = {"below": (2 / 3) ** 0.5, "above": 0.5**0.5}  # of the posterior: below, then above given below


def guide(wrong=(), shift=0.0, wide=1.0):
    shifts, scales = ({s: value if s in wrong else same for s in SD} for value, same in ((shift, 0.0), (wide, 1.0)))

    def guide(x):
        with pyro.plate("rows", len(x)):
            below = pyro.sample("below", dist.Normal(2 * x / 3 + shifts["below"], scales["below"] * SD["below"]))
            pyro.sample("above", dist.Normal(below / 2 + shifts["above"], scales["above"] * SD["above"]))

    return guide


def exact(site, shift, wide):
    return kl_divergence(dist.Normal(shift, wide * SD[site]), dist.Normal(0.0, SD[site])).item()


ERRORS = [(0.3, 2.0), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((1.0, 1.0), (0.0, 1.5), (0.0, 0.4)))]


@pytest.mark.parametrize(("shift", "wide"), ERRORS)
@pytest.mark.parametrize(
    "wrong", [("below",), *(pytest.param(each, marks=pytest.mark.slow) for each in (("above",), ("below", "above")))]
)
def test_each_site_has_its_own_divergence(wrong, shift, wide):
    table = pv.blame(model, guide(wrong, shift, wide), X, **QUIET)
    total = sum(exact(site, shift, wide) for site in wrong)
    assert table.index.tolist() == ["below", "above", "(rest)"]
    for site in SD:
        kl = exact(site, shift, wide) if site in wrong else 0.0
        assert abs(table.kl[site] - kl) < 4.5 * table.kl_se[site] + NEAR * (1 + kl)
        assert table.share[site] == pytest.approx(kl / total, abs=0.1)
    assert abs(table.kl["(rest)"]) < NEAR * (1 + total) + 4.5 * table.kl_se["(rest)"]
    assert table.share.sum() == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize(("shift", "wide"), [(2.5, 0.15), (0.0, 8.0)])
def test_a_guide_that_is_far_off_is_blamed_and_not_the_rest(shift, wide):
    table = pv.blame(model, guide(("below",), shift, wide), X, **QUIET)
    kl = exact("below", shift, wide)
    assert table.kl["below"] == pytest.approx(kl, rel=0.1)
    assert table.share["below"] > 0.9


@pytest.mark.slow
def test_an_exact_guide_has_no_shares():
    table = pv.blame(model, guide(), X, **QUIET)
    assert table.share.isna().all()
    assert table.kl.abs().max() < NEAR


ONE_BY_ONE = {"vectorize_particles": False, "num_draws": 20, "num_samples": 100}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, pytest.param(ONE_BY_ONE, marks=pytest.mark.slow)])
def test_one_step_in_a_series_is_found(options):
    times, sd = 4, 0.5**0.5

    def series(x):
        with pyro.plate("rows", len(x)):
            for t in range(times):
                z = pyro.sample(f"z_{t}", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0).to_event(1), obs=x[:, t])

    def encoder(x):
        with pyro.plate("rows", len(x)):
            for t in range(times):
                pyro.sample(f"z_{t}", dist.Normal(x[:, t] / 2 + (t == 2) * 0.5, sd).to_event(1))

    x = 2**0.5 * torch.randn(20, times, 2, generator=torch.Generator().manual_seed(0))
    table = pv.blame(series, encoder, x, **QUIET, **options)
    kl = 2 * 0.5**2 / (2 * sd**2)
    assert abs(table.kl["z_2"] - kl) < 4.5 * table.kl_se["z_2"] + NEAR * 2
    assert table.share["z_2"] > 0.9


def test_a_guide_without_densities_is_refused():
    auto = AutoNormal(model, create_plates=lambda x: pyro.plate("rows", len(x), dim=-1))
    with pytest.raises(ValueError, match=r"latents \['above', 'below'\] and have densities"):
        pv.blame(model, auto, X, **QUIET)
