"""The values of schedules at the steps and epochs of a training, by which a checkpoint recognises a function."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from pyro_vae.engine import rng

MOST_EPOCHS = 1000  # whose values are kept

Values = dict[int, float]  # by step, or by epoch


def scheduled_values(objective: Any, steps: int | None, epochs: int) -> dict[str, Values]:
    """The objective's settings that change, by name, at three steps of each epoch; of a stream, at powers of two."""
    if not hasattr(objective, "scheduled"):
        return {}
    if steps is None:
        chosen = [0, *(2**k for k in range(20))]
    else:
        inside = dict.fromkeys((0, int(0.382 * steps), max(steps - 1, 0)))
        chosen = [epoch * steps + step for epoch in range(min(epochs, MOST_EPOCHS)) for step in inside]
    other = copy.copy(objective)

    def values() -> Iterator[tuple[int, dict[str, float]]]:
        for step in chosen:
            other.step = step
            yield step, other.scheduled()

    found = _repeatable(values)
    names = list(dict.fromkeys(name for settings in found.values() for name in settings))
    return {name: {step: s[name] for step, s in found.items() if name in s} for name in names}


def learning_rates(scheduler: LRScheduler | None, epochs: int) -> Values:
    """The step size in each epoch, if it follows from the number of the epoch."""
    if scheduler is None:
        return {}
    optimizer = scheduler.optimizer

    def values() -> Iterator[tuple[int, dict[str, float]]]:
        # The copy steps an optimiser of its own, which has the settings but no parameters.
        groups = [dict(group, params=[]) for group in optimizer.param_groups]
        stand_in = copy.copy(optimizer)
        stand_in.param_groups = copy.deepcopy(groups)
        copied = copy.deepcopy(scheduler, {id(optimizer): stand_in})
        for epoch in range(1, min(epochs, MOST_EPOCHS) + 1):
            yield epoch, {"lr": stand_in.param_groups[0]["lr"]}
            copied.step()

    with warnings.catch_warnings():  # of an optimiser that took no step
        warnings.simplefilter("ignore")
        return {epoch: settings["lr"] for epoch, settings in _repeatable(values).items()}


def difference(saved: Values, own: Values) -> int | None:
    """The first step, or epoch, at which two schedules differ beyond rounding."""
    common = (key for key in sorted(saved.keys() & own.keys()))
    return next((k for k in common if not math.isclose(saved[k], own[k], rel_tol=1e-9, abs_tol=1e-12)), None)


def _repeatable(values: Callable[[], Iterator[tuple[int, dict[str, float]]]]) -> dict[int, dict[str, float]]:
    """The values that do not depend on random numbers, up to the first place at which there is none."""
    runs: list[dict[int, dict[str, float]]] = []
    for seed in (0, 1):
        found: dict[int, dict[str, float]] = {}
        # A function of the user's may end with the epochs that were planned, and some schedulers need the bound.
        with rng.preserved(seed), torch.no_grad(), suppress(Exception):
            for key, settings in values():
                found[key] = {name: float(value) for name, value in settings.items()}
        runs.append(found)
    first, second = runs
    return {key: settings for key, settings in first.items() if second.get(key) == settings}
