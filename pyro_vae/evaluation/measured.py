"""A row of the table of compare: one objective's bounds, their noise and gradients, measured part by part."""

import copy
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_vae.compiled.function import CompiledFunction
from pyro_vae.devices import wide
from pyro_vae.engine import rng
from pyro_vae.engine.program import Program
from pyro_vae.errors import PyroVAEError
from pyro_vae.evaluation.estimate import Estimate
from pyro_vae.evaluation.pieces import Pieces
from pyro_vae.evaluation.sharing import Sharing
from pyro_vae.objectives import ELBO, Objective

T = TypeVar("T")

REPEAT = 1  # a use of random numbers
ROWS_AT_ONCE = 2**15  # data times particles in one run: 100 MB for each float32 tensor of 784 pixels


class Measured:
    """What is measured of an objective. The gradient's bias is that on the first minibatch of the first part."""

    def __init__(
        self,
        objective: Objective,
        parameters: tuple[dict[str, Tensor], dict[str, Tensor]],
        repeats: int,
        compile: bool,
        share: Sharing,
        place: int,
    ) -> None:
        self.objective = copy.copy(objective)  # with fixed settings, since a measured loss is not a step of schedules
        vars(self.objective).update(objective.scheduled())
        self.leaves, self.own = (
            [v for group in groups for v in group.values()] for groups in (parameters, parameters[1:])
        )
        self.in_model = sum(value.numel() for value in parameters[0].values())
        self.compile, self.share, self.sizes = compile, share, set[int]()
        self.gradient: Callable[..., Tensor] | None = None
        self.repeats = repeats
        self.own_repeats = [i for i in range(repeats) if (place * repeats + i) % share.size == share.rank]
        self.seconds = dict.fromkeys(self.own_repeats, 0.0)
        self.gradients: dict[int, Any] = dict.fromkeys(self.own_repeats, 0.0)  # each the sum over data
        self.beside_score: dict[int, Tensor | None] = {}
        self.per_datum: list[Tensor] = []
        self.variance = 0.0  # the sum over data

    def add(self, data: Pieces) -> None:
        """Measure it on a part of the data."""
        program, chunks = data.program, data.minibatches(ROWS_AT_ONCE // self.objective.num_samples)
        bounds = {}
        for i in self.own_repeats:
            gradient = self._gradient(program, chunks)
            self.share.seed(i, REPEAT)
            with torch.no_grad():
                parts = [self.objective.bound(program.model, program.guide, *chunk) for chunk in chunks]
                bounds[i] = wide(torch.cat(parts))
            started = _now(program.args[0])
            parts = list(map(gradient, *zip(*chunks, strict=True)))
            self.gradients[i] = self.gradients[i] + torch.stack(parts).sum(0)
            self.seconds[i] += _now(program.args[0]) - started
            if i not in self.beside_score:
                of_guide = partial(_gradient_of, program, leaves=self.own, chunk=chunks[0])
                self.beside_score[i] = self._beside_score(parts[0][self.in_model :], of_guide, first=i == 0)
        per_repeat = torch.stack(self._of_all_repeats(bounds, data.device))
        self.per_datum.append(per_repeat.mean(0))
        self.variance += per_repeat.var(0).sum().item()

    def _of_all_repeats(self, own: dict[int, T], device: torch.device | None = None) -> list[T]:
        """What all processes have, by repeat."""
        found = {i: value for each in self.share.all(own, device) for i, value in each.items()}
        return [found[i] for i in range(self.repeats)]

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
        device = self.leaves[0].device
        stacked = torch.stack([torch.as_tensor(each) for each in self._of_all_repeats(self.gradients, device)])
        bound = Estimate.of(per_datum)
        row = {
            "bound": bound.value,
            "bound_se": bound.standard_error,
            "estimator_std": math.sqrt(self.variance / len(per_datum)),
            "grad_snr_model": _signal_to_noise(stacked[:, : self.in_model]),
            "grad_snr_guide": _signal_to_noise(stacked[:, self.in_model :]),
            "grad_bias_z": _bias(self._of_all_repeats(self.beside_score)),
            "milliseconds": 1e3 * statistics.median(self._of_all_repeats(self.seconds)),
        }
        return row, per_datum

    def _beside_score(self, path: Tensor, gradient: Callable[[Objective], Tensor], *, first: bool) -> Tensor | None:
        """A gradient along paths, and one by the score function, in a fixed random direction; None where one is not.

        The third number is that of rounding; it is of the `first` repeat.
        """
        objective, size = self.objective, 0.0
        score = "vimco" if objective.num_samples > 1 and "vimco" in objective.gradients else "score"
        free_bits = isinstance(objective, ELBO) and objective.free_bits
        if objective.estimator.path != "all" or score not in objective.gradients or free_bits or not path.numel():
            return None
        if self.repeats < 5:  # of few, the standard error is no guide
            return None
        try:
            scored = gradient(_with_gradient(objective, score))
        except PyroVAEError:  # there is no score function, such as where a support depends on parameters
            return None
        if first:
            # Both may be zero but for rounding, as at the exact posterior. The pathwise gradient has terms that cancel.
            whole = gradient(_with_gradient(objective, "pathwise")) if "pathwise" in objective.gradients else path
            size = 100 * torch.finfo(whole.dtype).eps * whole.norm().item()
        direction = torch.randn(path.numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return torch.stack([*(wide(each).cpu() @ direction for each in (path, scored)), direction.new_tensor(size)])


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


def _bias(beside_score: list[Tensor | None]) -> float:
    """How far gradients along paths are from the score function's, in standard errors; NaN where one does not exist."""
    known = [each for each in beside_score if each is not None]
    if len(known) < len(beside_score):
        return math.nan
    paths, scored, rounding = torch.stack(known).T
    error = torch.stack([each.var() / len(each) for each in (paths, scored)]).sum().sqrt().item()
    size = math.hypot(error, rounding.sum().item())
    return (paths.mean() - scored.mean()).item() / size if size else math.nan  # a fixed guide has no gradient


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
