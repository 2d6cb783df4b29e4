"""An evaluation's work in pieces, shared out over the processes of a group, with the same numbers for any of them.

A piece is a minibatch of rows, say. Its random numbers have a seed of its own, so no number depends on who does it, or
on what was done before. What sums over pieces does so after all of them have come back, in their order.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import pyro
import torch
import torch.distributed as dist
from torch import Tensor

from pyro_vae.distributed import Group, carried, group_of, mixed
from pyro_vae.engine import rng
from pyro_vae.engine.first_run import placed
from pyro_vae.engine.modules import eval_mode
from pyro_vae.engine.parameters import find_parameters
from pyro_vae.engine.program import Program
from pyro_vae.errors import OtherRankError
from pyro_vae.evaluation.evidence import LogLikelihood
from pyro_vae.evaluation.pieces import Args, Pieces, Programs, rows_at_once
from pyro_vae.objectives import Objective

T = TypeVar("T")
R = TypeVar("R")

LONGEST = timedelta(days=30)  # how long ranks that have made a call wait for the work of one another
ALONE = "Pass distributed=False to an evaluation that each rank makes alone."


class _Ranks(Group):
    """The ranks of one call. Each of its messages says whether the rank has failed, so a failure reaches all."""

    def gather(self, value: T) -> list[T]:
        found = super().gather(("", value))
        for rank, (failure, _) in enumerate(found):
            if failure:
                raise OtherRankError(f"rank {rank} of {self.size} has failed in {self.doing}: {failure}")
        return [each for _, each in found]

    def fail(self, error: Exception) -> None:
        """Tell the other ranks of the failure of this one, in place of its next message."""
        with suppress(OtherRankError):  # they have left; this rank's own failure is the news
            super().gather((f"{type(error).__name__}: {error}", None))


def _ranks_of(group: Group) -> _Ranks:
    """The ranks of a call that all of them have made. A rank that dies is noticed at once; a slow one has time."""
    if group.patient is None:
        group.patient = dist.new_group(backend="gloo", timeout=LONGEST)
    return _Ranks(group.rank, group.size, group.patient, doing=group.doing)


class Sharing:
    """The pieces of one call: which of them this process does, and with which random numbers.

    Attributes:
        progress: whether to show a progress bar; only rank 0 does.
        speaks: whether to warn of what all ranks see; only rank 0 does.
    """

    def __init__(self, ranks: _Ranks | None, key: int, progress: bool) -> None:
        self.ranks, self.key = ranks, key
        self.rank, self.size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
        self.speaks = self.rank == 0
        self.progress = progress and self.speaks
        self.part = -1

    def parts(self, parts: Iterable[T]) -> Iterator[T]:
        """Parts of the data, after all ranks have agreed on each, and on the parameters.

        What is done with a part leaves the generators as they were, for a loader that draws from them.
        """
        for each in parts:
            self.part += 1
            if self.ranks is not None:
                self._require_same_rows(_program(each).args)
                if not self.part:
                    self._require_same_parameters(each)
            state = rng.get_state()
            yield each
            rng.set_state(state)
        if self.ranks is not None:
            self._require_same_rows(())

    def own(self, number: int) -> range:
        """Which of so many pieces this process does."""
        return range(self.rank, number, self.size)

    def seed(self, piece: int, *use: int) -> None:
        """Begin the random numbers of a piece of this part; those for another `use` are others."""
        pyro.set_rng_seed(mixed(self.key, self.part, piece, *use))

    def each(self, pieces: Sequence[T], work: Callable[[T], R], device: torch.device | None = None) -> list[R]:
        """What `work` makes of each piece, in order, on a device; each process does some of them."""
        own = []
        for i in self.own(len(pieces)):
            self.seed(i)
            own.append(work(pieces[i]))
        return self.in_order(own, len(pieces), device)

    def in_order(self, own: list[R], number: int, device: torch.device | None = None) -> list[R]:
        """What all processes made of so many pieces, in order, from what this one made of its own."""
        found = self.all(own, device)
        return [found[i % self.size][i // self.size] for i in range(number)]

    def all(self, own: R, device: torch.device | None = None) -> list[R]:
        """What each process has, by rank, on a device."""
        if self.ranks is None:
            return [own]
        return [carried(each, device) for each in self.ranks.gather(own)]

    def records(self, programs: Programs, own: Iterable[LogLikelihood], device: torch.device) -> LogLikelihood:
        """One record of all minibatches from those of this process's own ones, without a record of each in memory."""
        sizes = [len(batch[0]) for batch in programs.batches]
        record = LogLikelihood.joined(own, sum(sizes[i] for i in self.own(len(sizes))), device)
        if self.ranks is None:
            return record
        rows = torch.arange(sum(sizes)).split(sizes)
        found = [rows[i] for rank in range(self.size) for i in range(rank, len(sizes), self.size)]
        device = record.per_datum.device
        return LogLikelihood.together(self.all(record, device)).of(torch.cat(found).argsort().to(device))

    def _require_same(self, own: Mapping[str, Any], fix: str) -> None:
        if self.ranks is not None:
            self.ranks.require_same(own, fix)

    def _require_same_rows(self, args: Args) -> None:
        rows = f"rows (hash {_hash_of_rows(args)})" if args else "no more rows"
        self._require_same(
            {"x": f"{len(args[0])} {rows}" if args else rows},
            "Pass the same rows in the same order on each rank, which are shared out here: a DataLoader must neither "
            f"have a DistributedSampler, nor shuffle by a generator that differs. {ALONE}",
        )

    def _require_same_parameters(self, part: Any) -> None:
        program = _program(part)
        if isinstance(part, Pieces):
            program = program.on(part.minibatches(rows_at_once(program.args))[0])
        with torch.no_grad():
            _, state = placed(program, _state)
        own = {name: _hash(value) for name, value in state.items()}
        self._require_same(
            own,
            f"Train with pv.fit on all ranks, or load the same checkpoint on each. {ALONE}",
        )


