"""Handlers for a model that draws what it observes, or that shows its ``pyro.deterministic`` sites."""

from typing import Any

import torch
from pyro.distributions import Delta, MaskedDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch.distributions import Independent

from pyro_vae.engine.modules import PyroFunction
from pyro_vae.engine.sites import Plate, is_deterministic


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
    """Makes ``pyro.deterministic`` sites observed sites like others, of density 1.

    Pyro takes all dimensions of such a value for one event, unless it is told otherwise. `event_dims` has the number of
    the event's dimensions by site, as :func:`deterministic_events` finds them; sites without one stay as they are.
    """

    def __init__(self, event_dims: dict[str, int]) -> None:
        super().__init__()
        self.event_dims = event_dims

    def _pyro_sample(self, msg: Any) -> None:
        event_dim = self.event_dims.get(msg["name"]) if msg["infer"].get("_deterministic") else None
        if event_dim is None:
            return
        value = msg["value"]
        sizes = {frame.dim: max(frame.size, 1) for frame in msg["cond_indep_stack"] if frame.vectorized}
        plates = [sizes.get(dim, 1) for dim in range(min(sizes, default=0), 0)]
        batch = torch.broadcast_shapes(value.shape[: value.dim() - event_dim], plates)
        msg["fn"] = Delta(value, event_dim=event_dim).expand(batch).mask(False)
        msg["infer"] = {name: note for name, note in msg["infer"].items() if name != "_deterministic"}


def deterministic_events(model: Trace, plate: Plate) -> dict[str, int]:
    """How many dimensions the event has of each ``pyro.deterministic`` site in the batch plate, in a run of one."""
    found, nodes = {}, dict[str, Any](model.nodes)
    for name, site in nodes.items():
        if site["type"] != "sample" or not site["infer"].get("_deterministic"):
            continue
        sizes = {frame.dim: frame.size for frame in site["cond_indep_stack"] if frame.vectorized}
        shape, depth = site["value"].shape, -min(sizes, default=0)
        batch = {dim: shape[depth + dim] for dim in range(-depth, 0)} if len(shape) >= depth else {}
        fits = all(size in (1, sizes.get(dim, 1)) or sizes.get(dim, 1) < 0 for dim, size in batch.items())
        if batch and fits and any(frame.name == plate.name for frame in site["cond_indep_stack"]):
            found[name] = len(shape) - depth
    return found
