"""Trains any Pyro model and guide: one loop, one optimiser, a checkpoint after each epoch."""

from __future__ import annotations

import copy
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from pyro_vae.compiled.step import Compiled, CompiledStep, OnCompile
from pyro_vae.compiled.supports import Supports
from pyro_vae.engine import rng
from pyro_vae.engine.minibatches import Minibatches
from pyro_vae.engine.modules import Program, buffers, evaluating, find_modules
from pyro_vae.engine.program import require_parameters, sample_sites, trace_once
from pyro_vae.errors import NotFiniteError, PyroVAEError
from pyro_vae.training import checkpoint as checkpoints
from pyro_vae.training import learning_rates


def fit(
    model: Program,
    guide: Program,
    data: Any,
    objective: Any,
    *,
    epochs: int,
    batch_size: int | None = None,
    lr: float = 1e-3,
    lr_scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
    validation: Any = None,
    patience: int | None = None,
    compile: bool = False,
    checkpoint: str | Path | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    r"""Maximise an objective over the parameters of a Pyro model and guide, with Adam, by minibatches.

    Each step follows the gradient of the minibatch's mean bound, :math:`\frac1B \sum_n \mathcal L(x_n)`.

    Arguments:
        model: a Pyro model, called with each minibatch.
        guide: its guide, called with the same.
        data: what to train on: a tensor (N, ...), a split of :mod:`pyro_vae.data`, a tuple of tensors with one
            length, whose minibatches are passed as several arguments, or a ``DataLoader``.
        objective: the bound, such as :class:`pyro_vae.ELBO`, or any ``pyro.infer.ELBO`` with a differentiable loss.
        epochs: how many passes over the data in all, those in the checkpoint included.
        batch_size: data in a minibatch, 128 unless told; not with a ``DataLoader``, which has its own.
        lr: Adam's step size.
        lr_scheduler: a function from the optimiser to one of ``torch.optim.lr_scheduler``, such as
            ``lambda optimizer: CosineAnnealingLR(optimizer, T_max=epochs)``. It takes a step after each epoch;
            ``ReduceLROnPlateau`` is given minus the validation bound.
        validation: data held out, of the same kinds; its bound is measured after each epoch, with the same noise
            each time and without touching the training's random numbers.
        patience: end when the validation bound has not risen for so many epochs. Parameters and buffers are then, and also
            where all epochs ran, those of the best epoch. The history keeps every epoch; the best is the one with the highest
            validation bound, the first of equals.
        compile: whether steps run as compiled code, as :func:`compile_step` says. Each size of minibatch takes 4 to 20 s to
            compile when it first comes; in a terminal, `fit` says after how many steps that will have paid off. The result
            differs by rounding.
        checkpoint: a file to write after each epoch. If it is there already, training goes on from it and ends,
            bit for bit, where it would have ended unbroken (batch norm: see below), with the same settings: only `epochs` and
            the number that `patience` is may change. A function inside the scheduler can't be compared. With `patience` it
            holds the best epoch's parameters too, and :func:`load_parameters` takes those.
        seed: starts the random generators for minibatches and samples; None goes on from where they are. Initial
            weights come before `fit`: call ``pyro.set_rng_seed`` before building the networks too.
        progress: whether to show a progress bar, in a terminal.

    Where the objective has a schedule (:mod:`pyro_vae.schedules`), bounds of epochs that end at different values of it are not
    comparable: while it moves, `patience` and ``ReduceLROnPlateau`` start to compare anew at each epoch.

    The checkpoint has the program's parameters, and the buffers (batch norm's statistics) of modules that model or
    guide is, or is a method of; these are also what validation puts into evaluation mode.

    Returns:
        A table with a row for each ``epoch``: ``train_bound`` and ``validation_bound`` (NaN without such data), the
        mean bound per datum in nats, times the program's own scale if it has one, and ``seconds``, compilation included; with a
        scheduler also ``lr``, the step size in that epoch. Ctrl-C ends training with a warning and returns the epochs so far; the parameters
        keep what was learned up to then, with `patience` too.

    Raises:
        ValueError: an argument out of range, data of unequal lengths, empty or with NaN, no parameters to train, `patience` or
            ``ReduceLROnPlateau`` without validation data, a scheduler of something else, or a checkpoint that can't be read or
            that belongs to another program or other settings; with `compile`, data outside their support, or a program that
            can't be traced.
        FloatingPointError: the loss or a parameter became NaN or infinite; the checkpoint is of the epoch before.

    Example:
        >>> import torch, pyro, pyro_vae as pv
        >>> pyro.set_rng_seed(0)
        >>> vae = pv.mlp_vae((5,), latent_dim=2, hidden_dims=(16,), likelihood="gaussian")
        >>> history = pv.fit(vae.model, vae.guide, torch.randn(64, 5), pv.ELBO(), epochs=2, batch_size=32)
        >>> list(history.columns)
        ['train_bound', 'validation_bound', 'seconds']
        >>> decay = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        >>> pv.fit(vae.model, vae.guide, torch.randn(64, 5), pv.ELBO(), epochs=3, lr_scheduler=decay).lr.tolist()
        [0.001, 0.0005, 0.00025]

    References:
        Kingma and Ba (2015), *Adam: A Method for Stochastic Optimization*, ICLR.
    """
    if not isinstance(epochs, int) or epochs < 1 or not (0 < lr < math.inf):
        raise PyroVAEError(f"expected epochs to be a positive integer and lr positive, got {epochs!r} and {lr!r}.")
    lr = float(lr)  # NumPy's numbers could not be read back from a checkpoint
    batches = Minibatches(data, batch_size, "data")
    held_out = None if validation is None else Minibatches(validation, batch_size, "validation")
    if held_out is not None and not held_out.has_data():
        held_out = None
    _check_patience(patience, held_out)
    if seed is not None and not (checkpoint and Path(checkpoint).exists()):
        pyro.set_rng_seed(seed)

    if isinstance(objective, type) or not hasattr(objective, "differentiable_loss"):
        raise PyroVAEError(f"expected an objective with a differentiable loss, such as pv.ELBO(), got {objective!r}.")
    example = batches.example()
    parameters, model_trace = _prepare(model, guide, objective, batches, example)
    optimizer = torch.optim.Adam(list(dict.fromkeys(parameters.values())), lr=lr, fused=True)  # shared ones once
    scheduler = None if lr_scheduler is None else learning_rates.make(lr_scheduler, optimizer, held_out is not None)
    settings = {
        "objective": _describe(objective),
        "batch_size": batches.batch_size,
        "lr": lr,
        "lr_scheduler": scheduler and learning_rates.describe(scheduler),
        "seed": seed,
        "N": batches.size,
        "compile": compile,
    }
    run = _Training(
        model, guide, objective, batches, held_out, parameters, optimizer, scheduler, patience, checkpoint, settings
    )
    if isinstance(getattr(objective, "step", None), int):
        objective.step = 0
    if checkpoint and Path(checkpoint).exists():
        run.resume(checkpoint, epochs)
    elif checkpoint and scheduler is not None:
        checkpoints.check_readable("lr_scheduler", scheduler.state_dict())

    total_steps = None if batches.steps is None else epochs * batches.steps
    bar = tqdm(total=total_steps, disable=None if progress else True, unit="step")
    bar.update(len(run.rows) * (batches.steps or 0))
    gradients: Callable[..., Tensor] = run.uncompiled
    supports = None
    if compile:
        supports = Supports(model, model_trace, example, batches)
        gradients = CompiledStep(
            model, guide, objective, optimizer, mean=True, on_compile=_teller(bar, batches)
        ).compute
    try:
        # Distributions were validated in _prepare, which ran the program once; a program's own checks stay on.
        with pyro.distributions.validation_enabled(False), _flushing_denormals():
            while len(run.rows) < epochs and not checkpoints.stalled(len(run.rows), run.best, patience):
                bar.set_description(f"epoch {len(run.rows) + 1}/{epochs}")
                run.train_epoch(gradients, supports, bar)
                supports = None  # which have seen all data by now
        run.restore_best()
    except KeyboardInterrupt:
        best = f", not those of the best epoch, {run.best['epoch']}" if run.best else ""
        kept = f"; the checkpoint {checkpoint} holds epoch {len(run.rows)}" if checkpoint and run.rows else ""
        warnings.warn(
            f"training stopped by Ctrl-C in epoch {run.epoch}, step {run.step}: the parameters keep what was learned{best}{kept}.",
            stacklevel=2,
        )
    finally:
        bar.close()
    columns = ["train_bound", "validation_bound", "seconds", *(["lr"] if scheduler else [])]
    return pd.DataFrame(run.rows, index=pd.RangeIndex(1, len(run.rows) + 1, name="epoch"), columns=columns)


@dataclass
class _Training:
    """A training under way: what moves from epoch to epoch, and how a checkpoint keeps it."""

    model: Program
    guide: Program
    objective: Any
    batches: Minibatches
    held_out: Minibatches | None
    parameters: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | None
    patience: int | None
    checkpoint: str | Path | None
    settings: dict[str, Any]
    rows: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    epoch: int = 0
    step: int = 0
    scheduled: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.modules = find_modules(self.model, self.guide)

    def uncompiled(self, *batch: Any) -> Tensor:
        """Set each parameter's ``grad``; return the loss."""
        self.optimizer.zero_grad()
        loss: Tensor = self.objective.differentiable_loss(self.model, self.guide, *batch)
        (loss / len(batch[0])).backward()
        return loss.detach()

    def train_epoch(self, gradients: Callable[..., Tensor], supports: Supports | None, bar: Any) -> None:
        """One pass over the data, its row in the history, and a checkpoint."""
        self.epoch, started, self.scheduled = len(self.rows) + 1, time.perf_counter(), []
        row = {"train_bound": self._take_steps(gradients, supports, bar), "validation_bound": self._validate()}
        row["seconds"] = time.perf_counter() - started
        anew = any(settings != self._scheduled() for settings in self.scheduled)
        if self.scheduler is not None:
            row["lr"] = float(self.optimizer.param_groups[0]["lr"])
            learning_rates.step(self.scheduler, row["validation_bound"], anew)
        if self.patience is not None and (self.best is None or anew or row["validation_bound"] > self.best["bound"]):
            self.best = self._copy(row["validation_bound"])
        if self.checkpoint:
            checkpoints.save(self.checkpoint, self._state([*self.rows, row]))
        self.rows.append(row)  # last, so that the history never runs ahead of the checkpoint

    def _take_steps(self, gradients: Callable[..., Tensor], supports: Supports | None, bar: Any) -> float:
        """A step for each minibatch; return the mean bound per datum."""
        total, count = torch.zeros((), dtype=torch.float64), 0
        for step, batch in enumerate(self.batches.shuffled(), 1):
            self.step = step
            self.scheduled.append(self._scheduled())
            if supports is not None:
                supports.check(batch)
            loss = gradients(*batch)
            if not (loss.is_cuda or math.isfinite(loss)):  # to ask a GPU would be to wait for it at each step
                raise self._not_finite(f"the loss is {loss:g}")
            self.optimizer.step()
            total, count = total + loss.double(), count + len(batch[0])
            if not bar.disable and (step in (1, self.batches.steps) or step % 20 == 0):
                bar.set_postfix(bound=f"{-total / count:.2f}", refresh=False)
            bar.update()
        if not math.isfinite(total):
            raise self._not_finite("the epoch's loss is not finite")
        for name, parameter in self.parameters.items():
            if not bool(torch.isfinite(parameter).all()):
                raise self._not_finite(f"parameter '{name}' is not finite")
        return -float(total) / count

    def _validate(self) -> float:
        if self.held_out is None:
            return math.nan
        total, count = 0.0, 0
        own = self.held_out.generator_states()
        with torch.no_grad(), rng.preserved(seed=0), evaluating(self.modules):
            for batch in self.held_out.in_order():
                total += self.objective.loss(self.model, self.guide, *batch)
                count += len(batch[0])
        self.held_out.set_generator_states(own)
        return -total / count

    def _scheduled(self) -> dict[str, float]:
        """Under which settings of the objective the next loss, or validation, is."""
        return self.objective.scheduled() if hasattr(self.objective, "scheduled") else {}

    def _copy(self, validation_bound: float) -> dict[str, Any]:
        tensors = {"parameters": self.parameters, "buffers": buffers(self.modules)}
        copies = {what: {n: v.detach().clone() for n, v in named.items()} for what, named in tensors.items()}
        bound = -math.inf if math.isnan(validation_bound) else validation_bound  # so that any number is above it
        return {"epoch": self.epoch, "bound": bound} | copies

    def restore_best(self) -> None:
        """Put parameters and buffers where they were after the best epoch, if it was looked for."""
        if self.best is not None:
            checkpoints.restore("of the best epoch", self.best, self.parameters, buffers(self.modules))

    def _state(self, rows: list[dict[str, float]]) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "settings": self.settings,
            "history": rows,
            "parameters": {name: value.detach() for name, value in self.parameters.items()},
            "buffers": buffers(self.modules),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler and self.scheduler.state_dict(),
            "rng": rng.get_state(),
            "loader_rng": self.batches.generator_states(),
            "step": self.objective.step if isinstance(getattr(self.objective, "step", None), int) else None,
        }

    def resume(self, path: str | Path, epochs: int) -> None:
        """Put everything where the checkpoint left it."""
        state = checkpoints.load(path)
        saved = {"compile": False, "lr_scheduler": None} | state["settings"]
        for name, value in self.settings.items():
            if saved[name] != value:
                raise PyroVAEError(
                    f"the checkpoint {path} was written with {name}={saved[name]!r}, and {name}={value!r} is "
                    "asked for: expected the same, to end where an unbroken run ends. Pass the same, or a new path."
                )
        best = state.get("best")
        if (best is None) != (self.patience is None):
            raise PyroVAEError(
                f"the checkpoint {path} was written {'without' if best is None else 'with'} patience, and "
                f"patience={self.patience!r} is asked for: expected a number if it began with one, which may be another, since the "
                "best epoch's parameters are kept from the first on. Pass that, or a new path."
            )
        if len(state["history"]) > epochs:
            raise PyroVAEError(
                f"the checkpoint {path} holds {len(state['history'])} epochs, and {epochs} in all are asked for. Ask for "
                "at least as many, or pass a new path."
            )
        checkpoints.restore(path, state, self.parameters, buffers(self.modules))
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.batches.set_generator_states(state["loader_rng"])
        rng.set_state(state["rng"])
        if state.get("step") is not None:
            self.objective.step = state["step"]
        self.rows, self.best = list(state["history"]), best

    def _not_finite(self, what: str) -> NotFiniteError:
        before = self.epoch - 1
        kept = (
            f" The checkpoint {self.checkpoint} is as it was after epoch {before}."
            if self.checkpoint and before
            else ""
        )
        lr = self.optimizer.param_groups[0]["lr"]
        return NotFiniteError(
            f"{what} in epoch {self.epoch}, step {self.step}. Likely causes: a learning rate too high (lr={lr:g}), a scale that "
            "went to zero (a Gaussian's, where pixels are constant), or data outside the likelihood's support." + kept
        )


