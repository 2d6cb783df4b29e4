"""`fit`: trains any Pyro model and guide by minibatches; the place of its arguments."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch.optim.lr_scheduler import LRScheduler

from pyro_vae.checks import Count, Seed
from pyro_vae.compiled.step import CompiledStep
from pyro_vae.distributed import group_of
from pyro_vae.engine.arguments import takes_program
from pyro_vae.engine.bars import progress_bar
from pyro_vae.engine.modules import PyroFunction
from pyro_vae.engine.parameters import store_as_it_is
from pyro_vae.errors import CallbackError, NotWrittenError
from pyro_vae.files import one_writer
from pyro_vae.signals import name_of, taken_for_ctrl_c
from pyro_vae.training import checkpoint as checkpoints
from pyro_vae.training import optimizers, resuming, surroundings
from pyro_vae.training.calling import Callback
from pyro_vae.training.setup import Asked, prepared


@takes_program
def fit(
    model: PyroFunction,
    guide: PyroFunction,
    data: Any,
    objective: Any,
    *,
    epochs: Count | None = None,
    steps: Count | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    optimizer: optimizers.Maker | None = None,
    lr_scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
    scheduler_every: Literal["epoch", "step"] = "epoch",
    clip_norm: float | None = None,
    accumulate: Count = 1,
    weights: Any = None,
    validation: Any = None,
    patience: int | None = None,
    callbacks: Callback | Sequence[Callback] = (),
    device: str | torch.device | None = None,
    precision: str | None = None,
    compile: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | timedelta | None = None,
    seed: Seed | None = None,
    progress: bool = True,
    distributed: bool | None = None,
) -> pd.DataFrame:
    r"""Maximise an objective over the parameters of a Pyro model and guide, by minibatches.

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
        steps: the total number of steps of the optimiser, in place of `epochs`. The last epoch may be a part of one.
        batch_size: data in a minibatch, by default 128. A ``DataLoader`` has its own.
        lr: the step size of Adam, the default optimiser; 1e-3 if it is None.
        optimizer: a function from the parameters to an optimiser of ``torch.optim``, such as
            ``lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-2)``. If its argument is called
            ``named_parameters``, it gets pairs of name and parameter, to make groups. Parameters that it leaves out
            stay as they are.
        lr_scheduler: a function from the optimiser to one of ``torch.optim.lr_scheduler``, such as
            ``lambda optimizer: CosineAnnealingLR(optimizer, T_max=epochs)``. ``ReduceLROnPlateau`` is given minus the
            validation bound.
        scheduler_every: whether the scheduler takes a step after each ``"epoch"``, or after each ``"step"``.
        clip_norm: scale each step's gradient, of the mean bound, to at most this Euclidean norm.
        accumulate: how many minibatches a step adds up. The gradient is the mean over all their data, also where their
            sizes differ; the last step of an epoch may have fewer. Schedules of the objective count minibatches. Free
            bits, the baseline of ``"score"`` and batch norm stay those of each minibatch.
        weights: a number for each datum, at least 0, as the scale of its bound. The gradient is that of the mean
            :math:`\sum_n w_n \mathcal L(x_n) / \sum_n w_n` over the data of a step, for every objective, and
            ``train_bound`` is that of the epoch. So a minibatch should hold many data.
            Validation has no weights. The baseline of ``"score"`` and batch norm take no notice of them; free bits are
            refused.
        validation: held-out data, of the same kinds. Their bound is measured after each epoch, with the same noise
            each time, and leaves the random numbers of training as they are.
        patience: stop when the validation bound has not risen for so many epochs. Parameters and buffers are then those
            of the best epoch, also if all epochs ran. The best epoch is the first with the highest validation bound,
            among whole epochs.
        callbacks: what to call at each step and epoch: :class:`Callback` objects, such as those of
            :mod:`pyro_vae.callbacks`.
        device: where to train, such as ``"cuda"``: moves the program's modules and parameters there, and each
            minibatch. None leaves the program where it is.
        precision: ``"bf16"`` runs the networks' layers in bfloat16, by autocast; all else is in float32, such as
            samples, densities and the bound. None runs all in the program's own type.
        compile: whether steps run as compiled code; see :func:`compile_step`. Each size of minibatch takes 4 to 20 s to
            compile at its first step. In a terminal, `fit` says after how many steps that pays off. The result differs
            by rounding.
        checkpoint: a file to write after each epoch. If it exists, training goes on from it, and ends bit for bit where
            an unbroken training ends (batch norm: see below). `epochs`, the number of `patience` and `progress` may
            change, and the device. All else must be the same and is compared: the settings, the program, the data and
            validation data, the values of schedules. With `patience`, the file also holds the best epoch's parameters,
            and :func:`load_parameters` takes those.
        checkpoint_every: write the checkpoint also inside of epochs, after so many steps, or so much time
            (``datetime.timedelta(minutes=10)``). Training then goes on in the middle of the epoch, bit for bit too. A
            ``DataLoader`` reads the epoch's first minibatches again for that; a stream that can't begin again is
            refused.
        seed: seeds the random number generators for minibatches and samples; None leaves their state. Networks draw
            their initial weights before `fit`: call ``pyro.set_rng_seed`` before you build them too.
        progress: whether to show a progress bar, in a terminal, with the bound and the KL. At the end, a line says what
            was still moving: the bound, the KL or a learned scale. Another one says why a callback has ended it.
        distributed: whether several processes train together, see below. None: they do if there is a process group of
            ``torch.distributed``, or if ``torchrun`` has started this program. False trains in this process alone.

    A parameter that the first minibatch does not use, such as a classifier of labelled rows, is trained from the first
    minibatch on that uses it. With `compile` it is refused.

    **Several processes.** Under ``torchrun --nproc-per-node 4 train.py``, each process is a rank and makes the same
    call. All start with rank 0's parameters. Each rank has a share of every minibatch, of `batch_size` data in all;
    a ``DataLoader`` is each rank's own, with data of its own. A step follows the gradient of the mean over the data of
    all ranks, also where shares differ in size. Samples have other noise on each rank. Rank 0 writes the checkpoint and
    calls the callbacks. The history is the same on all ranks. Ctrl-C is raised again, since ranks may be at other
    steps.

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
        compile; with a scheduler also ``lr``, the step size in that epoch. Its ``attrs["stopped"]`` is the reason of a
        callback that ended the training, or None. Ctrl-C ends training with a warning and returns the finished epochs.
        The parameters are then those of the last step, also with `patience`.

    Raises:
        ValueError: an argument is out of range; both or none of `epochs` and `steps`; the optimiser is of other
            parameters, or runs the loss several times; the machine has no such device; data have unequal lengths, are
            empty or hold NaN; there is no parameter to train; a parameter has a value for each row of a minibatch,
            where rows are shuffled; `patience` or ``ReduceLROnPlateau`` has no validation data; the scheduler belongs
            to another optimiser; the checkpoint can't be read, or belongs to another program, other data or other
            settings; data are outside the support of the site that observes them; another thread runs a program
            meanwhile. With `compile`: the program can't be compiled.
        OtherRankError: another rank has failed, or does not make this call.
        CallbackError: a callback has failed. Its ``history`` has the finished epochs, and the checkpoint the last step.
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
        >>> adamw = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-2)
        >>> history = pv.fit(vae, torch.randn(64, 5), pv.ELBO(), steps=3, optimizer=adamw, clip_norm=10.0)

    References:
        Kingma and Ba (2015), *Adam: A Method for Stochastic Optimization*, ICLR.
    """
    group = group_of(distributed, "pv.fit")
    asked = Asked(
        model,
        guide,
        data,
        objective,
        epochs,
        steps,
        batch_size,
        lr,
        optimizer,
        lr_scheduler,
        scheduler_every,
        clip_norm,
        accumulate,
        weights,
        validation,
        patience,
        callbacks,
        device,
        precision,
        compile,
        checkpoint,
        checkpoint_every,
        seed,
    )
    put_back = store_as_it_is()
    loop, going_on = prepared(asked, group)
    ranks, batches, called = loop.ranks, loop.batches, loop.callbacks
    alone = one_writer(checkpoint, "training into") if checkpoint and ranks.is_first else nullcontext()
    with taken_for_ctrl_c(then_obeyed=True) as received, ranks.entering(alone):
        if checkpoint and going_on:
            try:
                resuming.resume(loop, checkpoint)
            except Exception:
                put_back()
                raise
        elif checkpoint:
            checkpoints.check_readable("optimizer", loop.optimizer.state_dict())
            if loop.scheduler is not None:
                checkpoints.check_readable("lr_scheduler", loop.scheduler.state_dict())

        total = batches.steps and epochs * batches.steps if steps is None and epochs else steps and steps * accumulate
        bar = progress_bar(progress and ranks.is_first, total=total, unit="step")
        bar.update(loop.minibatches)
        loop.with_parts = any(ranks.gather(bool(called) or not bar.disable))
        if compile:
            loop.compiled = CompiledStep(
                loop.program.model,
                loop.program.guide_or_prior,
                objective,
                loop.optimizer,
                own=loop.parameters,
                rows=loop.rows_of,
                on_compile=surroundings.teller(bar, batches),
                with_parts=loop.with_parts,
            )
        try:
            ranks.attempt(called.start, loop)
            if checkpoint:
                ranks.attempt(checkpoints.check_readable, "callbacks", called.state())
            ranks.settle()
            loop.stopped = ranks.any_of(loop.asked)
            with surroundings.flushing_denormals(), surroundings.memory_of(objective, batches):
                while not loop.ended:
                    bar.set_description(f"epoch {loop.epoch}" + (f"/{epochs}" if epochs else ""))
                    loop.train_epoch(bar)
            loop.finish()
            surroundings.tell_end(bar, loop.moves, loop.steps, loop.stopped)
        except KeyboardInterrupt:
            best = f", not those of the best epoch, {loop.best['epoch']}" if loop.best else ""
            kept = f"; the checkpoint {checkpoint} holds {loop.saved}" if checkpoint and loop.saved else ""
            warnings.warn(
                f"training stopped by {name_of(received)} in epoch {loop.epoch}, step {loop.step}: the parameters are "
                f"those of the last step{best}{kept}.",
                stacklevel=3,
            )
            if group is not None:  # the others may be at another step
                raise
        except CallbackError as error:
            error.history = loop.history()
            try:
                loop.keep_last_step()
            except (NotWrittenError, CallbackError) as another:  # a full disk, or the same callback's state
                error.add_note(str(another))
            raise
        except NotWrittenError as error:
            error.history = loop.history()
            raise
        finally:
            called.ending.close()
            bar.close()
    return loop.history()
