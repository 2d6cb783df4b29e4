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
    observed = sample_sites(traced(model, args))
    trace = traced(poutine.uncondition(model), args)
    drawn = sample_sites(trace)
    replaced, latents = list(args), {}
    for name, site in observed.items():
        value = site["value"]
        if not site["is_observed"]:
            latents[name] = drawn[name]["value"]
            continue
        if is_factor(site):
            raise PyroVAEError(
                f"model site '{name}' is a factor: expected a model that can be simulated. Use pv.ais, on data."
            )
        places = [i for i, a in enumerate(args) if a.numel() == value.numel() and equal(a.reshape(value.shape), value)]
        if not places:
            raise PyroVAEError(
                f"model site '{name}' observes something that is not an argument of the model: expected obs= to be an "
                "unchanged argument, so that simulated data can take its place. Preprocess x before the call."
            )
        for place in places:
            replaced[place] = drawn[name]["value"].reshape(args[place].shape).to(args[place])
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
