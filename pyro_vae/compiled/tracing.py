"""Runs a Pyro program once under a tracer: what remains is a graph of tensor operations, without Pyro.

A graph does what the program did in that run, whatever its arguments hold. So a program that decides by values, reads
them, or does something else when run again is refused here, by the line that does it.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from pyro_vae.errors import PyroVAEError

GENERATED = (
    "<frozen",
    "<eval_with_key",
    "<__array_function__",
)  # files that no user wrote; "<stdin>" and "<string>" are theirs
FIX = "Keep it in tensors (torch.where, masks), or run it uncompiled (compile=False in pv.fit)."


@dataclass(frozen=True)
class Traced:
    """What a function did.

    Attributes:
        graph: a function of the captured tensors, then of the arguments; its results are those of the function.
        captured: tensors that the function found elsewhere than in its arguments: parameters, buffers, constants.
        read: tensors of integers among these whose values decided what is in the graph, such as a flow's permutation, each
            with its version: in-place changes, by which the graph would be of another program.
    """

    graph: fx.GraphModule
    captured: list[Tensor]
    read: list[tuple[Tensor, int]]


def being_traced() -> bool:
    """Whether operations are recorded just now, so that no check may read a value; the run before it has made them all."""
    tracer = sys.modules.get("torch.fx.experimental.proxy_tensor")  # half a second to import, for those who trace
    return tracer is not None and tracer.get_proxy_mode() is not None


def trace(function: Callable[..., Any], args: Sequence[Tensor], other_args: Sequence[Tensor]) -> Traced:
    """Record what a function of tensors does.

    It is run twice, with other data (the same rows in another order, since those are in their support) and other random
    numbers the second time, and both runs must do the same: else something besides tensors decides what it does, and would be frozen.

    Raises:
        ValueError: the function reads values, or does not do the same in both runs.
    """
    first, second = _trace(function, args), _trace(function, other_args)
    _check_same(first, second)
    return first


def _trace(function: Callable[..., Any], args: Sequence[Tensor]) -> Traced:
    from torch.fx.experimental.proxy_tensor import make_fx

    values = _RefuseValues()
    elsewhere = _other_generators()

    def refusing(*args: Tensor) -> Any:
        values.record(args)
        with _RefuseArrays(), values:
            return function(*args)

    try:
        # Validation reads values; what it would find, a run before this one has found.
        with pyro.validation_enabled(False):
            graph = make_fx(refusing)(*args)
    except _ReadsValues as error:
        raise PyroVAEError(
            f"the program can't be traced, since it reads a tensor's value ({error}), at {users_line(error)}: expected "
            f"operations that depend on shapes alone, as a compiled step does the same whatever its data are. {FIX}"
        ) from error
    if _other_generators() != elsewhere:
        raise PyroVAEError(
            "the program can't be traced, since it draws from Python's or NumPy's random numbers, which would be frozen as they "
            f"were: expected draws from torch or Pyro alone. Use torch.rand, say. {FIX}"
        )
    return _lifted(graph, list(values.read.values()))


def _other_generators() -> Any:
    state = pyro.util.get_rng_state()
    _, keys, *rest = state["numpy"]
    return state["random"], keys.tobytes(), rest


def _lifted(graph: fx.GraphModule, read: list[Tensor]) -> Traced:
    """Make what the graph captured its first arguments: read anew at each call, and updated in place where it was."""
    captured: dict[int, tuple[Tensor, fx.Node]] = {}
    first = next(iter(graph.graph.nodes))
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = getattr(graph, node.target)
        if id(tensor) not in captured:
            with graph.graph.inserting_before(first):
                captured[id(tensor)] = tensor, graph.graph.placeholder(f"captured_{len(captured)}")
        node.replace_all_uses_with(captured[id(tensor)][1])
        graph.graph.erase_node(node)
    graph.recompile()
    return Traced(graph, [tensor for tensor, _ in captured.values()], [(tensor, tensor._version) for tensor in read])


def _check_same(first: Traced, second: Traced) -> None:
    """Both runs did the same, with the same captured tensors."""
    alike = len(first.captured) == len(second.captured) and all(map(_equal, first.captured, second.captured))
    here, there = (str(traced.graph.graph).splitlines() for traced in (first, second))
    if here != there:
        line = next((pair for pair in zip(here, there, strict=False) if pair[0] != pair[1]), (here[-1], there[-1]))
        what = f"'{line[0].strip()}', then '{line[1].strip()}'"
    elif not alike:
        what = "a constant that is another tensor each time"
    else:
        return
    raise PyroVAEError(
        f"the program can't be traced, since it does something else when run again: expected the same operations for any "
        f"data, got {what}. A Python counter, or values that left a tensor, would be frozen as they were. Pass what changes as a tensor "
        "argument, or run it uncompiled (compile=False in pv.fit)."
    )


def _equal(first: Tensor, second: Tensor) -> bool:
    if first is second:
        return True
    same_kind = first.shape == second.shape and first.dtype == second.dtype and first.device == second.device
    return same_kind and torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)


_PLAINLY = {"_local_scalar_dense": "item, bool, int or float", "index": "an index of booleans"}


class _ReadsValues(BaseException):
    """Something asked for a tensor's value. No ``except Exception`` of the program's may swallow that."""


class _RefuseValues(TorchDispatchMode):
    """Refuses operations whose result, or its shape, is a tensor's value: ``item``, ``if tensor``, ``x[mask]``.

    Tensors of integers that come neither from arguments nor from parameters are constants, such as the order in which a flow
    goes through its dimensions: these may be read, are kept out of the graph, and noted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recorded: dict[int, Tensor] = {}  # by their ids, which are theirs as long as they live
        self.read: dict[int, Tensor] = {}
        self.constants: dict[int, Tensor] = {}  # what came of those alone that were read

    def record(self, values: Any) -> None:
        """These are arguments, or what came of them or of captured tensors: nothing may read them."""
        self.recorded |= _tensors(values)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = _tensors((args, kwargs))
        constant = given and not any(leaf in self.recorded or _counts(given[leaf]) for leaf in given)
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


