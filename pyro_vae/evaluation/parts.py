"""The data x of an evaluation in parts: all of them at once if they are in memory, else as they are read, in one pass.

An evaluation is made of each part, and the results are joined. A part has as many minibatches of a DataLoader, or rows
of an array in a file, as fit in memory. So memory depends on the number of data only as far as the results do.
"""

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import pyro
import torch
from torch.utils.data import DataLoader

from pyro_vae.devices import wide
from pyro_vae.engine import rng
from pyro_vae.engine.first_run import placed
from pyro_vae.engine.minibatches import Minibatches
from pyro_vae.engine.modules import PyroFunction, eval_mode
from pyro_vae.engine.program import Program
from pyro_vae.errors import PyroVAEError
from pyro_vae.evaluation.pieces import (
    Args,
    Pieces,
    checked_program,
    checked_sites,
    dense,
    has_no_tensors,
    is_divisible,
    memory_of,
    program_on,
    progress_bar,
    require_data,
    rows_at_once,
    with_checks,
)


class Parts:
    """A program on the parts of its data, and what they show.

    Attributes:
        number: the number of data, as far as it is known before they are read.
        seen: the number of data so far.
        divisible: whether the program gives a datum the same densities in every minibatch; None is not known.
    """

    def __init__(self, model: PyroFunction, guide: PyroFunction | None, x: Any, least: int = 1) -> None:
        self.model, self.guide, self.x, self.least = model, guide, x, least
        batches = None if has_no_tensors(x) else Minibatches(x, None, "x", model, guide)
        self.whole: Program | None = None
        if batches is None or not batches.is_read:
            self.whole = program_on(model, guide, x, least)
        self.number: int | None = None if batches is None else batches.number
        if self.whole is not None:
            self.number = len(self.whole.args[0])
        self.seen = 0
        self.divisible: bool | None = None
        self.total: _Total | None = None

    @property
    def sure_number(self) -> int | None:
        """The number of data; None where a DataLoader's `collate_fn` may give others than its sampler says."""
        return None if isinstance(self.x, DataLoader) else self.number

    def bar(self, progress: bool) -> Any:
        """A progress bar over all data, where these are read; those in memory have the bars of their evaluation."""
        return progress_bar(self.number, "datum", "x", progress and self.whole is None)

    def modules(self) -> list[torch.nn.Module]:
        """The modules that model and guide are, or are methods of."""
        return Program(self.model, self.guide).modules()

    def __iter__(self) -> Iterator[Program]:
        """The program on each part; what is read is on its parameters' device.

        Raises:
            ValueError: there are several parts, and the program has other densities for a datum in each of them.
        """
        self.seen = 0
        if self.whole is not None:
            self.seen = len(self.whole.args[0])
            yield self.whole
            return
        first: Program | None = None
        for args, is_last in _with_last(self._read()):
            program = program_on(self.model, self.guide, args)
            if first is None:
                first, self.divisible = placed(program, is_divisible, whole=False)
                if not self.divisible and not is_last:
                    with pyro.validation_enabled():
                        checked_sites(first.on(args), observing=False)  # what is wrong on any data says so itself
                    _refuse(len(args[0]))
            self.seen += len(args[0])
            yield first.on(args)
        require_data(self.seen, self.least)

    def _read(self) -> Iterator[Args]:
        """What is read, in parts that fit in memory; an error if it is not what was read before."""
        batches = Minibatches(self.x, 1, "x", self.model, self.guide)
        if batches.loader is None and batches.size:
            size = max(2, rows_at_once(batches.example()))
            batches = Minibatches(self.x, size, "x", self.model, self.guide)
        held: list[Args] = []
        total = _Total()
        for batch in batches.in_order():
            args = dense(batch, "x" if batches.loader is None else "minibatches")
            if not len(args[0]):
                continue
            total.add(args)
            rows = sum(len(each[0]) for each in held) + len(args[0])
            if held and (rows > max(2, rows_at_once(args)) or _form(held[0]) != _form(args)):
                yield _joined(held)
                held = []
            held.append(args)
        if held:
            yield _joined(held)
        if self.total is not None:
            self.total.check(total)
        self.total = total


