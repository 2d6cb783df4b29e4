"""Keeps draws, densities and all that is computed of them in float32 at least, whatever surrounds a call.

A log-density of 784 pixels in bfloat16 is some nats off, and no error bar shows it. Layers of ``torch.nn`` may run in
half precision, under autocast or with weights in half precision. All other arithmetic of a program is in float32.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

HALF = (torch.bfloat16, torch.float16)
DEVICES = ("cpu", "cuda", "mps", "xpu")  # that have an autocast of their own

Autocast = tuple[tuple[str, torch.dtype], ...]  # the devices under autocast, with its type


class _State(threading.local):
    """What surrounds the calls of this thread."""

    autocast: Autocast = ()  # what a caller had on, and the layers of torch.nn have
    promoting: bool = False
    layer: list[ExitStack]  # of the outermost layer that runs now, if any

    def __init__(self) -> None:
        self.layer = []


_state = _State()


def autocast_of_layers() -> Autocast:
    """The autocast that a program's layers run under."""
    return _state.autocast + _enabled()


@contextmanager
def single_precision() -> Iterator[None]:
    """Inside, autocast is on in layers of ``torch.nn`` alone, whose results are float32."""
    enabled = _enabled()
    if not enabled:
        yield
        return
    before = _state.autocast
    with ExitStack() as stack:
        for device, _ in enabled:
            stack.enter_context(torch.autocast(device, enabled=False))
        if not (before or _state.promoting):
            stack.enter_context(_watching_layers())
        _state.autocast = before + enabled
        stack.callback(setattr, _state, "autocast", before)
        yield


@contextmanager
def promoting() -> Iterator[None]:
    """Inside, every operation outside of layers of ``torch.nn`` takes tensors in half precision as float32."""
    if _state.promoting:
        yield
        return
    with ExitStack() as stack:
        if not _state.autocast:
            stack.enter_context(_watching_layers())
        _state.promoting = True
        stack.callback(setattr, _state, "promoting", False)
        stack.enter_context(_Promoting())
        yield


def is_half(value: Any) -> bool:
    """Whether it is a tensor in half precision."""
    return isinstance(value, Tensor) and value.dtype in HALF


def _enabled() -> Autocast:
    return tuple((d, torch.get_autocast_dtype(d)) for d in DEVICES if torch.is_autocast_enabled(d))


def _widened(value: Any) -> Any:
    return value.float() if is_half(value) else value


class _Promoting(TorchFunctionMode):
    """Takes arguments in half precision as float32. What writes to a tensor, or describes it, takes it as it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.__name__, kwargs or {}
        described = name in ("__get__", "__set__", "__setitem__", "register_hook", "retain_grad", "backward")
        if _state.layer or described or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i"):
            return func(*args, **kwargs)
        args, kwargs = pytree.tree_map(_widened, (args, kwargs))
        return func(*args, **kwargs)


@contextmanager
def _watching_layers() -> Iterator[None]:
    """Run each layer of ``torch.nn`` that is called in this thread under the caller's autocast, or in its own type."""
    thread = threading.get_ident()

    def before(module: nn.Module, args: Any) -> Any:
        if threading.get_ident() != thread or not _is_layer(module):
            return None
        if _state.layer:
            _state.layer.append(ExitStack())
            return None
        stack = ExitStack()
        for device, dtype in _state.autocast:
            # A cache would keep the first weights for as long as the caller's own autocast lasts.
            stack.enter_context(torch.autocast(device, dtype=dtype, cache_enabled=False))
        own = next((p.dtype for p in module.parameters() if p.dtype in HALF), None)
        if own is not None and not _state.autocast:
            args = pytree.tree_map(lambda v: v.to(own) if _is_floating(v) else v, args)
        _state.layer.append(stack)
        return args

    def after(module: nn.Module, args: Any, result: Any) -> Any:
        if threading.get_ident() != thread or not _is_layer(module) or not _state.layer:
            return None
        _state.layer.pop().close()
        return result if _state.layer else pytree.tree_map(_widened, result)

    hooks = register_module_forward_pre_hook(before), register_module_forward_hook(after, always_call=True)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_layer(module: nn.Module) -> bool:
    """Whether the module's computation is PyTorch's own, which contains no sample statement and no density."""
    forward: Callable[..., Any] = type(module).forward
    return getattr(forward, "__module__", "").startswith("torch.nn.")
