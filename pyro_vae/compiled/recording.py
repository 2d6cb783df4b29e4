"""Records a run of a Pyro program as a graph of tensor operations, without Pyro.

The graph repeats the operations of that run on any data. So this file refuses a program that reads a tensor's value, or
that does something else when it runs again, and names the line.
"""

import contextlib
import copy
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, fx
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from pyro_vae import errors
from pyro_vae.errors import PyroVAEError

# Generated files; "<stdin>" and "<string>" are the user's own code.
GENERATED = ("<frozen", "<eval_with_key", "<__array_function__")
FIX = "Keep it in tensors (torch.where, masks), or run it uncompiled (compile=False in pv.fit)."


@dataclass(frozen=True)
class Recording:
    """The operations of one run of a function."""

    graph: fx.GraphModule  # a function of the captured tensors, then of the arguments, to the function's results
    captured: list[Tensor]  # those that are not arguments of the function: parameters, buffers, constants
    # Captured tensors of integers whose values decided what is in the graph, such as a flow's permutation, each with
    # its version. An in-place change raises the version, and makes the graph one of another program.
    read: list[tuple[Tensor, int]]


def record(function: Callable[..., Any], args: Sequence[Tensor], other_args: Sequence[Tensor]) -> Recording:
    """Record a function of tensors at two arguments; refuse it if the runs differ: then a Python value decides."""
    first, second = _record(function, args), _record(function, other_args)
    alike = len(first.captured) == len(second.captured) and all(map(same_values, first.captured, second.captured))
    here, there = (str(recording.graph.graph).splitlines() for recording in (first, second))
    if alike and here == there:
        return first
    what = "a constant that is another tensor each time"
    if here != there:
        line = next((pair for pair in zip(here, there, strict=False) if pair[0] != pair[1]), (here[-1], there[-1]))
        what = f"'{line[0].strip()}', then '{line[1].strip()}'"
    raise PyroVAEError(
        "the program can't be compiled, since it does something else when it runs again: expected the same operations "
        f"for any data, got {what}. Python values, such as a counter, would never change again. Pass what changes as a "
        "tensor argument, or run it uncompiled (compile=False in pv.fit)."
    )


def _record(function: Callable[..., Any], args: Sequence[Tensor]) -> Recording:
    from torch.fx.experimental.proxy_tensor import make_fx

    values = _RefuseValues()
    elsewhere = _other_generators()

    def refusing(*args: Tensor) -> Any:
        values.record(args)
        with _RefuseArrays(), values:
            return function(*args)

    try:
        # Validation reads values; the run before this one was validated.
        with pyro.validation_enabled(False), _Unvalidated():
            graph = make_fx(refusing)(*args)
    except _ReadsValues as error:
        raise PyroVAEError(
            f"the program can't be compiled, since it reads a tensor's value ({error}), at {users_line(error)}: "
            "expected operations that depend on shapes alone, since a compiled step runs the same operations for any "
            f"data. {FIX}"
        ) from error
    except _ReplacesData as error:
        raise PyroVAEError(
            "the program can't be compiled, since it replaces a tensor's data, which would be lost, at "
            f"{users_line(error)}: expected tensors that keep their memory. Write into it: tensor.data.copy_(new), or "
            "run it uncompiled (compile=False in pv.fit)."
        ) from error
    if _other_generators() != elsewhere:
        raise PyroVAEError(
            "the program can't be compiled, since it draws from Python's or NumPy's random numbers, which would be the "
            f"same in every step: expected draws from torch or Pyro alone. Use torch.rand, say. {FIX}"
        )
    return _lifted(graph, list(values.read.values()))


class _Unvalidated(Messenger):
    """Turns off the validation that a distribution has of its own, as one that ``expand`` made has."""

    def _pyro_sample(self, msg: Any) -> None:
        msg["fn"] = _unvalidated(msg["fn"])


def _unvalidated(value: Any) -> Any:
    if not isinstance(value, Distribution):
        return value
    parts = {name: _unvalidated(part) for name, part in vars(value).items()}
    if not value._validate_args and all(part is vars(value)[name] for name, part in parts.items()):
        return value
    found = copy.copy(value)
    vars(found).update(parts, _validate_args=False)
    return found


def _other_generators() -> Any:
    state = pyro.util.get_rng_state()
    _, keys, *rest = state["numpy"]
    return state["random"], keys.tobytes(), rest


def _lifted(graph: fx.GraphModule, read: list[Tensor]) -> Recording:
    """Turn the captured tensors into the graph's first arguments: each call reads them, and updates them in place."""
    captured: dict[int, tuple[Tensor, fx.Node]] = {}
    first = next(iter(graph.graph.nodes))
    for node in graph.graph.find_nodes(op="get_attr"):
        tensor = getattr(graph, node.target)
        if id(tensor) not in captured:
            with graph.graph.inserting_before(first):
                captured[id(tensor)] = tensor, graph.graph.placeholder(f"captured_{len(captured)}")
        node.replace_all_uses_with(captured[id(tensor)][1])
        graph.graph.erase_node(node)
    graph.recompile()
    return Recording(graph, [tensor for tensor, _ in captured.values()], [(tensor, tensor._version) for tensor in read])


