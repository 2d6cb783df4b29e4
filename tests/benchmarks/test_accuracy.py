"""The benchmark of log-densities in float32: each error is within what is allowed, and so is each gradient's."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import mpmath
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
    # The density of FlowPosterior is known at its own samples alone: tests/test_posteriors.py compares it there.
    assert found == public - {"Likelihood", "Posterior", "FlowPosterior"}


@pytest.mark.parametrize("part", PARTS[:4], ids=lambda part: part.__name__)
def test_gradients_of_elements_are_exact(part):
    """Against derivatives of the formulas, since a part that autograd cannot see is missing in float64 too."""
    for case in part():
        likelihood, features = case.distribution.func.__self__, case.distribution.args
        own = [feature.clone().requires_grad_() for feature in features]
        log_prob = likelihood.event_distribution(*own, mask=None).log_prob(case.value)
        alike = slice(20, None), 0  # after 20 mixed data, each datum has an element of the pool at all places
        found = torch.stack([each[alike] for each in torch.autograd.grad(log_prob.sum(), own)], -1).double()
        for row, *element in zip(found, *(each[alike].tolist() for each in (case.value, *features)), strict=True):
            if case.part == "Poisson" and abs(element[1]) > 30:
                continue  # the log rate is clamped, with a gradient that leads back
            with mpmath.workdps(30):
                exact = [float(derivative(case.element, element, i)) for i in range(1, len(element))]
            # Where a derivative is a difference of numbers near the feature's own size, such as x - e^l, these round.
            torch.testing.assert_close(row, torch.tensor(exact, dtype=torch.float64), rtol=1e-4, atol=1e-5)


def derivative(exact, arguments, i):
    """The derivative of a function with respect to its argument i."""
    before, at, after = arguments[:i], arguments[i], arguments[i + 1 :]
    return mpmath.diff(lambda value: exact(*map(mpmath.mpf, before), value, *map(mpmath.mpf, after)), at)


@pytest.mark.parametrize("part", PARTS[4:6], ids=lambda part: part.__name__)
def test_gradients_of_vectors_are_those_of_float64(part):
    for case in part():
        method = getattr(case.distribution, "func", case.distribution)
        options = getattr(case.distribution, "keywords", {})
        gradients = []
        for dtype in (torch.float32, torch.float64):
            module = copy.deepcopy(method.__self__).to(dtype)
            features = [each.to(dtype).requires_grad_() for each in getattr(case.distribution, "args", ())]
            log_prob = getattr(module, method.__name__)(*features, **options).log_prob(case.value.to(dtype))
            own = [*features, *module.parameters()]
            gradients.append(torch.autograd.grad(log_prob.sum(), own) if own else ())
        for found, exact in zip(*gradients, strict=True):
            # A triangle is rounded before its inverse, which has large elements, is applied to a vector.
            assert (found - exact).abs().max() <= 1e-3 * exact.abs().max(), (case.part, case.values)
