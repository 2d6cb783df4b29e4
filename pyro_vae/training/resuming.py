"""What a checkpoint keeps of the training loop, and how the loop goes on from it."""

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor

from pyro_vae.distributed import mixed
from pyro_vae.engine import rng
from pyro_vae.engine.minibatches import Batch
from pyro_vae.engine.modules import buffers
from pyro_vae.engine.ownership import parameters_of
from pyro_vae.errors import PyroVAEError
from pyro_vae.training import checkpoint as checkpoints
from pyro_vae.training import contents, learning_rates, optimizers
from pyro_vae.training.accumulation import Accumulated
from pyro_vae.training.fingerprint import PASS_THE_SAME

if TYPE_CHECKING:
    from pyro_vae.training.loop import Loop

# Settings that earlier versions did not have, with the values that they trained with.
EARLIER: Mapping[str, Any] = {
    "compile": False,
    "lr_scheduler": None,
    "optimizer": None,
    "scheduler_every": "epoch",
    "clip_norm": None,
    "accumulate": 1,
    "precision": None,
}


@dataclass
class Limits:
    """Where a training ends: after so many epochs or steps, or without a better validation bound."""

    epochs: float = math.inf
    steps: float = math.inf
    patience: int | None = None  # how many epochs without a better validation bound; None never ends it


@dataclass
class Epoch:
    """The epoch in progress, as a checkpoint inside of it keeps it."""

    start: dict[str, Any]  # the states of the random number generators before its first minibatch
    minibatches: int = 0  # how many were taken
    total: Any = 0.0  # their losses
    count: float = 0  # their data, or the sum of their weights
    parts: Tensor | None = None  # of the losses, if there are callbacks
    # The objective's settings of the first minibatch, and of the last one in which they were others.
    settings: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0  # before it went on from a checkpoint

    def see(self, settings: dict[str, float]) -> None:
        """Look at the objective's settings in a minibatch."""
        if not self.settings:
            self.settings.append(settings)
        elif settings != self.settings[0]:
            self.settings[1:] = [settings]

    def add(self, sums: Accumulated) -> None:
        """Add what the minibatches of a step have given."""
        self.count, self.total = self.count + sums.count, self.total + sums.total
        if sums.parts is not None:
            self.parts = sums.parts if self.parts is None else self.parts + sums.parts

    @property
    def bound(self) -> float:
        """The mean bound so far; NaN while all data weigh nothing."""
        return -float(self.total) / (self.count or math.nan)

    @property
    def mean_parts(self) -> Tensor | None:
        """The mean reconstruction and KL so far."""
        return None if self.parts is None else self.parts / (self.count or math.nan)

    @property
    def shown(self) -> dict[str, str]:
        """What the progress bar shows."""
        parts = self.mean_parts
        return {"bound": f"{self.bound:.2f}"} | ({} if parts is None else {"KL": f"{parts[1]:.2f}"})


def generators(loop: "Loop") -> dict[str, Any]:
    """The states of this process's random number generators."""
    return {"rng": rng.get_state(), "loader_rng": loop.batches.generator_states()}


def set_generators(loop: "Loop", states: dict[str, Any]) -> None:
    """Restore the states of :func:`generators`."""
    rng.set_state(states["rng"])
    loop.batches.set_generator_states(states["loader_rng"])


def generators_now(loop: "Loop") -> dict[str, Any]:
    """What a checkpoint keeps of each rank: its generators now, and before the epoch in progress."""
    return generators(loop) | {"start": loop.current and loop.current.start}


def minibatches(loop: "Loop", epoch: Epoch) -> Iterator[Batch | None]:
    """The minibatches of an epoch that were not taken yet; None where other ranks have one, and this one has none."""
    taken, batches = epoch.minibatches, loop.batches
    now = generators(loop) if taken else None
    if now is not None:
        set_generators(loop, epoch.start)

    def own() -> Iterator[Batch | None]:
        nonlocal now
        for i, batch in enumerate(batches.shuffled(loop.key, loop.epoch, taken), 1):
            if i == taken and now is not None:
                set_generators(loop, now)  # as the steps since then have left them
                now = None
            if i == 1 and batch is not None and loop.fingerprint is not None:
                loop.fingerprint.see_first(batch)
            if i > taken:
                yield batch
        if now is not None:  # this rank's had ended before
            set_generators(loop, now)

    if loop.ranks.group is None:
        return own()
    return loop.ranks.reading(own(), None if batches.steps is None else batches.steps - taken)


