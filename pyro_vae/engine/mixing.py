"""Refuses a program that mixes particles or data where it runs for several particles at once."""

import warnings
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.engine.program import Program
from pyro_vae.engine.sites import Sites, being_recorded, labelled, unwrapped
from pyro_vae.engine.traces import At, in_particles, sample_sites, traced
from pyro_vae.errors import PyroVAEError

CAUSE = (
    "An operation that counts dimensions from the left, such as dim=1, meets another dimension where latents have one "
    "more there. Count from the right (dim=-1), wrap networks in pyro_vae.networks.apply_batched, or pass "
    "vectorize_particles=False."
)


def check_particles(program: Program, traces: tuple[Trace, Trace] | None = None) -> None:
    """Compare each site's density in a run of two different particles with that of each particle alone.

    They differ where an operation over a dimension that is counted from the left, such as ``dim=1``, meets the
    particles' dimension. No other check could show it: the shapes fit, and all numbers are finite. `traces` are those
    of the model and the guide for one particle, if they ran before.
    """
    if being_recorded():
        return
    with program.unnoticed():
        first = traces or program.trace()
        nodes = _sites(first)
        subsamples = {name: site["value"] for name, site in nodes.items() if site_is_subsample(site)}
        pair_of_traces = first, _run(program, subsamples)
        values = [_drawn(each) | subsamples for each in pair_of_traces]
        particle_dim = -(program.nesting or 0) - 1
        both = dict(subsamples)
        for name in values[0].keys() - subsamples.keys():
            pair: Any = [each.get(name) for each in values]
            if not all(isinstance(each, Tensor) for each in pair) or pair[0].shape != pair[1].shape:
                return  # no program for several particles at once, whose run says so
            shape = (1,) * (-particle_dim - 1 + nodes[name]["fn"].event_dim - pair[0].dim()) + tuple(pair[0].shape)
            both[name] = torch.stack([value.reshape(shape) for value in pair])
            for carried in vars(pair[0]).keys() & vars(pair[1]).keys():  # a straight-through sample's soft value
                soft = [getattr(value, carried) for value in pair]
                if all(isinstance(each, Tensor) and each.shape == pair[0].shape for each in soft):
                    setattr(both[name], carried, torch.stack([each.reshape(shape) for each in soft]))
        try:
            alone = [_densities(each) for each in pair_of_traces]
            together = _densities(_run(program, both, 2, particle_dim))
        except (KeyError, NotImplementedError):
            _warn("the density of a guide site at a given value can't be computed (a flow without an inverse, say)")
            return
        except (RuntimeError, IndexError, ValueError):
            return  # it fails again in the run that follows, which says how many particles there were
        for words, k in [(words, k) for words in alone[0] for k in (0, 1)]:
            by_itself = alone[k].get(words, alone[0][words])
            with_other = together.get(words, by_itself)
            if with_other.dim() >= -particle_dim and with_other.shape[particle_dim] == 2:
                with_other = with_other.select(particle_dim, k)
            if _same(with_other, by_itself):
                continue
            # A flow's cache gives the density of a draw, and its inverse, with fewer digits, that of a given value.
            given_twice = [_densities(_run(program, values[k])).get(words, by_itself) for _ in range(2)]
            if _same(with_other, given_twice[0]):
                continue
            if not _same(*given_twice):
                _warn(
                    f"{words} has another density when the program runs again at the same values, so that the program "
                    "is noisy outside of its sample sites"
                )
                return
            program.run(2)  # refuses what has a message of its own
            raise PyroVAEError(
                f"{words} has another density for a particle alone than for the same particle beside another one: "
                "expected a program that computes each particle by itself, got a mean of "
                f"{by_itself.mean():.6g} alone, and of {with_other.mean():.6g} in a run of two particles. {CAUSE}"
            )


def _warn(why: str) -> None:
    warnings.warn(f"{why}: pyro_vae can't check that the program keeps particles apart.", stacklevel=3)


def _sites(traces: tuple[Trace, Trace]) -> Sites:
    """The sample sites of both traces; of one name, the guide's."""
    return {n: s for trace in traces for n, s in trace.nodes.items() if s["type"] == "sample"}


def _drawn(traces: tuple[Trace, Trace]) -> dict[str, Any]:
    """The values of the latent sites, but for Deltas.

    A Delta is a function of other sites. Given its value, one unit of rounding would make its density zero.
    """
    return {
        name: site["value"]
        for name, site in _sites(traces).items()
        if not (site["is_observed"] or isinstance(unwrapped(site["fn"]), Delta))
    }


def _run(
    program: Program, values: dict[str, Tensor], number: int = 1, particle_dim: int | None = None
) -> tuple[Trace, Trace]:
    """The traces of model and guide at given values."""
    functions = program.guide_or_prior, program.model
    guide, model = (At(values)(in_particles(function, number, particle_dim)) for function in functions)
    guide_trace = traced(guide, program.args, program.kwargs)
    model = poutine.replay(model, trace=guide_trace)  # which has what the guide computed too: its Deltas
    return traced(model, program.args, program.kwargs), guide_trace


def _densities(traces: tuple[Trace, Trace]) -> dict[str, Tensor]:
    """The masked log-density of each site by the words that a message calls it."""
    sites = labelled(*map(sample_sites, traces))
    return {w: scale_and_mask(site["unscaled_log_prob"], mask=site["mask"]) for w, site in sites.items()}


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether two log-densities agree up to the rounding of networks that run for other numbers of rows."""
    half = torch.bfloat16 in (first.dtype, second.dtype) or torch.float16 in (first.dtype, second.dtype)
    try:
        first, second = torch.broadcast_tensors(first.double(), second.double())
    except RuntimeError:
        return False
    return torch.allclose(first, second, rtol=1e-1 if half else 1e-4, atol=1.0 if half else 1e-3, equal_nan=True)
