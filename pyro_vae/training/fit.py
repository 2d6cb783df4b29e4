"""`fit`: trains any Pyro model and guide by minibatches; the place of its arguments, and of the optimiser."""

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from pyro_vae.checks import Count, Seed
from pyro_vae.compiled.function import Compiled, OnCompile
from pyro_vae.compiled.step import CompiledStep
from pyro_vae.devices import memory_for
from pyro_vae.engine.arguments import takes_program
from pyro_vae.engine.first_run import placed, refusal
from pyro_vae.engine.minibatches import Minibatches
from pyro_vae.engine.modules import PyroFunction
from pyro_vae.engine.parameters import require_parameters, store_as_it_is
from pyro_vae.engine.program import Program
from pyro_vae.engine.row_parameters import check_row_parameters, trial
from pyro_vae.engine.rows import Rows, find_rows
from pyro_vae.engine.sites import Sites, particle_dim_of, plates, size_of
from pyro_vae.engine.traces import sample_sites
from pyro_vae.errors import NotWrittenError, PyroVAEError, require_count
from pyro_vae.files import one_writer
from pyro_vae.objectives import Objective
from pyro_vae.signals import name_of, taken_for_ctrl_c
from pyro_vae.training import checkpoint as checkpoints
from pyro_vae.training import learning_rates, schedule_values
from pyro_vae.training.data_support import DataSupport
from pyro_vae.training.fingerprint import Fingerprint
from pyro_vae.training.loop import Loop
from pyro_vae.training.scales import Fitted, Scales, joined, likelihoods_in


