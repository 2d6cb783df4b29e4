"""What an objective keeps of the programs that it has seen: their plates' nesting, and that they passed a check."""

from dataclasses import dataclass
from enum import Enum
from numbers import Integral
from typing import Any, NamedTuple, Self

from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_vae.engine.program import Program

MOST_VALUES = 8  # of a step counter, or of captions, that each get a check of their own
MOST_KINDS = 32  # such as those of the last minibatch, of validation, and of each value of a flag


class Kind(NamedTuple):
    """What a program's plates, and how it treats particles, may depend on: of data and real numbers, only the type."""

    fixed: Any
    changing: tuple[Any, ...]  # the values of integers, and of strings in lists, which may be others at each step


@dataclass(frozen=True)
class Known:
    """The nesting of programs that keep particles and data apart."""

    kinds: tuple[tuple[Any, dict[Any, int]], ...] = ()  # what is fixed, with the nestings by the changing values

    def nesting(self, program: Program, step: int) -> int | None:
        """That of an equal program, or None: then it must be found, and the program be checked.

        If many changing values had one nesting, other values are taken to have it too. They are checked at the steps
        1, 2, 4, 8 and so on.
        """
        kind = kind_of(program)
        seen = self._seen(kind)
        if kind.changing in seen:
            return seen[kind.changing]
        is_counter = len(seen) >= MOST_VALUES and len(set(seen.values())) == 1
        return next(iter(seen.values())) if is_counter and step & (step - 1) else None

    def with_program(self, program: Program) -> Self:
        """With a program whose nesting is known."""
        kind = kind_of(program)
        seen = {kind.changing: program.nesting or 0} | self._seen(kind)
        others = [each for each in self.kinds if each[0] != kind.fixed]
        return type(self)(((kind.fixed, dict(list(seen.items())[:MOST_VALUES])), *others)[:MOST_KINDS])

    def _seen(self, kind: Kind) -> dict[Any, int]:
        return next((seen for fixed, seen in self.kinds if fixed == kind.fixed), {})


def kind_of(program: Program) -> Kind:
    """The kind of a program."""
    values, structure = pytree.tree_flatten((program.args, program.kwargs))
    alone = {id(value) for value in (*program.args, *program.kwargs.values())}
    changes = [
        (isinstance(value, Integral) and not isinstance(value, bool))
        or (isinstance(value, str) and id(value) not in alone)
        for value in values
    ]
    # With the type, since 1 and True are equal; floats and other objects count by their type alone.
    fixed = [
        (type(value), value if isinstance(value, bool | str | Enum) and not changing else None)
        for value, changing in zip(values, changes, strict=True)
    ]
    # A single datum can't show whether data are apart.
    several = [
        tuple(size > 1 for size in value.shape) for value in values if isinstance(value, Tensor) and not value.is_nested
    ]
    # A bound method compares equal to itself, so vae.model, which is made anew at each use, is found again.
    of_program = (program.model, program.guide, program.needs.per_datum, structure, fixed, several)
    return Kind(of_program, tuple(value for value, changing in zip(values, changes, strict=True) if changing))
