"""Draws, densities and log-weights of a program as ArviZ groups, for ArviZ 0.2x and 1.x."""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae import __version__
from pyro_vae.checks import Seed
from pyro_vae.engine.agreement import draws_otherwise
from pyro_vae.engine.arguments import takes_program
from pyro_vae.engine.batch_plate import find_batch_plate
from pyro_vae.engine.drawing import deterministic_shapes
from pyro_vae.engine.first_run import placed
from pyro_vae.engine.mixing import check_apart
from pyro_vae.engine.modules import PyroFunction, eval_mode
from pyro_vae.engine.program import Program, Run
from pyro_vae.engine.sites import Site, family, is_deterministic, is_factor, labelled
from pyro_vae.engine.weights import log_density, per_datum, terms
from pyro_vae.errors import PyroVAEError, require_count
from pyro_vae.evaluation.parts import Parts
from pyro_vae.evaluation.pieces import checked_sites, memory_of
from pyro_vae.evaluation.runs import laid_out, run, simulate
from pyro_vae.evaluation.sharing import Sharing, sharing
from pyro_vae.evaluation.simulation import sites_that_read
from pyro_vae.extras import require

PARTICLES_AT_ONCE = 64  # of the model, whose draws of x are the largest tensors
Variable = tuple[list[str], np.ndarray]  # the names of the dimensions, and the array
Groups = dict[str, dict[str, Variable]]

IMAGE = ("channel", "height", "width")
CHAIN = ("chain", "draw")  # the dimensions that ArviZ needs by these names


