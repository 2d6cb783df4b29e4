"""The training loop behind `fit`: a step for each minibatch, validation and a checkpoint after each epoch."""

import math
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from pyro_vae.compiled.step import CompiledStep
from pyro_vae.devices import wide
from pyro_vae.engine import rng
from pyro_vae.engine.minibatches import Batch, Minibatches
from pyro_vae.engine.modules import buffers, eval_mode
from pyro_vae.engine.ownership import parameters_of
from pyro_vae.engine.parameters import NewParameters, require_kept, require_same
from pyro_vae.engine.program import Program
from pyro_vae.engine.row_parameters import check_row_parameters, trial
from pyro_vae.engine.rows import Rows
from pyro_vae.errors import NotFiniteError, NotWrittenError, PyroVAEError
from pyro_vae.training import checkpoint as checkpoints
from pyro_vae.training import contents, learning_rates
from pyro_vae.training.data_support import DataSupport
from pyro_vae.training.fingerprint import PASS_THE_SAME, Fingerprint
from pyro_vae.training.scales import Scales


@dataclass
class Loop:
    """The training loop: its state, its steps, and how a checkpoint keeps the state."""

    program: Program
    objective: Any
    batches: Minibatches
    held_out: Minibatches | None
    parameters: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | None
    patience: int | None  # how many epochs without a better validation bound end the training; None never does
    checkpoint: str | Path | None  # the file of the state
    settings: dict[str, Any]  # what a checkpoint must agree on
    support: DataSupport  # the check of the data
    rows_of: Rows  # how many data the loss of a minibatch stands for
    scales: Scales  # the likelihoods' learned scales
    fingerprint: Fingerprint | None  # what identifies the training, with a checkpoint
    compiled: CompiledStep | None = None
    rows: list[dict[str, float]] = field(default_factory=list)  # the history, a row an epoch
    best: dict[str, Any] | None = None  # epoch, bound, parameters and buffers of the best epoch, with `patience`
    epoch: int = 0  # the current one, from 1
    step: int = 0  # the current one of the epoch, from 1
    steps: int = 0  # how many were taken in all

    def __post_init__(self) -> None:
        self.modules = self.program.modules()
        # Of data that can't be checked at once, these check each minibatch in the first epoch; then they are None.
        self.unchecked = self.support.check_at_once(self.batches)
        self.unchecked_held_out = None if self.held_out is None else self.support.check_at_once(self.held_out)

    def train_epoch(self, bar: Any) -> None:
        """One pass over the data, its row in the history, and a checkpoint."""
        self.epoch, started = len(self.rows) + 1, time.perf_counter()
        total: Any = 0.0
        count, settings = 0, []
        for step, batch in enumerate(self.batches.shuffled(), 1):
            self.step = step
            if step == 1 and self.fingerprint is not None:
                self.fingerprint.see_first(batch)
            settings.append(self._scheduled())
            data = self.rows_of.of(batch)
            if self.unchecked is not None:
                self.unchecked.check(batch)
            # The first step validates the program's distributions, before any work; its own checks stay on.
            first = not self.rows and step == 1
            with pyro.distributions.validation_enabled(first):
                self.scales.before_step(self.steps, batch, data.own / self.rows_of.number)
                if self.compiled is None:
                    self.optimizer.zero_grad()
                    with NewParameters(self.parameters) as new:
                        loss = self.objective.differentiable_loss(self.program.model, self.program.guide, *batch)
                    if new.found:
                        self._add(new.found, batch)
                    (loss / data.whole).backward()
                else:
                    loss = self.compiled.compute(*batch)
            loss = loss.detach()
            if not (loss.is_cuda or math.isfinite(loss)):  # to read a GPU's value would wait for it at each step
                raise self._not_finite(f"the loss is {loss:g}")
            if first:
                require_kept(self.parameters)
            self.optimizer.step()
            self.steps += 1
            total, count = total + wide(loss) * data.share, count + data.own
            if not bar.disable and (step in (1, self.batches.steps) or step % 20 == 0):
                bar.set_postfix(bound=f"{-total / count:.2f}", refresh=False)
            bar.update()
        self.unchecked = None
        if not settings:
            raise PyroVAEError(
                f"expected minibatches in epoch {self.epoch}, got none: the DataLoader can be read only once. Give it "
                "a data set, or a sampler, that begins again at each epoch."
            )
        if not math.isfinite(total):
            raise self._not_finite("the epoch's loss is not finite")
        for name, parameter in self.parameters.items():
            if not bool(torch.isfinite(parameter).all()):
                raise self._not_finite(f"parameter '{name}' is not finite")
        row = {"train_bound": -float(total) / count, "validation_bound": self._validate()}
        row["seconds"] = time.perf_counter() - started
        anew = any(before != self._scheduled() for before in settings)
        if self.scheduler is not None:
            row["lr"] = float(self.optimizer.param_groups[0]["lr"])
            learning_rates.step(self.scheduler, row["validation_bound"], anew)
        if self.patience is not None and (self.best is None or anew or row["validation_bound"] > self.best["bound"]):
            self.best = self._copy(row["validation_bound"])
        try:
            if self.checkpoint:
                checkpoints.save(self.checkpoint, self._state([*self.rows, row]))
        except NotWrittenError:
            self.rows.append(row)
            raise
        self.rows.append(row)  # last, so that the history never runs ahead of the checkpoint

    def history(self) -> pd.DataFrame:
        """The table that `fit` returns."""
        index = pd.RangeIndex(1, len(self.rows) + 1, name="epoch")
        table = pd.DataFrame(self.rows, index=index, columns=self._columns())
        table.attrs["quantity"] = getattr(self.objective, "quantity", "bound on log p(x)")
        return table

    def _columns(self) -> list[str]:
        return ["train_bound", "validation_bound", "seconds", *(["lr"] if self.scheduler else [])]

    def _add(self, found: dict[str, Tensor], batch: Batch) -> None:
        """Train parameters that no earlier minibatch has used, from this step on."""
        require_same(self.parameters, found)
        program = self.program.on(batch)
        if self.batches.moves_rows:
            check_row_parameters(program, trial(program, self.rows_of.of(batch).own))
        for name, parameter in sorted(found.items()):
            parameter.grad = None  # of an earlier training
            if self.best is not None:
                self.best["parameters"][name] = parameter.detach().clone()  # as it was in that epoch
        self._take(self.parameters | dict(sorted(found.items())))
        self.scales.see(program)

    def _take(self, parameters: dict[str, Tensor]) -> None:
        """Train these parameters, in the order in which the optimiser's state has them."""
        self.parameters.clear()
        self.parameters.update(parameters)
        # In the one group, so that a scheduler made before sets their step size too.
        self.optimizer.param_groups[0]["params"][:] = dict.fromkeys(parameters.values())  # shared ones once

    def _validate(self) -> float:
        if self.held_out is None:
            return math.nan
        total, count = 0.0, 0
        own = self.held_out.generator_states()
        with (
            torch.no_grad(),
            rng.preserved(seed=0),
            eval_mode(self.modules),
            pyro.distributions.validation_enabled(not self.rows),  # the data are the same in each epoch
        ):
            for batch in self.held_out.in_order():
                if self.unchecked_held_out is not None:
                    self.unchecked_held_out.check(batch)
                loss = self.objective.loss(self.program.model, self.program.guide, *batch)
                data = self.rows_of.of(batch)
                total, count = total + loss * data.share, count + data.own
        self.unchecked_held_out = None
        self.held_out.set_generator_states(own)
        return -total / count

    def _scheduled(self) -> dict[str, float]:
        """The settings of the objective in the next loss, or validation."""
        return self.objective.scheduled() if hasattr(self.objective, "scheduled") else {}

    def _copy(self, validation_bound: float) -> dict[str, Any]:
        tensors = {"parameters": self.parameters, "buffers": buffers(self.modules)}
        copies = {what: {n: v.detach().clone() for n, v in named.items()} for what, named in tensors.items()}
        bound = -math.inf if math.isnan(validation_bound) else validation_bound  # so that any number is above it
        return {"epoch": self.epoch, "bound": bound} | copies

    def restore_best(self) -> None:
        """Restore the parameters and buffers of the best epoch, with `patience`."""
        if self.best is not None:
            checkpoints.restore("of the best epoch", self.best, self.parameters, buffers(self.modules))

    def _state(self, rows: list[dict[str, float]]) -> dict[str, Any]:
        """The contents of a checkpoint."""
        return {
            "settings": self.settings,
            "history": rows,
            "parameters": {name: value.detach() for name, value in self.parameters.items()},
            "buffers": buffers(self.modules),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler and self.scheduler.state_dict(),
            "rng": rng.get_state(),
            "steps": self.steps,
            "loader_rng": self.batches.generator_states(),
            "step": self.objective.step if isinstance(getattr(self.objective, "step", None), int) else None,
            "fingerprint": self.fingerprint and self.fingerprint.state(),
        }

    def resume(self, path: str | Path, epochs: int) -> None:
        """Restore the state from the checkpoint."""
        state = checkpoints.load(path)
        saved = {"compile": False, "lr_scheduler": None} | state["settings"]
        for name in saved:
            if name not in self.settings:
                raise PyroVAEError(
                    f"the checkpoint {path} was written with a setting that this version of pyro_vae does not know: "
                    f"expected none, got {name}={contents.shortened(saved[name])}. Update pyro_vae, or pass a new path."
                )
        for name, value in self.settings.items():
            if saved[name] != value:
                raise PyroVAEError(
                    f"the checkpoint {path} was written with other settings: expected {name}={saved[name]!r}, got "
                    f"{name}={value!r}. {PASS_THE_SAME}"
                )
        best = state.get("best")
        if (best is None) != (self.patience is None):
            raise PyroVAEError(
                f"the checkpoint {path} was written {'without' if best is None else 'with'} patience: expected "
                f"{'None' if best is None else 'a number, also another one'}, got patience={self.patience!r}, since it "
                "keeps the best epoch's parameters from the first epoch on. Pass that, or a new path."
            )
        if len(state["history"]) > epochs:
            raise PyroVAEError(
                f"the checkpoint {path} holds {len(state['history'])} epochs: expected at least as many in all, got "
                f"epochs={epochs}. Pass more epochs, or a new path."
            )
        # Version 0.1.0 did not count; a stream's epochs have no known number of steps.
        steps = state.get("steps", len(state["history"]) * (self.batches.steps or 1))
        self._restore_recognised(path, state)
        self._restore_optimizer(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.batches.set_generator_states(state["loader_rng"])
        rng.set_state(state["rng"])
        if state["step"] is not None:
            self.objective.step = state["step"]
        self.rows, self.best, self.steps = list(state["history"]), best, steps

    def _restore_optimizer(self, saved: dict[str, Any]) -> None:
        """Restore the optimiser's state, in memory laid out as the parameters': fused kernels take that for granted."""
        parameters, own = self.optimizer.param_groups[0]["params"], self.optimizer.state_dict()["param_groups"][0]
        names = contents.MOMENTS.needed
        moments = {
            i: {n: torch.empty_like(each["step"] if n == "step" else parameters[i]).copy_(each[n]) for n in names}
            for i, each in saved["state"].items()
        }
        self.optimizer.load_state_dict({"state": moments, "param_groups": [own | saved["param_groups"][0]]})

    def _check_parts(self, path: str | Path, state: dict[str, Any]) -> None:
        """Refuse a state that is not one of this training, before anything takes a part of it."""
        tensors = self.parameters, buffers(self.modules)
        checkpoints.check_tensors(path, state, *tensors)
        if state.get("best") is not None:
            checkpoints.check_tensors(path, state["best"], *tensors)
        epochs, counts = len(state["history"]), isinstance(getattr(self.objective, "step", None), int)
        taken = epochs * self.batches.steps if self.batches.loader is None and self.batches.steps else None
        most, scheduler = taken or state.get("steps", math.inf), self.scheduler
        parts = {
            "history": [contents.Parts(dict.fromkeys(self._columns(), float))],
            "optimizer": contents.of_adam(self.optimizer, most, scheduled=scheduler is not None),
            "loader_rng": contents.of_generators(self.batches.generators()),
            "step": contents.COUNT if counts else None,
        }
        later = {"scheduler": None if scheduler is None else learning_rates.state_kind(scheduler, epochs)}
        later |= {"steps": contents.equal(taken)} if taken else {}
        contents.check_parts(path, state, contents.Parts(parts, later))

    def _find(self, saved: dict[str, Tensor]) -> None:
        """Find the checkpoint's parameters that the first minibatch does not use, and put all into its order."""
        for batch in self.batches.looks() if saved.keys() - self.parameters.keys() else ():
            for trace in self.program.on(batch).trace():
                self.parameters.update({n: p for n, p in parameters_of(trace).items() if n in saved})
            if saved.keys() <= self.parameters.keys():
                break
        if saved.keys() == self.parameters.keys():
            self._take({name: self.parameters[name] for name in saved})

    def _restore_recognised(self, path: str | Path, state: dict[str, Any]) -> None:
        """Restore parameters and buffers; those of another program keep the values that they have."""
        saved, own_buffers = state.get("fingerprint"), buffers(self.modules)
        if saved is None or self.fingerprint is None:
            warnings.warn(
                f"the checkpoint {path} was written by an earlier version: whether program, data and schedules are "
                "those that were trained is not known. Pass the same.",
                stacklevel=5,
            )
            self._check_parts(path, state)
            checkpoints.restore(path, state, self.parameters, own_buffers)
            return
        self.fingerprint.check_inputs(path, saved)
        self._find(state["parameters"])
        self._check_parts(path, state)
        own = self._copy(math.nan)
        checkpoints.restore(path, state, self.parameters, own_buffers)
        try:
            self.fingerprint.check_program(path, saved)
        except PyroVAEError:
            checkpoints.restore(path, own, self.parameters, own_buffers)
            raise

    def _not_finite(self, what: str) -> NotFiniteError:
        before, lr = self.epoch - 1, self.optimizer.param_groups[0]["lr"]
        kept = f" The checkpoint {self.checkpoint} is as it was after epoch {before}." if self.checkpoint else ""
        return NotFiniteError(
            f"{what} in epoch {self.epoch}, step {self.step}: expected finite numbers. Likely causes: a learning rate "
            f"too high (lr={lr:g}), a scale that went to zero (a Gaussian's, where pixels are constant), or data "
            f"outside the likelihood's support.{kept if before else ''}"
        )