@takes_program
def fit(
    model: PyroFunction,
    guide: PyroFunction,
    data: Any,
    objective: Any,
    *,
    epochs: Count,
    batch_size: int | None = None,
    lr: float = 1e-3,
    lr_scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
    validation: Any = None,
    patience: int | None = None,
    compile: bool = False,
    checkpoint: str | Path | None = None,
    seed: Seed | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    r"""Maximise an objective over the parameters of a Pyro model and guide, with Adam, by minibatches.

    Each step follows the gradient of the minibatch's mean bound, :math:`\frac1B \sum_n \mathcal L(x_n)`.

    Arguments:
        model: a Pyro model, called with each minibatch; or a pair, or a tuple ``(model, guide)``, in place of both.
        guide: its guide, called with the same arguments.
        data: a tensor (N, ...), a split of :mod:`pyro_vae.data`, or an array that gives rows: NumPy's, also
            memory-mapped, Zarr's, HDF5's, or a csr matrix such as AnnData's ``.X``. Or a tuple of these with one
            length, for several arguments, or a dictionary, for arguments by name. Or any ``DataLoader`` of tensors,
            tuples or dictionaries; :func:`pyro_vae.data.collate` leaves labels out. Rows of arrays become tensors, and
            those in files are read, by minibatch. Minibatches are moved to the device of the parameters, if all are on
            one.
        objective: the bound, such as :class:`pyro_vae.ELBO`, or any ``pyro.infer.ELBO`` with a differentiable loss.
        epochs: the total number of passes over the data, those in the checkpoint included.
        batch_size: data in a minibatch, by default 128. A ``DataLoader`` has its own.
        lr: Adam's step size.
        lr_scheduler: a function from the optimiser to one of ``torch.optim.lr_scheduler``, such as
            ``lambda optimizer: CosineAnnealingLR(optimizer, T_max=epochs)``. It takes a step after each epoch;
            ``ReduceLROnPlateau`` is given minus the validation bound.
        validation: held-out data, of the same kinds. Their bound is measured after each epoch, with the same noise
            each time, and leaves the random numbers of training as they are.
        patience: stop when the validation bound has not risen for so many epochs. Parameters and buffers are then those
            of the best epoch, also if all epochs ran. The best epoch is the first with the highest validation bound.
        compile: whether steps run as compiled code; see :func:`compile_step`. Each size of minibatch takes 4 to 20 s to
            compile at its first step. In a terminal, `fit` says after how many steps that pays off. The result differs
            by rounding.
        checkpoint: a file to write after each epoch. If it exists, training goes on from it, and ends bit for bit where
            an unbroken training ends (batch norm: see below). `epochs`, the number of `patience` and `progress` may
            change, and the device. All else must be the same and is compared: the settings, the program, the data and
            validation data, the values of schedules. With `patience`, the file also holds the best epoch's parameters,
            and :func:`load_parameters` takes those.
        seed: seeds the random number generators for minibatches and samples; None leaves their state. Networks draw
            their initial weights before `fit`: call ``pyro.set_rng_seed`` before you build them too.
        progress: whether to show a progress bar, in a terminal.

    A parameter that the first minibatch does not use, such as a classifier of labelled rows, is trained from the first
    minibatch on that uses it. With `compile` it is refused.

    While a schedule (:mod:`pyro_vae.schedules`) changes the objective, bounds of different epochs are not comparable:
    `patience` and ``ReduceLROnPlateau`` start anew at each epoch.

    A learned scale of a likelihood, ``scale="learned"`` or ``"per_column"``, starts at that of the residuals, and
    follows them in closed form up to step 1 / lr, as :func:`fit_scale` says; then by its gradient.

    The checkpoint has the program's parameters, and the buffers, such as batch norm's statistics, of the modules that
    model and guide are, or are methods of. Validation puts these modules into evaluation mode.

    Programs are compared by the log-density of each site on the first rows of the data, which the file holds, and at
    fixed latents. For that the program runs two more times after each epoch, in evaluation mode, and leaves the random
    numbers of training as they are. Log-densities may differ by half of their digits, since processors round
    differently. What depends on other noise, such as dropout that is always on, is not compared. Data are compared by
    their number and by sums of blocks of rows. Of an array in a file, your own data set, or a stream, the number is
    compared, and the first minibatch if two epochs began with the same one.

    Returns:
        A table with a row for each ``epoch``: ``train_bound`` and ``validation_bound`` (NaN without validation data),
        the mean bound per datum in nats, times the program's own scale, if it has one; ``seconds``, with the time to
        compile; with a scheduler also ``lr``, the step size in that epoch. Ctrl-C ends training with a warning and
        returns the finished epochs. The parameters are then those of the last step, also with `patience`.

    Raises:
        ValueError: an argument is out of range; data have unequal lengths, are empty or hold NaN; there is no parameter
            to train; a parameter has a value for each row of a minibatch, where rows are shuffled; `patience` or
            ``ReduceLROnPlateau`` has no validation data; the scheduler belongs to another optimiser; the checkpoint
            can't be read, or belongs to another program, other data or other settings; data are outside the support of
            the site that observes them; another thread runs a program meanwhile. With `compile`: the program can't be
            compiled.
        FloatingPointError: the loss or a parameter is NaN or infinite; the checkpoint is that of the epoch before.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.mlp_vae((5,), latent_dim=2, hidden_dims=(16,), likelihood="gaussian")
        >>> history = pv.fit(vae, torch.randn(64, 5), pv.ELBO(), epochs=2, batch_size=32)
        >>> list(history.columns)
        ['train_bound', 'validation_bound', 'seconds']
        >>> decay = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        >>> pv.fit(vae, torch.randn(64, 5), pv.ELBO(), epochs=3, lr_scheduler=decay).lr.tolist()
        [0.001, 0.0005, 0.00025]

    References:
        Kingma and Ba (2015), *Adam: A Method for Stochastic Optimization*, ICLR.
    """
    if not 0 < lr <= torch.finfo(torch.float32).max:
        raise PyroVAEError(f"expected lr to be positive and finite, got {lr!r}. Try 1e-3.")
    lr = float(lr)  # NumPy's numbers could not be read back from a checkpoint
    if not torch.is_grad_enabled():
        raise PyroVAEError(
            "training needs gradients: expected a call outside of torch.no_grad() and torch.inference_mode(), got one "
            "inside. Call pv.fit before."
        )
    batches = Minibatches(data, batch_size, "data", model, guide)
    held_out = None if validation is None else Minibatches(validation, batch_size, "validation", model, guide)
    if held_out is not None and held_out.steps == 0:
        held_out = None
    if patience is not None:
        require_count("patience", patience, "None never stops early.", why=", a number of epochs")
        if held_out is None:
            raise PyroVAEError(
                "patience counts epochs without a higher validation bound: expected validation data with it, got none. "
                "Pass validation=..., or drop patience."
            )
    if seed is not None and not (checkpoint and Path(checkpoint).exists()):
        pyro.set_rng_seed(seed)

    if isinstance(objective, type) or not hasattr(objective, "differentiable_loss"):
        raise PyroVAEError(f"expected an objective with a differentiable loss, such as pv.ELBO(), got {objective!r}.")
    put_back = store_as_it_is()
    with _memory(objective, batches):
        program, found = placed(Program(model, guide, batches.example()), lambda it: _first_run(it, objective, batches))
    parameters, model_sites, likelihoods, rows_of = found
    batches.device = program.device
    if batches.ends_in_one_row:  # batch norm fails on it, after an epoch's work
        program.on(batches.of_one(batches.example())).trace(training=True)
    support = DataSupport(program, model_sites)
    if held_out is not None:
        held_out.device = program.device
        _check_columns(model, held_out)
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
    if isinstance(getattr(objective, "step", None), int):
        objective.step = 0
    fingerprint = None
    if checkpoint:
        schedules = schedule_values.scheduled_values(objective, batches.steps, epochs)
        schedules |= {"lr": schedule_values.learning_rates(scheduler, epochs)}
        fingerprint = Fingerprint.of(program, parameters, batches, held_out, schedules)
    loop = Loop(
        program,
        objective,
        batches,
        held_out,
        parameters,
        optimizer,
        scheduler,
        patience,
        checkpoint,
        settings,
        support,
        rows_of,
        Scales(program, objective, likelihoods, lr),
        fingerprint,
    )
    alone = one_writer(checkpoint, "training into") if checkpoint else nullcontext()
    with taken_for_ctrl_c(then_obeyed=True) as received, alone:
        if checkpoint and Path(checkpoint).exists():
            try:
                loop.resume(checkpoint, epochs)
            except Exception:
                put_back()
                raise
        elif checkpoint and scheduler is not None:
            checkpoints.check_readable("lr_scheduler", scheduler.state_dict())

        bar = tqdm(total=batches.steps and epochs * batches.steps, disable=None if progress else True, unit="step")
        bar.update(len(loop.rows) * (batches.steps or 0))
        if compile:
            loop.compiled = CompiledStep(
                model, guide, objective, optimizer, own=parameters, rows=rows_of, on_compile=_teller(bar, batches)
            )
        try:
            with _flushing_denormals(), _memory(objective, batches):
                while len(loop.rows) < epochs and not checkpoints.stalled(len(loop.rows), loop.best, patience):
                    bar.set_description(f"epoch {len(loop.rows) + 1}/{epochs}")
                    loop.train_epoch(bar)
            loop.restore_best()
            loop.scales.at_end()
        except KeyboardInterrupt:
            best = f", not those of the best epoch, {loop.best['epoch']}" if loop.best else ""
            kept = f"; the checkpoint {checkpoint} holds epoch {len(loop.rows)}" if checkpoint and loop.rows else ""
            warnings.warn(
                f"training stopped by {name_of(received)} in epoch {loop.epoch}, step {loop.step}: the parameters are "
                f"those of the last step{best}{kept}.",
                stacklevel=3,
            )
        except NotWrittenError as error:
            error.history = loop.history()
            raise
        finally:
            bar.close()
    return loop.history()


def _memory(objective: Any, batches: Minibatches) -> AbstractContextManager[None]:
    """Says beside an error of memory what to make smaller."""
    names = [name for name in ("chunk_size", "num_particles") if getattr(objective, "num_particles", 1) > 1]
    settings = {"batch_size": batches.batch_size} | {n: getattr(objective, n) for n in names if hasattr(objective, n)}
    given = ", ".join(f"{name} (now {value})" for name, value in settings.items())
    return memory_for("training", f"Pass a smaller {given}.")


def _first_run(
    program: Program, objective: Any, batches: Minibatches
) -> tuple[dict[str, Tensor], Sites, list[Fitted], Rows]:
    """Run the program once; return its parameters, the model's sites, its likelihoods, and what counts its data."""
    with likelihoods_in() as matched:
        traces = program.trace()
    sites = [sample_sites(trace, latent=False) for trace in traces]
    cut = len(program.args[0]) if batches.cuts_rows else None
    rows_of = find_rows(program, sites[0], cut)
    if batches.steps != 1:
        _check_minibatches(sites[0], rows_of.number)
        other = batches.of_one(program.args) if cut not in (None, 1, rows_of.number) and not rows_of.full else None
        if other is not None and not rows_of.follows(other):
            raise PyroVAEError(
                f"minibatches are {cut} rows of the data's first dimension, and plate "
                f"'{getattr(rows_of.plate, 'name', None)}' has {rows_of.number} rows in each of them: expected "
                "minibatches that add up to the data. Pass the data along the first dimension (x.T, say), or "
                "batch_size=N."
            )
        if isinstance(objective, Objective) and objective.needs().per_datum:
            _check_outermost(sites, rows_of)
    if isinstance(objective, Objective):  # before other runs, since a flow keeps the history of its last draw alone
        needs, nesting = objective.needs(), -particle_dim_of(*sites) - 1
        objective.remember(replace(program, needs=needs, nesting=nesting), traces)
    if batches.moves_rows:
        check_row_parameters(program, trial(program, rows_of.number))
    # The optimiser's state in a checkpoint has the parameters by their order.
    return dict(sorted(require_parameters(*traces).items())), sites[0], joined(matched(sites[0])), rows_of


def _check_minibatches(model: Sites, size: int) -> None:
    """Refuse a program with a term outside the data's plate, which would count once for each minibatch."""
    frames = {name: site["cond_indep_stack"] for name, site in model.items()}
    if any(frame.full_size != frame.size for stack in frames.values() for frame in stack):
        return  # scaled to all data: each minibatch's loss estimates the whole
    for name, stack in frames.items():
        if size not in [size_of(plate, model[name]) for plate in stack]:
            raise PyroVAEError(
                f"expected a program whose minibatches add up to the data, got model site '{name}' outside the data's "
                f"plate of size {size}: its term would count once for each minibatch. Move it inside; or give the "
                "plate the size of all data, pyro.plate('data', N, subsample_size=len(x)); or pass batch_size=N."
            )


def _check_outermost(sites: list[Sites], rows: Rows) -> None:
    """Refuse a program whose minibatches are cut from another plate than the outermost, whose rows are bounded."""
    stacks = [plates(site) for group in sites for site in group.values()]
    if not stacks:  # the first step refuses a program without sites
        return
    first, *others = stacks
    outermost = next((plate for plate in first if all(plate in stack for stack in others)), None)
    if outermost and rows.plate and outermost.name != rows.plate.name:
        raise PyroVAEError(
            f"the outermost plate '{outermost.name}' has {outermost.size} rows, and minibatches are cut from the "
            f"{rows.number} rows of plate '{rows.plate.name}': expected the data's plate to be the outermost one, "
            f"whose rows have log-weights of their own. Enter it first: pyro.plate('{rows.plate.name}', ..., dim=-2)."
        )


def _check_columns(model: PyroFunction, held_out: Minibatches) -> None:
    """Refuse validation data that the model does not take as its arguments."""
    if held_out.loader is None:
        error = refusal(model, held_out.example())
        if error is not None:
            raise PyroVAEError(
                "expected validation data that the model takes as its arguments, got a tuple of "
                f"{len(held_out.columns)} ({error}). Pass validation data of the form of the training data."
            ) from error


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


def _teller(bar: Any, batches: Minibatches) -> OnCompile | None:
    """Shows beside the progress bar that a step is being compiled, and when that pays off; None without a bar."""
    if bar.disable:
        return None
    first = True

    def tell(compiled: Compiled | None) -> None:
        nonlocal first
        bar.set_postfix_str("compiling ..." if compiled is None else "")
        if compiled is None:
            return
        line, now, before = f"compiled in {compiled.seconds:.1f} s", compiled.compiled_seconds, compiled.eager_seconds
        if first and before is not None and now is not None:
            steps = compiled.seconds / (before - now) if before > now else math.inf
            epochs = f", {steps / batches.steps:,.1f} epochs" if batches.steps else ""
            pays = f"pays off after {steps:,.0f} steps{epochs}" if before > now else "never pays off"
            line += f": a step takes {1e3 * now:.3g} ms in place of {1e3 * before:.3g}, which {pays}"
        else:
            line += " for a minibatch of another size"
        first = False
        bar.write(line, file=sys.stderr)

    return tell


@contextmanager
def _flushing_denormals() -> Iterator[None]:
    """Inside, denormal numbers are zero: arithmetic with them is slow, and an optimiser's moments become so small."""
    smallest = torch.tensor(torch.finfo(torch.float64).tiny, dtype=torch.float64)
    was_on = not bool(smallest / 2 > 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(was_on)
