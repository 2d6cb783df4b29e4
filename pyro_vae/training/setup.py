"""What `fit` does before its first step: check what it is given, look at the program, and make the loop."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyro
import torch
from torch.optim.lr_scheduler import LRScheduler

from pyro_vae.distributed import Group
from pyro_vae.engine.first_run import placed
from pyro_vae.engine.minibatches import Minibatches
from pyro_vae.engine.modules import PyroFunction
from pyro_vae.engine.program import Program
from pyro_vae.errors import PyroVAEError, require_count
from pyro_vae.training import agreeing, learning_rates, optimizers, schedule_values, surroundings, weighing
from pyro_vae.training.calling import Callback, Callbacks
from pyro_vae.training.data_support import DataSupport
from pyro_vae.training.fingerprint import Fingerprint
from pyro_vae.training.first_run import check_columns, first_run
from pyro_vae.training.loop import Loop
from pyro_vae.training.ranks import Ranks
from pyro_vae.training.resuming import Limits
from pyro_vae.training.scales import Scales


@dataclass(frozen=True)
class Asked:
    """The arguments of :func:`pyro_vae.fit`."""

    model: PyroFunction
    guide: PyroFunction
    data: Any
    objective: Any
    epochs: int | None
    steps: int | None
    batch_size: int | None
    lr: float | None
    optimizer: optimizers.Maker | None
    lr_scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None
    scheduler_every: str
    clip_norm: float | None
    accumulate: int
    weights: Any
    validation: Any
    patience: int | None
    callbacks: Callback | Sequence[Callback]
    device: str | torch.device | None
    precision: str | None
    compile: bool
    checkpoint: str | Path | None
    checkpoint_every: int | timedelta | None
    seed: int | None

    def planned_epochs(self, batches: Minibatches) -> int:
        """How many epochs there will be at most; of a stream, as many as schedules are compared for."""
        if self.epochs is not None:
            return self.epochs
        each = math.ceil(batches.steps / self.accumulate) if batches.steps else 0
        return math.ceil((self.steps or 0) / each) if each else schedule_values.MOST_EPOCHS


def prepared(asked: Asked, group: Group | None) -> tuple[Loop, bool]:
    """The loop before its first step, and whether a checkpoint is there to go on from."""
    ranks, checkpoint = Ranks(group), asked.checkpoint
    going_on = ranks.first_does(lambda: bool(checkpoint) and Path(str(checkpoint)).exists())
    with ranks.together():
        loop = _local(asked, ranks, going_on)
    if group is not None:
        agreeing.agree(group, loop, asked)
    return loop, going_on


def _local(asked: Asked, ranks: Ranks, going_on: bool) -> Loop:
    """The loop of this process."""
    making, called = optimizers.Making(asked.optimizer, asked.lr), Callbacks(asked.callbacks)
    if not ranks.is_first:
        called.keep_those_on_all_ranks()
    optimizers.check_clip(asked.clip_norm)
    if (asked.epochs is None) == (asked.steps is None):
        got = "none" if asked.epochs is None else f"epochs={asked.epochs} and steps={asked.steps}"
        raise PyroVAEError(f"expected one of epochs and steps, got {got}. Pass epochs=10, say.")
    _check_every(asked.checkpoint_every, asked.checkpoint)
    there = None if asked.device is None else surroundings.device_of(asked.device)
    if not torch.is_grad_enabled():
        raise PyroVAEError(
            "training needs gradients: expected a call outside of torch.no_grad() and torch.inference_mode(), got one "
            "inside. Call pv.fit before."
        )
    model, guide, objective = asked.model, asked.guide, asked.objective
    batches = Minibatches(asked.data, asked.batch_size, "data", model, guide)
    batches.share = ranks.share
    held_out = None
    if asked.validation is not None:
        held_out = Minibatches(asked.validation, asked.batch_size, "validation", model, guide)
        held_out = None if held_out.steps == 0 else held_out
    if asked.patience is not None:
        require_count("patience", asked.patience, "None never stops early.", why=", a number of epochs")
        if held_out is None:
            raise PyroVAEError(
                "patience counts epochs without a higher validation bound: expected validation data with it, got none. "
                "Pass validation=..., or drop patience."
            )
    if asked.seed is not None and not going_on:
        pyro.set_rng_seed(asked.seed)
    shuffles = batches.loader is None and batches.steps != 1
    drawn = asked.seed is None and (shuffles or ranks.group is not None)  # only then, since it moves the generator
    key = int(torch.randint(2**62, ())) if drawn else asked.seed or 0

    if isinstance(objective, type) or not hasattr(objective, "differentiable_loss"):
        raise PyroVAEError(f"expected an objective with a differentiable loss, such as pv.ELBO(), got {objective!r}.")
    of_data = weighing.check(asked.weights, batches, objective)
    with surroundings.memory_of(objective, batches):
        program = Program(model, guide, batches.example())
        if there is not None:
            program = surroundings.moved_to(there, program)
        program, found = placed(program, lambda it: first_run(it, objective, batches))
    parameters, model_sites, likelihoods, rows_of = found
    unweighed = program, rows_of
    if of_data is not None:
        program, rows_of = weighing.weighed(program, rows_of, batches, of_data)
        program.trace()  # refuses a program with sites outside of the plate
    batches.device = program.device
    own_device = program.device or next(iter(parameters.values())).device
    context = surroundings.precision_on(own_device, asked.precision)
    if asked.checkpoint_every is not None and not batches.begins_again:
        raise PyroVAEError(
            "checkpoint_every goes on in the middle of an epoch: expected a DataLoader that begins again with the same "
            "minibatches, got a stream that does not. Drop checkpoint_every, or use a data set with a length."
        )
    if batches.ends_in_one_row:  # batch norm fails on it, after an epoch's work
        program.on(batches.of_one(batches.example())).trace(training=True)
    support = DataSupport(program, model_sites)
    if held_out is not None:
        held_out.device = program.device
        check_columns(model, held_out)
    made = making(parameters)
    described = making.describe(made)  # before a scheduler adds to its settings
    by_step = asked.scheduler_every == "step"
    scheduler = None
    if asked.lr_scheduler is not None:
        scheduler = learning_rates.make(asked.lr_scheduler, made, held_out is not None, by_step=by_step)
    settings = {
        "objective": _describe(objective),
        "batch_size": batches.batch_size,
        "lr": making.lr,
        "optimizer": described,
        "lr_scheduler": scheduler and learning_rates.describe(scheduler),
        "scheduler_every": asked.scheduler_every,
        "clip_norm": None if asked.clip_norm is None else float(asked.clip_norm),
        "accumulate": asked.accumulate,
        "precision": asked.precision,
        "seed": asked.seed,
        "N": batches.size,
        "compile": asked.compile,
    }
    if isinstance(getattr(objective, "step", None), int):
        objective.step = 0
    fingerprint = None
    if asked.checkpoint and ranks.is_first:
        planned = asked.planned_epochs(batches)
        schedules = schedule_values.scheduled_values(objective, batches.steps, planned)
        of_lr = (asked.steps or planned) if by_step else planned
        schedules |= {"lr": schedule_values.learning_rates(scheduler, of_lr)}
        fingerprint = Fingerprint.of(program, parameters, batches, held_out, schedules)
    epochs, steps = (math.inf if each is None else each for each in (asked.epochs, asked.steps))
    return Loop(
        program,
        objective,
        batches,
        held_out,
        parameters,
        making,
        made,
        scheduler,
        Limits(epochs, steps, asked.patience),
        asked.checkpoint,
        settings,
        support,
        rows_of,
        Scales(program, objective, likelihoods, optimizers.own_lr_of(made), rows_of.number),
        fingerprint,
        called,
        unweighed,
        ranks,
        key,
        by_step,
        asked.clip_norm,
        asked.accumulate,
        asked.checkpoint_every,
        context,
    )


def _check_every(every: int | timedelta | None, checkpoint: Any) -> None:
    if every is None:
        return
    if isinstance(every, timedelta):
        if every <= timedelta(0):
            raise PyroVAEError(f"expected checkpoint_every to be a positive time, got {every}. Pass minutes=10, say.")
    else:
        require_count("checkpoint_every", every, why=" of steps, or a datetime.timedelta")
    if not checkpoint:
        raise PyroVAEError("expected a checkpoint with checkpoint_every, got none. Pass checkpoint='run.pt', say.")


def _describe(objective: Any) -> str:
    """An objective's type and settings, by which a checkpoint recognises it; without Pyro's switches."""
    left_out = (vars(pyro.infer.Trace_ELBO()).keys() - {"num_particles"}) | {"step", "name"}
    settings = [
        f"{name}={getattr(value, '__qualname__', None) or repr(value)}"
        for name, value in sorted(vars(objective).items())
        if name not in left_out and not name.startswith("_")
        if isinstance(value, bool | int | float | str | tuple) or callable(value)
    ]
    return f"{type(objective).__name__}({', '.join(settings)})"
