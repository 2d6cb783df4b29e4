"""The benchmark of log-densities in float32: each error is within what is allowed, and so is each gradient's."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

import pyro_vae as pv

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import accuracy as benchmark

PARTS = [benchmark.binary, benchmark.real, benchmark.counts, benchmark.discrete]
PARTS += [benchmark.correlated, benchmark.latents, benchmark.flows]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_each_error_is_within_what_is_allowed(part):
    for case in part():
        exact = torch.tensor([float(value) for value in case.exact()], dtype=torch.float64)
        for half in (False, True):
            if half and case.has_networks:
                continue
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                _, share = case.errors(exact)
            assert share.max() <= 1, (case.part, case.values, half)


def test_each_public_likelihood_prior_and_posterior_is_among_them():
    found = {case.part.split(",")[0] for part in PARTS for case in part()}
    kinds = (pv.Likelihood, pv.Posterior)
    public = {n for n in pv.__all__ if isinstance(getattr(pv, n), type) and issubclass(getattr(pv, n), kinds)}
    public |= {name for name in pv.__all__ if name.endswith("Prior")} | {"StandardNormal"}
    # The density of FlowPosterior is known at its own samples alone; its normal and its flow are those of other parts.
    assert found == public - {"Likelihood", "Posterior", "FlowPosterior"}


@pytest.mark.parametrize("part", PARTS[:4], ids=lambda part: part.__name__)
def test_gradients_are_those_of_float64(part):
    """By the same code, whose values in float64 differ from the exact ones by much less."""
    for case in part():
        likelihood, features = case.distribution.func.__self__, case.distribution.args
        gradients = []
        for dtype in (torch.float32, torch.float64):
            own = [feature.to(dtype).requires_grad_() for feature in features]
            made = copy.deepcopy(likelihood).to(dtype)
            log_prob = made.event_distribution(*own, mask=None).log_prob(case.value.to(dtype))
            gradients.append(torch.stack(torch.autograd.grad(log_prob.sum(), own)).double())
        found, exact = gradients
        # Where a derivative is a difference of numbers near the feature's own size, such as x - e^l, these round.
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
