"""Dictionaries of data as a program's arguments: each value goes to the parameter of the model with its name."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from pyro_vae.errors import PyroVAEError

BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def in_order(given: Mapping[Any, Any], model: Any, guide: Any, name: str) -> tuple[Any, ...]:
    """The values of a dictionary in the order of the model's parameters, which both model and guide are called with.

    Raises:
        ValueError: the model lacks a parameter of such a name, or needs another one; or the guide has the names in
            another order.
    """
    parameters = _by_position(model)
    names, keys = list(parameters), list(given)
    if not names:
        raise PyroVAEError(
            f"expected {name} by position, since the model's parameters have no names, got a dictionary with keys "
            f"{keys}. Pass a tuple of its values."
        )
    unknown = [key for key in keys if key not in parameters]
    if unknown:
        kept = ", ".join(repr(each) for each in names if each in given) or "..."
        raise PyroVAEError(
            f"expected {name} with keys that the model takes as arguments, {names}, got {unknown} too. Leave them out: "
            f"a DataLoader does with collate_fn=pv.data.collate({kept})."
        )
    last = max((names.index(key) for key in keys), default=-1)
    needed = [each for i, each in enumerate(names) if i < last or parameters[each].default is inspect.Parameter.empty]
    absent = [each for each in needed if each not in given]
    if absent:
        why = "needs" if parameters[absent[0]].default is inspect.Parameter.empty else f"takes before '{names[last]}'"
        raise PyroVAEError(
            f"expected {name} with the key '{absent[0]}', which the model {why}, got keys {keys}. Add it."
        )
    taken = names[: last + 1]
    others = [] if guide is None else list(_by_position(guide))[: len(taken)]
    for own, other in zip(taken, others, strict=False):
        if own != other and other in taken:
            raise PyroVAEError(
                f"expected model and guide with parameters in one order, to take {name} by name, got {taken} in the "
                f"model and {others} in the guide. Change the order in one of them."
            )
    return tuple(given[each] for each in taken)


def _by_position(function: Any) -> dict[str, inspect.Parameter]:
    """The parameters of a function, or of a module's forward, that take arguments by position and have names."""
    inner = inspect.unwrap(function)
    try:
        signature = inspect.signature(inner.forward if isinstance(inner, nn.Module) else function)
    except (TypeError, ValueError):  # a builtin has none
        return {}
    return {name: each for name, each in signature.parameters.items() if each.kind in BY_POSITION}
