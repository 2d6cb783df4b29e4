"""What the error of a failed run shows to be wrong: its arguments, their devices and shapes, or its parameters."""

import threading
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pyro_vae.checks import misfit, refuse_invalid_parameters, shown
from pyro_vae.devices import (
    OtherDeviceError,
    elsewhere,
    is_of_devices,
    is_out_of_memory,
    refuse_without_values,
)
from pyro_vae.engine.modules import PyroFunction, find_modules
from pyro_vae.engine.sites import family
from pyro_vae.engine.threads import other_thread
from pyro_vae.errors import PyroVAEError


def explain(error: Exception, function: PyroFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse what a program's error shows to be wrong with its arguments or parameters; else say how it was called."""
    if isinstance(error, PyroVAEError) or is_out_of_memory(error):
        return
    # Pyro's own words, for a handler that another one has entered over and not left.
    if str(error).startswith("This Messenger is not on the bottom of the stack") and threading.active_count() > 1:
        raise other_thread() from error
    if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
        raise PyroVAEError(
            "expected minibatches of two rows or more, since batch norm trains on their spread, got one of one row. "
            "Pass another batch_size, or drop_last=True to the DataLoader, or drop a row."
        ) from error
    if isinstance(error, ValueError):
        refuse_invalid_parameters(error)
    refuse_without_values(error)
    leaves = pytree.tree_leaves((args, kwargs))
    if any(isinstance(value, Tensor) and value.is_complex() for value in leaves):
        raise PyroVAEError(
            f"expected data of real numbers, got complex ones, of which the program says: {error}. Pass "
            "torch.view_as_real(x), or x.abs()."
        ) from error
    usual = torch.get_default_dtype()
    others = {v.dtype for v in leaves if isinstance(v, Tensor) and v.is_floating_point() and v.dtype is not usual}
    if others and any(words in str(error) for words in ("same dtype", "expected scalar type")):
        raise PyroVAEError(
            f"expected data of {usual}, as the parameters are, got {', '.join(map(str, others))}, of which the program "
            f"says: {str(error).splitlines()[0]}. Pass x.to({usual}), or convert the parameters."
        ) from error
    function = poutine.unwrap(function)
    name = getattr(function, "__name__", type(function).__name__)
    each = [*map(shown, args), *(f"{name}={shown(value)}" for name, value in kwargs.items())]
    given = ", ".join(each if len(each) <= 4 else [*each[:3], f"and so on, {len(each)} in all"])
    reason = misfit(function, args, kwargs) if isinstance(error, TypeError) and _is_of_the_call(error) else None
    if reason is not None:
        raise PyroVAEError(
            f"expected the arguments that model and guide take, got ({given}), of which {name} says: {reason}. "
            "Pass one for each argument that has no default."
        ) from error
    if not any("pyro_vae ran" in note for note in getattr(error, "__notes__", [])):
        error.add_note(f"pyro_vae ran {name} with ({given}).")


def _is_of_the_call(error: TypeError) -> bool:
    """Whether the call of a program has failed, and nothing inside of it."""
    innermost = error.__traceback__
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    module = "" if innermost is None else innermost.tb_frame.f_globals.get("__name__", "")
    return module.split(".")[0] in ("pyro", "pyro_vae", "contextlib", "functools")


def refuse_elsewhere(error: Exception, trace: Trace, function: PyroFunction, before: set[str] | None = None) -> None:
    """Refuse a run's arguments, if operations on several devices have ended it; a program may move them itself.

    With the names of the parameters before the run, those that it has made beside its arguments do not count.
    """
    if not isinstance(error, OtherDeviceError) and not (isinstance(error, RuntimeError) and is_of_devices(error)):
        return
    given, inside = trace.nodes["_INPUT"], poutine.unwrap(function)
    model = getattr(inside, "model", None)  # which an autoguide runs
    modules = find_modules(function, inside, *([model] if callable(model) else []))
    parameters = [parameter for module in modules for parameter in module.parameters()]
    beside = {v.device for v in pytree.tree_leaves((given["args"], given["kwargs"])) if isinstance(v, Tensor)}
    for name, site in trace.nodes.items():
        value = site.get("value")
        if site["type"] != "param" or value is None:
            continue
        of_module = isinstance(value, nn.Parameter)
        if of_module or before is None or name in before or value.device not in beside:
            parameters.append(value)
    refusal = elsewhere(parameters, inside, given["args"], given["kwargs"])
    if refusal is not None:
        raise refusal from error


def shapes_apart(trace: Trace, error: str) -> str:
    """What to say of a value that does not fit the shape of its distribution."""
    name = next((name for name in trace.nodes if f"'{name}'" in error), None)
    if name is None:
        return error
    site: Any = trace.nodes[name]
    fn, value = site["fn"], site["value"]
    return (
        f"expected a value at site '{name}' that fits its {family(fn)} of batch shape {tuple(fn.batch_shape)} and "
        f"event shape {tuple(fn.event_shape)}, got one of shape {tuple(value.shape)}. Give model and guide the same "
        "number of latent dimensions, and the likelihood the shape of the data."
    )
