"""What callbacks keep as it is: parameters, and the buffers of modules, such as batch norm's statistics."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pyro_vae.engine.modules import eval_mode
from pyro_vae.engine.program import Program


@dataclass
class Kept:
    """The parameters and modules that stay as they are, by who asked for that."""

    by: dict[Any, tuple[set[int], list[nn.Module]]] = field(default_factory=dict)
    evaluating: list[nn.Module] = field(default_factory=list)  # the modules that were in training mode before

    @property
    def parameters(self) -> set[int]:
        """Their identities."""
        return {each for own, _ in self.by.values() for each in own}

    def keep(self, who: Any, parameters: Iterable[Tensor], modules: Iterable[nn.Module]) -> None:
        """Keep these, and put the modules into evaluation mode."""
        self.by[who] = set(map(id, parameters)), list(modules)
        for module in self.by[who][1]:
            if module.training:
                self.evaluating.append(module)
                module.training = False

    def release(self, who: Any) -> None:
        """Put the modules back, except those that another one keeps."""
        self.by.pop(who, None)
        wanted = {module for _, modules in self.by.values() for module in modules}
        for module in self.evaluating:
            if module not in wanted:
                module.training = True
        self.evaluating = [module for module in self.evaluating if module in wanted]

    def release_all(self) -> None:
        """Put all modules back."""
        for who in list(self.by):
            self.release(who)


def with_buffers(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those that have buffers of their own, which training mode may move; others, such as dropout, may stay in it."""
    return [module for module in modules if any(buffer is not None for buffer in module._buffers.values())]


def modules_of(program: Program, frozen: Iterable[Tensor], trained: Iterable[Tensor]) -> Iterator[nn.Module]:
    """The modules whose trained parameters are all frozen, with their parts, also in a function's closure."""
    with eval_mode(program.modules()) as called:
        program.trace()
    own, others = set(map(id, frozen)), set(map(id, trained))
    others -= own
    for module in dict.fromkeys(part for each in (*program.modules(), *called) for part in each.modules()):
        held = set(map(id, module.parameters()))
        if held & own and not held & others:
            yield from module.modules()
