"""Trains any Pyro model and guide: one loop, one optimiser, a checkpoint after each epoch."""

from __future__ import annotations

import copy
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_vae import checkpoint as checkpoints
from pyro_vae import rng
from pyro_vae.agreement import interval, masks, plain, support_of, validates
from pyro_vae.compilation import Compiled, CompiledStep, OnCompile
from pyro_vae.minibatches import Minibatches
from pyro_vae.modules import Program, buffers, evaluating, find_modules
from pyro_vae.runs import require_parameters, sample_sites, trace_once


def fit(
    model: Program,
    guide: Program,
    data: Any,
    objective: Any,
    *,
    epochs: int,
    batch_size: int | None = None,
    lr: float = 1e-3,
    validation: Any = None,
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
        validation: data held out, of the same kinds; its bound is measured after each epoch, with the same noise
            each time and without touching the training's random numbers.
        compile: whether steps run as compiled code, as :func:`compile_step` says. Each size of minibatch takes 4 to 20 s to
            compile when it first comes; in a terminal, `fit` says after how many steps that will have paid off. The result
            differs by rounding.
        checkpoint: a file to write after each epoch. If it is there already, training goes on from it and ends,
            bit for bit, where it would have ended unbroken (batch norm: see below).
        seed: starts the random generators for minibatches and samples; None goes on from where they are. Initial
            weights come before `fit`: call ``pyro.set_rng_seed`` before building the networks too.
        progress: whether to show a progress bar, in a terminal.

    The checkpoint has the program's parameters, and the buffers (batch norm's statistics) of modules that model or
    guide is, or is a method of; these are also what validation puts into evaluation mode.

    Returns:
        A table with a row for each ``epoch``: ``train_bound`` and ``validation_bound`` (NaN without such data), the
        mean bound per datum in nats, times the program's own scale if it has one, and ``seconds``, compilation included. Ctrl-C ends
        training with a warning and returns the epochs so far; the parameters keep what was learned.

    Raises:
        ValueError: an argument out of range, data of unequal lengths, empty or with NaN, no parameters to train, or a
            checkpoint that can't be read or that belongs to another program or other settings; with `compile`, data outside
            their support, or a program that can't be traced.
        FloatingPointError: the loss or a parameter became NaN or infinite; the checkpoint is of the epoch before.

    Example:
        >>> import torch, pyro, pyro_vae as pv
        >>> pyro.set_rng_seed(0)
        >>> vae = pv.mlp_vae((5,), latent_dim=2, hidden_dims=(16,), likelihood="gaussian")
        >>> history = pv.fit(vae.model, vae.guide, torch.randn(64, 5), pv.ELBO(), epochs=2, batch_size=32)
        >>> list(history.columns)
        ['train_bound', 'validation_bound', 'seconds']

    References:
        Kingma and Ba (2015), *Adam: A Method for Stochastic Optimization*, ICLR.
    """
    if not isinstance(epochs, int) or epochs < 1 or not (0 < lr < math.inf):
        raise ValueError(f"expected epochs to be a positive integer and lr positive, got {epochs!r} and {lr!r}.")
    batches = Minibatches(data, batch_size, "data")
    held_out = None if validation is None else Minibatches(validation, batch_size, "validation")
    if held_out is not None and not held_out.has_data():
        held_out = None
    if seed is not None and not (checkpoint and Path(checkpoint).exists()):
        pyro.set_rng_seed(seed)

    if isinstance(objective, type) or not hasattr(objective, "differentiable_loss"):
        raise ValueError(f"expected an objective with a differentiable loss, such as pv.ELBO(), got {objective!r}.")
    example = batches.example()
    parameters, model_trace = _prepare(model, guide, objective, batches, example)
    modules = find_modules(model, guide)
    optimizer = torch.optim.Adam(list(dict.fromkeys(parameters.values())), lr=lr, fused=True)  # shared ones once
    settings = {
        "objective": _describe(objective),
        "batch_size": batches.batch_size,
        "lr": lr,
        "seed": seed,
        "N": batches.size,
        "compile": compile,
    }
    has_schedule = isinstance(getattr(objective, "step", None), int)
    rows: list[dict[str, float]] = []
    if has_schedule:
        objective.step = 0
    if checkpoint and Path(checkpoint).exists():
        rows = _resume(checkpoint, epochs, settings, parameters, modules, optimizer, batches, objective)

    total_steps = None if batches.steps is None else epochs * batches.steps
    bar = tqdm(total=total_steps, disable=None if progress else True, unit="step")
    bar.update(len(rows) * (batches.steps or 0))
    epoch = step = 0

    def uncompiled(*batch: Any) -> Tensor:
        optimizer.zero_grad()
        loss = objective.differentiable_loss(model, guide, *batch)
        (loss / len(batch[0])).backward()
        return loss.detach()

    gradients: Callable[..., Tensor] = uncompiled
    supports = None
    if compile:
        supports = _Supports(model_trace, example, batches)
        gradients = CompiledStep(
            model, guide, objective, optimizer, mean=True, on_compile=_teller(bar, batches)
        ).compute
    try:
        # Distributions were validated in _prepare, which ran the program once; a program's own checks stay on.
        with pyro.distributions.validation_enabled(False), _flushing_denormals():
            first = len(rows) + 1
            for epoch in range(first, epochs + 1):
                bar.set_description(f"epoch {epoch}/{epochs}")
                started, total, count = time.perf_counter(), torch.zeros((), dtype=torch.float64), 0
                for step, batch in enumerate(batches.shuffled(), 1):
                    if supports is not None and epoch == first:
                        supports.check(batch)
                    loss = gradients(*batch)
                    if not (loss.is_cuda or math.isfinite(loss)):  # to ask a GPU would be to wait for it at each step
                        raise FloatingPointError(_not_finite(f"the loss is {loss:g}", epoch, step, lr, checkpoint))
                    optimizer.step()
                    total, count = total + loss.double(), count + len(batch[0])
                    if not bar.disable and (step in (1, batches.steps) or step % 20 == 0):
                        bar.set_postfix(bound=f"{-total / count:.2f}", refresh=False)
                    bar.update()
                if not math.isfinite(total):
                    raise FloatingPointError(_not_finite("the epoch's loss is not finite", epoch, step, lr, checkpoint))
                for name, parameter in parameters.items():
                    if not bool(torch.isfinite(parameter).all()):
                        raise FloatingPointError(
                            _not_finite(f"parameter '{name}' is not finite", epoch, step, lr, checkpoint)
                        )
                row = {
                    "train_bound": -float(total) / count,
                    "validation_bound": _validate(model, guide, objective, held_out, modules),
                    "seconds": time.perf_counter() - started,
                }
                if checkpoint:
                    state = {
                        "settings": settings,
                        "history": [*rows, row],
                        "parameters": {name: value.detach() for name, value in parameters.items()},
                        "buffers": buffers(modules),
                        "optimizer": optimizer.state_dict(),
                        "rng": rng.get_state(),
                        "loader_rng": batches.generator_states(),
                        "step": objective.step if has_schedule else None,
                    }
                    checkpoints.save(checkpoint, state)
                rows.append(row)  # last, so that the history never runs ahead of the checkpoint
    except KeyboardInterrupt:
        kept = f"; the checkpoint {checkpoint} holds epoch {len(rows)}" if checkpoint and rows else ""
        warnings.warn(
            f"training stopped by Ctrl-C in epoch {epoch}, step {step}: the parameters keep what was learned{kept}.",
            stacklevel=2,
        )
    finally:
        bar.close()
    index = pd.RangeIndex(1, len(rows) + 1, name="epoch")
    return pd.DataFrame(rows, index=index, columns=["train_bound", "validation_bound", "seconds"])


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


class _Supports:
    """Refuses data that a site which observes them gives no density, in place of the checks that compiled code leaves out.

    It looks at supports that are the same for all data, where validation is not turned off and nothing is masked: at
    tensors whole, before training, at others as they come.
    """

    def __init__(self, model_trace: Trace, batch: tuple[Any, ...], batches: Minibatches) -> None:
        self.unseen: list[tuple[int, str, Any]] = []
        for name, site in sample_sites(model_trace).items():
            ends = interval(support_of(site["fn"])) if validates(site) and not masks(site) else None
            if ends is None or any(isinstance(end, Tensor) for end in ends):
                continue
            for column, argument in enumerate(batch):
                if site["value"] is argument:
                    self.unseen.append((column, name, plain(support_of(site["fn"]))))
        for seen in [entry for entry in self.unseen if batches.at_hand(entry[0]) is not None]:
            self._check(*seen[1:], batches.at_hand(seen[0]))
            self.unseen.remove(seen)

    def check(self, batch: tuple[Any, ...]) -> None:
        """Look at a minibatch of what was not at hand."""
        for column, name, support in self.unseen:
            self._check(name, support, batch[column])

    def _check(self, name: str, support: Any, data: Any) -> None:
        bad = ~support.check(data).reshape(len(data), -1).all(-1)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"expected data in the support of model site '{name}', {support}, got {int(bad.sum())} of {len(data)} outside, "
                f"row {row} with values from {data[row].min():.3g} to {data[row].max():.3g}. Convert those data, drop them, or "
                "choose another distribution."
            )


def _check_minibatches(model_trace: Trace, size: int) -> None:
    """Refuse a program whose terms outside the data's plate would count once for each minibatch."""
    frames = {n: s["cond_indep_stack"] for n, s in sample_sites(model_trace).items()}
    if any(frame.full_size != frame.size for stack in frames.values() for frame in stack):
        return  # scaled to all data: each minibatch's loss estimates the whole
    for name, stack in frames.items():
        if all(frame.size != size for frame in stack):
            raise ValueError(
                f"expected a program whose minibatches add up to the data, got model site '{name}' outside the data's "
                f"plate of size {size}: its term would count once for each minibatch. Move it inside; or give the "
                "plate the size of all data, pyro.plate('data', N, subsample_size=len(x)); or pass batch_size=N."
            )