def state_of(loop: "Loop", ranks: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """The contents of a checkpoint; `ranks` are the generators of several processes."""
    state = {
        "settings": loop.settings,
        "history": loop.rows,
        "parameters": {name: value.detach() for name, value in loop.parameters.items()},
        "buffers": buffers(loop.modules),
        "best": loop.best,
        "optimizer": loop.optimizer.state_dict(),
        "scheduler": loop.scheduler and loop.scheduler.state_dict(),
        "steps": loop.steps,
        "key": loop.key,
        "step": loop.objective.step if isinstance(getattr(loop.objective, "step", None), int) else None,
        "fingerprint": loop.fingerprint and loop.fingerprint.state(),
        "callbacks": loop.callbacks.state(),
    } | generators(loop)
    if ranks and len(ranks) > 1:
        state["ranks"] = ranks
    if loop.current is not None:
        parts = None if loop.current.parts is None else loop.current.parts.tolist()
        state["current"] = vars(loop.current) | {"total": float(loop.current.total), "parts": parts}
    return state


def resume(loop: "Loop", path: str | Path) -> None:
    """Restore the loop's state from the checkpoint, which rank 0 reads."""
    state = loop.ranks.first_does(lambda: checkpoints.load(path))
    for turn in (True, False):  # the others after rank 0 has accepted it
        with loop.ranks.together():
            if loop.ranks.is_first == turn:
                _resume(loop, path, state)


def _resume(loop: "Loop", path: str | Path, state: dict[str, Any]) -> None:
    saved = EARLIER | state["settings"]
    for name in saved:
        if name not in loop.settings:
            raise PyroVAEError(
                f"the checkpoint {path} was written with a setting that this version of pyro_vae does not know: "
                f"expected none, got {name}={contents.shortened(saved[name])}. Update pyro_vae, or pass a new path."
            )
    for name, value in loop.settings.items():
        if saved[name] != value:
            raise PyroVAEError(
                f"the checkpoint {path} was written with other settings: expected {name}={saved[name]!r}, got "
                f"{name}={value!r}. {PASS_THE_SAME}"
            )
    best, limits = state.get("best"), loop.limits
    if (best is None) != (limits.patience is None) and state["history"]:
        raise PyroVAEError(
            f"the checkpoint {path} was written {'without' if best is None else 'with'} patience: expected "
            f"{'None' if best is None else 'a number, also another one'}, got patience={limits.patience!r}, since it "
            "keeps the best epoch's parameters from the first epoch on. Pass that, or a new path."
        )
    # Version 0.1.0 did not count; a stream's epochs have no known number of steps.
    steps = state.get("steps", len(state["history"]) * (loop.batches.steps or 1))
    for unit, holds, most in (("epochs", len(state["history"]), limits.epochs), ("steps", steps, limits.steps)):
        if holds > most:
            raise PyroVAEError(
                f"the checkpoint {path} holds {holds} {unit}: expected at least as many in all, got {unit}={most}. "
                f"Pass more {unit}, or a new path."
            )
    _restore_recognised(loop, path, state)
    optimizers.restore(loop.optimizer, state["optimizer"])
    if loop.scheduler is not None:
        loop.scheduler.load_state_dict(state["scheduler"])
    if state["step"] is not None:
        loop.objective.step = state["step"]
    loop.rows, loop.best, loop.steps = list(state["history"]), best, steps
    current = state.get("current")
    if current is not None:
        parts = None if current["parts"] is None else torch.tensor(current["parts"], dtype=torch.float64)
        loop.current = Epoch(**(current | {"parts": parts}))
    loop.key = state.get("key", loop.key)  # earlier versions took each order from the generators
    _restore_generators(loop, path, state)
    loop.saved = f"epoch {len(loop.rows)}" if loop.rows else ""
    loop.callbacks.load(path, state.get("callbacks", {}))


def _restore_generators(loop: "Loop", path: str | Path, state: dict[str, Any]) -> None:
    """Restore this rank's generators; among another number of ranks, begin with new noise."""
    group, saved = loop.ranks.group, state.get("ranks", [state])
    now = 1 if group is None else group.size
    if len(saved) == now:
        own = saved[loop.ranks.rank]
        set_generators(loop, own)
        if loop.current is not None and own.get("start") is not None:
            loop.current.start = own["start"]
        return
    if loop.ranks.is_first:
        warnings.warn(
            f"the checkpoint {path} was written by {len(saved)} process{'es' * (len(saved) > 1)}, and {now} go on with "
            "it: the noise of samples is new, so that the training does not end where an unbroken one would.",
            stacklevel=6,
        )
    pyro.set_rng_seed(mixed(loop.key, loop.steps, loop.ranks.rank))
    if loop.current is not None:
        loop.current.start = generators(loop)
        if loop.batches.loader is not None and loop.current.minibatches:  # the ranks' minibatches are others
            loop.current = None


def _restore_recognised(loop: "Loop", path: str | Path, state: dict[str, Any]) -> None:
    """Restore parameters and buffers; those of another program keep the values that they have."""
    saved, own_buffers = state.get("fingerprint"), buffers(loop.modules)
    if not loop.ranks.is_first:  # rank 0 compares, and tells what it refuses
        _find(loop, state["parameters"])
        checkpoints.restore(path, state, loop.parameters, own_buffers)
        return
    if saved is None or loop.fingerprint is None:
        warnings.warn(
            f"the checkpoint {path} was written by an earlier version, or by a callback without a checkpoint: whether "
            "program, data and schedules are those that were trained is not known. Pass the same.",
            stacklevel=6,
        )
        _check_parts(loop, path, state)
        checkpoints.restore(path, state, loop.parameters, own_buffers)
        return
    loop.fingerprint.check_inputs(path, saved)
    _find(loop, state["parameters"])
    _check_parts(loop, path, state)
    own = loop.copy(math.nan)
    checkpoints.restore(path, state, loop.parameters, own_buffers)
    try:
        loop.fingerprint.check_program(path, saved)
    except PyroVAEError:
        checkpoints.restore(path, own, loop.parameters, own_buffers)
        raise


def _check_parts(loop: "Loop", path: str | Path, state: dict[str, Any]) -> None:
    """Refuse a state that is not one of this training, before anything takes a part of it."""
    tensors = loop.parameters, buffers(loop.modules)
    checkpoints.check_tensors(path, state, *tensors)
    if state.get("best") is not None:
        checkpoints.check_tensors(path, state["best"], *tensors)
    epochs, counts = len(state["history"]), isinstance(getattr(loop.objective, "step", None), int)
    inside = state.get("current", {}).get("minibatches", 0)
    known = loop.batches.loader is None and loop.batches.steps
    taken = _steps(loop, epochs, inside) if known else None
    most, scheduler = taken or state.get("steps", math.inf), loop.scheduler
    parts = {
        "history": [contents.Parts(dict.fromkeys(loop.columns(), float))],
        "optimizer": optimizers.state_kind(loop.making, loop.optimizer, most, scheduled=scheduler is not None),
        "loader_rng": contents.of_generators(loop.batches.generators()),
        "step": contents.COUNT if counts else None,
    }
    by_step = state.get("steps", taken) if loop.scheduled_by_step else epochs
    later = {"scheduler": None if scheduler is None else learning_rates.state_kind(scheduler, by_step)}
    later |= {"steps": contents.equal(taken)} if taken else {}
    contents.check_parts(path, state, contents.Parts(parts, later))


def _steps(loop: "Loop", epochs: int, inside: int) -> int:
    """How many steps so many epochs and minibatches of another one take."""
    of = loop.accumulate
    return epochs * math.ceil((loop.batches.steps or 0) / of) + math.ceil(inside / of)


def _find(loop: "Loop", saved: dict[str, Any]) -> None:
    """Find the checkpoint's parameters that the first minibatch does not use, and put all into its order."""
    for batch in loop.batches.looks() if saved.keys() - loop.parameters.keys() else ():
        for trace in loop.program.on(batch).trace():
            loop.parameters.update({n: p for n, p in parameters_of(trace).items() if n in saved})
        if saved.keys() <= loop.parameters.keys():
            break
    if saved.keys() == loop.parameters.keys():
        loop.take({name: loop.parameters[name] for name in saved})
