"""pyro_vae.testing accepts every likelihood of the package, at ordinary and at wide parameters."""

from __future__ import annotations

import pytest
import torch

import pyro_vae as pv
from pyro_vae.likelihoods import BY_NAME

OPTIONS = {
    "gaussian": {"scale": "per_pixel"},
    "student_t": {"df": "learned", "scale": "per_pixel"},
    "categorical": {"categories": 5},
    "discretized_logistic": {"levels": 5},
    "low_rank_gaussian": {"rank": 2, "shared": False},
}
COUNTS = ("poisson", "negative_binomial")


@pytest.mark.parametrize("spread", [pytest.param(0.3, marks=pytest.mark.slow), 1.0])
@pytest.mark.parametrize("name", BY_NAME)
def test_pv_testing_accepts_each_likelihood(name, spread, without_inductor):
    options = OPTIONS.get(name, {})
    levels = options.get("levels", 256)
    support = torch.arange(levels) / (levels - 1) if name == "discretized_logistic" else None
    spread = min(spread, 1.0) if name in COUNTS else spread
    pv.testing.check_likelihood(BY_NAME[name], support=support, spread=spread, compiled=spread == 1.0, **options)
