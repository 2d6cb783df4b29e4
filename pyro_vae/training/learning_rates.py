"""Schedulers of the step size, PyTorch's own: checks that `fit` can step one after each epoch, and the step."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_vae.checks import refuse_call
from pyro_vae.errors import PyroVAEError
from pyro_vae.training import contents

# What changes in every scheduler; versions of PyTorch differ in some of it.
PROGRESS = ("last_epoch", "_step_count", "_is_initial", "_get_lr_called_within_step", "_last_lr")


def make(
    function: Callable[[torch.optim.Optimizer], Any],
    optimizer: torch.optim.Optimizer,
    validates: bool,
    *,
    by_step: bool = False,
) -> LRScheduler:
    """The scheduler that the function makes; refuse one that can't be stepped after each epoch, or each step."""
    try:
        scheduler = function(optimizer) if callable(function) else function
    except TypeError as error:
        refuse_call(function, (optimizer,), "lr_scheduler", error)
        raise
    if not callable(function) or not isinstance(scheduler, LRScheduler) or scheduler.optimizer is not optimizer:
        made = "one that makes " if callable(function) else ""
        another = " of another optimizer" if isinstance(scheduler, LRScheduler) else ""
        raise PyroVAEError(
            "expected lr_scheduler to be a function that makes one of torch.optim.lr_scheduler of the given optimizer, "
            f"got {made}{type(scheduler).__name__}{another}. Pass, say, lambda optimizer: "
            "torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.95)."
        )
    if not isinstance(scheduler, ReduceLROnPlateau):
        return scheduler
    if by_step:
        raise PyroVAEError(
            "ReduceLROnPlateau reads the validation bound, which each epoch has: expected scheduler_every='epoch' with "
            "it, got 'step'. Drop scheduler_every, or pass another scheduler."
        )
    if not validates:
        raise PyroVAEError(
            "ReduceLROnPlateau waits for the validation bound to stop rising: expected validation data with it, got "
            "none. Pass validation=..., or another scheduler."
        )
    if scheduler.threshold_mode != "abs":
        raise PyroVAEError(
            "ReduceLROnPlateau compares by ratio, by which a worse loss below zero is a better one: expected "
            f"threshold_mode='abs', got {scheduler.threshold_mode!r}. Pass it; threshold is then in nats."
        )
    if scheduler.mode != "min":
        raise PyroVAEError(
            "ReduceLROnPlateau is given minus the validation bound, a loss: expected mode='min', got "
            f"{scheduler.mode!r}. Drop the mode."
        )
    return scheduler


def describe(scheduler: LRScheduler) -> str:
    """A scheduler's type and settings before its first step, by which a checkpoint recognises it."""
    settings = [f"{name}={value!r}" for name, value in scheduler.state_dict().items() if name not in PROGRESS]
    return f"{type(scheduler).__name__}({', '.join(settings)})"


def state_kind(scheduler: LRScheduler, epochs: int | None) -> Any:
    """The kind of this scheduler's state after so many epochs; None is not known. Another one's may be anything."""
    if type(scheduler).__module__ != LRScheduler.__module__:
        return dict
    kinds = {name: contents.like(value) for name, value in scheduler.state_dict().items()}
    if "lr_lambdas" in kinds:  # has the state of objects of the user's
        kinds["lr_lambdas"] = [object]
    if "_schedulers" in kinds:
        inside: Any = scheduler  # of no type of PyTorch's that has them
        kinds["_schedulers"] = contents.Items([state_kind(each, None) for each in inside._schedulers])
    if epochs is not None and kinds.get("last_epoch"):
        kinds["last_epoch"] = contents.equal(epochs)
    optional = {name: kinds.pop(name) for name in PROGRESS[1:] if name in kinds}
    return contents.Parts(kinds, optional)


def step(scheduler: LRScheduler, validation_bound: float, anew: bool) -> None:
    """End an epoch; with `anew`, earlier validation bounds are not comparable with this one."""
    if not isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step()
        return
    if anew:
        scheduler.best, scheduler.num_bad_epochs = math.inf, 0
    scheduler.step(-validation_bound)