@contextmanager
def sharing(
    distributed: bool | None, doing: str, seed: int | None, settings: Mapping[str, Any], progress: bool = False
) -> Iterator[Sharing]:
    """Around a whole evaluation: its group, whose ranks have the same settings, and its random numbers.

    Without a seed, one number is drawn from the global generators, which go on from there; rank 0's serves all. Inside
    they have states of their own. A call that fails leaves them as they were. An exception of one rank is raised on
    all.
    """
    group = group_of(distributed, doing)
    ranks = None if group is None else _ranks_of(group)
    before = rng.get_state()
    try:
        key = int(torch.randint(2**62, (), device="cpu")) if seed is None else seed
        if ranks is not None:
            ranks.require_same(
                {name: _words(value) for name, value in {**settings, "seed": seed}.items()},
                f"Pass the same on each rank. {ALONE}",
            )
            key = ranks.gather(key)[0]
        with rng.preserved(mixed(key)):
            yield Sharing(ranks, key, progress)
        if ranks is not None:
            ranks.gather(None)  # a failure after the last piece is known to all, too
    except Exception as error:
        rng.set_state(before)
        if ranks is not None and not isinstance(error, OtherRankError):  # all ranks know of that one
            ranks.fail(error)
        raise


def _program(part: Any) -> Program:
    found: Program = part.program if isinstance(part, Pieces) else part
    return found


def _state(program: Program) -> dict[str, Tensor]:
    """The parameters of a program and the buffers of its modules, by name."""
    with eval_mode(program.modules()) as called:
        model, guide = find_parameters(program)
    found = {f"parameter '{name.replace('$$$', '.')}'": value for name, value in (model | guide).items()}
    seen = {id(value) for value in found.values()}
    for module in dict.fromkeys([*program.modules(), *called]):
        named: Any = [("parameter", module.named_parameters()), ("buffer", module.named_buffers())]
        for kind, values in named:
            for name, value in values:
                if id(value) not in seen:
                    seen.add(id(value))
                    found.setdefault(f"{kind} '{name}' of {type(module).__name__} (number {len(seen)})", value)
    return found


def _hash_of_rows(args: Args) -> str:
    """A hash of all rows, from as many at a time as fit in memory."""
    found = hashlib.blake2b(digest_size=8)
    for column in args:
        found.update(f"{column.dtype} {tuple(column.shape)}".encode())
        for rows in column.split(rows_at_once((column,))):
            found.update(_bytes(rows))
    return found.hexdigest()


def _hash(value: Tensor) -> str:
    found = hashlib.blake2b(f"{value.dtype} {tuple(value.shape)}".encode(), digest_size=8)
    found.update(_bytes(value))
    return f"{tuple(value.shape)} (hash {found.hexdigest()})"


def _bytes(value: Tensor) -> Any:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data if value.numel() else b""


def _words(value: Any, most: float = 200) -> str:
    """A setting in words that are the same on all ranks if it is; a function is known by its name alone."""
    if isinstance(value, Tensor):
        return _hash(value)
    if isinstance(value, str | int | float | None):
        return repr(value)
    if isinstance(value, Mapping):
        text = ", ".join(f"{key}: {_words(each, math.inf)}" for key, each in value.items())
    elif isinstance(value, list | tuple):
        text = ", ".join(_words(each, math.inf) for each in value)
    elif isinstance(value, Objective):
        text = f"{value.name} with {value.num_particles} particles, {_words(vars(value), 0)[-23:]}"
    elif type(value).__module__.startswith("pyro_vae."):
        text = f"{type(value).__name__}({_words(vars(value), math.inf)})"
    else:
        return str(getattr(value, "__qualname__", type(value).__qualname__))
    if len(text) <= most:
        return text
    return f"{text[:100]} ... (hash {hashlib.blake2b(text.encode(), digest_size=8).hexdigest()})"
