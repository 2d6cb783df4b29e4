"""Devices: how tensors get to a program's, what refuses those that are elsewhere, and float64 where a device has none.

A program's device is that of its parameters, if all of them are on one. If there are several, or no parameters, the
program places its tensors itself.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_vae.errors import PyroVAEError

WITHOUT_FLOAT64 = ("mps",)
NO_MEMORY = "pyro_vae ran out of memory"


class OtherDeviceError(PyroVAEError):
    """An argument of a program is on another device than its parameters."""

    device: torch.device | None = None  # that of the parameters


def of_float64(device: torch.device) -> torch.device:
    """The device, or the CPU if it has no float64."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def wide(value: Tensor) -> Tensor:
    """The value in float64, on the CPU if its device has no float64."""
    return value.cpu().double() if value.device.type in WITHOUT_FLOAT64 else value.double()


def moved(args: tuple[Any, ...], device: torch.device | None) -> tuple[Any, ...]:
    """A program's arguments with their tensors on a device, also in lists and dictionaries; None moves nothing."""
    if device is None:
        return args

    def there(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=device.type == "cuda")  # CUDA keeps the order of a copy and its use

    return tuple(pytree.tree_map_only(Tensor, there, each) for each in args)


def elsewhere(
    parameters: Iterable[Tensor], function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> OtherDeviceError | None:
    """The refusal of arguments that are on another device than these parameters, by name; None if there are none."""
    devices = {parameter.device for parameter in parameters}
    if len(devices) != 1:
        return None
    (own,) = devices
    for name, value in _named(function, args, kwargs):
        for tensor in pytree.tree_leaves(value):
            if isinstance(tensor, Tensor) and tensor.device != own:
                called = name if name.isidentifier() else "it"
                fix = f"{called}.to('{own}')" if tensor is value else f"the tensors of {name} on '{own}'"
                error = OtherDeviceError(
                    f"expected {name} on {own}, the device of the parameters, got {tensor.device}. Pass {fix}."
                )
                error.device = own
                return error
    return None


def _named(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    try:
        yield from inspect.signature(function).bind(*args, **kwargs).arguments.items()
    except (TypeError, ValueError):  # a handler around the function hides its signature
        yield from ((f"argument {i}", value) for i, value in enumerate(args, 1))
        yield from kwargs.items()


def is_of_devices(error: RuntimeError) -> bool:
    """Whether an operation has failed since its tensors are on several devices, as PyTorch's messages have it."""
    if isinstance(error, NotImplementedError | torch.OutOfMemoryError):
        return False
    words = str(error).split("Trace Shapes:")[0]  # Pyro's own lines follow
    return ("device" in words and "CUDA error" not in words) or "weight type" in words


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device has no memory left; MPS and the CPU have no exception of their own for that."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and any(words in str(error) for words in ("out of memory", "allocate memory", "size calculation overflowed"))
    )


def refuse_without_values(error: Exception) -> None:
    """Say of a run that failed on tensors of PyTorch's device `meta` that they have no values."""
    if isinstance(error, RuntimeError) and "meta tensor" in str(error):
        raise PyroVAEError(
            "expected data and parameters with values, got a tensor on 'meta', which has a shape alone. Pass tensors "
            "on another device, and call to_empty(device=...) on a network before its parameters are loaded."
        ) from error


def note_memory(error: RuntimeError, what: str, fix: str, *, instead: bool = False) -> None:
    """Say beside an error of memory what ran, and what to make smaller: once, or `instead` of what was said before."""
    notes = getattr(error, "__notes__", [])
    before = [note for note in notes if note.startswith(NO_MEMORY)]
    if is_out_of_memory(error) and (instead or not before):
        error.__notes__ = [*(note for note in notes if note not in before), f"{NO_MEMORY} in {what}. {fix}"]


@contextmanager
def memory_for(what: str, fix: str) -> Iterator[None]:
    """Around a training or an evaluation, whose settings are those to change: see :func:`note_memory`."""
    try:
        yield
    except RuntimeError as error:
        note_memory(error, what, fix, instead=True)
        raise
