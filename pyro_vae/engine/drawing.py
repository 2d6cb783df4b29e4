"""Handlers for a model that draws what it observes, or that shows its ``pyro.deterministic`` sites."""

from typing import Any

import torch
from pyro.distributions import Delta, MaskedDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch.distributions import Independent

from pyro_vae.engine.modules import PyroFunction
from pyro_vae.engine.sites import PARTICLE_PLATE, is_deterministic


class OfObservedShape(Messenger):
    """Expands the event of an observed site to that of its data, to which densities broadcast and draws do not."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            msg["fn"] = _expanded(msg["fn"], msg["value"].shape)


def _expanded(fn: Any, shape: torch.Size) -> Any:
    event = shape[len(shape) - fn.event_dim :]
    if fn.event_dim > len(shape) or event == fn.event_shape:
        return fn
    base: Any = getattr(fn, "base_dist", None)
    if isinstance(fn, MaskedDistribution):
        return _expanded(base, shape).mask(fn._mask)
    if not isinstance(fn, Independent):
        return fn
    number = fn.reinterpreted_batch_ndims
    return base.expand(base.batch_shape[:-number] + event[: len(event) - base.event_dim]).to_event(number)


class DrawsObserved(UnconditionMessenger):
    """Draws observed sites; a ``pyro.deterministic`` site stays the function of others that it is."""

    def _pyro_sample(self, msg: Any) -> None:
        if not is_deterministic(msg):
            super()._pyro_sample(msg)


def drawing(model: PyroFunction) -> PyroFunction:
    """The model, which draws what it observes, in the shape of its data."""
    drawn: PyroFunction = DrawsObserved()(OfObservedShape()(model))
    return drawn


class ShowsDeterministic(Messenger):
    """Makes a ``pyro.deterministic`` site inside a plate an observed site like others, of density 1.

    Pyro takes all dimensions of its value for one event, unless it is told otherwise. Here the dimensions of the plates
    are no part of the event.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["infer"].get("_deterministic"):
            return
        value, frames = msg["value"], [frame for frame in msg["cond_indep_stack"] if frame.vectorized]
        sizes = {frame.dim: max(frame.size, 1) for frame in frames}
        batch = [sizes.get(dim, 1) for dim in range(min(sizes, default=0), 0)]
        of_data = [dim for frame, dim in zip(frames, sizes, strict=True) if frame.name != PARTICLE_PLATE]
        for depth in (len(batch), -min(of_data, default=0)):  # a value may be the same for all particles
            event_dim = value.dim() - depth
            own = value.shape[:depth] if depth and event_dim >= 0 else ()
            if own and all(size in (1, whole) for size, whole in zip(own, batch[-depth:], strict=True)):
                shown = Delta(value, event_dim=event_dim)
                msg["fn"] = shown.expand(torch.broadcast_shapes(own, batch)).mask(False)
                msg["infer"] = {name: note for name, note in msg["infer"].items() if name != "_deterministic"}
                return
