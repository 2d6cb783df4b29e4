"""Log-densities in float32 against 50 digits, over the whole range of parameters and data that is accepted."""

import math

import mpmath
import pytest
import torch
from torch import nn

import pyro_vae as pv

COUNTS = [0.0, 1.0, 3.0, 100.0, 12_345.0, 1e6, 2.0**24]
LOG_MEANS = [-40.0, -30.0, -10.0, 0.0, 1.1, 4.6, 9.4, 13.8, 16.6, 30.0, 40.0]


def tolerance(exact):
    """1e-3 nats for 1,000 elements, and 1e-5 of the density."""
    return 1e-6 + 1e-5 * exact.abs()


def exact_poisson(x, log_rate):
    log_rate = mpmath.mpf(min(max(log_rate, -30), 30))
    return x * log_rate - mpmath.exp(log_rate) - mpmath.loggamma(x + 1)


def exact_negative_binomial(x, log_mean, log_r):
    x, mean, r = mpmath.mpf(x), mpmath.exp(log_mean), mpmath.exp(log_r)
    choices = mpmath.loggamma(x + r) - mpmath.loggamma(x + 1) - mpmath.loggamma(r)
    return choices + r * mpmath.log(r / (r + mean)) + x * mpmath.log(mean / (r + mean))


def grid():
    x, log_mean = torch.meshgrid(torch.tensor(COUNTS), torch.tensor(LOG_MEANS), indexing="ij")
    return x.reshape(-1, 1), log_mean.reshape(-1, 1)


def test_poisson_at_any_rate_and_count():
    x, log_rate = grid()
    found = pv.Poisson(nn.Identity(), (1,)).event_distribution(log_rate, mask=None).log_prob(x).double()
    with mpmath.workdps(50):
        exact = torch.tensor([float(exact_poisson(a.item(), b.item())) for a, b in zip(x, log_rate, strict=True)])
    assert bool(((found - exact.double()).abs() <= tolerance(exact.double())).all())


@pytest.mark.parametrize("raw", [-20.0, -5.0, 0.0, 4.0, 20.0])
def test_negative_binomial_at_any_mean_count_and_dispersion(raw):
    likelihood = pv.NegativeBinomial(nn.Identity(), (1,))
    nn.init.constant_(likelihood.raw_total_count, raw)
    x, log_mean = grid()
    distribution = likelihood.event_distribution(log_mean, mask=None)
    found = distribution.log_prob(x).double().detach()
    log_r = distribution.base_dist.log_r.double().item()
    with mpmath.workdps(50):
        values = [exact_negative_binomial(a.item(), b.item(), log_r) for a, b in zip(x, log_mean, strict=True)]
    exact = torch.tensor([float(value) for value in values], dtype=torch.float64)
    assert bool(((found - exact).abs() <= tolerance(exact)).all())


def test_many_columns_of_small_counts_near_the_largest_dispersion():
    """Each of 2,000 columns was a difference of two numbers of 6,000 nats."""
    likelihood = pv.NegativeBinomial(nn.Identity(), (2000,))
    nn.init.constant_(likelihood.raw_total_count, 4.0)
    x = torch.poisson(torch.full((4, 2000), 3.0), generator=torch.Generator().manual_seed(0))
    log_mean = torch.full((4, 2000), math.log(3.0))
    distribution = likelihood.event_distribution(log_mean, mask=None)
    with mpmath.workdps(50):
        log_r = mpmath.mpf(distribution.base_dist.log_r[0].item())
        each = [exact_negative_binomial(n, mpmath.mpf(log_mean[0, 0].item()), log_r) for n in range(30)]
    exact = torch.tensor([float(value) for value in each], dtype=torch.float64)[x.long()].sum(-1)
    assert bool(((distribution.log_prob(x).double() - exact).abs() <= 1e-3 * 2 + 1e-5 * exact.abs()).all())


@pytest.mark.parametrize("family", [pv.Poisson, pv.NegativeBinomial])
def test_counts_that_are_no_float32_integers_are_refused(family):
    likelihood = family(nn.Identity(), (1,))
    likelihood.check(torch.tensor([[2.0**24]]))
    likelihood.check(torch.tensor([[2.0**24 + 2]], dtype=torch.float64))
    with pytest.raises(pv.PyroVAEError, match=r"expected x of counts up to 16777216, got 1.67772e\+07"):
        likelihood.check(torch.tensor([[2.0**24 + 2]]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize("family", [pv.Poisson, pv.NegativeBinomial])
def test_integers_are_counts(family, dtype):
    likelihood, x = family(torch.nn.Identity(), (3,)), torch.ones(2, 3, dtype=dtype)
    likelihood.check(x)
    if dtype.is_signed:
        with pytest.raises(pv.PyroVAEError, match=r"expected x of counts 0, 1, 2, \.\.\., got -1"):
            likelihood.check(-x)
