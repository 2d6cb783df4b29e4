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
from pyro_vae.errors import PyroVAEError


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


Shapes = dict[str, tuple[torch.Size, torch.Size]]


class ShowsDeterministic(Messenger):
    """Makes ``pyro.deterministic`` sites observed sites like others, of density 1.

    Pyro takes all dimensions of such a value for one event, unless it is told otherwise. `shapes` has the batch shape
    and the event shape by site, as :func:`deterministic_shapes` finds them; sites without these stay as they are.
    """

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.shapes = shapes

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["infer"].get("_deterministic") or msg["name"] not in self.shapes:
            return
        value, (of_one, event) = msg["value"], self.shapes[msg["name"]]
        event_dim = len(event)
        if value.shape[-len(of_one) - event_dim :] != of_one + event:
            raise PyroVAEError(
                f"pyro.deterministic site '{msg['name']}' has the shape {tuple(of_one + event)} for one particle, and "
                f"{tuple(value.shape)} for several: expected the same with one more dimension on the left. Count "
                "dimensions from the right, such as z[..., 0], or pass vectorize_particles=False."
            )
        sizes = {frame.dim: max(frame.size, 1) for frame in msg["cond_indep_stack"] if frame.vectorized}
        plates = [sizes.get(dim, 1) for dim in range(min(sizes, default=0), 0)]
        batch = torch.broadcast_shapes(value.shape[: value.dim() - event_dim], plates)
        msg["fn"] = Delta(value, event_dim=event_dim).expand(batch).mask(False)
        msg["infer"] = {name: note for name, note in msg["infer"].items() if name != "_deterministic"}


def deterministic_shapes(model: Trace, plate: Plate) -> Shapes:
    """The batch and event shapes of each ``pyro.deterministic`` site in the batch plate, in a run of one particle."""
    found, nodes = {}, dict[str, Any](model.nodes)
    for name, site in nodes.items():
        if site["type"] != "sample" or not site["infer"].get("_deterministic"):
            continue
        sizes = {frame.dim: frame.size for frame in site["cond_indep_stack"] if frame.vectorized}
        shape, depth = site["value"].shape, -min(sizes, default=0)
        batch = {dim: shape[depth + dim] for dim in range(-depth, 0)} if len(shape) >= depth else {}
        fits = all(size in (1, sizes.get(dim, 1)) or sizes.get(dim, 1) < 0 for dim, size in batch.items())
        if batch and fits and any(frame.name == plate.name for frame in site["cond_indep_stack"]):
            found[name] = shape[:depth], shape[depth:]
    return found