def _counts(tensor: Tensor) -> bool:
    """Whether a tensor's values are more than an order, a size or an index."""
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


class _RefuseArrays(TorchFunctionMode):
    """Refuses to turn tensors into arrays and lists, which no tracer follows; ``one_hot`` looks at values to check them alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.one_hot:
            return _one_hot(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("numpy", "__array__", "tolist"):
            raise _ReadsValues(func.__name__)
        return func(*args, **(kwargs or {}))


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes < 1:
        raise _ReadsValues("one_hot without a number of classes")
    return (tensor[..., None] == torch.arange(num_classes, device=tensor.device)).long()


@contextlib.contextmanager
def unchanged(tensors: Iterable[Tensor]) -> Iterator[None]:
    """These tensors are put back to what they were."""
    saved = _Saved()
    saved.save(tensors)
    try:
        yield
    finally:
        saved.put_back()


@contextlib.contextmanager
def writes_undone() -> Iterator[None]:
    """Whatever is there before and operations say that they write to is put back."""
    writes = _Writes()
    try:
        with writes:
            yield
    finally:
        writes.saved.put_back()


class _Saved:
    """Copies of tensors' memory, which leave their versions alone when they are put back."""

    def __init__(self) -> None:
        self.copies: dict[int, tuple[Any, Any]] = {}

    def save(self, tensors: Iterable[Tensor]) -> None:
        for storage in (tensor.untyped_storage() for tensor in tensors):
            if storage._cdata not in self.copies:
                self.copies[storage._cdata] = storage, storage.clone()

    def put_back(self) -> None:
        for storage, copy in self.copies.values():
            storage.copy_(copy)


class _Writes(TorchDispatchMode):
    """Saves what was there before operations came to be run, when they write to it."""

    def __init__(self) -> None:
        super().__init__()
        self.saved = _Saved()
        self.new: set[int] = set()  # addresses that are not of anything older, which is alive all the time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = list(_tensors((args, kwargs)).values())
        old = {tensor.untyped_storage()._cdata for tensor in given}
        if func._schema.is_mutable:
            self.saved.save(tensor for tensor in given if tensor.untyped_storage()._cdata not in self.new)
        result = func(*args, **(kwargs or {}))
        self.new |= {tensor.untyped_storage()._cdata for tensor in _tensors(result).values()} - old
        return result


def users_line(error: BaseException) -> str:
    """The innermost line of the user's own code that an error came through."""
    torch_itself, pyro_itself, ours = (Path(str(file)).parent for file in (torch.__file__, pyro.__file__, __file__))
    standard = Path(contextlib.__file__).parent
    frames = [f for f in traceback.extract_tb(error.__traceback__) if torch_itself not in Path(f.filename).parents]
    frames = [
        f
        for f in frames
        if Path(f.filename).parent != standard and not f.filename.startswith(GENERATED) and f.filename != __file__
    ]
    own = [f for f in frames if not {pyro_itself, ours} & set(Path(f.filename).parents)]
    frame = (own or frames)[-1]
    where = f"{frame.filename}:{frame.lineno}, in {frame.name}"
    return f"{where}: `{frame.line}`" if frame.line else where  # what was pasted or exec'd has no lines to quote
