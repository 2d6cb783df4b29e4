"""Callbacks of a training: what `fit` calls at each step and epoch."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

from pyro_vae.checks import shown
from pyro_vae.distributed import alone
from pyro_vae.engine import rng
from pyro_vae.engine.minibatches import Batch
from pyro_vae.errors import CallbackError, PyroVAEError
from pyro_vae.training.accumulation import Accumulated
from pyro_vae.training.record import Record

if TYPE_CHECKING:
    from pyro_vae.training.loop import Loop


class Callback:
    """What `fit` calls while it trains: a subclass defines the methods that it needs.

    Random numbers that a callback draws leave those of the training as they are. An exception in a callback ends the
    training with a :class:`CallbackError`, after the same method of all other callbacks: so the states that the
    checkpoint keeps are all of one step. The first exception is raised, and later ones are its notes. In
    :meth:`on_start` and :meth:`before_step`, it ends the training at once. The parameters are those of the last step.
    After a step or an epoch, the checkpoint, if there is one, is written before.

    Attributes:
        every: :meth:`on_step` is called after each so many steps.
        draws: whether it may draw random numbers. To keep those of training takes some tenths of a millisecond a call,
            which a callback without any saves by False.
        on_all_ranks: with several processes, whether all of them call it, as one that changes parameters or gradients
            needs. Otherwise rank 0 calls it alone, as loggers need, and what it calls is its own process's.

    Example:
        >>> import torch, pyro_vae as pv
        >>> class Print(pv.Callback):
        ...     def on_epoch(self, record):
        ...         print(record.epoch, record.step, sorted(record.numbers())[:2])
        >>> vae = pv.mlp_vae((5,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
        >>> history = pv.fit(vae, torch.randn(64, 5), pv.ELBO(), epochs=2, batch_size=32, callbacks=[Print()])
        1 2 ['beta', 'bound']
        2 4 ['beta', 'bound']
    """

    every: int = 1
    draws: bool = True
    on_all_ranks: bool = False

    def on_start(self, record: Record) -> None:
        """Before the first step; `record.step` is above 0 if the training goes on from a checkpoint."""

    def before_step(self, record: Record) -> None:
        """Before each step, when each parameter has its gradient in ``grad``."""

    def on_step(self, record: Record) -> None:
        """After a step."""

    def on_epoch(self, record: Record) -> None:
        """After an epoch."""

    def on_end(self, record: Record) -> None:
        """At the end of the training, also of one that a callback ended; not after an error or Ctrl-C.

        What must be closed in any case goes to ``record.enter`` in :meth:`on_start`.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: tensors, numbers, strings, lists and dictionaries."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state from a checkpoint, before :meth:`on_start`."""


HOOKS = ("on_start", "before_step", "on_step", "on_epoch", "on_end")
AT_ONCE = ("on_start", "before_step")  # an error ends these at once, since what they come before does not happen


class Callbacks:
    """The callbacks of a training, which cost nothing where there are none."""

    def __init__(self, given: Callback | Sequence[Callback]) -> None:
        self.all: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
        for wrong in (each for each in self.all if not isinstance(each, Callback)):
            what = f"the class {wrong.__name__}" if isinstance(wrong, type) else shown(wrong)
            raise PyroVAEError(
                f"expected callbacks to be pv.Callback objects, got {what}. Write a subclass of pv.Callback that "
                "defines on_step(self, record) or on_epoch(self, record), and pass an instance."
            )
        for callback in self.all:
            kind = type(callback)
            if all(getattr(kind, name) is getattr(Callback, name) for name in HOOKS):
                raise PyroVAEError(
                    f"expected a callback that defines one of {', '.join(HOOKS)}, got {kind.__name__}, which defines "
                    "none of them: it would never be called. Rename its methods."
                )
            if not isinstance(callback.every, int) or callback.every < 1:
                raise PyroVAEError(
                    f"expected {type(callback).__name__}.every to be a positive number of steps, got "
                    f"{callback.every!r}. 1 is each step."
                )
        named = [(type(c).__name__, c) for c in self.all if type(c).state_dict is not Callback.state_dict]
        self.with_state = {f"{name} {i}" if i else name: c for i, (name, c) in enumerate(named)}
        self.is_first = True  # whether this process calls all of them
        self.ending = ExitStack()  # what is left when the training ends, however it ends
        self.beta = math.nan  # of the last step
        self.before = time.perf_counter()

    def keep_those_on_all_ranks(self) -> None:
        """Keep those that other ranks than the first one call, too."""
        self.all = [each for each in self.all if each.on_all_ranks]
        self.with_state = {name: each for name, each in self.with_state.items() if each.on_all_ranks}
        self.is_first = False

    def __bool__(self) -> bool:
        return bool(self.all)

    def before_step(self, loop: "Loop", batch: Batch | None, sums: Accumulated) -> Record | None:
        """Make the record of a step, from the sums over its data, and call what comes before it."""
        if not self.all:
            return None
        record = Record(loop)
        record.step += 1
        record.batch = batch or ()
        count = sums.count or math.nan  # weights may all be zero
        record._mean = -sums.total / count
        record._parts = None if sums.parts is None else sums.parts / count
        record.beta = self.beta = float(loop.scheduled.get("beta", math.nan))
        now = time.perf_counter()
        record.examples_per_second, self.before = sums.count / max(now - self.before, 1e-9), now
        self._call("before_step", record)
        return record

    def after_step(self, record: Record) -> None:
        """Call what comes after a step."""
        self._call("on_step", record, lambda callback: record.step % callback.every == 0)

    def start(self, loop: "Loop") -> None:
        """Call what comes before the first step."""
        if self.all:
            self.ending.callback(loop.kept.release_all)
            self._call("on_start", Record(loop))

    def end_epoch(self, loop: "Loop", row: Mapping[str, float], epoch: Any) -> None:
        """Call what comes after an epoch, with its row of the history."""
        if not self.all:
            return
        record = Record(loop, epoch=len(loop.rows))
        record._mean, record.validation_bound = row["train_bound"], row["validation_bound"]
        record._parts = epoch.mean_parts
        record.examples_per_second = epoch.count / max(row["seconds"], 1e-9)
        record.beta, record.lr = self.beta, row.get("lr", record.lr)
        self._call("on_epoch", record)

    def end(self, loop: "Loop") -> None:
        """Call what comes at the end."""
        if self.all:
            self._call("on_end", Record(loop, epoch=len(loop.history())))

    def _call(self, name: str, record: Record, due: Callable[[Callback], bool] = lambda _: True) -> None:
        """Call a hook of all callbacks that it is due for, then raise the first error, if there is one.

        A hook that comes after something is called also where one before it in the list has failed: the checkpoint that
        is written then has the states of all callbacks, which must be of one step.
        """
        errors: list[CallbackError] = []
        interrupt: KeyboardInterrupt | None = None
        for callback in self.all:
            if not due(callback) or getattr(type(callback), name) is getattr(Callback, name):
                continue
            try:
                own = nullcontext() if callback.on_all_ranks else alone()
                with own, rng.preserved() if callback.draws else nullcontext():
                    getattr(callback, name)(record)
            except KeyboardInterrupt as error:
                interrupt = error
            except Exception as error:
                errors.append(
                    CallbackError(
                        f"callback {type(callback).__name__} failed in {name}, in epoch {record.epoch}, step "
                        f"{record.step}: {type(error).__name__}: {error}"
                    )
                )
                errors[-1].__cause__ = error
            if (errors or interrupt) and name in AT_ONCE:
                break
        for another in errors[1:]:
            errors[0].add_note(f"After it, {another}")
        if errors:
            raise errors[0]  # it ends the training too, so an interrupt beside it is no loss
        if interrupt is not None:
            raise interrupt

    def state(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint keeps of those that have a state."""
        return {name: _done("state_dict", callback) for name, callback in self.with_state.items()}

    def load(self, path: Any, saved: dict[str, dict[str, Any]]) -> None:
        """Give them their states from a checkpoint; refuse one without some, or with others."""
        own = self.with_state
        if own.keys() != saved.keys() and self.is_first:
            raise PyroVAEError(
                f"the checkpoint {path} was written with other callbacks that have a state: expected "
                f"{', '.join(saved) or 'none'}, got {', '.join(own) or 'none'}. Pass the same, or a new path."
            )
        for name, callback in own.items():
            _done("load_state_dict", callback, saved[name])


def _done(name: str, callback: Callback, *args: Any) -> Any:
    """What a method about the state returns; an error names the callback, unless it is a refusal."""
    try:
        return getattr(callback, name)(*args)
    except PyroVAEError:
        raise
    except Exception as error:
        raise CallbackError(
            f"callback {type(callback).__name__} failed in {name}: {type(error).__name__}: {error}"
        ) from error
