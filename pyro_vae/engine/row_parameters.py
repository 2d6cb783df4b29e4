"""Refuses parameters with a value for each row of a minibatch, where the rows move from step to step.

Such a parameter (a ``pyro.param`` of the minibatch's size, or an autoguide's) belongs to a place in the minibatch, and
other data come to that place at each step. It is found by what it does, since a weight may have the same size: with the
rows of data and latents moved alike, the gradient of every parameter that the data share stays the same.
"""

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_vae.engine.minibatches import at_rows
from pyro_vae.engine.ownership import parameters_of
from pyro_vae.engine.precision import is_half
from pyro_vae.engine.program import Program
from pyro_vae.engine.sites import Plate, Site, Sites, derived, is_factor, plates, unwrapped
from pyro_vae.engine.traces import At, sample_sites, traced
from pyro_vae.errors import PyroVAEError

Gradients = dict[str, Tensor]  # by the parameter's name
ZERO = torch.zeros(())


class Trial(NamedTuple):
    """A run of guide and model with gradients, but for those through the latents of the rows."""

    model: Trace
    guide: Trace
    chosen: set[str]  # the plates whose subsample the program chooses itself
    size: int  # how many rows the arguments have

    def parameters(self) -> dict[str, Tensor]:
        """Those of model and guide, by name."""
        return parameters_of(self.model) | parameters_of(self.guide)

    def gradients(self, weights: Tensor, plate: Plate, outside: float = 1.0) -> Gradients:
        """The gradient of the weighted sum of all log-densities; those outside of the plate have another weight."""
        total: Any = 0.0
        for trace in (self.model, self.guide):
            for site in sample_sites(trace).values():
                log_prob, inside = site["log_prob"], any(frame.name == plate.name for frame in plates(site))
                has_rows = inside and log_prob.dim() >= -plate.dim and log_prob.shape[plate.dim] == len(weights)
                shape = (-1,) + (1,) * (-plate.dim - 1)
                weight = weights.to(log_prob).reshape(shape) if has_rows else outside
                total = total + (weight * log_prob).sum()
        own = {name: parameter for name, parameter in self.parameters().items() if parameter.requires_grad}
        if not isinstance(total, Tensor) or not total.requires_grad:
            return {}
        found = torch.autograd.grad(total, list(own.values()), retain_graph=True, allow_unused=True)
        return {name: gradient for name, gradient in zip(own, found, strict=True) if gradient is not None}


def trial(program: Program, size: int) -> Trial:
    """Run a program of so many rows with gradients, for :func:`check_row_parameters`; nothing else notices the run."""
    with _unnoticed(program):
        return _run(program, size, {})


def check_row_parameters(program: Program, first: Trial) -> None:
    """Raise an error if parameters have a value for each row of the program's arguments; `first` is its trial."""
    size = first.size
    if size < 2:
        return
    found: set[str] | None = None
    with _unnoticed(program):
        weights = 1 + torch.rand(size)
        try:
            for moved in _moved(program, _order(size)):
                for plate in _data_plates(first):
                    names = _of_rows(program, moved, first, plate, weights)
                    if names is not None:
                        found = names if found is None else found & names
                if found is not None:
                    break
        except (RuntimeError, ValueError, IndexError, KeyError):
            return  # rows whose order matters, such as sequences sorted by length, or a flow without an inverse
    if not found:
        return
    shapes = ", ".join(f"'{name}' of shape {tuple(first.parameters()[name].shape)}" for name in sorted(found))
    raise PyroVAEError(
        f"expected parameters that all data share, since the rows of a minibatch hold other data at each step, got a "
        f"value for each row of a minibatch of {size}: {shapes}. Compute the values from the data, by an encoder "
        "network; or put pyro.param(..., event_dim=...), or an autoguide with create_plates, in a plate of all data, "
        "pyro.plate('data', N, subsample=index), and pass the index with the data; or train on all data in one order, "
        "with batch_size=N, or a DataLoader with one minibatch and shuffle=False."
    )


def _order(size: int) -> Tensor:
    """An order that moves every row."""
    return torch.arange(size).roll(1)


@contextmanager
def _unnoticed(program: Program) -> Iterator[None]:
    # cuDNN has no gradient of a recurrent network in evaluation mode.
    with program.unnoticed(), torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
        yield


def _observed(run: Trial) -> Sites:
    nodes: Sites = dict(run.model.nodes)
    sites = {name: site for name, site in nodes.items() if site["type"] == "sample" and site["is_observed"]}
    return {n: s for n, s in sites.items() if isinstance(s["value"], Tensor) and not is_factor(s)}


def _data_plates(run: Trial) -> list[Plate]:
    """The plates around observations that may hold the rows: a plate of as many pixels may be among them."""
    frames = [frame for site in _observed(run).values() for frame in plates(site) if frame.size in (run.size, -1)]
    return list({frame.name: frame for frame in frames}.values())


def _has_moved(first: Trial, moved: Trial, plate: Plate, order: Tensor) -> bool:
    """Whether the observations have moved along the plate."""
    pairs = ((site, _observed(moved).get(name)) for name, site in _observed(first).items())
    return all(
        again is not None and torch.equal(_along(site["value"], order, _dim(site, plate)), again["value"])
        for site, again in pairs
        if any(frame.name == plate.name for frame in plates(site))
    )


def _dim(site: Site, plate: Plate) -> int:
    """The dimension of a site's value that the plate takes."""
    return int(plate.dim - site["fn"].event_dim)


