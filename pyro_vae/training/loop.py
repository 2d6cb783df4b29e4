"""The training loop behind `fit`: a step for each minibatch, callbacks, validation and checkpoints."""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from pyro_vae.compiled.step import CompiledStep
from pyro_vae.devices import wide
from pyro_vae.engine.minibatches import Batch, Minibatches
from pyro_vae.engine.modules import buffers
from pyro_vae.engine.parameters import NewParameters, require_kept, require_same
from pyro_vae.engine.program import Program
from pyro_vae.engine.row_parameters import check_row_parameters, trial
from pyro_vae.engine.rows import Count, Rows
from pyro_vae.errors import NotFiniteError, PyroVAEError
from pyro_vae.objectives.parts import collected
from pyro_vae.training import checkpoint as checkpoints
from pyro_vae.training import learning_rates, optimizers, resuming
from pyro_vae.training.accumulation import Accumulated
from pyro_vae.training.calling import Callbacks
from pyro_vae.training.data_support import DataSupport
from pyro_vae.training.fingerprint import Fingerprint
from pyro_vae.training.freezing import Kept
from pyro_vae.training.ranks import Ranks
from pyro_vae.training.resuming import Epoch, Limits
from pyro_vae.training.scales import Scales
from pyro_vae.training.validation import validate


