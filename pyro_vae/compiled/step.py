"""A Pyro program at the speed of compiled code: traced once for each shape of its arguments, then compiled by Inductor."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.infer
import torch
from pyro.optim import PyroOptim
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pyro_vae.compiled.tracing import trace, unchanged, writes_undone
from pyro_vae.engine import rng
from pyro_vae.engine.modules import Program, evaluating, find_modules
from pyro_vae.engine.program import require_parameters, trace_once
from pyro_vae.errors import MissingCompilerError, PyroVAEError
from pyro_vae.objectives import Objective

MAX_KINDS = 8  # of arguments that one function is compiled for


@dataclass(frozen=True)
class Compiled:
    """The compiled code for arguments of one kind.

    Attributes:
        code: a function of the captured tensors, then of the arguments.
        captured: what it reads besides its arguments, and updates where the program does (batch norm's statistics).
        seconds: what it took to trace and compile.
        read: tensors of integers whose values it has in it, with their versions.
        bound: what was where in the program's modules, as (dictionary, name, tensor): another tensor there is another program.
        eager_seconds: what one call takes uncompiled; None where nobody listens.
        compiled_seconds: what one call takes compiled, likewise.
    """

    code: Callable[..., Any]
    captured: list[Tensor]
    read: list[tuple[Tensor, int]]
    bound: list[tuple[dict[str, Any], str, Any]]
    seconds: float
    eager_seconds: float | None
    compiled_seconds: float | None


OnCompile = Callable[[Compiled | None], None]  # hears of a compilation, with None when it begins


class CompiledFunction:
    """A function that runs a Pyro program on tensors, compiled when arguments of a kind first come.

    It is traced with the arguments' shapes; what is no tensor is a constant of the code, so that it is compiled again for
    each value. Random numbers are drawn anew at each call, from torch's generators: those that the function itself draws.

    Arguments:
        function: what to compile; it returns tensors, or None among them.
        model: the model that it runs.
        guide: the guide that it runs.
        on_compile: is called with None before each compilation, and with its result after.
    """

    def __init__(
        self, function: Callable[..., Any], model: Program, guide: Program, on_compile: OnCompile | None = None
    ) -> None:
        self.function = function
        self.modules = find_modules(model, guide)
        self.on_compile = on_compile
        self.compiled: dict[Any, Compiled] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns, without gradients."""
        if am_i_wrapped():
            raise PyroVAEError(
                "compiled code runs no Pyro handlers: expected it to be called outside of all of them, got one around the call "
                "(poutine.scale or mask, a plate, say). Put the handler inside the model and the guide."
            )
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = [leaf.detach().contiguous() for leaf in leaves if isinstance(leaf, Tensor)]
        kind = (repr(structure), *map(_kind, leaves))
        key = (*kind, *_modes(self.modules))
        compiled = self.compiled.get(key)
        if compiled is not None and any(owner.get(name) is not tensor for owner, name, tensor in compiled.bound):
            del self.compiled[key]
            compiled = None
        if compiled is None:
            compiled = self._compile(leaves, structure, tensors)
            self.compiled[(*kind, *_modes(self.modules))] = compiled  # it may have found more modules
        if any(tensor._version != version for tensor, version in compiled.read):
            raise PyroVAEError(
                "a tensor of integers that the program read when it was compiled has changed since: expected a constant, such as "
                "a permutation. Pass what changes as an argument, and keep it in tensors, or run the program uncompiled."
            )
        with torch.no_grad():
            if not any(tensor.is_cuda for tensor in compiled.captured):
                return compiled.code(*compiled.captured, *tensors)
            torch.compiler.cudagraph_mark_step_begin()
            results = compiled.code(*compiled.captured, *tensors)  # which the next replay of the graph writes over
            return pytree.tree_map_only(Tensor, torch.clone, results)

    def _compile(self, leaves: list[Any], structure: Any, tensors: list[Tensor]) -> Compiled:
        if len(self.compiled) == MAX_KINDS:
            raise PyroVAEError(
                f"compiled for {MAX_KINDS} kinds of arguments, and another came: expected arguments of few shapes, and tensors for "
                "what changes from call to call, since anything else is a constant of the code. Pass torch.tensor(value), "
                "or pad the data to one shape."
            )
        if self.on_compile is not None:
            self.on_compile(None)

        def function(*tensors: Tensor) -> Any:
            rest = iter(tensors)
            filled = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(filled, structure)
            return self.function(*args, **kwargs)

        with rng.preserved():
            with writes_undone():
                with evaluating(self.modules) as found:  # so that batch norm takes no notice
                    function(*tensors)
                parts = [part for module in (*self.modules, *found) for part in module.modules()]
                self.modules = list(dict.fromkeys(parts))
                # Batch norm does not say that it writes to its statistics.
                statistics = [buffer for module in self.modules for buffer in module.buffers(recurse=False)]
                with unchanged(statistics):
                    with pyro.validation_enabled(True):
                        function(*tensors)
                    started = time.perf_counter()
                    reordered = [tensor.flip(0) if tensor.dim() else tensor for tensor in tensors]
                    traced = trace(function, tensors, reordered)
            inputs = [*traced.captured, *tensors]
            with unchanged(inputs), torch.no_grad():
                code = _inductor(traced.graph, inputs)
                code(*inputs)
                seconds = time.perf_counter() - started
                compiled_seconds = _seconds(code, inputs) if self.on_compile else None
                with pyro.validation_enabled(False):
                    eager_seconds = _seconds(function, tensors) if self.on_compile else None
        bound = [
            (owner, name, tensor)
            for module in self.modules
            for owner in (module._parameters, module._buffers)
            for name, tensor in owner.items()
        ]
        compiled = Compiled(code, traced.captured, traced.read, bound, seconds, eager_seconds, compiled_seconds)
        if self.on_compile is not None:
            self.on_compile(compiled)
        return compiled


def _kind(leaf: Any) -> Any:
    """What of an argument compiled code depends on."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    try:
        hash(leaf)
    except TypeError:
        raise PyroVAEError(
            "compiled code takes tensors, and constants such as numbers and strings, also in tuples, lists and dictionaries: got "
            f"{type(leaf).__name__}. Pass torch.as_tensor(...)."
        ) from None
    return type(leaf), leaf  # 1 and True are equal


def _modes(modules: list[nn.Module]) -> list[Any]:
    """What else the code depends on."""
    autocast = [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")]
    return [torch.get_default_dtype(), *autocast, *[module.training for module in modules]]


def _inductor(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    import torch._inductor  # half a second, which those who never compile need not wait

    graph = _with_whole_bernoullis(graph)
    options: dict[str, Any] = {"fallback_random": True}  # torch's own generators, in the program's order
    if any(tensor.is_cuda for tensor in inputs):
        options["triton.cudagraphs"] = True
    try:
        code: Callable[..., Any] = torch._inductor.compile(graph, list(inputs), options=options)
    except Exception as error:
        if "InvalidCxxCompiler" not in str(error):
            raise
        raise MissingCompilerError(
            f"compiled code needs a C++ compiler: expected one that works, got none ({error}). Install one (g++, say; the "
            "variable CXX names another), or run the program uncompiled."
        ) from error
    return code


def _with_whole_bernoullis(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The graph with coins tossed as PyTorch tosses them: Inductor would draw numbers of float32 for them in any precision."""
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
    """The least time of three calls: the first may have more to do, and others may have the machine."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        function(*args)
        if any(tensor.is_cuda for tensor in args):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


class CompiledStep:
    """What :func:`compile_step` returns: call it with a minibatch to take a step.

    Attributes:
        loss_and_gradients: the compiled function, which has what compiling took for each shape.
        parameters: what the optimiser steps.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        objective: Objective,
        optimizer: torch.optim.Optimizer | PyroOptim,
        *,
        mean: bool = False,
        on_compile: OnCompile | None = None,
    ) -> None:
        check_compiled(objective)
        stepping = isinstance(optimizer, torch.optim.Optimizer | PyroOptim)
        if not stepping or isinstance(optimizer, torch.optim.LBFGS):  # which runs the loss several times
            raise PyroVAEError(
                "expected an optimizer that steps on one gradient, such as torch.optim.Adam(vae.parameters(), lr=1e-3) or "
                f"pyro.optim.Adam({{'lr': 1e-3}}), got {_shown(optimizer)}."
            )
        self.model, self.guide, self.objective, self.optimizer, self.mean = model, guide, objective, optimizer, mean
        self.on_compile = on_compile
        self.parameters: list[Tensor] = []
        self._own: dict[str, Tensor] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Set each parameter's ``grad``, step the optimiser, and return the loss before the step, a tensor."""
        loss = self.compute(*args, **kwargs)
        if isinstance(self.optimizer, PyroOptim):
            self.optimizer([leaf for leaf in self.parameters if leaf.grad is not None])
        else:
            self.optimizer.step()
        return loss

    def compute(self, *args: Any, **kwargs: Any) -> Tensor:
        """Set each parameter's ``grad`` and return the loss, but leave the step to the caller."""
        loss, gradients = self._run(args, kwargs)
        taken = set()
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is not None:  # two equal gradients may be one tensor, which clipping would scale twice
                gradient = gradient.clone() if gradient.data_ptr() in taken else gradient
                taken.add(gradient.data_ptr())
            parameter.grad = gradient
        return loss

    def accumulate(self, *args: Any, **kwargs: Any) -> Tensor:
        """As :meth:`compute`, but add to each parameter's ``grad``: for a minibatch that comes in portions.

        With many particles portions save time besides memory, since a portion fits the processor's cache. Each counts as a step
        of a schedule, as each differentiable loss does.
        """
        loss, gradients = self._run(args, kwargs)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad.add_(gradient)
        return loss

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, list[Tensor | None]]:
        """The loss, and its gradient by each parameter."""
        parameters = self._find_parameters(args, kwargs)
        if list(map(id, parameters)) != list(map(id, self.parameters)):
            self.parameters = parameters
            if isinstance(self.optimizer, torch.optim.Optimizer):
                self.optimizer.zero_grad()  # one that is frozen from now on must not step by its last gradient
            self._traced = copy.copy(self.objective)  # whose settings become tensors
            self.loss_and_gradients = CompiledFunction(
                self._loss_and_gradients, self.model, self.guide, self.on_compile
            )
        settings = {name: self._constant(value) for name, value in self.objective.scheduled().items()}
        loss, *gradients = self.loss_and_gradients(settings, args, kwargs)
        self.objective.step += 1
        return loss, gradients

    def _loss_and_gradients(self, settings: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        vars(self._traced).update(settings)
        with torch.enable_grad():
            loss = self._traced.differentiable_loss(self.model, self.guide, *args, **kwargs)
            whole = loss / len(args[0]) if self.mean else loss
            gradients = torch.autograd.grad(whole, self.parameters, allow_unused=True) if whole.requires_grad else ()
            if all(gradient is None for gradient in gradients):
                raise PyroVAEError(
                    f"expected an optimizer of parameters that the loss depends on, got one of {len(self.parameters)} others. Build "
                    "it on the program's, torch.optim.Adam(vae.parameters()), say, after the last change of the networks."
                )
            return loss.detach(), *gradients

    def _constant(self, value: float) -> Tensor:
        # Without dimensions, so that float64 changes no other tensor's type, and rounds as a Python number does.
        return torch.tensor(value, dtype=torch.float64, device=self.parameters[0].device)

    def _find_parameters(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """What the optimiser steps; of Pyro's optimisers, which are given that at each step, all that the program has."""
        if not isinstance(self.optimizer, PyroOptim):
            parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
            if not parameters:
                raise PyroVAEError(
                    "expected an optimizer of parameters that require a gradient, got one without any. Unfreeze some."
                )
            return parameters
        store = dict(pyro.get_param_store().named_parameters())
        in_store = not pyro.settings.get("module_local_params")
        if not self._own or (in_store and any(store.get(name) is not own for name, own in self._own.items())):
            with pyro.validation_enabled(True):
                traces = trace_once(self.model, self.guide, *args, **kwargs)
            self._own = require_parameters(*traces)
        return list(dict.fromkeys(self._own.values()))


def compile_step(
    model: Program, guide: Program, objective: Objective, optimizer: torch.optim.Optimizer | PyroOptim
) -> CompiledStep:
    r"""A training step of a Pyro program as compiled code, for a loop of one's own.

    .. math:: \theta \leftarrow \mathrm{optimizer}\bigl(\theta, \nabla_\theta \, \mathrm{loss}(\theta; x)\bigr), \qquad
        \mathrm{loss} = -\sum_n s_n \mathcal L(x_n)

    with the bound :math:`\mathcal L` of each datum and its scale s. When a shape of arguments first comes, model and guide run a
    few times, twice under a tracer, which records loss and gradients together in one graph; Inductor compiles it: 4 to 20 s on
    one core, and less when its cache on disk knows it. From then on Pyro does not run. A step does what the program did in that
    run, on other data, parameters and random numbers, drawn from the generators that ``pyro.set_rng_seed`` starts, as an
    uncompiled step draws them. Dropout and batch norm work; `beta` may change, and be a schedule (a subclass of
    :class:`pyro_vae.Objective` says by `scheduled` what else may). Other Python values are those of that run. **Nothing is validated
    after it**, the data neither: look at the loss, or use :func:`pyro_vae.fit`, which looks at both.

    Arguments:
        model: a Pyro model.
        guide: its guide.
        objective: the bound, such as :class:`pyro_vae.ELBO`, with all particles in one run.
        optimizer: of ``torch.optim``, over parameters of the program (``fused=True`` is fastest), or of ``pyro.optim``.

    Returns:
        A function of a minibatch, called as the model is, with tensors for all that changes. It takes one step, and
        returns the loss before it in nats, a tensor without dimensions. To clip gradients, call its ``compute``, which
        replaces every ``grad`` and returns the loss, then clip, then step the optimiser. To run a minibatch in portions, call
        its ``accumulate`` with each, which adds to every ``grad``, step the optimiser, and empty it by ``zero_grad``.

    Raises:
        ValueError: the objective is none of this package's or runs particles apart, or the optimizer has none of the
            program's parameters; at the first step: what :func:`pyro_vae.log_weights` refuses, or a program that can't be
            traced, since it reads a tensor's value or does something else when run again. The message names the line.
        RuntimeError: there is no C++ compiler, which Inductor needs for a CPU.

    Example:
        >>> import torch, pyro, pyro_vae as pv
        >>> vae = pv.mlp_vae((5,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
        >>> optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3, fused=True)
        >>> step = pv.compile_step(vae.model, vae.guide, pv.ELBO(), optimizer)
        >>> loss = step(torch.randn(32, 5))  # doctest: +SKIP
    """
    return CompiledStep(model, guide, objective, optimizer)


def check_compiled(objective: Any) -> None:
    """Refuse an objective whose runs can't be one graph."""
    if isinstance(objective, pyro.infer.ELBO) and not isinstance(objective, Objective):
        raise PyroVAEError(
            f"compiled code expected an objective of pyro_vae, got Pyro's {_shown(objective)}: those read a value back at every "
            "step, and TraceEnum_ELBO's enumeration is no part of this package. Use pv.ELBO or pv.IWAE, or run it uncompiled."
        )
    if not isinstance(objective, Objective):
        order = " The objective comes before the optimizer." if isinstance(objective, torch.optim.Optimizer) else ""
        raise PyroVAEError(f"expected an objective such as pv.ELBO(), got {_shown(objective)}.{order}")
    if objective.chunk_size is not None:
        raise PyroVAEError(
            f"compiled code holds the whole run: expected an objective without chunk_size, got {objective.chunk_size}. "
            "Drop it, or run it uncompiled."
        )
    if objective.num_samples > 1 and not objective.vectorize_particles:
        raise PyroVAEError(
            "compiled code runs all particles at once: expected vectorize_particles=True, got False. Let the program take a "
            "leading dimension (pyro_vae.networks.apply_batched), or run it uncompiled."
        )


def _shown(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"{type(value).__name__}"
