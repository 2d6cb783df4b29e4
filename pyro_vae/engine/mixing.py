"""Refuses a program that mixes data, or particles where several run at once."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.devices import wide
from pyro_vae.engine import agreement
from pyro_vae.engine.batch_plate import find_batch_plate
from pyro_vae.engine.program import Program
from pyro_vae.engine.sites import Plate, Sites, being_recorded, labelled, unwrapped
from pyro_vae.engine.traces import At, in_particles, sample_sites, traced
from pyro_vae.errors import PyroVAEError

Values = dict[str, Tensor]
Traces = tuple[Trace, Trace]  # of the model and the guide

WEAK = 1e-3  # nats by which a datum's density may depend on other data's latents, with a warning
CAUSE = (
    "An operation that counts dimensions from the left, such as dim=1, meets another dimension where latents have one "
    "more there. Count from the right (dim=-1), wrap networks in pyro_vae.networks.apply_batched, or pass "
    "vectorize_particles=False."
)


def check_apart(program: Program, *, together: bool, traces: Traces | None = None) -> None:
    """Refuse a program whose data depend on each other's latents, or whose particles, run `together`, on each other.

    No other check could show it: the shapes fit, and all numbers are finite. `traces` are those of the model and the
    guide for one particle, if they ran before.
    """
    if being_recorded() or not (program.needs.per_datum or together):
        return
    with program.unnoticed():
        first = traces or program.trace()
        pyro.set_rng_seed(1 + int(torch.randint(2**30, ())))  # another seed than that of the first traces
        plate = _batch_plate(first) if program.needs.per_datum else None
        if plate is None and not together:
            return
        nodes = _sites(first)
        fixed = {name: site["value"] for name, site in nodes.items() if site_is_subsample(site)}
        drawn = _drawn(nodes)
        few = {name: value for name, value in drawn.items() if agreement.has_few_values(nodes[name]["fn"])}
        changed = {name: agreement.another(nodes[name]["fn"], value) for name, value in few.items()}
        # What depends on the changed values is drawn given them, since they may move its support.
        again = traced(At(fixed | changed)(program.guide_or_prior), program.args, program.kwargs)
        other = _drawn(again.nodes)
        for name in drawn:
            pair: Any = drawn[name], other.get(name)
            if not all(isinstance(each, Tensor) for each in pair) or pair[0].shape != pair[1].shape:
                return  # no program for several particles at once, whose run says so
        try:
            if plate is None:
                values, runs = [drawn, other], [first, _run(program, other | fixed)]
            else:
                half = torch.randperm(plate.size) < plate.size // 2
                values = [_mixed(nodes, plate, drawn, other, rows) for rows in (half, ~half)]
                runs = [_run(program, each | fixed) for each in values]
                for rows, run in zip((half, ~half), runs, strict=True):
                    _check_rows(program, plate, rows, first, run, drawn | fixed)
            if together:
                _check_particles(program, values, runs, fixed)
        except (KeyError, NotImplementedError):
            _warn("the density of a guide site at a given value can't be computed (a flow without an inverse, say)")
        except PyroVAEError:
            raise
        except (RuntimeError, IndexError, ValueError) as error:
            _warn(f"the program fails at latents of another draw ({error})")


def _batch_plate(traces: Traces) -> Plate | None:
    """The batch plate, if it has several rows."""
    try:
        plate = find_batch_plate(labelled(*map(sample_sites, traces)))
    except PyroVAEError:
        return None  # the run that follows says why, or takes all as one datum
    return plate if plate.size > 1 else None


def _mixed(nodes: Sites, plate: Plate, first: Values, second: Values, rows: Tensor) -> Values:
    """The first draw's values in these rows of the batch plate, and others elsewhere."""
    mixed = {}
    for name, value in first.items():
        dim = plate.dim - nodes[name]["fn"].event_dim
        has_rows = value.dim() >= -dim and value.shape[dim] == plate.size
        here = rows.to(value.device).reshape(-1, *[1] * (-dim - 1))
        join: Any = functools.partial(torch.where, here)
        mixed[name] = _joined((value, second[name]), join) if has_rows else value
    return mixed


def _check_rows(program: Program, plate: Plate, rows: Tensor, first: Traces, mixed: Traces, values: Values) -> None:
    """Compare some rows' densities with those in a run in which the other rows have other latents."""
    alone, others = _densities(first), _densities(mixed)
    for words, by_itself in alone.items():
        kept, with_others = (_of_rows(each, plate, rows) for each in (by_itself, others.get(words, by_itself)))
        if _same(kept, with_others, of_one_size=True):
            continue
        twice = [_densities(_run(program, values)).get(words, by_itself) for _ in range(2)]
        if _same(_of_rows(twice[0], plate, rows), with_others, of_one_size=True):
            continue
        if not _same(*twice, of_one_size=True):
            _warn_of_noise(words)
            return
        change = _of_data(kept - with_others, plate).abs().max().item()
        if change < WEAK:
            warnings.warn(
                f"{words} changes by {change:.1g} nats for a datum when other data have other latents, as with a "
                "solver that has one step size for all data. Numbers of one datum have an error of about that size. "
                "This is checked once: the error may grow in training.",
                stacklevel=3,
            )
            continue
        raise PyroVAEError(
            f"{words} has another density for a datum when other data have other latents: expected rows of the "
            f"batch plate '{plate.name}' that depend on their own latents alone, got a mean "
            f"log-density of {kept.mean():.6g}, and of {with_others.mean():.6g} with other latents elsewhere. Such "
            "rows have no log-weights of their own. Make what belongs together (a time series, a graph) one row of the "
            "batch plate, with its steps in a nested plate or an event; replace layers that use statistics of the "
            "batch, or a solver with one step size for all rows; or use pv.ELBO's pathwise loss, which needs the sum "
            "alone."
        )


