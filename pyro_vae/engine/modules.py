"""The torch modules behind a program: what has buffers, and modes for training and evaluation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

Program = Callable[..., Any]  # a Pyro model or guide


def find_modules(*programs: Program) -> list[nn.Module]:
    """The modules that the programs are, or are methods of, through any of Pyro's handlers."""
    plain = [inspect.unwrap(program) for program in programs]
    owners = [getattr(program, "__self__", program) for program in plain]
    return list(dict.fromkeys(owner for owner in owners if isinstance(owner, nn.Module)))


def buffers(modules: list[nn.Module]) -> dict[str, Tensor]:
    """Their buffers, such as batch norm's statistics, as they are now."""
    state = {
        f"{i}.{name}": value for i, m in enumerate(modules) for name, value in m.state_dict(keep_vars=True).items()
    }
    return {name: value for name, value in state.items() if not isinstance(value, nn.Parameter)}


@contextmanager
def evaluating(modules: list[nn.Module]) -> Iterator[list[nn.Module]]:
    """Inside, dropout is off and batch norm frozen where they were on, in these modules and in any that is called.

    It yields a list of the modules that are called, each time.
    """
    found: list[nn.Module] = []
    training = [part for module in modules for part in module.modules() if part.training]
    for part in training:
        part.training = False

    def switch_off(called: nn.Module, _: Any) -> None:
        found.append(called)
        if called.training:  # a module that a program found in its closure
            training.append(called)
            called.training = False

    hook = register_module_forward_pre_hook(switch_off)
    try:
        yield found
    finally:
        hook.remove()
        for part in training:
            part.training = True
