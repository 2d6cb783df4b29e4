"""Derivatives of scalars, and a check of them against finite differences."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pyro_vae.testing.reports import Report

STEP = 1e-5  # whose square, the difference's own error, is as small as its rounding


def derivatives(value: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The derivative of a scalar by each tensor, zero where it does not depend on one."""
    if not value.requires_grad:
        return [torch.zeros_like(tensor) for tensor in tensors]
    return list(torch.autograd.grad(value, list(tensors), allow_unused=True, materialize_grads=True))


def check_slopes(report: Report, function: Callable[[], Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Check the gradient of a float64 scalar by each tensor against finite differences along random directions."""
    cause = "Something is detached, or has a derivative of its own, such as a clamp that preserves gradients."
    value = function()
    found = derivatives(value, list(tensors.values()))
    for (name, tensor), gradient in zip(tensors.items(), found, strict=True):
        kept = tensor.detach().clone()
        for _ in range(2):
            direction = torch.randn_like(tensor)
            direction = direction / direction.norm().clamp(min=1e-12)
            ends = []
            with torch.no_grad():
                for sign in (1, -1):
                    tensor.copy_(kept + sign * STEP * direction)
                    ends.append(function().detach())
                tensor.copy_(kept)
            expected = (ends[0] - ends[1]) / (2 * STEP)
            got = (gradient * direction).sum()
            tolerance = 1e-5 * (1 + expected.abs().item()) + 1e-9 * value.abs().item()
            report.close("slope", got, expected, tolerance, cause, f"by {name}, the finite difference")
