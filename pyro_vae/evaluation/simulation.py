"""Simulated data for bdmc and to_arviz: the model's own draws of x and z, with x as arguments of the model."""

from collections.abc import Iterator
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.engine.agreement import check_draws
from pyro_vae.engine.drawing import drawing
from pyro_vae.engine.modules import PyroFunction
from pyro_vae.engine.program import Program
from pyro_vae.engine.simulation import given_either, same_density
from pyro_vae.engine.sites import Sites, equal, is_deterministic, is_factor, labelled, same_masks
from pyro_vae.engine.traces import given, sample_sites, traced
from pyro_vae.errors import PyroVAEError
from pyro_vae.evaluation.pieces import Args

MOST_EXACT = 2**24  # the largest whole number up to which float32 has all


def simulate_data(model: PyroFunction, args: Args) -> tuple[Args, dict[str, Tensor]]:
    """Draw x and z from p(x, z): the arguments with the drawn x in place of the observed one, and z by site."""
    args = copies_of(args)
    observed, trace = sample_sites(traced(model, args)), traced(drawing(model), args)
    drawn = sample_sites(trace)
    check_draws(labelled(drawn, {}))
    for name, site in observed.items():
        if is_factor(site):
            raise PyroVAEError(
                f"model site '{name}' is a factor: expected a model that can be simulated. Use pv.ais, on data."
            )
    replaced, missing = _replaced(model, args, observed, drawn)
    if missing:
        raise PyroVAEError(
            f"model site '{missing[0]}' observes something that is no part of an argument of the model: expected obs= "
            "to be an argument or elements of one, such as x[:, 0], so that simulated data can take its place. "
            "Preprocess x before the call."
        )
    before, after = given_either(model, trace, (args, {}), (replaced, {}))
    for name, site in before.items():
        if not same_density(site, after.get(name)) or not same_masks(site, after[name]):
            raise PyroVAEError(
                f"model site '{name}' has another density, or mask, when the model is called with its simulated data: "
                "expected a model that uses x only in obs=, so that one run can simulate it. Use pv.ais, on data."
            )
    return replaced, {name: drawn[name]["value"] for name, site in observed.items() if not site["is_observed"]}


def sites_that_read(program: Program) -> list[str]:
    """The sites whose density reads data that the model observes, as in teacher forcing: one run can't draw them."""
    args = copies_of(program.args)
    with program.unnoticed():
        observed = sample_sites(program.on(args).trace()[0])
        latents = {name: site["value"] for name, site in observed.items() if not site["is_observed"]}
        model = poutine.replay(program.model, trace=given(latents))
        trace = traced(drawing(model), args)
        replaced, missing = _replaced(model, args, observed, sample_sites(trace))
        sources = list(_sources(model, args, observed, missing))
        if missing and not sources and args:
            return missing  # whether they are read can't be seen, since no argument changes them
        for i, other in sources:
            replaced = (*replaced[:i], other, *replaced[i + 1 :])
        # Other data that have no place among the arguments stay as they are drawn, in both runs.
        before, after = given_either(drawing(model), trace, (args, {}), (replaced, {}))
    return [name for name, site in before.items() if not is_factor(site) and not same_density(site, after.get(name))]


def _sources(model: PyroFunction, args: Args, observed: Sites, names: list[str]) -> Iterator[tuple[int, Tensor]]:
    """The arguments of which observed data are functions, such as (x - mean) / scale, each with its rows moved."""
    for i, argument in enumerate(args if names else ()):
        if argument.dtype == torch.bool or not argument.dim():  # a mask, which the model may read
            continue
        other = argument.roll(1, 0)
        if torch.equal(other, argument):
            other = argument.flatten().roll(1).reshape(argument.shape)
        try:
            nodes = traced(model, (*args[:i], other, *args[i + 1 :])).nodes
        except (RuntimeError, ValueError, IndexError, AssertionError):  # such as lengths, which must be in order
            continue
        if any(name not in nodes or not equal(nodes[name]["value"], observed[name]["value"]) for name in names):
            yield i, other


