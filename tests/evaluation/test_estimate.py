"""pv.Estimate: the mean, its standard error, the interval and the printed digits."""

from __future__ import annotations

import math

import pytest
import torch

import pyro_vae as pv


def test_estimate():
    estimate = pv.Estimate.of(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert (estimate.value, estimate.standard_error) == (2.5, pytest.approx(math.sqrt(5 / 3) / 2))
    low, high = estimate.interval(0.95)
    assert (low, high) == (
        pytest.approx(2.5 - 1.959964 * estimate.standard_error),
        pytest.approx(2.5 + 1.959964 * estimate.standard_error),
    )
    assert str(pv.Estimate(-104.9649, 0.2731)) == "-104.96 ± 0.27"
    assert str(pv.Estimate(0.00123, 0.0004)) == "0.0012 ± 0.0004"
    with pytest.raises(ValueError, match="expected a vector of real values"):
        pv.Estimate.of(torch.zeros(0))
    single = pv.Estimate.of(torch.tensor([1.5]))
    assert (single.value, math.isnan(single.standard_error)) == (1.5, True)
    assert str(single) == "1.50 (of a single value, without an error)"
    with pytest.raises(ValueError, match="between 0 and 1"):
        estimate.interval(95)
