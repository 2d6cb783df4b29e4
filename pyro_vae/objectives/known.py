"""What an objective keeps of the programs that it has seen: their plates' nesting, and that they passed a check."""

from dataclasses import dataclass
from enum import Enum
from numbers import Integral
from typing import Any, Self

from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_vae.engine.program import Program

FEW = 8  # values of an argument that each get a run of their own, such as those of a flag; a counter has more
KEPT = 4  # kinds of programs, such as those of whole minibatches, of the last one, and of validation


@dataclass(frozen=True)
class Known:
    """The nesting of programs that keep particles and data apart, by all that it may depend on."""

    nestings: tuple[tuple[Any, int], ...] = ()  # with the kind of the program, the newest first
    by_types: tuple[tuple[Any, tuple[int, ...]], ...] = ()  # with the kind up to constants, one for each value seen

    def nesting(self, program: Program) -> int | None:
        """That of an equal program. Or one that many values of the same constants had; a wrong one is refused later."""
        kind = _kind(program)
        found = next((nesting for each, nesting in self.nestings if each == kind), None)
        several = self._of_types(program) if found is None else ()
        return several[0] if len(several) >= FEW and len(set(several)) == 1 else found

    def needs_check(self, program: Program) -> bool:
        """Whether it may be another program than those that have been checked."""
        return len(self._of_types(program)) < FEW

    def with_program(self, program: Program) -> Self:
        """With a program whose nesting is known."""
        types, nesting = _kind(program, by_value=False), program.nesting or 0
        others = [each for each in self.by_types if each[0] != types]
        return type(self)(
            ((_kind(program), nesting), *self.nestings)[:KEPT],
            ((types, (nesting, *self._of_types(program))[:FEW]), *others)[:KEPT],
        )

    def _of_types(self, program: Program) -> tuple[int, ...]:
        types = _kind(program, by_value=False)
        return next((nestings for each, nestings in self.by_types if each == types), ())


def _kind(program: Program, *, by_value: bool = True) -> tuple[Any, ...]:
    """What a program's plates, and how it treats particles, may depend on: of data and real numbers, only the type."""
    values, structure = pytree.tree_flatten((program.args, program.kwargs))
    # With the type, since 1 and True are equal.
    named = (Integral, str, Enum) if by_value else ()
    constants = [(type(value), value if isinstance(value, named) else None) for value in values]
    # A single datum can't show whether data are apart.
    several = [tuple(size > 1 for size in value.shape) for value in values if isinstance(value, Tensor)]
    # A bound method compares equal to itself, so vae.model, which is made anew at each use, is found again.
    return program.model, program.guide, program.needs.per_datum, structure, constants, several
