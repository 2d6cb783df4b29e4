"""The torch modules behind a program: their buffers, and their training and evaluation modes."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

PyroFunction = Callable[..., Any]  # a Pyro model, or a guide


def find_modules(*functions: PyroFunction) -> list[nn.Module]:
    """The modules that the functions are, are methods of, or hold as arguments of ``functools.partial``.

    Pyro's handlers around the functions make no difference.
    """
    found: list[Any] = []
    for function in functions:
        layer: Any = function
        while layer is not None:  # a method under a decorator, such as pyro_method, is no method any more inside
            if isinstance(layer, functools.partial):
                found += [*layer.args, *layer.keywords.values()]
                layer = layer.func
            else:
                found.append(getattr(layer, "__self__", layer))
                layer = getattr(layer, "__wrapped__", None)
    return list(dict.fromkeys(module for module in found if isinstance(module, nn.Module)))


def buffers(modules: list[nn.Module]) -> dict[str, Tensor]:
    """Their buffers, such as batch norm's statistics, as they are now."""
    states = enumerate(module.state_dict(keep_vars=True) for module in modules)
    return {f"{i}.{n}": v for i, state in states for n, v in state.items() if not isinstance(v, nn.Parameter)}


@contextmanager
def buffers_kept() -> Iterator[None]:
    """Restore the buffers, such as batch norm's statistics, of every module that is called meanwhile."""
    before: dict[tuple[nn.Module, str], tuple[Tensor, Tensor]] = {}

    def keep(called: nn.Module, _: Any) -> None:
        for name, buffer in called._buffers.items() if called.training else ():
            if buffer is not None:
                before.setdefault((called, name), (buffer, buffer.clone()))

    hook = register_module_forward_pre_hook(keep)
    try:
        yield
    finally:
        hook.remove()
        for (module, name), (buffer, value) in before.items():
            module._buffers[name] = buffer.copy_(value)


@contextmanager
def recorded_calls(attribute: str) -> Iterator[list[tuple[nn.Module, Any]]]:
    """It yields the list of the modules with that attribute that are called meanwhile, and their outputs."""
    found: list[tuple[nn.Module, Any]] = []

    def record(called: nn.Module, _: Any, output: Any) -> None:
        if hasattr(called, attribute):
            found.append((called, output))

    hook = register_module_forward_hook(record)
    try:
        yield found
    finally:
        hook.remove()


@contextmanager
def eval_mode(modules: list[nn.Module]) -> Iterator[list[nn.Module]]:
    """Put these modules, and every module that is called meanwhile, into evaluation mode: no dropout, fixed batch norm.

    It yields the list of the modules that are called, one entry a call.
    """
    found: list[nn.Module] = []
    training = [part for module in modules for part in module.modules() if part.training]
    for part in training:
        part.training = False

    def switch_off(called: nn.Module, _: Any) -> None:
        found.append(called)
        if called.training:  # a module that a function found in its closure
            training.append(called)
            called.training = False

    hook = register_module_forward_pre_hook(switch_off)
    try:
        yield found
    finally:
        hook.remove()
        for part in training:
            part.training = True
