"""The callbacks that come with the package; ``pyro_vae.callbacks`` is their public place."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.checks import Count, checked
from pyro_vae.errors import PyroVAEError
from pyro_vae.files import one_writer
from pyro_vae.training.calling import Callback
from pyro_vae.training.record import Record


class EMA(Callback):
    r"""An exponential moving average of the parameters, which often gives a better bound than the last step's.

    .. math:: \bar\theta_t = d_t \bar\theta_{t-1} + (1 - d_t) \theta_t, \qquad
        d_t = \min\Bigl(d, \frac{1 + t}{10 + t}\Bigr)

    with the decay d, which is smaller in the first steps t. A checkpoint keeps the average.

    Arguments:
        decay: d, from 0 to 1; 0.999 averages over some thousand steps.
        at_end: whether the parameters are the average when `fit` returns. Otherwise use :meth:`in_place`.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.mlp_vae((5,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
        >>> average = pv.callbacks.EMA(0.99)
        >>> _ = pv.fit(vae, torch.randn(64, 5), pv.ELBO(), epochs=5, callbacks=average)
        >>> with average.in_place():
        ...     bound = pv.ELBO().bound(vae, torch.randn(64, 5)).mean()

    References:
        Polyak and Juditsky (1992), *Acceleration of Stochastic Approximation by Averaging*, SIAM J. Control Optim.
    """

    draws = False
    on_all_ranks = True

    @checked
    def __init__(self, decay: float = 0.999, *, at_end: bool = False) -> None:
        if not 0 <= decay < 1:
            raise PyroVAEError(f"expected decay to be at least 0 and below 1, got {decay!r}. 0.999 is usual.")
        self.decay, self.at_end = decay, at_end
        self.averages: dict[str, Tensor] = {}
        self._parameters: dict[str, Tensor] = {}

    def on_start(self, record: Record) -> None:
        """Start at the parameters, or go on from the checkpoint's average."""
        self._parameters = record.parameters
        own = {name: value.detach().clone() for name, value in self._parameters.items()}
        kept = self.averages if record.step else {}  # a new training begins anew
        self.averages = own | {name: kept[name].to(value) for name, value in own.items() if name in kept}

    @torch.no_grad()
    def on_step(self, record: Record) -> None:
        """Move the average."""
        decay = min(self.decay, (1 + record.step) / (10 + record.step))
        for name, value in record.parameters.items():  # a later minibatch may have added some
            self._parameters[name] = value
            self.averages.setdefault(name, value.detach().clone()).lerp_(value, 1 - decay)

    def on_end(self, record: Record) -> None:
        """Put the average in place, if it is asked for."""
        if self.at_end:
            self._put(self.averages)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the parameters are the average."""
        if not self.averages:
            raise PyroVAEError("expected an average after training, got none. Pass it to pv.fit first.")
        own = {name: value.detach().clone() for name, value in self._parameters.items()}
        self._put(self.averages)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._parameters[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The average, and its decay."""
        return {"decay": self.decay, "averages": dict(self.averages)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the average of a checkpoint; refuse one of another decay."""
        if state["decay"] != self.decay:
            raise PyroVAEError(
                f"the checkpoint has an average of another decay: expected decay={state['decay']}, got {self.decay}. "
                "Pass the same, in the same order."
            )
        self.averages = dict(state["averages"])


class Freeze(Callback):
    """Leave a part of the program as it is for some epochs.

    Its modules that have buffers, such as batch norm, are in evaluation mode meanwhile: their statistics stay, and the
    loss is computed with these. Other modules, such as dropout, stay in their mode. All are put back, however the
    training ends.

    Arguments:
        part: a module, such as ``vae.posterior``, or the beginning of parameters' names, such as ``"likelihood"``.
        epochs: for how many epochs, from the first one.

    Raises:
        ValueError: no parameter is of this part.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.mlp_vae((5,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
        >>> before = [p.clone() for p in vae.posterior.parameters()]
        >>> freeze = pv.callbacks.Freeze(vae.posterior, epochs=1)
        >>> _ = pv.fit(vae, torch.randn(64, 5), pv.ELBO(), epochs=1, callbacks=freeze)
        >>> all(map(torch.equal, before, vae.posterior.parameters()))
        True
    """

    draws = False
    on_all_ranks = True

    @checked
    def __init__(self, part: nn.Module | str, epochs: Count) -> None:
        self.part, self.epochs = part, epochs

    def on_start(self, record: Record) -> None:
        """Check that there are such parameters."""
        if not self._frozen(record):
            what = f"names that begin with '{self.part}'" if isinstance(self.part, str) else "the module's"
            raise PyroVAEError(
                f"expected parameters of the part to freeze, {what}, got none among {', '.join(record.parameters)}. "
                "Pass another part."
            )
        if record.epoch <= self.epochs:
            self._keep(record)

    def before_step(self, record: Record) -> None:
        """Take the gradients away, so that the optimiser steps over these parameters."""
        if record.epoch <= self.epochs:
            for parameter in self._frozen(record):
                parameter.grad = None

    def on_epoch(self, record: Record) -> None:
        """Let a learned scale, and batch norm, move again after the last of the epochs."""
        if record.epoch < self.epochs:
            self._keep(record)  # a later minibatch may have added parameters
        else:
            record.release(self)

    def _keep(self, record: Record) -> None:
        frozen, part = self._frozen(record), self.part
        record.keep(self, frozen, record.modules(frozen) if isinstance(part, str) else list(part.modules()))

    def _frozen(self, record: Record) -> list[Tensor]:
        if isinstance(self.part, str):
            return [value for name, value in record.parameters.items() if name.startswith(self.part)]
        own = {id(parameter) for parameter in self.part.parameters()}
        return [value for value in record.parameters.values() if id(value) in own]


class Validate(Callback):
    """Measure the bound of held-out data each so many steps, also inside of an epoch.

    The record's ``validation_bound`` has it then, so that loggers after it in the list write it.

    Arguments:
        data: held-out data, as `fit` takes them.
        every: measure each so many steps.
        batch_size: data in a minibatch, by default 128.

    Attributes:
        bounds: the bound by the number of the step.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.mlp_vae((5,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
        >>> validate = pv.callbacks.Validate(torch.randn(32, 5), every=2)
        >>> _ = pv.fit(vae, torch.randn(64, 5), pv.ELBO(), epochs=1, batch_size=16, callbacks=validate)
        >>> list(validate.bounds)
        [2, 4]
    """

    on_all_ranks = True

    @checked
    def __init__(self, data: Any, *, every: Count, batch_size: Count | None = None) -> None:
        self.data, self.every, self.batch_size = data, every, batch_size
        self.bounds: dict[int, float] = {}

    def on_start(self, record: Record) -> None:
        """Check the data, and forget the bounds of another training."""
        self._held_out = record.held_out(self.data, self.batch_size)
        self.bounds = {step: bound for step, bound in self.bounds.items() if step <= record.step}

    def on_step(self, record: Record) -> None:
        """Measure the bound."""
        record.validation_bound = self.bounds[record.step] = record.validate(self._held_out)

    def state_dict(self) -> dict[str, Any]:
        """The bounds so far."""
        return {str(step): bound for step, bound in self.bounds.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the bounds of a checkpoint."""
        self.bounds = {int(step): bound for step, bound in state.items()}


class KeepBest(Callback):
    """Keep checkpoints of the k epochs with the highest validation bound, ``epoch-0007.pt`` and so on.

    :func:`pyro_vae.load_parameters` reads each. Training goes on from one, without `patience`.

    Arguments:
        folder: where they go.
        k: how many.

    Raises:
        ValueError: `fit` has no validation data; or another training keeps its epochs in this folder meanwhile.
    """

    @checked
    def __init__(self, folder: str | Path, k: Count = 3) -> None:
        self.folder, self.k = Path(folder), k
        self.bounds: dict[int, float] = {}

    def on_start(self, record: Record) -> None:
        """Check that there are validation data, and make the folder."""
        if not record.validates:
            raise PyroVAEError(
                "KeepBest compares validation bounds: expected validation data, got none. Pass validation=... to fit."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        record.enter(one_writer(self.folder, "keeping its best epochs in", inside=True))
        if not record.step:
            self.bounds = {}

    def on_epoch(self, record: Record) -> None:
        """Keep this epoch, if it is one of the best; drop the worst of too many."""
        worst = min(self.bounds, key=self.bounds.__getitem__) if len(self.bounds) == self.k else None
        if worst is not None and not record.validation_bound > self.bounds[worst]:
            return
        record.save(self._file(record.epoch))
        self.bounds[record.epoch] = record.validation_bound
        if worst is not None:
            del self.bounds[worst]
            self._file(worst).unlink(missing_ok=True)

    def _file(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch:04d}.pt"

    @property
    def best(self) -> Path:
        """The file of the best epoch."""
        return self._file(max(self.bounds, key=self.bounds.__getitem__))

    def state_dict(self) -> dict[str, Any]:
        """The epochs that are kept, with their bounds."""
        return {str(epoch): bound for epoch, bound in self.bounds.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the epochs of a checkpoint."""
        self.bounds = {int(epoch): bound for epoch, bound in state.items()}