class Checked:
    """Parts that are checked, to go through once."""

    def __init__(self, parts: Parts, pieces: Iterator[Pieces]) -> None:
        self.parts, self.pieces = parts, pieces
        self.last: Pieces | None = None

    def __iter__(self) -> Iterator[Pieces]:
        for pieces in self.pieces:
            self.last = pieces
            yield pieces

    def again(self) -> Generator[Pieces, None, None]:
        """The same parts once more, without checks of the program."""
        if self.last is None:
            raise RuntimeError("expected parts that have been gone through.")
        if self.parts.whole is not None:
            yield self.last
            return
        for args in self.parts._read():
            yield replace(self.last, program=self.last.program.on(args))

    @property
    def number(self) -> int | None:
        """The number of data; see :class:`Parts`."""
        return self.parts.number

    @property
    def sure_number(self) -> int | None:
        """The number of data, where it is sure; see :class:`Parts`."""
        return self.parts.sure_number

    @property
    def seen(self) -> int:
        """The number of data so far."""
        return self.parts.seen


@contextmanager
def checked_parts(
    model: PyroFunction, guide: PyroFunction | None, x: Any, seed: int | None, least: int = 1, *, progress: bool = False
) -> Iterator[Checked]:
    """Check data and program as :func:`pyro_vae.evaluation.pieces.checked` does, part by part, and yield the parts."""
    parts = Parts(model, guide, x, least)
    if parts.whole is not None:
        with checked_program(parts.whole, seed) as pieces:
            parts.seen = len(pieces.program.args[0])
            yield Checked(parts, iter([pieces]))
        return
    with (
        memory_of(None),
        eval_mode(parts.modules()),
        torch.no_grad(),
        rng.seeded(seed),
        parts.bar(progress) as bar,
        closing(_checked(parts, bar)) as each,
    ):
        yield Checked(parts, each)


def _checked(parts: Parts, bar: Any) -> Generator[Pieces, None, None]:
    said = set[str]()
    for program in parts:
        pieces = with_checks(Pieces(program, bool(parts.divisible)), said)
        # Where the guide's support exceeds the model's, Pyro must check every sample.
        with pyro.validation_enabled(not pieces.same_supports):
            yield pieces
        bar.update(len(program.args[0]))


@dataclass
class _Total:
    """Sums over what is read in one pass, which tell whether another pass reads the same, in any order."""

    rows: int = 0
    sums: list[float] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)

    def add(self, args: Args) -> None:
        self.rows += len(args[0])
        columns = [wide(column) for column in args]
        for kept, found in (
            (self.sums, [each.sum().item() for each in columns]),
            (self.sizes, [each.abs().sum().item() for each in columns]),
        ):
            kept[:] = [a + b for a, b in zip_longest(kept, found, fillvalue=0.0)]

    def check(self, other: "_Total") -> None:
        """Refuse another pass that has read other data."""
        if self.rows and not other.rows:
            raise PyroVAEError(
                "expected x to be read twice, since each sample is compared with all data, got a DataLoader that can "
                "be read only once. Give it a data set that begins again, or pass tensors."
            )
        apart = [abs(a - b) > 1e-9 * size for a, b, size in zip(self.sums, other.sums, self.sizes, strict=False)]
        if self.rows != other.rows or any(apart):
            raise PyroVAEError(
                f"expected the same data each time that x is read, got {self.rows} and {other.rows} rows"
                f"{', with other numbers' * (self.rows == other.rows)}. Pass a DataLoader without random changes of "
                "the data, or tensors."
            )


def _with_last(parts: Iterator[Args]) -> Iterator[tuple[Args, bool]]:
    """Each part, and whether it is the last one."""
    before = next(parts, None)
    while before is not None:
        after = next(parts, None)
        yield before, after is None
        before = after


def _form(args: Args) -> list[Any]:
    return [(column.shape[1:], column.dtype, column.device) for column in args]


def _joined(batches: list[Args]) -> Args:
    return batches[0] if len(batches) == 1 else tuple(map(torch.cat, zip(*batches, strict=True)))


def _refuse(rows: int) -> None:
    if rows == 1:
        raise PyroVAEError(
            "expected minibatches of two rows or more, to see whether a datum has the same densities in each of them, "
            "got one. Pass a larger batch_size to the DataLoader."
        )
    raise PyroVAEError(
        "expected a program that gives a datum the same densities in every minibatch, to evaluate x as it is read, got "
        "one that does not, such as a guide with parameters for each datum. Pass x as a tensor."
    )