def _replaced(model: PyroFunction, args: Args, observed: Sites, drawn: Sites) -> tuple[Args, list[str]]:
    """The arguments with the drawn data in place of the observed ones, and the sites that observe no part of them."""
    replaced, missing = list(copies_of(args)), []
    for name, site in observed.items():
        if not site["is_observed"] or is_factor(site) or is_deterministic(site):
            continue
        value = site["value"]
        positions = _positions(model, args, name, value)
        for i, taken in positions.items():
            new = drawn[name]["value"]
            if new.numel() != len(taken):
                raise PyroVAEError(
                    f"model site '{name}' observes data of shape {tuple(value.shape)} where it draws some of shape "
                    f"{tuple(new.shape)}: expected data of the shape of its distribution, a row for each datum. Pass x "
                    "of that shape."
                )
            replaced[i].view(-1)[taken] = new.flatten().to(replaced[i])
        if not positions:
            missing.append(name)
    return tuple(replaced), missing


def _positions(model: PyroFunction, args: Args, name: str, value: Tensor) -> dict[int, Tensor]:
    """The arguments that an observed value consists of, each with the positions of its elements there."""
    return _of_views(value, args) or _of_copies(model, args, name) or _of_equals(value, args)


def places_in(model: PyroFunction, args: Args, name: str, value: Tensor) -> Tensor | None:
    """Where the elements of an observed value stand in a row of the arguments; None if they are not from there as such.

    The arguments must be copies, as :func:`copies_of` makes them.
    """
    positions = _positions(model, args, name, value)
    if len(positions) != 1:
        return None
    ((i, taken),) = positions.items()
    before = sum(argument[0].numel() for argument in args[:i])
    return (before + taken % max(1, args[i][0].numel())).reshape(value.shape)


def copies_of(args: Args) -> Args:
    """Copies of the arguments, each with a storage of its own, whose positions tell which elements are observed."""
    return tuple(argument.clone(memory_format=torch.contiguous_format) for argument in args)


def _of_views(value: Tensor, args: Args) -> dict[int, Tensor]:
    """The arguments that an observed value is, or is a view of, each with the positions of its elements there."""
    found = {}
    for i, argument in enumerate(args):
        is_view = value.untyped_storage().data_ptr() == argument.untyped_storage().data_ptr()
        if is_view and value.dtype == argument.dtype:
            places = _places(argument).as_strided(value.shape, value.stride(), value.storage_offset()).flatten()
            if len(places.unique()) == len(places):
                found[i] = places
    return found


def _of_equals(value: Tensor, args: Args) -> dict[int, Tensor]:
    """The same for arguments of equal numbers, such as integers in another type."""
    alike = {i: each for i, each in enumerate(args) if each.numel() == value.numel()}
    return {i: _places(each) for i, each in alike.items() if equal(each.reshape(value.shape), value)}


def _places(argument: Tensor) -> Tensor:
    return torch.arange(argument.numel(), device=argument.device)


def _of_copies(model: PyroFunction, args: Args, name: str) -> dict[int, Tensor]:
    """The same for a copy of some elements, such as x[rows, t]: its derivative tells which ones they are."""
    leaves = [argument.clone().requires_grad_(argument.is_floating_point()) for argument in args]
    with torch.enable_grad():
        value: Any = traced(model, tuple(leaves)).nodes[name]["value"]
    if not value.requires_grad or value.numel() > MOST_EXACT:
        return {}
    order = torch.arange(1, value.numel() + 1, device=value.device).to(value)
    for i, leaf in enumerate(leaves):
        if not leaf.requires_grad:
            continue
        (slope,) = torch.autograd.grad(
            value, leaf, order.reshape(value.shape), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        seen = slope.flatten().nonzero()[:, 0]
        places = seen[slope.flatten()[seen].argsort()]
        if torch.equal(slope.flatten()[places], order.to(slope)) and torch.equal(
            args[i].flatten()[places].to(value), value.detach().flatten()
        ):
            return {i: places}
    return {}