def same_values(first: Tensor, second: Tensor) -> bool:
    """Whether two constants of a program are the same."""
    if first is second:
        return True
    same_kind = first.shape == second.shape and first.dtype == second.dtype and first.device == second.device
    return same_kind and torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)


_PLAINLY = {"_local_scalar_dense": "item, bool, int or float", "index": "an index of booleans"}


class _ReadsValues(BaseException):
    """The program reads a tensor's value. It is no Exception, so that no ``except`` of the program hides it."""


class _ReplacesData(BaseException):
    """The program gives a tensor other memory. It is no Exception, as :class:`_ReadsValues`."""


class _RefuseValues(TorchDispatchMode):
    """Refuses operations whose result, or whose shape, is a tensor's value: ``item``, ``if tensor``, ``x[mask]``."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: dict[int, Tensor] = {}  # by ids, which are unique while the tensors live
        self.read: dict[int, Tensor] = {}
        self.constants: dict[int, Tensor] = {}  # results of operations on constants alone

    def record(self, values: Any) -> None:
        """Forbid to read these: arguments, or results of operations on them or on captured tensors."""
        self.recorded |= _tensors(values)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "aten::set_":
            raise _ReplacesData
        given = _tensors((args, kwargs))
        dtypes = [tensor.dtype for tensor in given.values()]
        # Integers that come neither from arguments nor from parameters are constants, such as the order of a flow's
        # dimensions. The program may read these; they stay out of the graph, and are noted.
        data = any(dtype.is_floating_point or dtype.is_complex for dtype in dtypes)
        constant = given and not data and not given.keys() & self.recorded.keys()
        if constant and (not func._schema.is_mutable or id(args[0]) in self.constants):
            self.read |= {leaf: given[leaf] for leaf in given.keys() - self.constants.keys()}
            with _disable_current_modes():
                constants = func(*args, **(kwargs or {}))
            self.constants |= _tensors(constants)
            return constants
        shape_depends = torch.Tag.dynamic_output_shape in func.tags
        if func is torch.ops.aten.index.Tensor:  # by numbers, its result has the shape of the indices
            shape_depends = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if torch.Tag.data_dependent_output in func.tags or shape_depends:
            name = func.__name__.split(".")[0]
            raise _ReadsValues(_PLAINLY.get(name, name))
        result = func(*args, **(kwargs or {}))
        self.record(result)
        return result


def _tensors(values: Any) -> dict[int, Tensor]:
    return {id(leaf): leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)}


class _RefuseArrays(TorchFunctionMode):
    """Refuses what can't be recorded: tensors as arrays and lists, and ``tensor.data = new``.

    ``one_hot`` only checks values.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.one_hot:
            return _one_hot(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("numpy", "__array__", "tolist"):
            raise _ReadsValues(func.__name__)
        if func == _SET_DATA:
            raise _ReplacesData
        return func(*args, **(kwargs or {}))


_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes < 1:
        raise _ReadsValues("one_hot without a number of classes")
    return (tensor[..., None] == torch.arange(num_classes, device=tensor.device)).long()


@contextlib.contextmanager
def unchanged(tensors: Iterable[Tensor]) -> Iterator[Callable[[Iterable[Tensor]], None]]:
    """Restore the memory of these tensors afterwards, and of those that the yielded function gets; versions stay."""
    copies: dict[int, tuple[Any, Any]] = {}

    def save(tensors: Iterable[Tensor]) -> None:
        for storage in (tensor.untyped_storage() for tensor in tensors):
            if storage._cdata not in copies:
                copies[storage._cdata] = storage, storage.clone()

    save(tensors)
    try:
        yield save
    finally:
        for storage, copy in copies.values():
            storage.copy_(copy)


class SavesBeforeWriting(TorchDispatchMode):
    """Saves each older tensor before an operation that declares to write to it."""

    def __init__(self, save: Callable[[Iterable[Tensor]], None]) -> None:
        super().__init__()
        self.save = save
        self.new: set[int] = set()  # addresses of younger memory; older memory stays alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = list(_tensors((args, kwargs)).values())
        old = {tensor.untyped_storage()._cdata for tensor in given}
        if func._schema.is_mutable:
            self.save(tensor for tensor in given if tensor.untyped_storage()._cdata not in self.new)
        result = func(*args, **(kwargs or {}))
        self.new |= {tensor.untyped_storage()._cdata for tensor in _tensors(result).values()} - old
        return result


def users_line(error: BaseException) -> str:
    """The innermost line of the user's own code in an error's traceback."""
    torch_itself, pyro_itself, ours, standard = (
        Path(str(module.__file__)).parent for module in (torch, pyro, errors, contextlib)
    )
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if torch_itself not in (path := Path(frame.filename)).parents and path.parent != standard
        if not frame.filename.startswith(GENERATED) and frame.filename != __file__
    ]
    own = [f for f in frames if not {pyro_itself, ours} & set(Path(f.filename).parents)]
    frame = (own or frames)[-1]
    where = f"{frame.filename}:{frame.lineno}, in {frame.name}"
    return f"{where}: `{frame.line}`" if frame.line else where  # pasted code has no lines to quote
