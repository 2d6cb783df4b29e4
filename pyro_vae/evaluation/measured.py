"""A row of the table of compare: one objective's bounds, their noise and gradients, measured part by part."""

import copy
import math
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pyro_vae.compiled.function import CompiledFunction
from pyro_vae.devices import wide
from pyro_vae.engine import rng
from pyro_vae.engine.program import Program
from pyro_vae.errors import PyroVAEError
from pyro_vae.evaluation.estimate import Estimate
from pyro_vae.evaluation.pieces import Pieces
from pyro_vae.objectives import ELBO, Objective

ROWS_AT_ONCE = 2**15  # data times particles in one run: 100 MB for each float32 tensor of 784 pixels


class Measured:
    """What is measured of an objective. The gradient's bias is that on the first minibatch of the first part."""

    def __init__(
        self,
        objective: Objective,
        parameters: tuple[dict[str, Tensor], dict[str, Tensor]],
        repeats: int,
        compile: bool,
        numbers: rng.Continued,
    ) -> None:
        self.objective = copy.copy(objective)  # with fixed settings, since a measured loss is not a step of schedules
        vars(self.objective).update(objective.scheduled())
        self.leaves, self.own = (
            [v for group in groups for v in group.values()] for groups in (parameters, parameters[1:])
        )
        self.in_model = sum(value.numel() for value in parameters[0].values())
        self.compile, self.numbers, self.sizes = compile, numbers, set[int]()
        self.gradient: Callable[..., Tensor] | None = None
        self.seconds = [0.0] * repeats
        self.gradients: list[Tensor | float] = [0.0] * repeats  # each the sum over data
        self.per_datum: list[Tensor] = []
        self.variance = 0.0  # the sum over data
        self.bias: float | None = None

    def add(self, data: Pieces) -> None:
        """Measure it on a part of the data."""
        with self.numbers.inside():
            program, chunks = data.program, data.minibatches(ROWS_AT_ONCE // self.objective.num_samples)
            gradient = self._gradient(program, chunks)
            bounds, first = [], []
            for i in range(len(self.seconds)):
                with torch.no_grad():
                    parts = [self.objective.bound(program.model, program.guide, *chunk) for chunk in chunks]
                    bounds.append(wide(torch.cat(parts)))
                started = _now(program.args[0])
                parts = list(map(gradient, *zip(*chunks, strict=True)))
                self.gradients[i] = self.gradients[i] + torch.stack(parts).sum(0)
                self.seconds[i] += _now(program.args[0]) - started
                first.append(parts[0])
            per_repeat = torch.stack(bounds)
            self.per_datum.append(per_repeat.mean(0))
            self.variance += per_repeat.var(0).sum().item()
            if self.bias is None:
                of_guide = partial(_gradient_of, program, leaves=self.own, chunk=chunks[0])
                self.bias = _bias([part[self.in_model :] for part in first], self.objective, of_guide)

    def _gradient(self, program: Program, chunks: list[tuple[Tensor, ...]]) -> Callable[..., Tensor]:
        """A function of a minibatch; if it is compiled, it is so before the timing."""
        if self.gradient is None:

            def gradient(*chunk: Tensor) -> Tensor:
                return _gradient_of(program, self.objective, self.leaves, chunk)

            self.gradient = CompiledFunction(gradient, program.modules()) if self.compile else gradient
        if self.compile:
            with rng.preserved():
                for chunk in {len(chunk[0]): chunk for chunk in chunks if len(chunk[0]) not in self.sizes}.values():
                    self.sizes.add(len(chunk[0]))
                    self.gradient(*chunk)
        return self.gradient

    def row(self) -> tuple[dict[str, float], Tensor]:
        """The row, and the bound of each datum, averaged over repeats."""
        per_datum = torch.cat(self.per_datum)
        stacked = torch.stack([torch.as_tensor(each) for each in self.gradients])
        bound = Estimate.of(per_datum)
        row = {
            "bound": bound.value,
            "bound_se": bound.standard_error,
            "estimator_std": math.sqrt(self.variance / len(per_datum)),
            "grad_snr_model": _signal_to_noise(stacked[:, : self.in_model]),
            "grad_snr_guide": _signal_to_noise(stacked[:, self.in_model :]),
            "grad_bias_z": math.nan if self.bias is None else self.bias,
            "milliseconds": 1e3 * statistics.median(self.seconds),
        }
        return row, per_datum


@torch.enable_grad()
def _gradient_of(program: Program, objective: Objective, leaves: list[Tensor], chunk: tuple[Tensor, ...]) -> Tensor:
    """The gradient of an objective's loss on a minibatch, as a vector."""
    loss = objective.differentiable_loss(program.model, program.guide, *chunk)
    parts = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def _now(x: Tensor) -> float:
    """The time after all work queued on x's device has finished."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def _bias(paths: list[Tensor], objective: Objective, gradient: Callable[[Objective], Tensor]) -> float:
    """How far gradients along paths are from the score function's, in standard errors; NaN where one does not exist."""
    score = "vimco" if objective.num_samples > 1 and "vimco" in objective.gradients else "score"
    free_bits = isinstance(objective, ELBO) and objective.free_bits
    if objective.estimator.path != "all" or score not in objective.gradients or free_bits or not paths[0].numel():
        return math.nan
    if len(paths) < 5:  # of few repeats, the standard error is no guide
        return math.nan
    try:
        scored = [gradient(_with_gradient(objective, score)) for _ in paths]
    except PyroVAEError:  # there is no score function, such as where a support depends on parameters
        return math.nan
    direction = torch.randn(paths[0].numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    along = [wide(torch.stack(each)).cpu() @ direction for each in (paths, scored)]
    error = torch.stack([each.var() / len(each) for each in along]).sum().sqrt().item()
    # Both may be zero but for rounding, as at the exact posterior. The pathwise gradient has the terms that cancel.
    whole = gradient(_with_gradient(objective, "pathwise")) if "pathwise" in objective.gradients else paths[0]
    rounding = 100 * torch.finfo(whole.dtype).eps * whole.norm().item()
    size = math.hypot(error, rounding)
    return (along[0].mean() - along[1].mean()).item() / size if size else math.nan  # a fixed guide has no gradient


def _with_gradient(objective: Objective, gradient: str) -> Objective:
    other = copy.copy(objective)
    other.gradient = gradient
    return other


def _signal_to_noise(gradients: Tensor) -> float:
    """The signal-to-noise ratio of gradients (R, P), corrected for the noise in their mean; NaN if P is 0."""
    if gradients.shape[1] == 0:
        return math.nan
    gradients = wide(gradients)
    noise = gradients.var(0).sum()
    signal = (gradients.mean(0).square().sum() - noise / len(gradients)).clamp(min=0)
    return (signal / noise).sqrt().item()
