"""Runs for an evaluation: of all particles at once, or of one particle after another, joined to one run."""

import copy
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor
from torch.distributions import Independent

from pyro_vae.engine.particles import Particles
from pyro_vae.engine.program import Program, Run
from pyro_vae.engine.sites import Site, Sites, is_deterministic, unwrapped
from pyro_vae.errors import PyroVAEError
from pyro_vae.evaluation.families import OF_ONE_PARTICLE, constructor_arguments, suffices

Values = dict[str, Tensor]


def run(program: Program, number: int, vectorize: bool) -> Run:
    """A run with samples of the guide."""
    runs = Particles(number, vectorize).read(program, lambda run: run)
    return runs[0] if vectorize else _joined(runs)


def run_at(program: Program, values: Values, number: int, vectorize: bool) -> Run:
    """A run at given values, whose particles are the first dimension."""
    if vectorize:
        return program.run_at(values, number)
    return _joined([program.run_at(_one(values, k)) for k in range(number)])


def laid_out(run: Run, site: Site) -> tuple[Tensor, list[str]]:
    """A site's value as (K, N, *nested, *event), and the names of the plates nested in the batch plate."""
    value, depth = site["value"], -run.particle_dim
    value = value.reshape((1,) * (depth + site["fn"].event_dim - value.dim()) + tuple(value.shape))
    batch_dim = depth + run.batch_plate.dim
    plates = {depth + frame.dim: frame.name for frame in site["cond_indep_stack"] if frame.vectorized}
    nested = sorted(plates.keys() - {0, batch_dim})
    shape = list(value.shape)
    shape[0], shape[batch_dim] = run.num_particles, run.batch_plate.size
    order = [0, batch_dim, *nested, *range(depth, len(shape))]
    others = [dim for dim in range(depth) if dim not in order]  # of size 1
    return value.expand(shape).permute(*order, *others).flatten(len(order) - 1), [plates[dim] for dim in nested]


def simulate(program: Program, values: Values | None, number: int, vectorize: bool) -> Sites:
    """The model's sites with new data, at given values of the latents or at draws from the prior."""
    if vectorize:
        return program.simulate(values, number)
    return _joined_sites([program.simulate(values and _one(values, k)) for k in range(number)], program.depth)


def _one(values: Values, particle: int) -> Values:
    return {name: value[particle] for name, value in values.items()}


def _joined(runs: list[Run]) -> Run:
    """One run with all particles."""
    first, depth = runs[0], -runs[0].particle_dim
    model, guide = ([getattr(each, which) for each in runs] for which in ("model", "guide"))
    return first._replace(
        model=_joined_sites(model, depth), guide=_joined_sites(guide, depth), num_particles=len(runs), samples=[]
    )


def _joined_sites(each: list[Sites], depth: int) -> Sites:
    for sites in each:
        if sites.keys() != each[0].keys():
            raise PyroVAEError(
                f"the program has sites {list(each[0])} for one particle and {list(sites)} for another: expected the "
                "same sites in each run. Mask a site where it is absent, instead of leaving it out."
            )
    return {name: _joined_site([sites[name] for sites in each], depth) for name in each[0]}


def _joined_site(sites: list[Site], depth: int) -> Site:
    """A site with the particles' values, densities, masks and parameters along a new first dimension."""
    first, event_dim = sites[0], sites[0]["fn"].event_dim
    of_data = first["is_observed"] and not is_deterministic(first)

    def along(key: str, dims: int) -> Any:
        values = [site[key] for site in sites]
        return _stacked(values, dims) if isinstance(values[0], Tensor) else values[0]

    return first | {
        "value": first["value"] if of_data else along("value", depth + event_dim),
        "unscaled_log_prob": _stacked([site["unscaled_log_prob"] for site in sites], depth),
        "mask": along("mask", depth),
        "fn": _joined_fn([site["fn"] for site in sites], depth),
    }


def _stacked(values: list[Tensor], dims: int) -> Tensor:
    """Tensors along a new first dimension of `dims`."""
    return torch.cat([value.reshape((1,) * (dims - value.dim()) + tuple(value.shape)) for value in values])


def _joined_fn(fns: list[Any], depth: int) -> Any:
    first: Any = fns[0]
    if isinstance(first, Independent | MaskedDistribution):
        joined: Any = copy.copy(first)
        inner = depth
        if isinstance(first, Independent):
            inner += first.reinterpreted_batch_ndims
        joined.base_dist = _joined_fn([fn.base_dist for fn in fns], inner)
        masks: list[Any] = [getattr(fn, "_mask", None) for fn in fns]
        if isinstance(masks[0], Tensor):
            joined._mask = _stacked(masks, depth)
        outer = joined.base_dist.batch_shape
        joined._batch_shape = outer[: len(outer) - (inner - depth)]
        return joined
    parameters = [constructor_arguments(fn) for fn in fns]
    if not suffices(parameters[0], first):
        standing = copy.copy(unwrapped(first))  # has the support and the shape of an event
        setattr(standing, OF_ONE_PARTICLE, True)
        return standing
    dims = {name: value.dim() - len(first.batch_shape) + depth for name, value in parameters[0].items()}
    return type(unwrapped(first))(**{n: _stacked([each[n] for each in parameters], d) for n, d in dims.items()})
