"""Whether one run of a model can draw what it observes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace

from pyro_vae.engine.drawing import drawing
from pyro_vae.engine.modules import PyroFunction
from pyro_vae.engine.program import Program
from pyro_vae.engine.sites import Site, Sites
from pyro_vae.engine.traces import sample_sites
from pyro_vae.errors import PyroVAEError

Call = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments and the keyword arguments of a model


@contextmanager
def prior_that_draws(instead: str) -> Iterator[None]:
    """Around draws from a prior, which an improper one does not have; the message says what to use instead."""
    try:
        yield
    except NotImplementedError as error:
        if "support sampling" not in str(error):
            raise
        raise PyroVAEError(
            f"{str(error).splitlines()[0]}: expected latents that can be drawn from their prior. Use {instead}."
        ) from error


def given_either(model: PyroFunction, draws: Trace, data: Call, drawn: Call) -> tuple[Sites, Sites]:
    """The sites of the model at these draws, called with the data and with the drawn data in their place.

    A site with another density reads the data that it, or another site, observes: one run can't simulate it.
    """
    both = []
    for (args, kwargs), each in ((data, drawing(model)), (drawn, model)):
        # Batch norm must not notice such a run, and both draw dropout from one state, so that only the data differ.
        trace, _ = Program(poutine.replay(each, trace=draws), lambda *_, **__: None, args, kwargs).trace()
        both.append(sample_sites(trace))
    return both[0], both[1]


def same_density(first: Site, second: Site | None) -> bool:
    """Whether a site has one log-density in two runs, where the first one's mask counts it; None is no such site."""
    if second is None or first["unscaled_log_prob"].shape != second["unscaled_log_prob"].shape:
        return False
    a, b = (scale_and_mask(site["unscaled_log_prob"], mask=first["mask"]) for site in (first, second))
    return torch.allclose(a, b.to(a.dtype), rtol=1e-3, atol=1e-2, equal_nan=True)
