"""A step of a traced and compiled program against the same step uncompiled."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vae.compiled.step import compile_step
from pyro_vae.errors import MissingCompilerError, PyroVAEError
from pyro_vae.objectives import Objective
from pyro_vae.testing.reports import Report


def check_compiled(
    report: Report,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    objective: Objective,
    parameters: Sequence[Tensor],
    x: Tensor,
) -> None:
    """Loss and gradients from two seeds. Both forms take the same random numbers, so that only rounding differs."""
    optimizer = torch.optim.SGD(list(parameters), lr=1e-3)
    step = compile_step(model, guide, objective, optimizer)
    for seed in range(2):
        torch.manual_seed(seed)
        try:
            loss = step.compute(x)
        except MissingCompilerError:
            raise
        except PyroVAEError as error:
            report.fail(
                "compiled", "a program that can be traced", f"the refusal: {error}", "Decide nothing by values."
            )
        found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        torch.manual_seed(seed)
        objective.step -= 1
        eager = objective.differentiable_loss(model, guide, x)
        exact = torch.autograd.grad(eager, list(parameters), allow_unused=True, materialize_grads=True)
        cause = "Something is a constant in the traced run: a Python number, or a decision by a tensor's value."
        tolerance = 1e-9 if eager.dtype == torch.float64 else 1e-4  # of sums in another order
        report.close("compiled", loss, eager, tolerance * (1 + eager.abs().item()), cause, "the uncompiled loss")
        flat, expected = (torch.cat([g.flatten() for g in group]) for group in (found, exact))
        scale = tolerance * (1 + expected.norm().item())
        report.close("compiled", flat, expected, scale, cause, "the uncompiled derivative")