def _of_rows(program: Program, other: Program, run: Trial, plate: Plate, weights: Tensor) -> set[str] | None:
    """The names of the parameters whose entries belong to places in the plate; None if it does not hold the rows.

    `other` is the program with its rows moved.
    """
    order = _order(run.size)
    moved = _run(other, run.size, _latents(run, plate, order))
    if not _has_moved(run, moved, plate, order):
        return None
    first = run.gradients(weights, plate)
    differing = _differing(first, moved.gradients(weights[order], plate))
    if not differing:
        return set()
    again = _run(program, run.size, _latents(run, plate, torch.arange(len(order))))
    if _differing(first, again.gradients(weights, plate)):
        return set()  # the program is noisy outside of its sample sites
    return _apart(run, plate, differing, len(order))


def _apart(run: Trial, plate: Plate, names: set[str], size: int) -> set[str]:
    """Those of these parameters of which different rows have different entries, or one row alone has any.

    What moves with the rows may also be a network that depends on their order, or that only some of them use, such as
    the first half. These rows share its parameters. Each bit of the rows' numbers halves them, and tells any two apart.
    """
    apart: set[str] = set()
    of_several: set[str] = set()
    used: set[str] = set()
    for bit in range((size - 1).bit_length()):
        half = (torch.arange(size) >> bit & 1).float()
        gradients = [run.gradients(weights, plate, 0.0) for weights in (half, 1 - half)]
        for name in names:
            first, second = (each.get(name, ZERO).ne(0) for each in gradients)
            if bool(first.any()) and bool(second.any()):
                (of_several if bool((first & second).any()) else apart).add(name)
            elif any(name in each for each in gradients):  # it may be of the rows of another plate
                used.add(name)
    return apart | (used - of_several)


def _differing(first: Gradients, second: Gradients) -> set[str]:
    """The names of the parameters with two gradients, by more than the rounding of a sum over rows."""
    tensors = [gradient for group in (first, second) for gradient in group.values()]
    largest = max((float(gradient.abs().max()) for gradient in tensors if gradient.numel()), default=0.0)
    names = set()
    for name in first.keys() | second.keys():
        one, other = first.get(name, ZERO), second.get(name, ZERO)
        scale = max(float(gradient.abs().max()) if gradient.numel() else 0.0 for gradient in (one, other))
        tolerance = 0.3 if is_half(one) or is_half(other) else 1e-2
        # A gradient that cancels between rows is all rounding.
        if scale > 1e-5 * largest and float((one - other).abs().max()) > tolerance * scale:
            names.add(name)
    return names


def _run(program: Program, size: int, values: dict[str, Tensor]) -> Trial:
    watch = _Watch(size)
    with watch:
        guide = traced(At(values)(program.guide_or_prior), program.args, program.kwargs)
    model = traced(poutine.replay(program.model, trace=guide), program.args, program.kwargs)
    return Trial(model, guide, watch.chosen, size)


class _Watch(Messenger):
    """Stops gradients at the guide's latents in plates that may hold the rows; notes who chooses each subsample."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.chosen: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["value"] is not None and not msg["done"]:
            self.chosen.add(msg["name"])

    def _pyro_post_sample(self, msg: Any) -> None:
        if _is_drawn(msg) and any(frame.size in (self.size, -1) for frame in plates(msg)):
            msg["value"] = derived(msg["value"], Tensor.detach)


def _is_drawn(site: Site) -> bool:
    """Whether a site of the guide is a draw; a Delta is a function of others."""
    point = site_is_subsample(site) or isinstance(unwrapped(site["fn"]), Delta)
    return not (point or site["is_observed"]) and isinstance(site["value"], Tensor)


def _latents(run: Trial, plate: Plate, order: Tensor) -> dict[str, Tensor]:
    """The guide's draws, with the rows of the plate in that order."""
    values: dict[str, Tensor] = {}
    nodes: dict[str, Site] = dict(run.guide.nodes)
    for name, site in nodes.items():
        if site["type"] != "sample" or name in run.chosen:
            continue
        if site_is_subsample(site):
            values[name] = site["value"]
        elif _is_drawn(site):
            inside = any(frame.name == plate.name for frame in plates(site))
            move = functools.partial(_along, order=order, dim=_dim(site, plate))
            values[name] = derived(site["value"], move) if inside else site["value"]
    return values


def _along(value: Any, order: Tensor, dim: int | None) -> Any:
    """The tensor with the rows of a dimension in another order, if it has them."""
    has_rows = dim is not None and value.dim() >= -dim and value.shape[dim] == len(order)
    return value.index_select(dim, order.to(value.device)) if has_rows else value


def _moved(program: Program, order: Tensor) -> Iterator[Program]:
    """The program with the rows of its data in another order, for each choice of the dimensions that have them."""
    size = len(order)
    leaves, structure = pytree.tree_flatten(program.args, is_leaf=lambda value: _is_column(value, size))
    # Arguments of one shape have their rows in one dimension.
    dims = {_shape(leaf): _dims(_shape(leaf), size) for leaf in leaves}
    for chosen in itertools.product(*dims.values()):
        of_shape = dict(zip(dims, chosen, strict=True))
        moved = [at_rows(v, order) if _is_column(v, size) else _along(v, order, of_shape[_shape(v)]) for v in leaves]
        yield program.on(pytree.tree_unflatten(moved, structure))


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _is_column(value: Any, size: int) -> bool:
    """Whether a value is a list with an item for each row, such as a string."""
    items = value if type(value) in (list, tuple) and len(value) == size else ()
    return bool(items) and not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(items))


def _dims(shape: tuple[int, ...], size: int) -> list[int | None]:
    """The dimensions, counted from the right, that may have the rows: the first one, or else first none."""
    dims: list[int | None] = [dim - len(shape) for dim, length in enumerate(shape) if length == size]
    return dims if -len(shape) in dims else [None, *dims]