def _resume(
    path: str | Path,
    epochs: int,
    settings: dict[str, Any],
    parameters: dict[str, Tensor],
    modules: list[nn.Module],
    optimizer: torch.optim.Optimizer,
    batches: Minibatches,
    objective: Any,
) -> list[dict[str, float]]:
    """Put everything where the checkpoint left it; return the history so far."""
    state = checkpoints.load(path)
    saved = {"compile": False} | state["settings"]
    for name, value in settings.items():
        if saved[name] != value:
            raise ValueError(
                f"the checkpoint {path} was written with {name}={saved[name]!r}, and {name}={value!r} is "
                "asked for: expected the same, to end where an unbroken run ends. Pass the same, or a new path."
            )
    if len(state["history"]) > epochs:
        raise ValueError(
            f"the checkpoint {path} holds {len(state['history'])} epochs, and {epochs} in all are asked for. Ask for "
            "at least as many, or pass a new path."
        )
    checkpoints.restore(path, state, parameters, buffers(modules))
    optimizer.load_state_dict(state["optimizer"])
    batches.set_generator_states(state["loader_rng"])
    rng.set_state(state["rng"])
    if state.get("step") is not None:
        objective.step = state["step"]
    return list(state["history"])


def _validate(
    model: Program,
    guide: Program,
    objective: Any,
    held_out: Minibatches | None,
    modules: list[nn.Module],
) -> float:
    if held_out is None:
        return math.nan
    total, count = 0.0, 0
    own = held_out.generator_states()
    with torch.no_grad(), rng.preserved(seed=0), evaluating(modules):
        for batch in held_out.in_order():
            total += objective.loss(model, guide, *batch)
            count += len(batch[0])
    held_out.set_generator_states(own)
    return -total / count


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


def _not_finite(what: str, epoch: int, step: int, lr: float, checkpoint: str | Path | None) -> str:
    kept = f" The checkpoint {checkpoint} is as it was after epoch {epoch - 1}." if checkpoint and epoch > 1 else ""
    return (
        f"{what} in epoch {epoch}, step {step}. Likely causes: a learning rate too high (lr={lr:g}), a scale that went "
        f"to zero (a Gaussian's, where pixels are constant), or data outside the likelihood's support.{kept}"
    )