@dataclass
class Loop:
    """The training loop: its state and its steps."""

    program: Program
    objective: Any
    batches: Minibatches
    held_out: Minibatches | None
    parameters: dict[str, Tensor]
    making: optimizers.Making
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | None
    limits: Limits
    checkpoint: str | Path | None  # the file of the state
    settings: dict[str, Any]  # what a checkpoint must agree on
    support: DataSupport  # the check of the data
    rows_of: Rows  # how many data the loss of a minibatch stands for
    scales: Scales  # the likelihoods' learned scales
    fingerprint: Fingerprint | None  # what identifies the training, with a checkpoint
    callbacks: Callbacks
    unweighed: tuple[Program, Rows]  # the program for validation, which has no weights, and what counts its data
    ranks: Ranks  # the other processes of the training
    key: int  # by which each epoch has its order of the data
    scheduled_by_step: bool = False
    clip_norm: float | None = None
    accumulate: int = 1
    checkpoint_every: int | timedelta | None = None
    precision: AbstractContextManager[Any] = field(default_factory=nullcontext)  # around each loss
    with_parts: bool = False  # whether the reconstruction and the KL are told or shown
    compiled: CompiledStep | None = None
    rows: list[dict[str, float]] = field(default_factory=list)  # the history, a row an epoch
    best: dict[str, Any] | None = None  # epoch, bound, parameters and buffers of the best epoch, with `patience`
    current: Epoch | None = None  # an epoch in progress
    step: int = 0  # the current minibatch of the epoch, from 1
    steps: int = 0  # how many were taken in all
    between_steps: bool = True  # whether a checkpoint may be written now
    moves: list[dict[str, float]] = field(default_factory=list)  # of each epoch, what may still move at the end
    partial: dict[str, float] | None = None  # the row of an epoch in which the training has ended
    finished: bool = False
    kept: Kept = field(default_factory=Kept)  # what callbacks keep as it is
    scheduled: dict[str, float] = field(default_factory=dict)  # the objective's settings in the last minibatch
    asked: str | None = None  # why a callback of this process wants the training to end
    stopped: str | None = None  # why it has ended

    def __post_init__(self) -> None:
        self.modules = self.program.modules()
        # Of data that can't be checked at once, these check each minibatch in the first epoch; then they are None.
        self.unchecked = self.support.check_at_once(self.batches)
        self.unchecked_held_out = None if self.held_out is None else self.support.check_at_once(self.held_out)
        self.saved_at = time.monotonic()
        self.saved = f"epoch {len(self.rows)}" if self.rows else ""  # what the checkpoint holds

    @property
    def epoch(self) -> int:
        """The current epoch, from 1."""
        return len(self.rows) + 1

    @property
    def minibatches(self) -> int:
        """How many minibatches were taken in all, of data whose number is known."""
        return len(self.rows) * (self.batches.steps or 0) + (self.current.minibatches if self.current else 0)

    @property
    def ended(self) -> bool:
        """Whether the training is at its end."""
        limits = self.limits
        return (
            self.stopped is not None
            or self.steps >= limits.steps
            or (self.current is None and len(self.rows) >= limits.epochs)
            or (self.current is None and checkpoints.stalled(len(self.rows), self.best, limits.patience))
        )

    def train_epoch(self, bar: Any) -> None:
        """One pass over the data, or what is left of it, its row in the history, and a checkpoint."""
        epoch = self.current = self.current or Epoch(resuming.generators(self))
        started, batch, inside = time.perf_counter() - epoch.seconds, None, False
        sums = Accumulated(self.accumulate == 1 and self.ranks.group is None, self.ranks.buffers)
        for batch in resuming.minibatches(self, epoch):
            self.step, self.between_steps = epoch.minibatches + 1, False
            self.scheduled = self._scheduled()
            epoch.see(self.scheduled)
            self._take_in(batch, sums)
            epoch.minibatches, sums.number = self.step, sums.number + 1
            going_on = sums.number < self.accumulate or self._step(epoch, sums, batch, started)
            if not bar.disable and (self.step in (1, self.batches.steps) or self.step % 20 == 0):
                bar.set_postfix(epoch.shown, refresh=False)
            bar.update()
            inside = not sums.number and self.ended and epoch.minibatches != self.batches.steps
            if inside or not going_on:
                break
        if sums.number:  # the last minibatches of the epoch, fewer than `accumulate`
            self._step(epoch, sums, batch, started)
            inside = self.stopped is not None and epoch.minibatches != self.batches.steps
        if not inside:
            self.unchecked = None
            epoch.seconds = time.perf_counter() - started
            self._finish(epoch)

    def _take_in(self, batch: Batch | None, sums: Accumulated) -> None:
        """Add the loss of a minibatch and its gradients to those of the step; None is one without a row here."""
        data = None if batch is None else self.ranks.attempt(self._counted, batch)
        # The first step validates the program's distributions, before any work; its own checks stay on.
        first = not self.rows and self.step == 1
        with nullcontext() if self.compiled else pyro.distributions.validation_enabled(first):
            with self.precision:
                self.scales.before_step(self.steps, batch if data else None, data, self._moves, self.ranks)
            if batch is not None and data is not None:
                self.ranks.attempt(self._add_loss, batch, data, sums)
            elif isinstance(getattr(self.objective, "step", None), int):
                self.objective.step += 1  # as on the other ranks
        if first:
            require_kept(self.parameters)

    def _counted(self, batch: Batch) -> Count:
        """The number of a minibatch's data, which are checked."""
        data = self.rows_of.of(batch)
        if self.unchecked is not None:
            self.unchecked.check(batch)
        return data

    def _add_loss(self, batch: Batch, data: Count, sums: Accumulated) -> None:
        """Compute the loss; each parameter's ``grad`` becomes that of its mean over data."""
        with self.precision:
            if self.compiled is None:
                loss, parts = self._uncompiled(batch)
            else:
                loss = self.compiled.compute(*batch)
                parts = self.compiled.parts
        if self.compiled is None:
            (loss / data.whole).backward()  # outside of autocast, which would round it
        # To read a GPU's value would wait for it at each step.
        value = wide(loss.detach()) if loss.is_cuda else loss.item()
        if self.ranks.group is None:
            self._require_finite(value)
        sums.add(self._in_step(), value, data, None if parts is None else wide(parts))

    def _in_step(self) -> dict[Tensor, None]:
        """The parameters of this step, a shared one once; also those that other ranks don't know yet."""
        late = (each for found, _ in self.ranks.new for each in found.values())
        return dict.fromkeys([*self.parameters.values(), *late])

    def _require_finite(self, value: Any) -> None:
        if isinstance(value, float) and not math.isfinite(value):
            raise self._not_finite(f"the loss is {value:g}")

    def _moves(self, likelihood: torch.nn.Module) -> bool:
        """Whether the likelihood's own parameters, such as its scale, are in training now."""
        own = {id(parameter) for parameter in likelihood.parameters(recurse=False)}
        return bool(own & set(map(id, optimizers.parameters_of(self.optimizer))) - self.kept.parameters)

    def _uncompiled(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        for parameter in self._in_step():
            parameter.grad = None
        reading = collected(self.objective) if self.with_parts else nullcontext()
        with NewParameters(self.parameters) as new, reading as found:
            loss = self.objective.differentiable_loss(self.program.model, self.program.guide, *batch)
            parts = None if found is None else found.sums()
        if new.found and self.ranks.group is None:
            self.add(new.found, batch)
        elif new.found:
            self.ranks.new.append((dict(new.found), batch))  # which the other ranks don't know yet
        return loss, parts

    def _step(self, epoch: Epoch, sums: Accumulated, batch: Batch | None, started: float) -> bool:
        """Step the optimiser by the gradients, and tell the callbacks; False if no process had a minibatch for it."""
        self.ranks.provide(self.parameters)
        agreed = self.ranks.sum(sums, save=self._is_due())
        if not agreed.any_minibatch:
            epoch.minibatches -= sums.number
            sums.clear()
            return False
        if agreed.new:
            self.ranks.find_new(self, sums)
        self._require_finite(sums.total)
        epoch.add(sums)
        sums.put(dict.fromkeys(self.parameters.values()))
        record = self.ranks.attempt(self.callbacks.before_step, self, batch, sums)
        self.ranks.check_in()
        sums.clear()
        if self.clip_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(optimizers.parameters_of(self.optimizer), self.clip_norm)
            if record is not None:
                record._norm = norm
        self.optimizer.step()
        self.steps, self.between_steps = self.steps + 1, True
        if self.scheduler is not None and self.scheduled_by_step:
            self.scheduler.step()
        if record is not None:
            self.ranks.attempt(self.callbacks.after_step, record)
        self.stopped = self.stopped or self.ranks.check_in(self.asked)
        epoch.seconds = time.perf_counter() - started
        if agreed.save and epoch.minibatches != self.batches.steps and not self.ended:  # an end writes its own
            self.save()
        return True

    def _finish(self, epoch: Epoch) -> None:
        """End an epoch that had its last minibatch."""
        self.ranks.settle()
        self._require_finite_state(epoch)
        self.ranks.hold_together(self)
        if not epoch.minibatches:
            raise PyroVAEError(
                f"expected minibatches in epoch {self.epoch}, got none: the DataLoader can be read only once. Give it "
                "a data set, or a sampler, that begins again at each epoch."
            )
        row = self._row(epoch)
        anew = any(before != self._scheduled() for before in epoch.settings)
        if self.scheduler is not None and not self.scheduled_by_step:
            learning_rates.step(self.scheduler, row["validation_bound"], anew)
        self._keep_if_best(row, anew)
        self.rows.append(row)
        self.current = None
        try:
            self.ranks.attempt(self.callbacks.end_epoch, self, row, epoch)
        finally:
            if self.checkpoint:
                try:
                    self.save()
                except KeyboardInterrupt:
                    self.rows.pop()  # the history never runs ahead of the checkpoint
                    raise
        self.ranks.settle()
        self.stopped = self.stopped or self.ranks.any_of(self.asked)

    def finish(self) -> None:
        """End the training, which may be inside of an epoch: its row is of what was trained."""
        epoch = self.current
        if epoch is not None and epoch.minibatches:
            if self.checkpoint:
                self.save()
            self._require_finite_state(epoch)
            self.partial = self._row(epoch)
        self.finished = True
        self.restore_best()
        self.scales.at_end()
        self.ranks.attempt(self.callbacks.end, self)
        self.ranks.settle()
        self.ranks.hold_together(self)

    def _row(self, epoch: Epoch) -> dict[str, float]:
        """The row of the history of an epoch."""
        started = time.perf_counter()
        row, parts = {"train_bound": epoch.bound, "validation_bound": self._validate()}, epoch.mean_parts
        kl = {} if parts is None else {"KL": float(parts[1])}
        self.moves.append({"bound": row["train_bound"]} | kl | self.scales.values())
        row["seconds"] = epoch.seconds + time.perf_counter() - started
        if self.scheduler is not None:
            row["lr"] = float(self.optimizer.param_groups[0]["lr"])
        return row

    def _require_finite_state(self, epoch: Epoch) -> None:
        if not math.isfinite(epoch.total):
            raise self._not_finite("the epoch's loss is not finite")
        for name, parameter in self.parameters.items():
            if not bool(torch.isfinite(parameter).all()):
                raise self._not_finite(f"parameter '{name}' is not finite")

    def _keep_if_best(self, row: dict[str, float], anew: bool) -> None:
        bound = row["validation_bound"]
        if self.limits.patience is not None and (self.best is None or anew or bound > self.best["bound"]):
            self.best = self.copy(bound)

    def history(self) -> pd.DataFrame:
        """The table that `fit` returns."""
        rows = [*self.rows, *([self.partial] if self.partial else [])]
        table = pd.DataFrame(rows, index=pd.RangeIndex(1, len(rows) + 1, name="epoch"), columns=self.columns())
        table.attrs["quantity"] = getattr(self.objective, "quantity", "bound on log p(x)")
        table.attrs["stopped"] = self.stopped
        return table

    def columns(self) -> list[str]:
        """The names of the history's columns."""
        return ["train_bound", "validation_bound", "seconds", *(["lr"] if self.scheduler else [])]

    def add(self, found: dict[str, Tensor], batch: Batch) -> None:
        """Train parameters that no earlier minibatch has used, from this step on."""
        require_same(self.parameters, found)
        program = self.program.on(batch)
        if self.batches.moves_rows:
            check_row_parameters(program, trial(program, self.rows_of.number))
        for name, parameter in sorted(found.items()):
            parameter.grad = None  # of an earlier training
            if self.best is not None:
                self.best["parameters"][name] = parameter.detach().clone()  # as it was in that epoch
        self.take(self.parameters | dict(sorted(found.items())))
        self.scales.see(program)

    def take(self, parameters: dict[str, Tensor]) -> None:
        """Train these parameters, in the order in which the optimiser's state has them."""
        self.parameters.clear()
        self.parameters.update(parameters)
        self.making.regroup(self.optimizer, parameters)

    def _validate(self) -> float:
        if self.held_out is None:
            return math.nan
        bound = validate(self, self.held_out)
        self.unchecked_held_out = None
        return bound

    def _scheduled(self) -> dict[str, float]:
        """The settings of the objective in the next loss, or validation."""
        return self.objective.scheduled() if hasattr(self.objective, "scheduled") else {}

    def copy(self, validation_bound: float) -> dict[str, Any]:
        """Copies of all parameters and buffers, with this epoch's bound."""
        tensors = {"parameters": self.parameters, "buffers": buffers(self.modules)}
        copies = {what: {n: v.detach().clone() for n, v in named.items()} for what, named in tensors.items()}
        bound = -math.inf if math.isnan(validation_bound) else validation_bound  # so that any number is above it
        return {"epoch": self.epoch, "bound": bound} | copies

    def restore_best(self) -> None:
        """Restore the parameters and buffers of the best epoch, with `patience`."""
        if self.best is not None:
            checkpoints.restore("of the best epoch", self.best, self.parameters, buffers(self.modules))

    def _is_due(self) -> bool:
        """Whether it is time for a checkpoint inside of an epoch, after the coming step."""
        every = self.checkpoint_every
        if isinstance(every, timedelta):
            return self.ranks.is_first and time.monotonic() - self.saved_at >= every.total_seconds()
        return every is not None and (self.steps + 1) % every == 0

    def keep_last_step(self) -> None:
        """Write a checkpoint of the last step inside of an epoch, if training can go on from it."""
        inside = self.current is not None and self.between_steps and not self.finished
        # Other ranks may have taken another step, so that they can't write one together.
        if self.checkpoint and inside and self.batches.begins_again and self.ranks.group is None:
            self.save()

    def save(self, path: str | Path | None = None) -> None:
        """Write a checkpoint, by default the training's own; another has no best epoch."""
        if path is not None:
            checkpoints.save(path, resuming.state_of(self) | {"best": None})
            return
        self.ranks.hold_together(self)
        others = self.ranks.gather(resuming.generators_now(self))
        with self.ranks.together():
            if self.ranks.is_first:
                checkpoints.save(self.checkpoint or "", resuming.state_of(self, others))
        inside = "" if self.current is None else f"step {self.steps}, in epoch "
        self.saved_at, self.saved = time.monotonic(), f"{inside or 'epoch '}{len(self.rows) + bool(inside)}"

    def _not_finite(self, what: str) -> NotFiniteError:
        before, lr = self.epoch - 1, optimizers.lr_of(self.optimizer)
        kept = f" The checkpoint {self.checkpoint} is as it was after epoch {before}." if self.checkpoint else ""
        return NotFiniteError(
            f"{what} in epoch {self.epoch}, step {self.step}: expected finite numbers. Likely causes: a learning rate "
            f"too high (lr={lr:g}), a scale that went to zero (a Gaussian's, where pixels are constant), or data "
            f"outside the likelihood's support.{kept if before else ''}"
        )
