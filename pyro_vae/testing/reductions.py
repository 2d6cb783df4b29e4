"""Checks of a reduction of log-weights: its laws, its derivatives and its precision."""

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_vae.objectives import Objective
from pyro_vae.testing.reports import Report
from pyro_vae.testing.slopes import STEP, derivatives

NUM_DATA = 8
ROUNDINGS = 32  # that a particle's share of a reduction may take, of its largest number


def check_reduction(report: Report, objective: Objective, tight: bool) -> bool:
    """Check `reduce` and `reduce_for_guide`; returns whether the guide's is linear."""
    log_w = 2 * torch.randn(objective.num_samples, NUM_DATA, dtype=torch.float64) - 5
    one_bound = type(objective).reduce_for_guide is Objective.reduce_for_guide
    for reduce in [objective.reduce] if one_bound else [objective.reduce, objective.reduce_for_guide]:
        _check_form(report, reduce, log_w)
        if tight:
            _check_tight(report, reduce, log_w)
        _check_slope(report, reduce, log_w)
        _check_float32(report, reduce, log_w)
    return _check_curvature(report, objective, log_w)


def _check_form(report: Report, reduce: Callable[[Tensor], Tensor], log_w: Tensor) -> None:
    bound = reduce(log_w)
    cause = "The reduction is over particles, the first dimension, and keeps data apart."
    report.require(
        bound.shape == log_w.shape[1:], "shapes", f"bounds of shape ({NUM_DATA},)", tuple(bound.shape), cause
    )
    alone = torch.cat([reduce(log_w[:, n : n + 1]) for n in range(NUM_DATA)])
    report.close("columns", bound, alone, 1e-9 * (1 + alone.abs()), cause, "a datum's bound alone,")


def _check_tight(report: Report, reduce: Callable[[Tensor], Tensor], log_w: Tensor) -> None:
    levels = torch.linspace(-20, 20, NUM_DATA, dtype=torch.float64)
    cause = (
        "Look for a constant such as -log K, or for a factor. Pass tight=False if the bound is not meant to be tight."
    )
    report.close(
        "equal weights",
        reduce(levels.expand_as(log_w)),
        levels,
        1e-9 * 21,
        cause,
        "the bound of equal log-weights to be",
    )
    shifted, expected = reduce(log_w + 3.0), reduce(log_w) + 3.0
    report.close("constant factor", shifted, expected, 1e-9 * (1 + expected.abs()), cause, "the bound shifted by 3,")


def slope(reduce: Callable[[Tensor], Tensor], log_w: Tensor) -> Tensor:
    """The derivative of a reduction by each log-weight, (K, N)."""
    log_w = log_w.detach().clone().requires_grad_()
    return derivatives(reduce(log_w).sum(), [log_w])[0]


def _each(function: Callable[[Tensor], Tensor], log_w: Tensor, step: float, k: int) -> Tensor:
    """The central difference of a function by the k-th log-weight of every datum."""
    change = torch.zeros_like(log_w)
    change[k] = step
    return (function(log_w + change) - function(log_w - change)) / (2 * step)


def _check_slope(report: Report, reduce: Callable[[Tensor], Tensor], log_w: Tensor) -> None:
    found = slope(reduce, log_w)
    expected = torch.stack([_each(reduce, log_w, STEP, k) for k in range(len(log_w))])
    cause = "Something in the reduction is detached, or has no derivative."
    tolerance = 1e-6 * (1 + expected.abs().max().item())  # the difference's own error is 1e-10, its rounding 1e-9
    report.close("slope", found, expected, tolerance, cause, "the finite difference")


def _check_curvature(report: Report, objective: Objective, log_w: Tensor) -> bool:
    reduce = objective.reduce_for_guide
    expected = torch.stack([_each(lambda w: slope(reduce, w), log_w, 1e-4, k)[k] for k in range(len(log_w))])
    found = objective.curvature(log_w)
    cause = "`curvature` is the second derivative of another reduction. Correct it, or drop it: it is found without."
    tolerance = 1e-5 * (1 + expected.abs().max().item())
    report.close("curvature", found, expected, tolerance, cause, "the finite difference")
    return bool((expected.abs() < 1e-7).all())


def _check_float32(report: Report, reduce: Callable[[Tensor], Tensor], log_w: Tensor) -> None:
    unit = torch.finfo(torch.float32).eps / 2
    for spread in (1.0, 1e3):
        narrow = (spread * log_w - 100).float()
        expected, found = reduce(narrow.double()), reduce(narrow)
        cause = "Work in logarithms (logsumexp, logaddexp), and make tensors in the type of the log-weights."
        report.require(found.dtype == torch.float32, "float32", "bounds of float32", found.dtype, cause)
        # Each particle's rounding is passed on by the slope, and the sum over particles rounds once for each.
        passed_on = slope(reduce, narrow.double()).abs().sum(0).clamp(min=1)
        size = passed_on * narrow.double().abs().amax(0)
        tolerance = unit * (ROUNDINGS + len(log_w)) * size
        report.close("float32", found, expected, tolerance, cause, f"with log-weights {spread:g} apart, in float64")