def _teller(bar: Any, batches: Minibatches) -> OnCompile | None:
    """Shows that a step is being compiled, and when that will have paid off, where the bar is shown."""
    if bar.disable:
        return None
    first = True

    def tell(compiled: Compiled | None) -> None:
        nonlocal first
        if compiled is None:
            bar.set_postfix_str("compiling ...")
            return
        bar.set_postfix_str("")
        line = f"compiled in {compiled.seconds:.1f} s"
        if first and compiled.eager_seconds is not None and compiled.compiled_seconds is not None:
            saved = compiled.eager_seconds - compiled.compiled_seconds
            pays = f"{compiled.seconds / saved:,.0f} steps" if saved > 0 else ""
            if pays and batches.steps is not None:
                pays += f", {compiled.seconds / saved / batches.steps:,.1f} epochs"
            line += f": a step takes {1e3 * compiled.compiled_seconds:.3g} ms in place of {1e3 * compiled.eager_seconds:.3g}, "
            line += f"which pays off after {pays}" if pays else "which never pays off"
        else:
            line += " for a minibatch of another size"
        first = False
        bar.write(line, file=sys.stderr)

    return tell


@contextmanager
def _flushing_denormals() -> Iterator[None]:
    """Inside, numbers too small for full precision are zero: an optimiser's moments get there, where arithmetic is slow."""
    smallest = torch.tensor(torch.finfo(torch.float64).tiny, dtype=torch.float64)
    was_on = not bool(smallest / 2 > 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(was_on)


def _prepare(
    model: Program, guide: Program, objective: Any, batches: Minibatches, batch: tuple[Any, ...]
) -> tuple[dict[str, Tensor], Trace]:
    """Run the program once with validation on, so that its mistakes show before any work.

    Returns:
        Its parameters, and the model's trace.
    """
    model_trace, guide_trace = trace_once(model, guide, *batch)
    if batches.steps != 1:
        _check_minibatches(model_trace, len(batch[0]))
    parameters = dict(sorted(require_parameters(model_trace, guide_trace).items()))  # Adam knows its own by their order
    trial = evaluating(find_modules(model, guide))
    with pyro.validation_enabled(True), rng.preserved(), pyro.poutine.block(), trial:
        copy.copy(objective).differentiable_loss(model, guide, *batch)  # a copy: this is no step of a schedule
    return parameters, model_trace


def _check_minibatches(model_trace: Trace, size: int) -> None:
    """Refuse a program whose terms outside the data's plate would count once for each minibatch."""
    frames = {n: s["cond_indep_stack"] for n, s in sample_sites(model_trace).items()}
    if any(frame.full_size != frame.size for stack in frames.values() for frame in stack):
        return  # scaled to all data: each minibatch's loss estimates the whole
    for name, stack in frames.items():
        if all(frame.size != size for frame in stack):
            raise PyroVAEError(
                f"expected a program whose minibatches add up to the data, got model site '{name}' outside the data's "
                f"plate of size {size}: its term would count once for each minibatch. Move it inside; or give the "
                "plate the size of all data, pyro.plate('data', N, subsample_size=len(x)); or pass batch_size=N."
            )


def _check_patience(patience: int | None, held_out: Minibatches | None) -> None:
    if patience is None:
        return
    if not isinstance(patience, int) or patience < 1:
        raise PyroVAEError(
            f"expected patience to be a positive integer, of epochs, got {patience!r}. None never stops early."
        )
    if held_out is None:
        raise PyroVAEError(
            "patience counts epochs in which the validation bound has not risen: expected validation data with it, got none. "
            "Pass validation=..., or drop patience."
        )


def _describe(objective: Any) -> str:
    """An objective's type and settings, to recognise it by; not Pyro's switches, nor what it found out by running."""
    common = (vars(pyro.infer.Trace_ELBO()).keys() - {"num_particles"}) | {"step"}
    settings = [
        f"{name}={getattr(value, '__qualname__', None) or repr(value)}"
        for name, value in sorted(vars(objective).items())
        if name not in common
        and name != "name"
        and (isinstance(value, bool | int | float | str | tuple) or callable(value))
        and not name.startswith("_")
    ]
    return f"{type(objective).__name__}({', '.join(settings)})"
