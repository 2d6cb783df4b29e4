"""A function of a Pyro program as compiled code: recorded for each shape of its arguments, compiled by Inductor."""

import time
import timeit
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pyro_vae.compiled.recording import SavesBeforeWriting, record, same_values, unchanged
from pyro_vae.engine import rng
from pyro_vae.engine.modules import eval_mode
from pyro_vae.engine.precision import autocast_of_layers, single_precision
from pyro_vae.errors import MissingCompilerError, PyroVAEError

MAX_KINDS = 8  # of arguments that one function is compiled for
MAX_KEPT = 32  # graphs whose code is kept for another function that records the same


@dataclass(frozen=True)
class Compiled:
    """The compiled code for arguments of one kind."""

    code: Callable[..., Any]  # a function of the captured tensors, then of the arguments
    captured: list[Tensor]  # it updates those that the program updates, such as batch norm's statistics
    read: list[tuple[Tensor, int]]  # tensors of integers whose values are constants of the code, with their versions
    bound: "Bound"  # the parts of the modules: all must stay
    modes: list[tuple[nn.Module, bool]]  # the modules that ran, and whether each was in training mode
    seconds: float  # the time to record and compile
    eager_seconds: float | None  # the time of an uncompiled call; None without `on_compile`
    compiled_seconds: float | None  # the time of a compiled call; None without `on_compile`


Bound = list[tuple[dict[str, Any], str, Any]]  # each dictionary, name and part of some modules
OnCompile = Callable[[Compiled | None], None]  # called when a compilation begins, with None, and when it ends


@dataclass(eq=False, repr=False)
class CompiledFunction:
    """A function that runs a Pyro program on tensors, compiled at the first call with arguments of a new kind.

    The kind of a tensor is its shape, type and device; any other argument is a constant of the code. Each call draws
    the random numbers of the uncompiled function, from torch's generators.
    """

    function: Callable[..., Any]  # it returns tensors, or None among them
    modules: list[nn.Module]  # of the program that it runs
    on_compile: OnCompile | None = None
    compiled: dict[Any, list[Compiled]] = field(default_factory=dict, init=False)  # by kind; each of other modes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's results, without gradients."""
        with single_precision():
            return self._call(args, kwargs)

    @property
    def outdated(self) -> bool:
        """Whether the modules have other parameters, buffers or parts than when some code was compiled."""
        return any(_has_lost_parts(each) for same_kind in self.compiled.values() for each in same_kind)

    def _call(self, args: Any, kwargs: Any) -> Any:
        if am_i_wrapped():
            raise PyroVAEError(
                "compiled code runs no Pyro handlers: expected a call outside of all of them, got one around the call "
                "(such as poutine.scale, poutine.mask or a plate). Put the handler inside the model and the guide."
            )
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = [leaf.detach().contiguous() for leaf in leaves if isinstance(leaf, Tensor)]
        kind = (repr(structure), *map(_kind, leaves), torch.get_default_dtype(), *autocast_of_layers())
        same_kind = self.compiled.get(kind, [])
        compiled = next((each for each in same_kind if _serves(each)), None)
        if compiled is None:
            self.compiled[kind] = [each for each in same_kind if not _has_lost_parts(each)]
            compiled = self._compile(leaves, structure, tensors)
            self.compiled[kind].append(compiled)
        if any(tensor._version != version for tensor, version in compiled.read):
            raise PyroVAEError(
                "a tensor of integers that the program read when it was compiled has changed since: expected a "
                "constant, such as a permutation. Pass it as a tensor argument, or run the program uncompiled."
            )
        with torch.no_grad():
            if not any(tensor.is_cuda for tensor in compiled.captured):
                return compiled.code(*compiled.captured, *tensors)
            torch.compiler.cudagraph_mark_step_begin()
            results = compiled.code(*compiled.captured, *tensors)  # the next replay of the graph writes over them
            return pytree.tree_map_only(Tensor, torch.clone, results)

    def _compile(self, leaves: list[Any], structure: Any, tensors: list[Tensor]) -> Compiled:
        if sum(map(len, self.compiled.values())) == MAX_KINDS:
            raise PyroVAEError(
                f"compiled for {MAX_KINDS} kinds of arguments, got one more: expected arguments of few shapes, and a "
                "tensor for each argument that changes from call to call, since any other argument is a constant of "
                "the code. Pass torch.tensor(value), or pad the data to one shape."
            )
        if self.on_compile is not None:
            self.on_compile(None)

        def function(*tensors: Tensor) -> Any:
            rest = iter(tensors)
            filled = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(filled, structure)
            return self.function(*args, **kwargs)

        with rng.preserved():
            with unchanged([]) as save, SavesBeforeWriting(save):
                with eval_mode(self.modules) as found:  # so that batch norm does not notice
                    function(*tensors)
                # Among those that were found, some may be made anew in each run, as a conditioned flow is.
                parts = (part for module in (*self.modules, *found) for part in module.modules())
                modules = list(dict.fromkeys(parts))
                # Batch norm does not say that it writes to its statistics.
                save(buffer for module in modules for buffer in module.buffers(recurse=False))
                with pyro.validation_enabled(True):
                    function(*tensors)
                reordered = [tensor.flip(0) if tensor.dim() else tensor for tensor in tensors]  # in their support too
                before = _bound(modules)
                function(*reordered)
                _require_kept(before)
                started = time.perf_counter()
                recorded = record(function, tensors, reordered)
            inputs = [*recorded.captured, *tensors]
            with unchanged(inputs), torch.no_grad():
                code = _kept(recorded.graph, inputs)
                code(*inputs)
                seconds = time.perf_counter() - started
                compiled_seconds = _seconds(code, inputs) if self.on_compile else None
                with pyro.validation_enabled(False):
                    eager_seconds = _seconds(function, tensors) if self.on_compile else None
        bound, modes = _bound(modules), [(module, module.training) for module in modules]
        compiled = Compiled(
            code, recorded.captured, recorded.read, bound, modes, seconds, eager_seconds, compiled_seconds
        )
        if self.on_compile is not None:
            self.on_compile(compiled)
        return compiled


