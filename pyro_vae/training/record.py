"""The record of a training that callbacks are given."""

import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pandas as pd
import torch
from torch import Tensor, nn

from pyro_vae.checks import checked
from pyro_vae.engine.minibatches import Batch, Minibatches
from pyro_vae.printed import Printed
from pyro_vae.training import freezing, optimizers
from pyro_vae.training.validation import validate

if TYPE_CHECKING:
    from pyro_vae.training.loop import Loop

T = TypeVar("T")
Data = Any  # what `fit` takes as data


class Record(Printed):
    r"""What a callback is given: where the training is, its numbers, and the parts that it works on.

    After a step, the numbers are those of the step's minibatch; after an epoch, the means of the epoch. All of them are
    nats per datum unless stated.

    Attributes:
        epoch: the current epoch, from 1.
        step: the number of steps of the optimiser so far.
        beta: the weight of the KL in this step's loss; NaN of an objective without one.
        lr: the step size of the optimiser's first group.
        examples_per_second: data trained on in a second.
        validation_bound: the bound of the validation data, after an epoch or :class:`Validate`; NaN otherwise.
        batch: the arguments of the program in this step, a tuple.
        validates: whether `fit` has validation data.
        model, guide, objective, optimizer: as `fit` got or made them.
    """

    epoch: int
    step: int
    beta: float = math.nan
    lr: float = math.nan
    examples_per_second: float = math.nan
    validation_bound: float = math.nan
    batch: Batch = ()

    def __init__(self, loop: "Loop", epoch: int | None = None) -> None:
        self._loop, self.validates = loop, loop.held_out is not None
        self.epoch, self.step = loop.epoch if epoch is None else epoch, loop.steps
        self.model, self.guide = loop.program.model, loop.program.guide
        self.objective, self.optimizer = loop.objective, loop.optimizer
        self.lr = float(loop.optimizer.param_groups[0].get("lr", math.nan))
        self._mean: Any = None  # the bound, and its parts, as tensors, which are read when they are asked for
        self._parts: Tensor | None = None
        self._norm: Tensor | None = None

    @property
    def bound(self) -> float:
        """The mean bound, the objective that is trained."""
        return math.nan if self._mean is None else float(self._mean)

    @property
    def reconstruction(self) -> float:
        """The mean of log p(x|z) under the guide; NaN of an objective of another package."""
        return math.nan if self._parts is None else float(self._parts[0])

    @property
    def kl(self) -> float:
        """The mean KL of the guide to the prior; NaN of an objective of another package."""
        return math.nan if self._parts is None else float(self._parts[1])

    @property
    def gradient_norm(self) -> float:
        """The Euclidean norm of the gradient before clipping; NaN after an epoch."""
        if self._norm is None and self.batch:
            gradients = [p.grad for p in optimizers.parameters_of(self.optimizer) if p.grad is not None]
            self._norm = torch.nn.utils.get_total_norm(gradients)
        return math.nan if self._norm is None else float(self._norm)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters in training, by name, such as ``"likelihood.decoder.1.weight"``."""
        return {optimizers.plain(name): value for name, value in self._loop.parameters.items()}

    @property
    def history(self) -> pd.DataFrame:
        """The table of the finished epochs, as `fit` returns it."""
        return self._loop.history()

    def numbers(self) -> dict[str, float]:
        """The numbers that are known here, by name, as a logger takes them."""
        names = ("bound", "reconstruction", "kl", "beta", "lr", "gradient_norm", "examples_per_second")
        found = {name: getattr(self, name) for name in (*names, "validation_bound")}
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def _statement(self) -> str:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in self.numbers().items())
        return f"epoch {self.epoch}, step {self.step}: {numbers}".rstrip(": ")

    def _rows(self) -> dict[str, object]:
        numbers = {name: f"{value:.4g}" for name, value in self.numbers().items()}
        return {"epoch": self.epoch, "step": self.step, **numbers}

    def validate(self, data: Data, batch_size: int | None = None) -> float:
        """The mean bound of these data, without gradients, in evaluation mode, with the same noise each time."""
        return validate(self._loop, self.held_out(data, batch_size))

    def held_out(self, data: Data, batch_size: int | None = None) -> Minibatches:
        """These data in minibatches, checked."""
        if isinstance(data, Minibatches):
            return data
        program, _ = self._loop.unweighed
        found = Minibatches(data, batch_size, "data", program.model, program.guide)
        found.device = self._loop.program.device
        return found

    def modules(self, parameters: list[Tensor]) -> list[nn.Module]:
        """The program's modules whose parameters in training are all among these, with their parts."""
        program, _ = self._loop.unweighed
        return list(freezing.modules_of(program, parameters, self._loop.parameters.values()))

    def keep(self, who: Any, parameters: list[Tensor], modules: list[nn.Module]) -> None:
        """Say that a callback keeps parameters as they are, so that no closed form moves them either.

        Those of the modules that have buffers go into evaluation mode, until :meth:`release`, or the training's end.
        """
        self._loop.kept.keep(who, parameters, freezing.with_buffers(modules))

    def release(self, who: Any) -> None:
        """Undo :meth:`keep`."""
        self._loop.kept.release(who)

    def enter(self, context: AbstractContextManager[T]) -> T:
        """Enter a context that is left when the training ends, however it ends, such as an open file."""
        return self._loop.callbacks.ending.enter_context(context)

    def save(self, path: str | Path) -> None:
        """Write a checkpoint, from which `load_parameters` reads the parameters that they are now.

        `fit` goes on from it too, without `patience`.
        """
        self._loop.save(path)

    @checked
    def stop(self, reason: str = "a callback ended it") -> None:
        """End the training after this step, or this epoch.

        The progress bar's last line shows the reason, and ``history.attrs["stopped"]`` has it.
        """
        self._loop.asked = reason
