"""The torch modules behind a program: their buffers, and their training and evaluation modes."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions.transforms import _InverseTransform
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


class Hook:
    """A function that runs for every module that is called, while there is something in :attr:`within`.

    PyTorch has the same hook each time, since TorchDynamo compiles networks anew for another one. For the same reason,
    the function must look at the module first, and at :attr:`within` only where there is something to do.
    """

    def __init__(self, register: Callable[[Any], Any], function: Callable[..., None]) -> None:
        self.within: list[Any] = []  # what each user of the hook keeps, outermost first
        self._function, self._handle = function, register(function)
        self._handle.remove()

    def enter(self, kept: Any) -> None:
        """Use the hook, until :meth:`leave`."""
        self._handle.hooks_dict_ref()[self._handle.id] = self._function
        self.within.append(kept)

    def leave(self, kept: Any) -> None:
        """Undo :meth:`enter`."""
        self.within[:] = [each for each in self.within if each is not kept]  # of several threads, any may end first
        if not self.within:
            self._handle.remove()


@contextmanager
def buffers_kept() -> Iterator[None]:
    """Restore the buffers, such as batch norm's statistics, of every module that is called meanwhile."""
    before: dict[tuple[nn.Module, str], tuple[Tensor, Tensor]] = {}
    _KEEPING.enter(before)
    try:
        yield
    finally:
        _KEEPING.leave(before)
        for (module, name), (buffer, value) in before.items():
            module._buffers[name] = buffer.copy_(value)


def _keep(called: nn.Module, _: Any) -> None:
    for name, buffer in called._buffers.items() if called.training else ():
        if buffer is not None:
            for before in _KEEPING.within:
                before.setdefault((called, name), (buffer, buffer.clone()))


_KEEPING = Hook(register_module_forward_pre_hook, _keep)


@contextmanager
def likelihood_calls() -> Iterator[list[tuple[nn.Module, Any]]]:
    """It yields the list of the likelihoods, and their like, that are called meanwhile, and their outputs."""
    found: list[tuple[nn.Module, Any]] = []
    _RECORDING.enter(found)
    try:
        yield found
    finally:
        _RECORDING.leave(found)


def _record(called: nn.Module, _: Any, output: Any) -> None:
    if hasattr(called, "has_learned_scale"):
        for found in _RECORDING.within:
            found.append((called, output))


_RECORDING = Hook(register_module_forward_hook, _record)


@contextmanager
def eval_mode(modules: list[nn.Module]) -> Iterator[list[nn.Module]]:
    """Put these modules, and every module that is called meanwhile, into evaluation mode: no dropout, fixed batch norm.

    It yields the list of the modules that are called, one entry a call.
    """
    found: list[nn.Module] = []
    training = [part for module in modules for part in module.modules() if part.training]
    for part in training:
        part.training = False
    kept = found, training
    _EVALUATING.enter(kept)
    try:
        yield found
    finally:
        _EVALUATING.leave(kept)
        for part in training:
            part.training = True


def _switch_off(called: nn.Module, _: Any) -> None:
    if torch.compiler.is_compiling() and not called.training:
        return  # a part of a network under torch.compile, whose call was found before
    for found, training in _EVALUATING.within:
        found.append(called)
        # A module that a function found in its closure. Under torch.compile, all parts belong to one call.
        for part in called.modules() if "_orig_mod" in called._modules else (called,):
            if part.training:
                training.append(part)
                part.training = False


_EVALUATING = Hook(register_module_forward_pre_hook, _switch_off)


def transforms_called() -> AbstractContextManager[Any]:
    """Around a run: a module that is a transform of a distribution counts as called, which no hook of PyTorch sees."""
    return _CalledTransforms() if _EVALUATING.within or _KEEPING.within else nullcontext()


class _CalledTransforms(Messenger):
    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        while fn is not None:
            for transform in getattr(fn, "transforms", ()):
                for part in _modules_of(transform):
                    _switch_off(part, None)
                    _keep(part, None)
            fn = getattr(fn, "base_dist", None)


def _modules_of(transform: Any) -> Iterator[nn.Module]:
    """The modules of a transform, of its parts, and of what it inverts."""
    if isinstance(transform, nn.Module):
        yield from transform.modules()
    inner = [*getattr(transform, "parts", ()), getattr(transform, "base_transform", None)]
    inner += [transform.inv] if isinstance(transform, _InverseTransform) else []
    for each in inner:
        yield from _modules_of(each) if each is not None else ()
