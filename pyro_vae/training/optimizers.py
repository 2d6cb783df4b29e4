"""The optimiser of a training: Adam, or one that a function of the user's makes, and what refuses others."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_vae.checks import refuse_call, shown
from pyro_vae.errors import PyroVAEError
from pyro_vae.training import contents

LR = 1e-3  # Adam's default step size
NAMED = "named_parameters"  # a function with an argument of this name gets names too
EXAMPLE = "lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)"

Maker = Callable[[Any], torch.optim.Optimizer]


class Making:
    """How the optimiser of a training is made, for the first parameters and again when later minibatches add some."""

    def __init__(self, function: Maker | None, lr: float | None) -> None:
        if function is not None and lr is not None:
            raise PyroVAEError(
                f"lr is the step size of the default Adam: expected it without optimizer, got lr={lr!r} with one. Pass "
                "the step size in the function, optimizer=" + EXAMPLE + "."
            )
        if not (lr is None or 0 < lr <= torch.finfo(torch.float32).max):
            raise PyroVAEError(f"expected lr to be positive and finite, got {lr!r}. Try {LR:g}.")
        if function is not None and (not callable(function) or isinstance(function, PyroOptim)):
            kind = f"one of pyro.optim ({type(function).__name__})" if isinstance(function, PyroOptim) else None
            raise PyroVAEError(
                "expected optimizer to be a function from parameters to an optimizer of torch.optim, got "
                f"{kind or shown(function)}. Pass, say, {EXAMPLE}."
            )
        self.function = function
        self.lr = float(LR if lr is None else lr)  # NumPy's numbers could not be read back from a checkpoint

    def __call__(self, parameters: dict[str, Tensor]) -> torch.optim.Optimizer:
        """The optimiser of these parameters, by name."""
        names: dict[Tensor, str] = {}
        for name, value in parameters.items():
            names.setdefault(value, plain(name))  # a shared one once
        if self.function is None:
            return torch.optim.Adam(list(names), lr=self.lr, fused=True)
        given = [(name, value) for value, name in names.items()] if _asks_for_names(self.function) else list(names)
        try:
            made: Any = self.function(given)
        except TypeError as error:
            refuse_call(self.function, (given,), "optimizer", error)
            raise
        self._check(made, parameters)
        return made

    def regroup(self, optimizer: torch.optim.Optimizer, parameters: dict[str, Tensor]) -> None:
        """Give the optimiser these parameters, in the groups and the order of a new one; it keeps state and settings.

        A scheduler that was made for it goes on.
        """
        groups = self(parameters).param_groups
        if len(groups) != len(optimizer.param_groups):
            raise PyroVAEError(
                "a later minibatch uses parameters that the first one does not: expected an optimizer function that "
                f"makes as many groups with them, {len(optimizer.param_groups)}, got {len(groups)}. Make the same "
                "groups, some of them empty, or let the first minibatch use all parameters."
            )
        for own, new in zip(optimizer.param_groups, groups, strict=True):
            own["params"][:] = new["params"]
            if "param_names" in new:
                own["param_names"] = new["param_names"]

    def _check(self, made: Any, parameters: dict[str, Tensor]) -> None:
        if not isinstance(made, torch.optim.Optimizer):
            raise PyroVAEError(
                f"expected optimizer to make an optimizer of torch.optim, got one that makes {shown(made)}. Pass, say, "
                f"{EXAMPLE}."
            )
        closure = inspect.signature(made.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise PyroVAEError(
                "expected an optimizer that steps on one gradient, such as torch.optim.AdamW, got "
                f"{type(made).__name__}, which runs the loss several times. Write a loop of your own for it."
            )
        own = {id(value) for value in parameters.values()}
        others = [value for group in made.param_groups for value in group["params"] if id(value) not in own]
        if others:
            raise PyroVAEError(
                f"expected an optimizer of the program's parameters, got {len(others)} others, the first of shape "
                f"{tuple(others[0].shape)}. Build it from the argument of the function: {EXAMPLE}."
            )

    def describe(self, optimizer: torch.optim.Optimizer) -> str | None:
        """A user's optimiser, by which a checkpoint recognises it; None for the default Adam, which has its lr."""
        if self.function is None:
            return None
        groups = [
            {name: value for name, value in group.items() if name not in ("params", "param_names")}
            | {"parameters": len(group["params"])}
            for group in optimizer.param_groups
        ]
        common = {n: v for n, v in groups[0].items() if all(group.get(n) == v for group in groups)}
        text = ", ".join(f"{name}={value!r}" for name, value in sorted(common.items()) if name != "parameters")
        apart = [{n: v for n, v in sorted(group.items()) if n not in common or n == "parameters"} for group in groups]
        return f"{type(optimizer).__name__}({text}; groups {apart})"


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The optimiser's parameters."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def lr_of(optimizer: torch.optim.Optimizer) -> float:
    """The largest step size of its groups."""
    return max(float(group["lr"]) for group in optimizer.param_groups) if "lr" in optimizer.param_groups[0] else LR


def own_lr_of(optimizer: torch.optim.Optimizer) -> float:
    """The same, or where a scheduler begins at 0, that which it scales."""
    return lr_of(optimizer) or max(float(group.get("initial_lr", 0.0)) for group in optimizer.param_groups)


def restore(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Restore the optimiser's state, in memory laid out as the parameters': fused kernels take that for granted."""
    parameters = parameters_of(optimizer)

    def placed(value: Any, parameter: Tensor) -> Any:
        if not isinstance(value, Tensor) or value.shape != parameter.shape or not value.dim():
            return value
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    state = {i: {n: placed(v, parameters[i]) for n, v in each.items()} for i, each in saved["state"].items()}
    own = optimizer.state_dict()["param_groups"]
    groups = [mine | its for mine, its in zip(own, saved["param_groups"], strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def state_kind(making: Making, optimizer: torch.optim.Optimizer, steps: float, *, scheduled: bool) -> contents.Parts:
    """The kind of this optimiser's state after so many steps, if a scheduler changes its settings."""
    if making.function is None:
        return contents.of_adam(optimizer, steps, scheduled=scheduled)
    groups = [
        contents.Parts(
            {name: contents.like(value) if scheduled else contents.equal(value) for name, value in g.items()}
        )
        for g in optimizer.state_dict()["param_groups"]
    ]
    number = len(parameters_of(optimizer))
    finite = contents.Where(Tensor, "a tensor without NaN", lambda tensor: not bool(tensor.isnan().any()))
    moments = contents.Each(str, (None, bool, float, finite))
    state = contents.Where(
        contents.Each(int, moments), f"the state of {number} parameters", lambda s: all(0 <= i < number for i in s)
    )
    return contents.Parts({"state": state, "param_groups": contents.Items(groups)})


def check_clip(clip_norm: float | None) -> None:
    """Refuse a norm that no gradient could be clipped to."""
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        raise PyroVAEError(
            f"expected clip_norm to be a positive number, got {clip_norm!r}. None leaves gradients as they are."
        )


def _asks_for_names(function: Callable[..., Any]) -> bool:
    try:
        return NAMED in inspect.signature(function).parameters
    except (TypeError, ValueError):  # a built-in function
        return False


def plain(name: str) -> str:
    """A parameter's name without Pyro's mark between the name of a module and that inside of it."""
    return name.replace("$$$", ".")
