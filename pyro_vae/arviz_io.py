"""Draws, densities and log-weights of a program as ArviZ groups, for ArviZ 0.2x and 1.x."""

from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.engine import rng
from pyro_vae.engine.arguments import takes_program
from pyro_vae.engine.batch_plate import check_rows
from pyro_vae.engine.mixing import check_particles
from pyro_vae.engine.modules import PyroFunction, eval_mode
from pyro_vae.engine.program import Program, Run
from pyro_vae.engine.simulation import OfObservedShape
from pyro_vae.engine.sites import Site, family, is_factor
from pyro_vae.engine.weights import log_density, per_datum, terms
from pyro_vae.errors import PyroVAEError, require_count
from pyro_vae.evaluation.pieces import program_on
from pyro_vae.evaluation.runs import run, simulate
from pyro_vae.evaluation.simulation import check_simulated

PARTICLES_AT_ONCE = 64  # of the model, whose draws of x are the largest tensors
Variable = tuple[list[str], np.ndarray]  # the names of the dimensions, and the array

IMAGE = ("channel", "height", "width")


@takes_program
def to_arviz(
    model: PyroFunction,
    guide: PyroFunction,
    x: Any,
    num_samples: int = 1000,
    *,
    coords: dict[str, Any] | None = None,
    vectorize_particles: bool = True,
    seed: int | None = None,
) -> Any:
    r"""Draws, densities and log-weights of a program for ArviZ, as one chain of `num_samples` independent draws.

    =========================  ===============================================================================
    ``posterior``              z ~ q(z|x), dimensions (chain, draw, data, latent): the guide's, not the exact one
    ``prior``                  z ~ p(z), the same dimensions
    ``posterior_predictive``   x ~ p(x|z) at z ~ q(z|x), (chain, draw, data, ...)
    ``prior_predictive``       x ~ p(x|z) at z ~ p(z)
    ``log_likelihood``         log p(x_n|z) of each observed site, in nats, (chain, draw, data)
    ``sample_stats``           ``log_weight``: log p(x_n, z) - log q(z|x_n), and ``lp``: log p(x_n, z), in nats
    ``observed_data``          x
    =========================  ===============================================================================

    A group without variables is left out, such as ``prior`` and ``prior_predictive`` with an ``ImproperUniform`` prior,
    and the groups of x in a program whose data are in a ``pyro.factor``. Draws ignore factors.

    If there is one latent site, its event dimension is ``latent``. The dimensions of an image of shape (C, H, W) are
    ``channel``, ``height``, ``width``. Other event dimensions are ``NAME_dim_0`` and so on; plates inside the batch
    plate keep their names.

    ``arviz.loo`` runs on it, but it estimates log p(x) by the mean of 1 / p(x|z) over the posterior, which is a poor
    estimate: each datum has its own latent, which no other datum informs. For log p(x) use
    :func:`pyro_vae.log_likelihood`.

    Arguments:
        model, guide, x, vectorize_particles, seed: see :func:`pyro_vae.log_likelihood`.
        num_samples: draws for each datum, at least 2. All of them are in memory.
        coords: coordinates by dimension, as in ArviZ; whole numbers from 0 by default. Where a site has the name of a
            dimension, such as ``data``, the dimension is ``data_dim``.

    Returns:
        An ``arviz.InferenceData`` under ArviZ 0.2x, an ``xarray.DataTree`` under ArviZ 1.x. Both have ``to_netcdf``.

    Raises:
        ValueError: there are fewer than 2 samples; data are not finite; coordinates are of a dimension that does not
            exist; a site is named ``chain`` or ``draw``; the model reads what it observes; or the program has no
            log-weight per datum (see :func:`pyro_vae.log_weights`).

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.mlp_vae((5,), latent_dim=2, hidden_dims=(16,), likelihood="gaussian")
        >>> groups = pv.to_arviz(vae, torch.randn(8, 5), num_samples=100)
        >>> dict(groups["posterior"]["z"].sizes)
        {'chain': 1, 'draw': 100, 'data': 8, 'latent': 2}

    References:
        Kumar, Carroll, Hartikainen and Martin (2019), *ArviZ: a unified library for exploratory analysis of Bayesian
        models in Python*, JOSS.
    """
    require_count("num_samples", num_samples, least=2)
    program = program_on(model, guide, x)
    with eval_mode(program.modules()), torch.no_grad(), rng.seeded(seed):
        program = program.with_nesting()
        if vectorize_particles:
            check_particles(program)
        check_simulated(program)
        return _container(_groups(program, num_samples, vectorize_particles), coords or {})


def _groups(program: Program, number: int, vectorize: bool) -> dict[str, dict[str, Variable]]:
    """The variables of every group, each with the names of its dimensions."""
    sizes = [min(PARTICLES_AT_ONCE, number - start) for start in range(0, number, PARTICLES_AT_ONCE)]
    runs = [list(_variables(program, run(program, max(2, size), vectorize), vectorize)) for size in sizes]
    groups: dict[str, dict[str, Variable]] = {}
    for pieces in zip(*runs, strict=True):
        group, name, (dims, first) = pieces[0]
        array = np.concatenate([array for _, _, (_, array) in pieces], 1)[:, :number]
        groups.setdefault(group, {})[name] = (dims[2:], first[0, 0]) if group == "observed_data" else (dims, array)
    return groups


