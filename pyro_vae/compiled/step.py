"""A training step as compiled code, for a loop of the user's own, and for `fit`."""

import copy
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import pyro
import pyro.infer
import torch
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_vae.compiled.function import CompiledFunction, OnCompile
from pyro_vae.devices import of_float64
from pyro_vae.engine.arguments import takes_program
from pyro_vae.engine.modules import PyroFunction, find_modules
from pyro_vae.engine.parameters import NewParameters, require_parameters
from pyro_vae.engine.precision import single_precision
from pyro_vae.engine.program import Program
from pyro_vae.engine.rows import Rows
from pyro_vae.engine.threads import ONE_THREAD
from pyro_vae.errors import PyroVAEError
from pyro_vae.objectives import Objective
from pyro_vae.objectives.parts import collected


@dataclass(eq=False, repr=False)
class CompiledStep:
    """A compiled training step, as :func:`compile_step` returns it: call it with a minibatch to take a step."""

    model: PyroFunction
    guide: PyroFunction
    objective: Objective
    optimizer: torch.optim.Optimizer | PyroOptim
    _: KW_ONLY
    own: dict[str, Tensor] = field(default_factory=dict)  # all parameters of the program; Pyro's optimisers find them
    rows: Rows | None = None  # divides the loss before its gradients are taken; None leaves the sum over data
    on_compile: OnCompile | None = None
    with_parts: bool = False  # whether each loss leaves its reconstruction and KL in `parts`
    parts: Tensor | None = field(default=None, init=False)  # of the last loss, undivided
    _numbers: dict[float, Tensor] = field(default_factory=dict, init=False)
    parameters: list[Tensor] = field(default_factory=list, init=False)  # those that the optimiser steps
    loss_and_gradients: CompiledFunction = field(init=False)  # with the compiling time of each shape

    def __post_init__(self) -> None:
        check_compiled(self.objective)
        stepping = isinstance(self.optimizer, torch.optim.Optimizer | PyroOptim)
        if not stepping or isinstance(self.optimizer, torch.optim.LBFGS):  # LBFGS runs the loss several times
            raise PyroVAEError(
                "expected an optimizer that steps on one gradient, such as torch.optim.Adam(vae.parameters(), lr=1e-3) "
                f"or pyro.optim.Adam({{'lr': 1e-3}}), got {_shown(self.optimizer)}."
            )

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
        """Add to each parameter's ``grad`` and return the loss: for a minibatch in portions.

        With many particles, portions save memory, and time too, since a portion fits the processor's cache. Each
        portion counts as a step of a schedule, as each differentiable loss does.
        """
        loss, gradients = self._run(args, kwargs)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad.add_(gradient)
        return loss

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, list[Tensor | None]]:
        """The loss, and its gradient by each parameter."""
        with ONE_THREAD:
            parameters = self._find_parameters(args, kwargs)
            if list(map(id, parameters)) != list(map(id, self.parameters)):
                self.parameters = parameters
                if isinstance(self.optimizer, torch.optim.Optimizer):
                    self.optimizer.zero_grad()  # a parameter that is frozen now must not step by its last gradient
                self._compiled_objective = copy.copy(self.objective)  # its settings become tensors
                self.loss_and_gradients = CompiledFunction(
                    self._loss_and_gradients, find_modules(self.model, self.guide), self.on_compile
                )
            device = of_float64(self.parameters[0].device)
            # A tensor without dimensions leaves the types of others as they are, and rounds as a Python number does.
            settings = {
                name: torch.tensor(value, dtype=torch.float64, device=device)
                for name, value in self.objective.scheduled().items()
            }
            data = None if self.rows is None else self._number(self.rows.of(args).whole, device)
            loss, self.parts, *gradients = self.loss_and_gradients(settings, data, args, kwargs)
            self.objective.step += 1
            return loss, gradients

    def _number(self, value: float, device: torch.device) -> Tensor:
        """A number of data as a tensor, which is made once; a sum of weights is another one each time."""
        found = self._numbers.get(value)
        if found is None:
            found = torch.tensor(value, dtype=torch.float64, device=device)
            if isinstance(value, int):
                self._numbers[value] = found
        return found

    def _loss_and_gradients(
        self, settings: dict[str, Tensor], data: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        vars(self._compiled_objective).update(settings)
        with torch.enable_grad():
            reading = collected(self._compiled_objective) if self.with_parts else nullcontext()
            with NewParameters(self.own) as new, reading as found:
                loss = self._compiled_objective.differentiable_loss(self.model, self.guide, *args, **kwargs)
                parts = None if found is None else found.sums()
            if self.own and new.found:
                names = ", ".join(f"'{name}'" for name in sorted(new.found))
                raise PyroVAEError(
                    "compiled code trains the parameters of the first minibatch: expected arguments of another kind to "
                    f"use no others, got {names}. Use all parameters in the first minibatch, or run it uncompiled."
                )
            whole = loss if data is None else loss / data
            with single_precision():  # under autocast, the gradients of what is in float32 would be rounded
                gradients = (
                    torch.autograd.grad(whole, self.parameters, allow_unused=True) if whole.requires_grad else ()
                )
            if all(gradient is None for gradient in gradients):
                raise PyroVAEError(
                    f"expected an optimizer of parameters that the loss depends on, got one of {len(self.parameters)} "
                    "others. Build it on the program's parameters, torch.optim.Adam(vae.parameters()), after the last "
                    "change of the networks."
                )
            return loss.detach(), parts, *gradients

    def _find_parameters(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The optimiser's parameters; Pyro's optimisers get them at each step: all parameters of the program."""
        if not isinstance(self.optimizer, PyroOptim):
            parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
            if not parameters:
                raise PyroVAEError(
                    "expected an optimizer of parameters that require a gradient, got one without any. Unfreeze some."
                )
            return parameters
        store = dict(pyro.get_param_store().named_parameters())
        in_store = not pyro.settings.get("module_local_params")
        anew = bool(self.parameters) and self.loss_and_gradients.outdated
        if anew or not self.own or (in_store and any(store.get(name) is not own for name, own in self.own.items())):
            with pyro.validation_enabled(True):
                traces = Program(self.model, self.guide, args, kwargs).trace()
            self.own = require_parameters(*traces)
        return list(dict.fromkeys(self.own.values()))


@takes_program
def compile_step(
    model: PyroFunction, guide: PyroFunction, objective: Objective, optimizer: torch.optim.Optimizer | PyroOptim
) -> CompiledStep:
    r"""A training step of a Pyro program as compiled code, for a loop of your own.

    .. math:: \theta \leftarrow \mathrm{optimizer}\bigl(\theta, \nabla_\theta \, \mathrm{loss}(\theta; x)\bigr), \qquad
        \mathrm{loss} = -\sum_n s_n \mathcal L(x_n)

    with the bound :math:`\mathcal L` of each datum and its scale s. At the first call with arguments of a new shape,
    model and guide run a few times. Two of these runs are recorded: loss and gradients together, as one graph. Inductor
    compiles it, which takes 4 to 20 s on one core, or less if its cache on disk has it. From then on Pyro doesn't run.

    A step repeats the operations of the recorded run on other data, parameters and random numbers. It draws the random
    numbers of an uncompiled step, from the generators that ``pyro.set_rng_seed`` starts. Dropout and batch norm work.
    `beta` may change, and may be a schedule; a subclass of :class:`pyro_vae.Objective` lists in `scheduled` the other
    settings that may change. All other Python values are constants. **Nothing is validated after that run**, also not
    the data: check the loss, or use :func:`pyro_vae.fit`, which checks both.

    Arguments:
        model, guide: as in :meth:`pyro_vae.Objective.bound`.
        objective: the bound, such as :class:`pyro_vae.ELBO`, with all particles in one run.
        optimizer: an optimiser of ``torch.optim`` over parameters of the program (``fused=True`` is fastest), or one of
            ``pyro.optim``.

    Returns:
        A function of a minibatch, with the model's arguments; those that change must be tensors. It takes one step, and
        returns the loss before the step in nats, a tensor without dimensions. Its ``compute`` replaces every ``grad``
        and leaves the step to you, to clip gradients. Its ``accumulate`` adds to every ``grad``, for a minibatch in
        portions; then step the optimiser, and call ``zero_grad``.

    Raises:
        ValueError: the objective is not of this package, or splits its particles into several runs; or the optimizer
            has no parameter of the program. At the first step: see :func:`pyro_vae.log_weights`; or the program can't
            be compiled, since it reads a tensor's value (the message names the line), or does something else when it
            runs again.
        RuntimeError: there is no C++ compiler, which Inductor needs for a CPU.

    Example:
        >>> import torch, pyro, pyro_vae as pv
        >>> vae = pv.mlp_vae((5,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
        >>> optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3, fused=True)
        >>> step = pv.compile_step(vae, pv.ELBO(), optimizer)
        >>> loss = step(torch.randn(32, 5))  # doctest: +SKIP
    """
    return CompiledStep(model, guide, objective, optimizer)


def check_compiled(objective: Any) -> None:
    """Refuse an objective that needs more than one graph."""
    if isinstance(objective, pyro.infer.ELBO) and not isinstance(objective, Objective):
        raise PyroVAEError(
            f"compiled code expected an objective of pyro_vae, got Pyro's {_shown(objective)}: Pyro's objectives read "
            "a tensor's value at every step. Use pv.ELBO or pv.IWAE, or run it uncompiled."
        )
    if not isinstance(objective, Objective):
        order = " The objective comes before the optimizer." if isinstance(objective, torch.optim.Optimizer) else ""
        raise PyroVAEError(f"expected an objective such as pv.ELBO(), got {_shown(objective)}.{order}")
    if objective.chunk_size is not None:
        raise PyroVAEError(
            "compiled code runs all particles at once: expected an objective without chunk_size, got "
            f"{objective.chunk_size}. Drop it, or run it uncompiled."
        )
    if objective.num_samples > 1 and not objective.vectorize_particles:
        raise PyroVAEError(
            "compiled code runs all particles at once: expected vectorize_particles=True, got False. Let the program "
            "take a leading dimension (pyro_vae.networks.apply_batched), or run it uncompiled."
        )


def _shown(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"{type(value).__name__}"
