"""Simulated data for bdmc: the model's own draws of x and z, with x as arguments of the model."""

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.engine.modules import PyroFunction
from pyro_vae.engine.sites import equal, is_factor, same_masks
from pyro_vae.engine.traces import sample_sites, traced
from pyro_vae.errors import PyroVAEError
from pyro_vae.evaluation.pieces import Args


def simulate_data(model: PyroFunction, args: Args) -> tuple[Args, dict[str, Tensor]]:
    """Draw x and z from p(x, z): the arguments with the drawn x in place of the observed one, and z by site."""
    args = tuple(argument.contiguous() for argument in args)  # whose clones have the same strides
    observed = sample_sites(traced(model, args))
    trace = traced(poutine.uncondition(model), args)
    drawn = sample_sites(trace)
    replaced, latents = [argument.clone() for argument in args], {}
    for name, site in observed.items():
        value = site["value"]
        if not site["is_observed"]:
            latents[name] = drawn[name]["value"]
            continue
        if is_factor(site):
            raise PyroVAEError(
                f"model site '{name}' is a factor: expected a model that can be simulated. Use pv.ais, on data."
            )
        places = [_place(value, *each) for each in zip(args, replaced, strict=True)]
        if all(place is None for place in places):
            raise PyroVAEError(
                f"model site '{name}' observes something that is no part of an argument of the model: expected obs= to "
                "be an argument or a view of one, such as x[:, 0], so that simulated data can take its place. "
                "Preprocess x before the call."
            )
        for place in places:
            if place is not None:
                place.copy_(drawn[name]["value"].reshape(place.shape))
    again = sample_sites(traced(poutine.replay(model, trace=trace), tuple(replaced)))
    for name in observed:
        first, second = drawn[name]["unscaled_log_prob"], again[name]["unscaled_log_prob"]
        same = torch.allclose(first, second, rtol=1e-3, atol=1e-2, equal_nan=True)
        if not same or not same_masks(drawn[name], again[name]):
            raise PyroVAEError(
                f"model site '{name}' has another density, or mask, when the model is called with its simulated data: "
                "expected a model that uses x only in obs=, so that one run can simulate it. Use pv.ais, on data."
            )
    return tuple(replaced), latents


def _place(observed: Tensor, argument: Tensor, new: Tensor) -> Tensor | None:
    """The part of `new`, a copy of the argument, that belongs to what a site observes; None if it is no part of it."""
    first = observed.storage_offset() - argument.storage_offset()
    last = first + sum((size - 1) * stride for size, stride in zip(observed.shape, observed.stride(), strict=True))
    is_view = observed.untyped_storage().data_ptr() == argument.untyped_storage().data_ptr()
    once = all(size == 1 or stride for size, stride in zip(observed.shape, observed.stride(), strict=True))
    if is_view and once and observed.dtype == argument.dtype and first >= 0 and last < argument.numel():
        return new.as_strided(observed.shape, observed.stride(), new.storage_offset() + first)
    if argument.numel() == observed.numel() and equal(argument.reshape(observed.shape), observed):
        return new
    return None