def _bound(modules: list[nn.Module]) -> Bound:
    return [
        (owner, name, part)
        for module in modules
        for owner in (module._parameters, module._buffers, module._modules)
        for name, part in owner.items()
    ]


def _require_kept(bound: Bound) -> None:
    """Refuse a program whose last run has assigned a module another tensor than one of these: later ones are lost."""
    for owner, name, part in bound:
        now = owner.get(name)
        if now is part or (isinstance(now, Tensor) and isinstance(part, Tensor) and same_values(now, part)):
            continue
        raise PyroVAEError(
            f"the program can't be compiled, since it assigns a module's '{name}' anew when it runs, which would be "
            f"lost: expected tensors that stay. Write into it, self.{name}.copy_(new) under torch.no_grad(), or run it "
            "uncompiled (compile=False in pv.fit)."
        )


def _serves(compiled: Compiled) -> bool:
    """Whether the modules have the parts, and are in the modes, for which the code was compiled."""
    same = all(module.training is mode for module, mode in compiled.modes)
    return same and not _has_lost_parts(compiled)


def _has_lost_parts(compiled: Compiled) -> bool:
    return any(owner.get(name) is not part for owner, name, part in compiled.bound)


def _kind(leaf: Any) -> Any:
    """The property of an argument that compiled code depends on."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    try:
        hash(leaf)
    except TypeError:
        raise PyroVAEError(
            "compiled code expected tensors, or constants such as numbers and strings, also in tuples, lists and "
            f"dictionaries, got {type(leaf).__name__}. Pass torch.as_tensor(...)."
        ) from None
    return type(leaf), leaf  # 1 and True are equal


_CODE: dict[Any, Callable[..., Any]] = {}  # by graph and kinds of inputs, the latest last


def _kept(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """The graph's code; that of an equal graph serves again, as when an evaluation of one program is called twice."""
    kinds = (
        (each.shape, each.stride(), each.dtype, each.device, each.data_ptr() if each.is_cuda else None)
        for each in inputs
    )  # CUDA graphs read their inputs where they are
    key = (str(graph.graph), torch.get_num_threads(), *kinds)
    code = _CODE.pop(key, None) or _inductor(graph, inputs)
    _CODE[key] = code
    while len(_CODE) > MAX_KEPT:
        del _CODE[next(iter(_CODE))]
    return code


def _inductor(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    import torch._inductor  # to import it takes half a second

    options = {
        "fallback_random": True,  # torch's own generators, in the program's order
        "triton.cudagraphs": any(tensor.is_cuda for tensor in inputs),
    }
    try:
        return torch._inductor.compile(_with_whole_bernoullis(graph), list(inputs), options=options)
    except Exception as error:
        if "InvalidCxxCompiler" not in str(error):
            raise
        raise MissingCompilerError(
            f"compiled code needs a C++ compiler: expected one that works, got none ({error}). Install one (g++, say; "
            "the variable CXX names another), or run the program uncompiled."
        ) from error


def _with_whole_bernoullis(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The graph with Bernoulli samples drawn as PyTorch draws them: Inductor draws float32 numbers in any precision."""
    aten = torch.ops.aten
    for node in graph.graph.find_nodes(op="call_function", target=aten.bernoulli.default):
        with graph.graph.inserting_before(node):
            empty = graph.graph.call_function(aten.empty_like.default, node.args)
            tossed = graph.graph.call_function(aten.bernoulli_.Tensor, (empty, *node.args))
        node.replace_all_uses_with(tossed)
        graph.graph.erase_node(node)
    graph.recompile()
    return graph


def _seconds(function: Callable[..., Any], args: list[Tensor]) -> float:
    """The least time of three calls: the first call does more, and other processes use the machine too."""

    def call() -> None:
        function(*args)
        if any(tensor.is_cuda for tensor in args):
            torch.cuda.synchronize()

    return min(timeit.repeat(call, number=1, repeat=3))
