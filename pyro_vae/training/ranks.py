"""What the processes of a training, its ranks, sum and decide together; alone, a process asks nobody.

Each rank has a share of each minibatch. Gradients are summed over data and divided by the number of data, so that the
step is that of one process, also where shares have different sizes.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from pyro_vae.distributed import Group, is_alone
from pyro_vae.engine import rng
from pyro_vae.engine.minibatches import Batch, Share
from pyro_vae.engine.modules import buffers
from pyro_vae.engine.ownership import parameters_of
from pyro_vae.errors import PyroVAEError
from pyro_vae.training.accumulation import Accumulated

T = TypeVar("T")

ROUNDING = 1e-3  # how far, relative to their size, parameters may be apart by what processors round differently


class Agreed(NamedTuple):
    """What the ranks know together before a step."""

    any_minibatch: bool  # whether a rank had one
    save: bool  # whether rank 0 wants a checkpoint after the step
    new: bool  # whether a rank has found new parameters


class Ranks:
    """The ranks of a training.

    Attributes:
        group: the process group; None alone.
        failure: what this rank could not do since the last step, of which all ranks learn at the step.
        new: parameters that a minibatch of this rank was the first to use, and that minibatch.
        late: the sums of their gradients.
        buffers: the place of each parameter's gradient in what is summed.
    """

    def __init__(self, group: Group | None) -> None:
        self.group = group
        self.failure: Exception | None = None
        self.new: list[tuple[dict[str, Tensor], Batch]] = []
        self.late: dict[Tensor, Tensor] = {}
        self.with_callbacks = False  # whether any rank has some
        self.buffers: dict[Tensor, Tensor] = {}
        self.flat: list[Tensor] = []

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and calls callbacks."""
        return self.group is None or self.group.is_first

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""
        return 0 if self.group is None else self.group.rank

    @property
    def share(self) -> Share | None:
        """This process's part of so many rows; None is all of them, also while it works alone."""
        return None if self.group is None or is_alone() else self.group.share

    def sum_of(self, *numbers: float) -> list[float]:
        """The sums over ranks, after an attempt of each; those of this process while it works alone."""
        if self.group is None or is_alone():
            return list(numbers)
        self.settle()
        return [sum(each) for each in zip(*self.group.gather(numbers), strict=True)]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks."""
        return [value] if self.group is None else self.group.gather(value)

    def first_does(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, which alone does it."""
        return work() if self.group is None else self.group.first_does(work)

    def any_of(self, value: T | None) -> T | None:
        """The first rank's value that is not None."""
        return next((each for each in self.gather(value) if each is not None), None)

    def together(self) -> AbstractContextManager[None]:
        """Around work of each rank by itself: a failure of one is raised on all."""
        return nullcontext() if self.group is None else self.group.together()

    @contextmanager
    def entering(self, context: AbstractContextManager[Any]) -> Iterator[None]:
        """Enter a context of this rank's own: a failure to do so is raised on all."""
        with ExitStack() as stack:
            with self.together():
                stack.enter_context(context)
            yield

    def settle(self) -> None:
        """Raise the failures of the attempts since the last step, on all ranks."""
        if self.group is not None:
            failure, self.failure = self.failure, None
            self.group.raise_failures(failure)

    def attempt(self, work: Callable[..., T], *args: Any) -> T | None:
        """Do some work; with other ranks, keep its failure until they learn of it, and do no more until then."""
        if self.group is None:
            return work(*args)
        if self.failure is None:
            try:
                return work(*args)
            except Exception as error:
                self.failure = error
        return None

    def reading(self, batches: Iterator[Batch | None], left: int | None) -> Iterator[Batch | None]:
        """The minibatches of this rank, in step with the others: None where it has none, as long as another may have.

        `left` is how many there are at most on any rank; None is not known.
        """
        while left is None or left > 0:
            yield self.attempt(next, batches, None)
            left = None if left is None else left - 1

    def provide(self, parameters: dict[str, Tensor]) -> None:
        """Make buffers for the gradients of these parameters, one for each type; their addresses stay."""
        each = list(dict.fromkeys(parameters.values()))
        if self.group is None or each == list(self.buffers):
            return
        self.buffers, self.flat = {}, []
        for kind in dict.fromkeys((p.dtype, p.device) for p in each):
            own = [p for p in each if (p.dtype, p.device) == kind]
            flat = torch.zeros(sum(p.numel() for p in own), dtype=kind[0], device=kind[1])
            parts = flat.split([p.numel() for p in own])
            self.buffers |= {p: part.view(p.shape) for p, part in zip(own, parts, strict=True)}
            self.flat.append(flat)
        self.buffers = {p: self.buffers[p] for p in each}

    def sum(self, sums: Accumulated, *, save: bool) -> Agreed:
        """Sum what the ranks' minibatches have given; say what the ranks decide. Alone, nothing changes.

        Raises:
            OtherRankError: another rank has failed; this rank's own failure is raised as it is.
        """
        if self.group is None:
            return Agreed(sums.taken > 0, save, bool(self.new))
        on_device = any(each.is_cuda for each in self.flat)  # a GPU's loss is not read
        device = self.flat[0].device if on_device else torch.device("cpu")
        parts = torch.zeros(2, dtype=torch.float64) if sums.parts is None else sums.parts
        loss = torch.as_tensor(sums.total, dtype=torch.float64, device=device).reshape(1)
        values = torch.cat([loss, parts.to(loss)])
        flags = [self.failure is not None, save, sums.taken > 0, bool(self.new), sums.parts is not None]
        used = [parameter in sums.sums for parameter in self.buffers]
        numbers = torch.tensor([sums.count, *map(float, flags + used)], dtype=torch.float64)
        for parameter, buffer in self.buffers.items():
            if parameter not in sums.sums:
                buffer.zero_()
            elif sums.sums[parameter] is not buffer:  # of a minibatch before there were buffers
                buffer.copy_(sums.sums[parameter])
        if not on_device:
            numbers = torch.cat([numbers, values])
        self.group.sum(numbers, *self.flat, *([values] if on_device else []))
        count, failed, saves, any_found, new, with_parts, *rest = numbers.tolist()
        if failed:
            self.settle()
        self.late = {p: each for p, each in sums.sums.items() if p not in self.buffers}
        values = values if on_device else numbers[-3:]
        sums.count, sums.total = count, values[0] if on_device else rest[-3]
        sums.parts = values[1:] if with_parts else None
        sums.sums = {p: buffer for (p, buffer), n in zip(self.buffers.items(), rest, strict=False) if n}
        return Agreed(bool(any_found), bool(saves), bool(new))

    def find_new(self, loop: Any, sums: Accumulated) -> None:
        """Train, on all ranks, parameters that a minibatch of one rank was the first to use."""
        if self.group is None:
            return
        own = [({name: value.detach() for name, value in found.items()}, batch) for found, batch in self.new]
        gathered = [each for of_rank in self.group.gather(own) for each in of_rank]
        values = {name: value for found, _ in reversed(gathered) for name, value in found.items()}
        found: dict[str, Tensor] = {}
        with self.together():
            with rng.preserved():  # a run on that minibatch makes them where they are not yet
                for _, batch in gathered:
                    for trace in loop.program.on(batch).trace():
                        found |= {n: p for n, p in parameters_of(trace).items() if n in values}
            if found.keys() != values.keys():
                raise PyroVAEError(
                    f"expected each rank to find the parameters that a later minibatch uses, {', '.join(values)}, got "
                    f"{', '.join(found) or 'none'} here. Use all parameters in the first minibatch."
                )
            with torch.no_grad():
                for name, parameter in found.items():
                    parameter.copy_(values[name])
        gradients = {p: self.late.get(p, torch.zeros_like(p, requires_grad=False)) for _, p in sorted(found.items())}
        self.group.sum(*gradients.values())
        loop.add(found, gathered[0][1])
        sums.sums |= gradients
        self.new, self.late = [], {}

    def check_in(self, asked: str | None = None) -> str | None:
        """After callbacks: raise the failure of one on all ranks, or return why one of them asks for the end."""
        if self.group is None or not self.with_callbacks:
            return asked
        flags = torch.tensor([self.failure is not None, asked is not None], dtype=torch.float64)
        self.group.sum(flags)
        if bool(flags[0]):
            self.settle()
        return self.any_of(asked) if bool(flags[1]) else None

    def hold_together(self, loop: Any) -> None:
        """Give all ranks rank 0's parameters and buffers; refuse parameters that are further away than by rounding."""
        if self.group is None:
            return
        parameters, epoch = loop.parameters, loop.epoch
        self.group.broadcast(buffers(loop.modules).values())
        own = {name: value.detach().clone() for name, value in parameters.items()}
        self.group.broadcast(parameters.values())
        apart = [
            name
            for name, value in own.items()
            if not bool((value - parameters[name]).norm() <= ROUNDING * parameters[name].norm())
        ]
        found = self.group.gather(apart)
        for rank, names in enumerate(found):
            if names:
                raise PyroVAEError(
                    f"rank {rank} of {self.group.size} has other parameters in epoch {epoch}: expected '{names[0]}' "
                    "to be as on rank 0, got other values. A callback that changes parameters or gradients must be "
                    "called on all ranks: set its on_all_ranks to True."
                )