@takes_program
def to_arviz(
    model: PyroFunction,
    guide: PyroFunction,
    x: Any,
    num_samples: int = 1000,
    *,
    coords: dict[str, Any] | None = None,
    vectorize_particles: bool = True,
    seed: Seed | None = None,
    distributed: bool | None = None,
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

    A group without variables is left out: ``prior`` and ``prior_predictive`` with an ``ImproperUniform`` prior, the
    groups of x where the data are in a ``pyro.factor``, and draws of a model that reads what it observes. So are draws
    of families whose draws in PyTorch or Pyro do not have their density, such as ``LKJCholesky``. Other draws ignore
    factors.

    If there is one latent site, its event dimension is ``latent``. The dimensions of an image of shape (C, H, W) are
    ``channel``, ``height``, ``width``. Other event dimensions are ``NAME_dim_0`` and so on; plates inside the batch
    plate keep their names.

    ``arviz.loo`` runs on it, but it estimates log p(x) by the mean of 1 / p(x|z) over the posterior, which is a poor
    estimate: each datum has its own latent, which no other datum informs. For log p(x) use
    :func:`pyro_vae.log_likelihood`.

    Arguments:
        model, guide, x, vectorize_particles, seed, distributed: see :func:`pyro_vae.log_likelihood`.
        num_samples: draws for each datum, at least 2. All of them are in memory.
        coords: coordinates by dimension, as in ArviZ; whole numbers from 0 by default. Where a site has the name of a
            dimension, such as ``data``, the dimension is ``data_dim``. Sites ``chain`` and ``draw`` are ``chain_site``
            and ``draw_site``. A plate of such a name, or ``data``, inside the batch plate is ``data_plate``, say.

    Returns:
        An ``arviz.InferenceData`` under ArviZ 0.2x, an ``xarray.DataTree`` under ArviZ 1.x. Both have ``to_netcdf``.

    Raises:
        MissingPackageError: ArviZ is not installed.
        ValueError: there are fewer than 2 samples; data are not finite; coordinates are of a dimension that does not
            exist; or the program has no log-weight per datum (see :func:`pyro_vae.log_weights`).

    Warns:
        UserWarning: the model reads what it observes, as in teacher forcing, so that it would draw x given the data.

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
    require("arviz", "xarray", by="pv.to_arviz")
    settings = {"num_samples": num_samples, "vectorize_particles": vectorize_particles}
    groups, warned = list[Groups](), False
    with sharing(distributed, "pv.to_arviz", seed, settings) as share:
        require_count("num_samples", num_samples, least=2)
        parts = Parts(model, guide, x)
        with memory_of(parts.number), eval_mode(parts.modules()), torch.no_grad():
            for program in share.parts(parts):
                program, sites = placed(program, lambda it: checked_sites(it, observing=False))
                plate = find_batch_plate(labelled(*sites))
                shown = deterministic_shapes(program.trace()[0], plate)
                program = replace(program.with_nesting(), deterministic=shown)
                check_apart(program, together=vectorize_particles)
                reading = sites_that_read(program)
                if reading and share.speaks and not warned:
                    warnings.warn(
                        f"model site '{reading[0]}' reads data that the model observes (teacher forcing), so that one "
                        "run can't draw them: the groups of such draws are left out. Pass what the model reads of x as "
                        "an argument of its own, such as x[:, :-1], to draw data given it.",
                        stacklevel=3,
                    )
                    warned = True
                groups.append(_groups(program, num_samples, vectorize_particles, reading, share))
    return _container(_together(groups), coords or {})


def _together(parts: list[Groups]) -> Groups:
    """The variables of all parts of the data, which are along their dimension `data`."""
    if len(parts) == 1:
        return parts[0]

    def joined(group: str, name: str) -> Variable:
        dims = parts[0][group][name][0]
        return dims, np.concatenate([part[group][name][1] for part in parts], dims.index("data"))

    # What a part lacks, such as draws where the model reads the data, all lack.
    kept = [group for group in parts[0] if all(group in part for part in parts)]
    return {
        group: {n: joined(group, n) for n in parts[0][group] if all(n in p[group] for p in parts)} for group in kept
    }


def _groups(program: Program, number: int, vectorize: bool, reading: list[str], share: Sharing) -> Groups:
    """The variables of every group, each with the names of its dimensions."""
    sizes = [min(PARTICLES_AT_ONCE, number - start) for start in range(0, number, PARTICLES_AT_ONCE)]
    runs = share.each(
        sizes, lambda size: [*_variables(program, run(program, max(2, size), vectorize), vectorize, reading)]
    )
    groups: Groups = {}
    for pieces in zip(*runs, strict=True):
        group, name, (dims, first) = pieces[0]
        array = np.concatenate([array for _, _, (_, array) in pieces], 1)[:, :number]
        groups.setdefault(group, {})[name] = (dims[2:], first[0, 0]) if group == "observed_data" else (dims, array)
    return groups


def _variables(program: Program, run: Run, vectorize: bool, reading: list[str]) -> Iterator[tuple[str, str, Variable]]:
    """The variables of one run, each with its group and its name."""
    latents = [name for name, site in run.model.items() if not site["is_observed"]]
    event_names = ("latent",) if len(latents) == 1 else ()
    log_p = log_density(run, terms(run.model))
    yield "sample_stats", "log_weight", _per_datum(log_p - log_density(run, terms(run.guide)))
    yield "sample_stats", "lp", _per_datum(log_p)
    for name, site in run.model.items():
        if name in latents or is_deterministic(site):
            yield "posterior", name, _variable(run, name, site, event_names if name in latents else ())
        elif not is_factor(site):
            yield "log_likelihood", name, _per_datum(per_datum(run, site, site["unscaled_log_prob"]))
            yield "observed_data", name, _variable(run, name, site, IMAGE)
    values = {name: run.model[name]["value"] for name in latents}
    drawn = {name: not draws_otherwise(site["fn"]) and name not in reading for name, site in run.model.items()}
    proper = all(drawn[name] and family(run.model[name]["fn"]) != "ImproperUniform" for name in latents)
    for kind, given in (("posterior", values), *([("prior", None)] if proper else [])):
        for name, site in simulate(program, given, run.num_particles, vectorize).items():
            if name in latents or is_deterministic(run.model[name]):
                if kind == "prior":
                    yield "prior", name, _variable(run, name, site, event_names if name in latents else ())
            elif not is_factor(site) and not reading and drawn[name]:
                yield f"{kind}_predictive", name, _variable(run, name, site, IMAGE)


def _per_datum(value: Tensor) -> Variable:
    """The variable of a matrix (K, N)."""
    return ["chain", "draw", "data"], value.cpu().numpy()[None]


def _variable(run: Run, name: str, site: Site, event_names: tuple[str, ...]) -> Variable:
    """A site's value as (chain, draw, data, ...), and its dimensions' names: `event_names` where they fit the event."""
    event_dim, (value, plates) = site["fn"].event_dim, laid_out(run, site)
    plates = [f"{plate}_plate" if plate in (*CHAIN, "data") else plate for plate in plates]
    known = len(event_names) == event_dim and not {*event_names} & {*plates}
    events = event_names if known else [f"{name}_dim_{i}" for i in range(event_dim)]
    return ["chain", "draw", "data", *plates, *events], value.cpu().numpy()[None]


def _free(name: str, suffix: str, taken: set[str]) -> str:
    """The name, with the suffix while it is taken."""
    while name in taken:
        name += suffix
    return name


def _container(groups: Groups, coords: dict[str, Any]) -> Any:
    """The groups in the container of the installed ArviZ."""
    import xarray as xr

    # xarray takes a variable with the name of a dimension for its coordinates, and ArviZ needs two dimensions by name.
    sites = {name for variables in groups.values() for name in variables}
    names = {name: _free(name, "_site", sites) if name in CHAIN else name for name in sites}
    taken = {*sites, *names.values()} - {*CHAIN}
    groups = {
        group: {names[n]: ([_free(d, "_dim", taken) for d in dims], array) for n, (dims, array) in variables.items()}
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
    attributes = {"inference_library": "pyro_vae", "inference_library_version": __version__}
    datasets = {}
    for group, variables in groups.items():
        dims = {dim for names, _ in variables.values() for dim in names}
        own = {dim: np.asarray(coords[dim]) if dim in coords else np.arange(sizes[dim]) for dim in sorted(dims)}
        datasets[group] = xr.Dataset(variables, own, attributes)
    if int(version("arviz").split(".")[0]) > 0:
        return xr.DataTree.from_dict(datasets)
    import arviz

    return arviz.InferenceData(**datasets)  # type: ignore[arg-type]
