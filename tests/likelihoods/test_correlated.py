"""The low-rank Gaussian likelihood: its density, samples and conditional distributions against the dense normal."""

from __future__ import annotations

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from helpers.programs import z_score
from torch import nn

import pyro_vae as pv
from pyro_vae.likelihoods.correlated import LowRankEvent


def low_rank(size=4, batch=(), **options):
    """A low-rank likelihood with random parameters, its features, and the equal dense normal of the flat event."""
    likelihood = pv.LowRankGaussian(nn.Identity(), (2, size // 2), rank=2, **options).double()
    features = torch.randn(likelihood.num_features, *batch, 2, size // 2, dtype=torch.float64)
    if likelihood.shared:
        likelihood.factor.data = torch.randn_like(likelihood.factor)
        likelihood.raw_scale.data = torch.randn_like(likelihood.raw_scale)
        factor, raw = likelihood.factor.detach(), likelihood.raw_scale.detach()
    else:
        factor, raw = features[1:-1].movedim(0, -1), features[-1]
    factor, scale = factor.flatten(-3, -2), nn.functional.softplus(raw.flatten(-2)) + likelihood.min_scale
    covariance = factor @ factor.mT + torch.diag_embed(scale**2)
    dense = dist.MultivariateNormal(features[0].flatten(-2), covariance)
    return likelihood, features, dense


@pytest.mark.parametrize("shared", [True, False])
def test_low_rank_is_the_dense_normal(shared):
    likelihood, features, dense = low_rank(batch=(3,), shared=shared)
    ours = likelihood.event_distribution(*features, mask=None)
    assert (ours.batch_shape, ours.event_shape) == ((3,), (2, 2))
    x = torch.randn(7, 3, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(ours.log_prob(x), dense.log_prob(x.flatten(-2)))
    torch.testing.assert_close(ours.mean.flatten(-2), dense.mean)
    torch.testing.assert_close(ours.variance.flatten(-2), dense.variance)
    expanded = ours.expand((7, 3))
    assert expanded.rsample((2,)).shape == (2, 7, 3, 2, 2)
    torch.testing.assert_close(expanded.log_prob(x), dense.log_prob(x.flatten(-2)))
    with torch.no_grad():
        deviations = ours.rsample((20_000,)).flatten(-2) - dense.mean
    assert (z_score(deviations, 0.0) < 4.5).all()
    products = deviations[..., :, None] * deviations[..., None, :]
    assert (z_score(products, dense.covariance_matrix) < 4.5).all()


def test_low_rank_in_float32_agrees_with_float64():
    """If F is much larger than the scale, PyTorch's class is off by nats, or its Cholesky factorisation fails.

    The terms are computed in float64, and the result is rounded once.
    """
    size, rank = 784, 4
    loc, factor = torch.randn(50, size), torch.randn(size, 1) * torch.ones(rank) + 0.01 * torch.randn(size, rank)
    narrow, wide = (
        LowRankEvent(loc.to(dtype), factor.to(dtype), torch.full((size,), 0.02).to(dtype), 1)
        for dtype in (torch.float32, torch.float64)
    )
    x = narrow.sample()
    found, exact = narrow.log_prob(x).double(), wide.log_prob(x.double())
    assert ((found - exact).abs() <= torch.finfo(torch.float32).eps * exact.abs()).all()


def test_low_rank_integrates_to_one():
    likelihood, features, _ = low_rank(size=2, batch=())
    line = torch.linspace(-12, 12, 601, dtype=torch.float64)
    x = torch.cartesian_prod(line, line).reshape(-1, 2, 1)
    normal = likelihood.event_distribution(*features, mask=None)
    assert (normal.log_prob(x).exp().sum() * 0.04**2).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("batch", [(5,), (3, 5)])
def test_low_rank_with_a_mask_is_the_marginal_of_observed_elements(shared, batch):
    likelihood, features, dense = low_rank(size=6, batch=batch, shared=shared)
    x, mask = torch.randn(5, 2, 3, dtype=torch.float64), torch.rand(5, 2, 3) > 0.5
    mask[0], mask[1] = False, True
    hidden = torch.where(mask, x, math.nan)  # missing elements are not read
    ours = likelihood.event_distribution(*features, mask=mask)
    log_prob = ours.log_prob(torch.where(mask, x, 1e9))
    assert log_prob.shape == batch
    expected = torch.zeros(batch, dtype=torch.float64)
    for index in np.ndindex(*batch):
        seen = mask[index[-1]].flatten()
        if seen.any():
            loc, covariance = dense.loc[index][seen], dense.covariance_matrix[index][seen][:, seen]
            expected[index] = dist.MultivariateNormal(loc, covariance).log_prob(x[index[-1]].flatten()[seen])
    torch.testing.assert_close(log_prob, expected)
    ours._validate_args = False
    torch.testing.assert_close(ours.log_prob(hidden), expected)
    torch.testing.assert_close(ours.expand((2, *batch)).log_prob(x), expected.expand(2, *batch))


def test_low_rank_beats_independent_pixels_where_noise_is_correlated():
    """At the true parameters the difference of the log-densities has the total correlation of the noise as its mean."""
    likelihood, features, dense = low_rank(size=6)
    ours = likelihood.event_distribution(*features, mask=None)
    independent = dist.Normal(ours.mean, ours.variance.sqrt()).to_event(2)
    with torch.no_grad():
        x = ours.sample((20_000,))
        gain = ours.log_prob(x) - independent.log_prob(x)
        exact = 0.5 * (ours.variance.log().sum() - dense.covariance_matrix.logdet())
    assert exact > 0.5
    assert z_score(gain, exact) < 4
