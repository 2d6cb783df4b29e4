"""Counts: many columns in float32 against 50 digits, and which numbers are counts. The rest is in tests/benchmarks."""

import math

import mpmath
import pytest
import torch
from torch import nn

import pyro_vae as pv


def exact_negative_binomial(x, log_mean, log_r):
    x, mean, r = mpmath.mpf(x), mpmath.exp(log_mean), mpmath.exp(log_r)
    choices = mpmath.loggamma(x + r) - mpmath.loggamma(x + 1) - mpmath.loggamma(r)
    return choices + r * mpmath.log(r / (r + mean)) + x * mpmath.log(mean / (r + mean))


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
