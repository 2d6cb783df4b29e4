"""pv.active_units against closed forms."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.programs import LinearGaussian
from pyro.infer.autoguide import AutoNormal
from torch.distributions import kl_divergence

import pyro_vae as pv


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
    # for normal data, the variance of a variance is 2 v^2 / N
    assert table.variance_se.iloc[0] == pytest.approx(variance[0].item() * math.sqrt(2 / 500), rel=0.2)
    assert pv.active_units(program.model, guide, program.x, threshold=1e-9).active.tolist() == [True, True, False]
    with pytest.raises(ValueError, match="threshold of at least 0"):
        pv.active_units(program.model, guide, program.x, threshold=-1.0)


def test_active_units_where_means_are_sampled():
    """A collapsed site that depends on another sample: the noise of its sampled mean does not count as activity."""

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
    """Means are estimated by samples for a transformed normal and for a categorical, whose PyTorch mean is NaN."""

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


def of_normals(prior, posterior):
    """z ~ prior, x ~ N(z, 1), with a posterior from a function of x."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(x))

    return model, guide


def test_the_kl_of_a_folded_posterior_is_not_that_of_its_base():
    def folded(loc):
        return dist.FoldedDistribution(dist.Normal(loc, 1.0))

    x = torch.ones(2000, dtype=torch.float64)
    table = pv.active_units(of_normals(folded(torch.zeros_like(x)), folded), x, 2, seed=0)
    z = torch.linspace(1e-9, 12, 4001, dtype=torch.float64)
    log_q, log_p = (folded(torch.full_like(z, loc)).log_prob(z) for loc in (1.0, 0.0))
    exact = torch.trapezoid(log_q.exp() * (log_q - log_p), z).item()
    assert abs(table.kl.item() - exact) < 4 * table.kl_se.item()  # that of the bases is 0.5


def test_a_point_of_an_auxiliary_site_has_no_kl_of_its_own():
    model, _ = of_normals(dist.Normal(0.0, 1.0), None)
    x = torch.randn(25)
    table = pv.active_units(model, AutoNormal(model), x, 3)
    assert table.kl.isna().all()


def test_a_posterior_without_a_mean():
    program = of_normals(dist.Cauchy(0.0, 1.0), lambda x: dist.Cauchy(x, 1.0))
    with pytest.raises(pv.PyroVAEError, match=r"guide site 'z' \(Cauchy\) has no finite mean"):
        pv.active_units(program, torch.randn(5), 3)
