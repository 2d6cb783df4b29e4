"""Arguments that are what their annotations say: one check for every public function and class."""

import contextlib
import functools
import inspect
import math
import operator
import os
import re
import reprlib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    ParamSpec,
    TypeGuard,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from pyro_vae.defaults import MAX_SEED
from pyro_vae.devices import is_out_of_memory
from pyro_vae.errors import PyroVAEError

P = ParamSpec("P")
T = TypeVar("T")


class Between(NamedTuple):
    """The range of a number, or of the length of a sequence, as a mark on an annotation."""

    least: float
    most: float = math.inf


Count = Annotated[int, Between(1)]
Whole = Annotated[int, Between(0)]
Shape = Annotated[Sequence[Count], Between(1)]
Image = Annotated[Sequence[Count], Between(3, 3)]  # (C, H, W)
Seed = Annotated[int, Between(0, MAX_SEED)]


NOT_OF_A_KIND = (TypeError, ValueError, OverflowError, RuntimeError)  # what converting such a value raises


@dataclass(frozen=True)
class Kind:
    """What an annotation asks for, in words, and a function that returns the value as that, or raises an error."""

    words: str
    convert: Callable[[Any], Any]


@overload
def checked(function: type[T]) -> type[T]: ...  # an editor then shows a class as one
@overload
def checked(function: Callable[P, T]) -> Callable[P, T]: ...
def checked(function: Any) -> Any:
    """Refuse arguments that are not of their annotated types, before the function runs; for a class, its `__init__`.

    NumPy's integers, and tensors of one number, become Python's numbers. A sequence becomes a tuple.
    """
    if isinstance(function, type):
        function.__init__ = checked(function.__init__)  # type: ignore[misc]
        return function
    convert = converter(function)

    @functools.wraps(function)
    def with_checks(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = convert(args, kwargs)
        try:
            return function(*args, **kwargs)
        except (RuntimeError, TypeError) as error:
            if not is_out_of_memory(error) and "Overflow when unpacking" not in str(error):
                raise
            raise PyroVAEError(
                f"expected sizes that fit into memory, got more in {function.__qualname__}: {error}. Pass smaller ones."
            ) from error

    return with_checks


def converter(function: Callable[..., Any], without: Sequence[str] = ()) -> Callable[[Any, Any], tuple[Any, Any]]:
    """A function that checks and converts a function's positional and keyword arguments, but those `without`."""
    signature = inspect.signature(function)
    options = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")

    @functools.cache
    def found() -> tuple[dict[str, Kind], set[str] | None]:  # not at once: annotations may name what is defined later
        hints, declared = _hints(function), None
        if "Unpack" in str(get_origin(hints.get(options))):
            declared = get_type_hints(get_args(hints.pop(options))[0], include_extras=True)
        kinds = {name: kind_of(hint) for name, hint in (hints | (declared or {})).items() if name not in without}
        kept = {name: kind for name, kind in kinds.items() if kind is not None}
        return kept, None if declared is None else {*declared}

    def convert(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        kinds, declared = found()
        if not kinds:
            return args, kwargs
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{_called(function, args)}() {error}") from None
        given, others = bound.arguments, bound.arguments.get(options, {})
        unknown = [name for name in others if declared is not None and name not in declared]
        if unknown:
            raise TypeError(f"{_called(function, args)}() got an unexpected keyword argument {unknown[0]!r}")
        for each in (given, others):
            for name in [name for name in each if name in kinds]:
                each[name] = _converted(name, each[name], kinds[name])
        return bound.args, bound.kwargs

    return convert


def _called(function: Callable[..., Any], args: tuple[Any, ...]) -> str:
    """What a person has called: of a constructor, the class of the object."""
    return type(args[0]).__name__ if function.__name__ == "__init__" and args else function.__qualname__


def _converted(name: str, value: Any, kind: Kind) -> Any:
    try:
        return kind.convert(value)
    except NOT_OF_A_KIND as error:
        message = f"expected {name} to be {kind.words}, got {shown(value)}. {_fix(kind, value)}"
        raise PyroVAEError(message.rstrip()) from error


def misfit(
    function: Any, args: Sequence[Any], kwargs: Mapping[str, Any] = types.MappingProxyType({})
) -> TypeError | None:
    """The error of a function that does not take these arguments; None if it does, or if it has no signature."""
    try:
        inspect.signature(function).bind(*args, **kwargs or {})
    except ValueError:  # a builtin has none
        return None
    except TypeError as error:
        return error
    return None


def refuse_call(function: Any, args: Sequence[Any], name: str, error: TypeError) -> None:
    """Say of a function that failed that it does not take its arguments, if it does not."""
    reason = misfit(function, args)
    if reason is not None:
        given = ", ".join(map(shown, args))
        raise PyroVAEError(f"expected {name} to be a function of ({given}), got one that says: {reason}.") from error


def refuse_invalid_parameters(error: ValueError) -> None:
    """Say what to do about a distribution's invalid parameters, if PyTorch's error is of these."""
    found = re.search(
        r"(Expected parameter .* to satisfy the constraint .*), but found invalid values:\s*(.*)", str(error)
    )
    if isinstance(error, PyroVAEError) or found is None:
        return
    fix = "Such values are outside its domain: check the distribution's arguments."
    if "nan" in str(error):
        fix = (
            "NaN comes of data or parameters that are NaN or very large: check x.isfinite(), scale the data, or lower "
            "the learning rate."
        )
    raise PyroVAEError(f"a distribution has invalid parameters. {found[1]}, got {found[2][:80]} ... {fix}") from error


PLAIN = (int, float, complex, str, bytes, list, tuple, set, dict, range, type, np.generic, type(None))


def shown(value: Any) -> str:
    """A value in an error message: a number or a short text as it is, else its type; of a tensor, its form."""
    if isinstance(value, Tensor) and value.is_nested:
        return "a nested tensor"
    if isinstance(value, Tensor):
        layout = "" if value.layout is torch.strided else f"{value.layout} "
        return f"a {layout}tensor of shape {tuple(value.shape)}, {value.dtype}, on {value.device}"
    text = reprlib.repr(value) if isinstance(value, PLAIN) else ""  # another repr may take long, or fail
    short = 0 < len(text) <= 80 and "\n" not in text and "tensor(" not in text
    return text if short else with_article(type(value).__name__)


def with_article(name: str) -> str:
    """The name of a type, after "a" or "an"."""
    return f"an {name}" if name[0] in "aeiouAEIOU" or name == "ndarray" else f"a {name}"


def how_to_make_dense(value: Any) -> str:
    """How a value can be made a dense tensor: the end of a message."""
    if isinstance(value, Tensor) and value.is_nested:
        return "Pass torch.nested.to_padded_tensor(x, 0.0), and a mask."
    if isinstance(value, Tensor) and value.is_meta:
        return "Pass data with values: a tensor on 'meta' has none."
    if isinstance(value, Tensor):
        return "Pass x.dequantize()." if value.is_quantized else "Pass x.to_dense()."
    if hasattr(value, "train") and hasattr(value, "test"):
        return "Pass one of its splits, such as x.train."
    if isinstance(value, np.ma.MaskedArray):
        return "Pass torch.as_tensor(x.filled(0)), and a mask, torch.as_tensor(~x.mask)."
    if isinstance(value, np.ndarray) and value.dtype.kind not in "biuf":
        return "Convert its values to numbers."
    if hasattr(value, "to_numpy"):
        return "Pass torch.tensor(x.to_numpy(), dtype=torch.float32)."
    if hasattr(value, "toarray"):
        return "Pass torch.tensor(x.toarray(), dtype=torch.float32)."
    if isinstance(value, Dataset):
        return "Pass a DataLoader of it, or its tensors."
    return "Pass torch.as_tensor(x)." if isinstance(value, np.ndarray | list | tuple) else "Pass one."


def _fix(kind: Kind, value: Any) -> str:
    if "tensor" in kind.words:
        return how_to_make_dense(value)
    if isinstance(value, type):
        return "Pass an instance of it."
    if "sequence" in kind.words and isinstance(value, int):
        return f"Write ({value},)."
    return ""


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function's arguments."""
    hints: dict[str, Any] = {}
    for name, hint in function.__annotations__.items():
        holder = types.SimpleNamespace(__annotations__={name: hint})
        try:
            hints |= get_type_hints(holder, function.__globals__, include_extras=True)
        except NameError:  # of a library that is imported only where it is used, such as matplotlib
            hints[name] = hint
    return {name: hint for name, hint in hints.items() if name != "return"}


def kind_of(hint: Any) -> Kind | None:
    """What an annotation asks for; None where any value may be right."""
    origin, inside = get_origin(hint), get_args(hint)
    if isinstance(hint, str):
        return _by_names(hint.split(" | ")) if re.fullmatch(r"\w+( \| \w+)*", hint) else None
    if origin is Annotated:
        return _ranged(kind_of(inside[0]), next((each for each in inside[1:] if isinstance(each, Between)), None))
    if origin in (Union, types.UnionType):
        kinds = [kind_of(each) for each in inside if each is not str or Path not in inside]
        found = [kind for kind in kinds if kind is not None]
        return _either(found) if len(found) == len(kinds) else None
    if origin is Literal:
        return kind_of(type(inside[0]))
    if origin in (Sequence, tuple, list) and inside and (element := kind_of(inside[0])) is not None:
        if "integer" not in element.words and "number" not in element.words:
            return None
        fixed = origin is tuple and Ellipsis not in inside
        return _ranged(_sequence(element), Between(len(inside), len(inside)) if fixed else None)
    if origin in (Mapping, dict):
        return _instance(Mapping, "a dictionary")
    return _KINDS.get(hint)  # functions say themselves which other classes they take


def _instance(cls: type, words: str) -> Kind:
    def convert(value: Any) -> Any:
        if not isinstance(value, cls):
            raise TypeError
        return value

    return Kind(words, convert)


def _by_names(names: list[str]) -> Kind:
    """What is of a class with one of these names, or None, if that is one of them."""

    def convert(value: Any) -> Any:
        if not any(each.__name__ in names for each in type(value).__mro__) and not (value is None and "None" in names):
            raise TypeError
        return value

    return Kind(" or ".join(name if name == "None" else with_article(name) for name in names), convert)


def _either(kinds: list[Kind]) -> Kind:
    def convert(value: Any) -> Any:
        for kind in kinds:
            with contextlib.suppress(*NOT_OF_A_KIND):
                return kind.convert(value)
        raise TypeError

    return Kind(" or ".join(dict.fromkeys(kind.words for kind in kinds)), convert)


def _sequence(element: Kind) -> Kind:
    def convert(value: Any) -> tuple[Any, ...]:
        unordered = isinstance(value, str | bytes | Set | Mapping)
        if unordered or not isinstance(value, Iterable):
            raise TypeError
        return tuple(element.convert(each) for each in value)

    words = element.words.removeprefix("an ").removeprefix("a ")
    return Kind(f"a sequence of {words}s" if "," not in words else f"a sequence, each of {element.words}", convert)


def _ranged(kind: Kind | None, between: Between | None) -> Kind | None:
    if kind is None or between is None:
        return kind
    least, most = between

    def convert(value: Any) -> Any:
        value = kind.convert(value)
        if not least <= (len(value) if isinstance(value, tuple) else value) <= most:
            raise ValueError
        return value

    if "sequence" in kind.words:
        number = f"{least} " if least == most else "one or more "
        return Kind(kind.words.replace("sequence of ", f"sequence of {number}"), convert)
    if kind.words == "an integer" and between == Between(1):
        return Kind("a positive integer", convert)
    limits = f" of at least {least:,}" if most == math.inf else f" from {least:,} to {most:,}"
    return Kind(f"{kind.words}{limits}", convert)


def _integer(value: Any) -> int:
    if isinstance(value, bool | np.bool_) or (isinstance(value, Tensor) and value.dtype is torch.bool):
        raise TypeError
    return operator.index(value)


def _number(value: Any) -> float:
    single = hasattr(value, "__float__") and getattr(value, "ndim", 0) == 0
    if not single or isinstance(value, bool | np.bool_):
        raise TypeError
    number = float(value.detach() if isinstance(value, Tensor) else value)
    kept = type(value) in (int, float) or (isinstance(value, Tensor) and value.requires_grad)
    return value if kept else number


def _truth(value: Any) -> bool:
    if not isinstance(value, bool | np.bool_) and value not in (0, 1):  # as configuration files have them
        raise TypeError
    return bool(value)


def is_dense(value: Any) -> TypeGuard[Tensor]:
    """Whether it is a tensor with all its elements in memory: neither sparse nor nested nor quantized."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not (value.is_nested or value.is_quantized)


def _tensor(value: Any) -> Tensor:
    if not is_dense(value):
        raise TypeError
    return value


def _network(value: Any) -> Any:
    if isinstance(value, type) or not callable(value):  # any function of tensors serves
        raise TypeError
    return value


def _path(value: Any) -> Any:
    if not isinstance(value, str | os.PathLike) or not str(value) or "\0" in str(value):
        raise TypeError
    return Path(value).expanduser() if str(value).startswith("~") else value


_KINDS: dict[Any, Kind] = {
    int: Kind("an integer", _integer),
    float: Kind("a number", _number),
    bool: Kind("True or False", _truth),
    str: _instance(str, "a string"),
    Tensor: Kind("a dense tensor", _tensor),
    np.ndarray: _instance(np.ndarray, "an array"),
    nn.Module: Kind("a torch.nn.Module", _network),
    Path: Kind("a path", _path),
    type(None): _instance(type(None), "None"),
}
