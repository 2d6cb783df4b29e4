"""Refuses a program that mixes particles or data where it runs for several particles at once."""

import warnings
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.engine.program import Program
from pyro_vae.engine.sites import being_recorded, labelled, unwrapped
from pyro_vae.engine.traces import given, in_particles, sample_sites, traced
from pyro_vae.errors import PyroVAEError

CAUSE = (
    "An operation that counts dimensions from the left, such as dim=1, meets another dimension where latents have one "
    "more there. Count from the right (dim=-1), wrap networks in pyro_vae.networks.apply_batched, or pass "
    "vectorize_particles=False."
)


def check_particles(program: Program, traces: tuple[Trace, Trace] | None = None) -> None:
    """Compare each site's density in a run of two different particles with that of the first particle alone.

    They differ where an operation over a dimension that is counted from the left, such as ``dim=1``, meets the
    particles' dimension. No other check could show it: the shapes fit, and all numbers are finite. `traces` are those
    of the model and the guide for one particle, if they ran before.
    """
    if being_recorded():
        return
    with program.unnoticed():
        traces = traces or program.trace()
        nodes: dict[str, Any] = {
            name: site for trace in traces for name, site in trace.nodes.items() if site["type"] == "sample"
        }
        # A Delta is a function of other sites. Given its value, one unit of rounding would make its density zero.
        drawn: dict[str, Any] = {
            name: site["value"]
            for name, site in nodes.items()
            if not (site["is_observed"] or isinstance(unwrapped(site["fn"]), Delta))
        }
        subsamples = {name: value for name, value in drawn.items() if site_is_subsample(nodes[name])}
        guide = poutine.replay(program.guide_or_prior, trace=given(subsamples))
        second = traced(guide, program.args, program.kwargs).nodes
        particle_dim = -(program.nesting or 0) - 1
        both = dict(subsamples)
        for name in drawn.keys() - subsamples.keys():
            pair: Any = drawn[name], second[name]["value"] if name in second else drawn[name]
            if not isinstance(pair[0], Tensor) or pair[0].shape != pair[1].shape:
                return  # no program for several particles at once, whose run says so
            shape = (1,) * (-particle_dim - 1 + nodes[name]["fn"].event_dim - pair[0].dim()) + tuple(pair[0].shape)
            both[name] = torch.stack([value.reshape(shape) for value in pair])
            for carried in vars(pair[0]).keys() & vars(pair[1]).keys():  # a straight-through sample's soft value
                soft = [getattr(value, carried) for value in pair]
                if all(isinstance(each, Tensor) and each.shape == pair[0].shape for each in soft):
                    setattr(both[name], carried, torch.stack([each.reshape(shape) for each in soft]))
        try:
            first = _densities(traces)
            together = _densities(_run(program, both, particle_dim))
        except (RuntimeError, IndexError, ValueError):
            return  # it fails again in the run that follows, which says how many particles there were
        except (KeyError, NotImplementedError):
            return  # a flow without an inverse has no density at given values
        for words, log_prob in first.items():
            with_other = together.get(words, log_prob)
            if with_other.dim() >= -particle_dim and with_other.shape[particle_dim] == 2:
                with_other = with_other.select(particle_dim, 0)
            if _same(with_other, log_prob):
                continue
            again = _densities(program.trace(drawn))
            if not _same(again.get(words, log_prob), log_prob):
                warnings.warn(
                    f"{words} has another density when the program runs again at the same values, so that the program "
                    "is noisy outside of its sample sites, and pyro_vae can't check that it keeps particles apart.",
                    stacklevel=2,
                )
                return
            program.run(2)  # refuses what has a message of its own
            raise PyroVAEError(
                f"{words} has another density for a particle alone than for the same particle beside another one: "
                f"expected a program that computes each particle by itself, got a mean of {log_prob.mean():.6g} alone, "
                f"and of {with_other.mean():.6g} in a run of two particles. {CAUSE}"
            )


def _run(program: Program, values: dict[str, Tensor], particle_dim: int) -> tuple[Trace, Trace]:
    """The traces of model and guide for two particles at given values."""
    trace, functions = given(values), (program.guide_or_prior, program.model)
    guide, model = (poutine.replay(in_particles(function, 2, particle_dim), trace=trace) for function in functions)
    guide_trace = traced(guide, program.args, program.kwargs)
    model = poutine.replay(model, trace=guide_trace)  # which has what the guide computed too: its Deltas
    return traced(model, program.args, program.kwargs), guide_trace


def _densities(traces: tuple[Trace, Trace]) -> dict[str, Tensor]:
    """The log-density of each site by the words that a message calls it."""
    model, guide = map(sample_sites, traces)
    return {words: site["unscaled_log_prob"] for words, site in labelled(model, guide).items()}


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether two log-densities agree up to the rounding of networks that run for other numbers of rows."""
    half = torch.bfloat16 in (first.dtype, second.dtype) or torch.float16 in (first.dtype, second.dtype)
    try:
        first, second = torch.broadcast_tensors(first.double(), second.double())
    except RuntimeError:
        return False
    return torch.allclose(first, second, rtol=1e-1 if half else 1e-4, atol=1.0 if half else 1e-3, equal_nan=True)
