"""A Pyro program at the speed of compiled code: traced once for each shape of its arguments, then compiled by Inductor."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_vae import rng
from pyro_vae.modules import Program, buffers, called, evaluating, find_modules
from pyro_vae.objectives import Objective
from pyro_vae.runs import parameters_of, trace_once
from pyro_vae.tracing import trace

MOST = 16  # kinds of arguments that one function is compiled for


@dataclass(frozen=True)
class Compiled:
    """The compiled code for arguments of one kind.

    Attributes:
        code: a function of the captured tensors, then of the arguments.
        captured: what it reads besides its arguments, and updates where the program does (batch norm's statistics).
        seconds: what it took to trace and compile.
        read: tensors of integers whose values it has in it, with their versions.
        before: the seconds that one call takes uncompiled.
        after: the seconds that one call takes compiled.
    """

    code: Callable[..., Any]
    captured: list[Tensor]
    read: list[tuple[Tensor, int]]
    seconds: float
    before: float
    after: float

    @property
    def calls_to_pay_off(self) -> float:
        """After how many calls the compilation has saved the time that it took."""
        return self.seconds / (self.before - self.after) if self.after < self.before else math.inf


Tell = Callable[[Compiled | None], None]  # hears of a compilation, with None when it begins


def _silently(compiled: Compiled | None) -> None:
    """Tells nobody."""


class CompiledFunction:
    """A function that runs a Pyro program on tensors, compiled when arguments of a kind first come.

    It is traced with the arguments' shapes; what is no tensor is a constant of the code, so that it is compiled again for
    each value. Random numbers are drawn anew at each call, from torch's generators: those that the function itself draws.

    Arguments:
        function: what to compile; it returns tensors, or None among them.
        model: the model that it runs.
        guide: the guide that it runs.
        tell: is called with None before each compilation, and with its result after.
    """

    def __init__(self, function: Callable[..., Any], model: Program, guide: Program, tell: Tell = _silently) -> None:
        self.function = function
        self.modules = find_modules(model, guide)
        self.tell = tell
        self.compiled: dict[Any, Compiled] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns, without gradients."""
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = [leaf.detach().contiguous() for leaf in leaves if isinstance(leaf, Tensor)]
        kinds = [(leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        key = (repr(structure), *kinds, *[module.training for module in self.modules])
        compiled = self.compiled.get(key)
        if compiled is None:
            compiled = self._compile(leaves, structure, tensors)
            key = (repr(structure), *kinds, *[module.training for module in self.modules])  # it may have found more
            self.compiled[key] = compiled
        if any(tensor._version != version for tensor, version in compiled.read):
            raise ValueError(
                "a tensor of integers that the program read when it was compiled has changed since: expected a constant, such as "
                "a permutation. Pass what changes as an argument, and keep it in tensors, or run the program uncompiled."
            )
        with torch.no_grad():
            return compiled.code(*compiled.captured, *tensors)

    def _compile(self, leaves: list[Any], structure: Any, tensors: list[Tensor]) -> Compiled:
        if len(self.compiled) == MOST:
            raise ValueError(
                f"compiled for {MOST} kinds of arguments, and another came: expected arguments of few shapes, and tensors for "
                "what changes from call to call, since anything else is a constant of the code. Pass torch.tensor(value), "
                "or pad the data to one shape."
            )
        self.tell(None)

        def function(*tensors: Tensor) -> Any:
            rest = iter(tensors)
            filled = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(filled, structure)
            return self.function(*args, **kwargs)

        with pyro.poutine.block(), rng.preserved():
            # First with validation, in evaluation mode: mistakes show here, and parameters come into being.
            with pyro.validation_enabled(True), evaluating(self.modules), called() as found:
                function(*tensors)
            self.modules = list(dict.fromkeys([*self.modules, *found]))
            state = [(buffer, buffer.clone()) for buffer in buffers(self.modules).values()]
            try:
                with pyro.validation_enabled(False):
                    before = _seconds(function, tensors)
                started = time.perf_counter()
                traced = trace(function, tensors, [tensor.flip(0) if tensor.dim() else tensor for tensor in tensors])
                with torch.no_grad():
                    inputs = [*traced.captured, *tensors]
                    code = _inductor(traced.graph, inputs)
                    code(*inputs)
                    seconds = time.perf_counter() - started
                    after = _seconds(code, inputs)
            finally:
                with torch.no_grad():
                    for buffer, value in state:
                        if not torch.equal(
                            buffer, value
                        ):  # a change in place is a new version, even to the same values
                            buffer.copy_(value)
        compiled = Compiled(code, traced.captured, traced.read, seconds, before, after)
        self.tell(compiled)
        return compiled


def _inductor(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    import torch._inductor  # half a second, which those who never compile need not wait

    options: dict[str, Any] = {"fallback_random": True}  # torch's own generators, in the program's order
    if any(tensor.is_cuda for tensor in inputs):
        options["triton.cudagraphs"] = True
    try:
        code: Callable[..., Any] = torch._inductor.compile(graph, list(inputs), options=options)
    except Exception as error:
        raise RuntimeError(
            f"Inductor could not compile the traced program ({error}): expected a working compiler, of C++ for a CPU. Install "
            "one (g++, say; the variable CXX names another), or run the program uncompiled."
        ) from error
    return code


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
        gradients: the compiled function, which has what compiling took for each shape.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        objective: Objective,
        optimizer: torch.optim.Optimizer | PyroOptim,
        *,
        mean: bool = False,
        tell: Tell = _silently,
    ) -> None:
        check_compiled(objective)
        self.model, self.guide, self.objective, self.optimizer, self.mean = model, guide, objective, optimizer, mean
        self.gradients = CompiledFunction(self._gradients, model, guide, tell)
        self._traced = copy.copy(objective)  # whose schedule gives tensors
        self.leaves: list[Tensor] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Set each parameter's ``grad``, step the optimiser, and return the loss before the step, a tensor."""
        loss = self.compute(*args, **kwargs)
        if isinstance(self.optimizer, PyroOptim):
            self.optimizer([leaf for leaf in self.leaves if leaf.grad is not None])
        else:
            self.optimizer.step()
        return loss

    def compute(self, *args: Any, **kwargs: Any) -> Tensor:
        """Set each parameter's ``grad`` and return the loss, but leave the step to the caller."""
        self.leaves = self.leaves or self._find_leaves(args, kwargs)
        scheduled = {name: self._constant(value) for name, value in self.objective.scheduled().items()}
        loss, *gradients = self.gradients(scheduled, args, kwargs)
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            leaf.grad = gradient
        self.objective.step += 1
        return loss

    def _gradients(self, scheduled: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        vars(self._traced).update(scheduled)
        with torch.enable_grad():
            loss = self._traced.differentiable_loss(self.model, self.guide, *args, **kwargs)
            whole = loss / len(args[0]) if self.mean else loss
            gradients = torch.autograd.grad(whole, self.leaves, allow_unused=True) if whole.requires_grad else ()
            if all(gradient is None for gradient in gradients):
                raise ValueError(
                    f"expected an optimizer of parameters that the loss depends on, got one of {len(self.leaves)} others. Build "
                    "it on the program's, torch.optim.Adam(vae.parameters()), say, after the last change of the networks."
                )
            return loss.detach(), *gradients

    def _constant(self, value: float) -> Tensor:
        # Without dimensions, so that float64 changes no other tensor's type, and rounds as a Python number does.
        return torch.tensor(value, dtype=torch.float64, device=self.leaves[0].device)

    def _find_leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """What the optimiser steps; of Pyro's optimisers, which are given that at each step, all that the program has."""
        if not isinstance(self.optimizer, PyroOptim):
            return [leaf for group in self.optimizer.param_groups for leaf in group["params"]]
        with pyro.validation_enabled(True):
            traces = trace_once(self.model, self.guide, *args, **kwargs)
        own = {name: value for found in traces for name, value in parameters_of(found).items()}
        if not own:
            raise ValueError(
                "expected a program with parameters to train, got none: neither model nor guide has a pyro.param or "
                "pyro.module statement."
            )
        return list(dict.fromkeys(own.values()))


def compile_step(
    model: Program, guide: Program, objective: Objective, optimizer: torch.optim.Optimizer | PyroOptim
) -> CompiledStep:
    r"""A training step of a Pyro program as compiled code, for a loop of one's own.

    .. math:: \theta \leftarrow \mathrm{optimizer}\bigl(\theta, \nabla_\theta \, \mathrm{loss}(\theta; x)\bigr), \qquad
        \mathrm{loss} = -\sum_n s_n \mathcal L(x_n)

    When a shape of arguments first comes, model and guide run a few times, once under a tracer, which records loss and
    gradients together; Inductor compiles the record, in some seconds the first time, less when its cache on disk knows it. From then
    on Pyro does not run: a step does what the program did in that run, on other data, parameters and random numbers, drawn
    from the generators that ``pyro.set_rng_seed`` starts, as an uncompiled step draws them. Dropout and batch norm work. A `beta`
    schedule goes on; other Python values are those of the first run.

    Arguments:
        model: a Pyro model.
        guide: its guide.
        objective: the bound, such as :class:`pyro_vae.ELBO`, with all particles in one run.
        optimizer: of ``torch.optim``, over parameters of the program (``fused=True`` is fastest), or of ``pyro.optim``.

    Returns:
        A function of a minibatch, called as the model is, with tensors for all that changes. It takes one step, and
        returns the loss before it in nats, a tensor without dimensions.

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
    if not isinstance(objective, Objective):
        raise ValueError(
            f"a compiled step expected an objective of pyro_vae, got {objective!r}: Pyro's own read a value back at every step, "
            "and enumeration, TraceEnum_ELBO's, is no part of this package. Use pv.ELBO or pv.IWAE, or run it uncompiled."
        )
    if objective.chunk_size is not None:
        raise ValueError(
            f"a compiled step holds the whole run: expected an objective without chunk_size, got {objective.chunk_size}. "
            "Drop it, or run it uncompiled."
        )
    if objective.num_samples > 1 and not objective.vectorize_particles:
        raise ValueError(
            "a compiled step runs all particles at once: expected vectorize_particles=True, got False. Let the program take a "
            "leading dimension (pyro_vae.networks.apply_batched), or run it uncompiled."
        )