def _variables(program: Program, run: Run, vectorize: bool) -> Iterator[tuple[str, str, Variable]]:
    """The variables of one run, each with its group and its name."""
    check_rows(run.batch_plate, len(program.args[0]))
    latents = [name for name, site in run.model.items() if not site["is_observed"]]
    event_names = ("latent",) if len(latents) == 1 else ()
    log_p = log_density(run, terms(run.model))
    yield "sample_stats", "log_weight", _per_datum(log_p - log_density(run, terms(run.guide)))
    yield "sample_stats", "lp", _per_datum(log_p)
    for name, site in run.model.items():
        if name in latents:
            yield "posterior", name, _variable(run, name, site, event_names)
        elif not is_factor(site):
            yield "log_likelihood", name, _per_datum(per_datum(run, site, site["unscaled_log_prob"]))
            yield "observed_data", name, _variable(run, name, site, IMAGE)
    values = {name: run.model[name]["value"] for name in latents}
    proper = all(family(run.model[name]["fn"]) != "ImproperUniform" for name in latents)
    drawing = replace(program, model=OfObservedShape()(program.model))
    for kind, given in (("posterior", values), *([("prior", None)] if proper else [])):
        for name, site in simulate(drawing, given, run.num_particles, vectorize).items():
            if name in latents and kind == "prior":
                yield "prior", name, _variable(run, name, site, event_names)
            elif name not in latents and not is_factor(site):
                yield f"{kind}_predictive", name, _variable(run, name, site, IMAGE)


def _per_datum(value: Tensor) -> Variable:
    """The variable of a matrix (K, N)."""
    return ["chain", "draw", "data"], value.cpu().numpy()[None]


def _variable(run: Run, name: str, site: Site, event_names: tuple[str, ...]) -> Variable:
    """A site's value as (chain, draw, data, ...), and its dimensions' names: `event_names` where they fit the event."""
    value, event_dim, depth = site["value"], site["fn"].event_dim, -run.particle_dim
    value = value.reshape((1,) * (depth + event_dim - value.dim()) + tuple(value.shape))
    plates = {frame.dim: frame.name for frame in site["cond_indep_stack"] if frame.vectorized}
    names: list[str | None] = [plates.get(dim) for dim in range(-depth, 0)]
    for dim, plate in plates.items():
        if plate in ("chain", "draw", "data") and dim not in (run.particle_dim, run.batch_plate.dim):
            raise PyroVAEError(
                f"plate '{plate}' inside the batch plate has the name of a dimension of ArviZ: expected another name. "
                "Rename it."
            )
    names += event_names if len(event_names) == event_dim else [f"{name}_dim_{i}" for i in range(event_dim)]
    batch_dim = depth + run.batch_plate.dim
    names[0], names[batch_dim] = "draw", "data"
    shape = list(value.shape)
    shape[0], shape[batch_dim] = run.num_particles, run.batch_plate.size
    order = [0, batch_dim, *(i for i, n in enumerate(names) if n is not None and i not in (0, batch_dim))]
    without_name = [i for i, n in enumerate(names) if n is None]  # of size 1
    array = value.expand(shape).permute(*order, *without_name).flatten(len(order) - 1)
    return ["chain", *(str(names[i]) for i in order)], array.cpu().numpy()[None]


def _container(groups: dict[str, dict[str, Variable]], coords: dict[str, Any]) -> Any:
    """The groups in the container of the installed ArviZ."""
    import xarray as xr

    taken = {name for variables in groups.values() for name in variables}
    for name in taken & {"chain", "draw"}:
        raise PyroVAEError(f"site '{name}' has the name of a dimension of ArviZ: expected another name. Rename it.")
    # xarray takes a variable with the name of a dimension for its coordinates.
    groups = {
        group: {n: ([f"{d}_dim" if d in taken else d for d in dims], array) for n, (dims, array) in variables.items()}
        for group, variables in groups.items()
    }
    found = [variable for variables in groups.values() for variable in variables.values()]
    sizes = {dim: size for dims, array in found for dim, size in zip(dims, array.shape, strict=True)}
    for dim, values in coords.items():
        if dim not in sizes or len(values) != sizes[dim]:
            raise PyroVAEError(
                f"expected coords of dimensions {sizes}, one value for each position, got {len(values)} values of "
                f"'{dim}'. Rename or resize them."
            )
    attributes = {"inference_library": "pyro_vae", "inference_library_version": version("pyro_vae")}
    datasets = {}
    for group, variables in groups.items():
        dims = {dim for names, _ in variables.values() for dim in names}
        own = {dim: np.asarray(coords[dim]) if dim in coords else np.arange(sizes[dim]) for dim in sorted(dims)}
        datasets[group] = xr.Dataset(variables, own, attributes)
    if int(version("arviz").split(".")[0]) > 0:
        return xr.DataTree.from_dict(datasets)
    import arviz

    return arviz.InferenceData(**datasets)  # type: ignore[arg-type]