def _check_particles(program: Program, values: list[Values], runs: list[Traces], fixed: Values) -> None:
    """Compare each site's density in a run of two different particles with that of each particle alone.

    They differ where an operation over a dimension that is counted from the left, such as ``dim=1``, meets the
    particles' dimension.
    """
    nodes, particle_dim = _sites(runs[0]), -(program.nesting or 0) - 1
    both = dict(fixed)
    for name, value in values[0].items():
        shape = (1,) * (-particle_dim - 1 + nodes[name]["fn"].event_dim - value.dim()) + tuple(value.shape)
        both[name] = _joined((value, values[1][name]), functools.partial(_stack, shape))
    try:
        alone = [_densities(each) for each in runs]
        together = _densities(_run(program, both, 2, particle_dim))
    except NotImplementedError:
        raise
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
        given_twice = [_densities(_run(program, values[k] | fixed)).get(words, by_itself) for _ in range(2)]
        if _same(with_other, given_twice[0]):
            continue
        if not _same(*given_twice):
            _warn_of_noise(words)
            return
        program.run(2)  # refuses what has a message of its own
        raise PyroVAEError(
            f"{words} has another density for a particle alone than for the same particle beside another one: "
            "expected a program that computes each particle by itself, got a mean log-density of "
            f"{by_itself.mean():.6g} alone, and of {with_other.mean():.6g} in a run of two particles. {CAUSE}"
        )


def _joined(pair: tuple[Tensor, Tensor], join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Two values of a site as one, with what both carry: a straight-through sample's soft value."""
    joined = join(*pair)
    for name in vars(pair[0]).keys() & vars(pair[1]).keys():
        soft = [getattr(value, name) for value in pair]
        if all(isinstance(each, Tensor) and each.shape == pair[0].shape for each in soft):
            setattr(joined, name, join(*soft))
    return joined


def _stack(shape: tuple[int, ...], first: Tensor, second: Tensor) -> Tensor:
    return torch.stack([first.reshape(shape), second.reshape(shape)])


def _of_rows(log_density: Tensor, plate: Plate, rows: Tensor) -> Tensor:
    """Some rows of a log-density; all of one that has no dimension for them."""
    if log_density.dim() < -plate.dim or log_density.shape[plate.dim] != len(rows):
        return log_density
    return log_density.index_select(plate.dim, rows.nonzero().squeeze(-1).to(log_density.device))


def _of_data(change: Tensor, plate: Plate) -> Tensor:
    """The sum over all dimensions but that of the batch plate."""
    has_rows = change.dim() >= -plate.dim
    return change.movedim(plate.dim, 0).flatten(1).sum(1) if has_rows and change.dim() > 1 else change


def _warn(why: str) -> None:
    warnings.warn(f"{why}: pyro_vae can't check that the program keeps particles and data apart.", stacklevel=3)


def _warn_of_noise(words: str) -> None:
    _warn(
        f"{words} has another density when the program runs again at the same values, so that the program is noisy "
        "outside of its sample sites"
    )


def _sites(traces: Traces) -> Sites:
    """The sample sites of both traces; of one name, the guide's."""
    return {n: s for trace in traces for n, s in trace.nodes.items() if s["type"] == "sample"}


def _drawn(nodes: Sites) -> Values:
    """The values of the latent sites, but for Deltas.

    A Delta is a function of other sites. Given its value, one unit of rounding would make its density zero.
    """
    return {
        name: site["value"]
        for name, site in nodes.items()
        if site["type"] == "sample" and not site["is_observed"]
        if not (site_is_subsample(site) or isinstance(unwrapped(site["fn"]), Delta))
    }


def _run(program: Program, values: dict[str, Tensor], number: int = 1, particle_dim: int | None = None) -> Traces:
    """The traces of model and guide at given values."""
    functions = program.guide_or_prior, program.model
    guide, model = (At(values)(in_particles(function, number, particle_dim)) for function in functions)
    guide_trace = traced(guide, program.args, program.kwargs)
    model = poutine.replay(model, trace=guide_trace)  # which has what the guide computed too: its Deltas
    return traced(model, program.args, program.kwargs), guide_trace


def _densities(traces: Traces) -> dict[str, Tensor]:
    """The masked log-density of each site by the words that a message calls it."""
    sites = labelled(*map(sample_sites, traces))
    return {w: scale_and_mask(site["unscaled_log_prob"], mask=site["mask"]) for w, site in sites.items()}


def _same(first: Tensor, second: Tensor, *, of_one_size: bool = False) -> bool:
    """Whether two log-densities agree up to rounding, which is larger between networks on other numbers of rows."""
    half = torch.bfloat16 in (first.dtype, second.dtype) or torch.float16 in (first.dtype, second.dtype)
    rtol, atol = (1e-5, 1e-5) if of_one_size else (1e-1, 1.0) if half else (1e-4, 1e-3)
    try:
        first, second = torch.broadcast_tensors(wide(first), wide(second))
    except RuntimeError:
        return False
    return torch.allclose(first, second, rtol=rtol, atol=atol, equal_nan=True)
