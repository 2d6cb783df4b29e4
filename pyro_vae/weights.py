r"""Runs a Pyro model and guide, and turns the run into log-weights per datum.

Everything that a variational bound needs is in one matrix,

    log w[k, n] = log p(x_n, z_kn) - log q(z_kn | x_n),    z_kn ~ q(z | x_n),    shape (K particles, N data),

where p is the model, q is the guide, and n runs along the batch plate. The Monte Carlo ELBO is the mean of
log w over k, the IWAE bound its log-mean-exp.

:func:`run_particles` is the one place that runs a program; :func:`log_weights` fills the matrix from the run.
This file knows no objective.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_site_shape
from torch import Tensor

from pyro_vae import rng
from pyro_vae.agreement import check_densities, check_reparameterised, check_shapes, check_sites, equal
from pyro_vae.batch_plate import PARTICLE_PLATE, Plate, Site, Sites, find_batch_plate
from pyro_vae.modules import Program, evaluating, find_modules
from pyro_vae.sequential import DrawAsOneOf


def log_weights(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int,
    vectorize_particles: bool = True,
    max_plate_nesting: int | None = None,
    **kwargs: Any,
) -> Tensor:
    r"""Log importance weights of a guide's samples under a model, per particle and datum.

    .. math:: \log w_{kn} = \log p(x_n, z_{kn}) - \log q(z_{kn} \mid x_n), \qquad z_{kn} \sim q(z \mid x_n)

    Every density inside the batch plate counts: all latent sites, and plates nested in it (pixels, time steps)
    summed. What a mask hides counts zero. A scale, such as the N / b of a subsampled plate, is no part of a
    datum's weight and is left out: objectives apply it to each datum's finished bound. Where two plates hold every
    site, the data are the rows of the outer one.

    Arguments:
        model: a Pyro model with one batch plate, of any name, around every sample site.
        guide: a Pyro guide for its latent sites.
        *args: what both are called with.
        num_particles: K, the number of samples drawn from the guide for each datum.
        vectorize_particles: run the program once, with a leading dimension for the particles; False runs it K
            times, for programs whose networks take no leading dimension. From one seed both draw the same values
            at sites whose noise is of a fixed kind: normal, Laplace, Cauchy, uniform, and transforms of them.
        max_plate_nesting: how many dimensions the program's plates take; None finds it, by one more run.
        **kwargs: what both are called with.

    Returns:
        The log-weights in nats, of shape (K, N), differentiable in the parameters through the samples.

    Raises:
        ValueError: the program has no log-weight per datum (no batch plate, a site outside it, two plates,
            ``to_event`` in place of a plate, a subsampled plate inside it), model and guide disagree on sites,
            shapes or masks, the guide is no density of the latents, or, while gradients are recorded, a site of the
            guide can't be reparameterised.

    Example:
        With the posterior as guide, each weight is p(x), whatever the sample.

        >>> import torch, pyro, pyro.distributions as dist, pyro_vae as pv
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> x = torch.tensor([0.0, 2.0])
        >>> weights = pv.log_weights(model, guide, x, num_particles=3)
        >>> weights.shape
        torch.Size([3, 2])
        >>> torch.allclose(weights, dist.Normal(0.0, 2**0.5).log_prob(x))
        True

    References:
        Burda, Grosse and Salakhutdinov (2016), *Importance Weighted Autoencoders*, ICLR.
    """
    check_num_particles(num_particles)
    runs = run_particles(
        model,
        guide,
        args,
        kwargs,
        num_particles=num_particles,
        vectorize_particles=vectorize_particles,
        max_plate_nesting=max_plate_nesting,
        in_plate=True,
    )
    return torch.cat([run_log_weights(run) for run in runs])


def check_num_particles(num_particles: int) -> None:
    """Refuse what is no number of samples."""
    if not isinstance(num_particles, int) or num_particles < 1:
        raise ValueError(f"expected num_particles to be a positive integer, got {num_particles!r}.")


def trace_once(model: Program, guide: Program, *args: Any, **kwargs: Any) -> tuple[Trace, Trace]:
    """The traces of one run of the model and of the guide, which leaves nothing of itself behind."""
    with _untraced(model, guide):
        return _traces(model, guide, args, kwargs)


def _traces(model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Trace, Trace]:
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    return poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs), guide_trace


def find_parameters(
    model: Program, guide: Program, *args: Any, **kwargs: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters that the model uses, and those that the guide uses, found by running each once.

    Returns:
        Two dictionaries from a parameter's name in Pyro to its unconstrained value, the leaf that an optimiser
        steps. A parameter that both use is in both.
    """
    model_trace, guide_trace = trace_once(model, guide, *args, **kwargs)
    return parameters_of(model_trace), parameters_of(guide_trace)


def parameters_of(trace: Trace) -> dict[str, Tensor]:
    """The parameters in a trace, by name: unconstrained, as an optimiser steps them."""
    values: dict[str, Any] = {n: site["value"] for n, site in trace.nodes.items() if site["type"] == "param"}
    # Under Pyro's module_local_params, a module's parameters are unconstrained as they are.
    return {n: v.unconstrained() if hasattr(v, "unconstrained") else v for n, v in values.items()}


@contextmanager
def _untraced(model: Program, guide: Program) -> Iterator[None]:
    """Around a run that only looks at a program: handlers, gradients, random generators, batch norm don't see it."""
    with torch.no_grad(), poutine.block(), rng.preserved(), evaluating(find_modules(model, guide)):
        pyro.set_rng_seed(int(torch.randint(2**31, ())))  # initial values drawn here must not come again as noise
        yield


@dataclass(frozen=True)
class Run:
    """One run of a guide, and of the model against it.

    Attributes:
        model: the model's sample sites by name, in order, each with its ``unscaled_log_prob``.
        guide: the guide's sample sites, likewise.
        num_particles: K, how many particles this run holds.
        particle_dim: the dimension that holds them, counted from the right, left of every plate.
        batch_plate: the plate whose rows are the data; None where the run was not asked to have one.
    """

    model: Sites
    guide: Sites
    num_particles: int
    particle_dim: int
    batch_plate: Plate

    @property
    def sites(self) -> Sites:
        """All sites, by the words that an error names them by."""
        return _labelled(self.model, self.guide)


def run_particles(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    num_particles: int,
    vectorize_particles: bool,
    max_plate_nesting: int | None,
    in_plate: bool,
) -> list[Run]:
    """Run the guide, and the model against it: once with K particles, or K times with one.

    Arguments and errors are those of :func:`log_weights`; what has no meaning per datum is refused only if
    `in_plate`, since the ELBO, linear in the log-densities, needs no batch plate.
    """
    if num_particles == 1:
        return [_run(model, guide, args, kwargs, in_plate)]
    if not vectorize_particles:
        runs = []
        draws = DrawAsOneOf(num_particles)
        for particle in range(num_particles):
            with draws.of(particle):
                runs.append(_run(model, guide, args, kwargs, in_plate))
        draws.finish()
        return runs
    if max_plate_nesting is None:
        max_plate_nesting = find_max_plate_nesting(model, guide, args, kwargs, in_plate=in_plate)
    particle_dim = -max_plate_nesting - 1
    plate = pyro.plate(PARTICLE_PLATE, num_particles, dim=particle_dim)
    try:
        return [_run(plate(model), plate(guide), args, kwargs, in_plate, num_particles, particle_dim)]
    except (RuntimeError, IndexError) as error:
        error.add_note(
            f"pyro_vae ran the program for {num_particles} particles at once, so latent values have a leading dimension of "
            f"{num_particles}. Expand x to it (x.expand(*z.shape[:-1], -1), say), or pass vectorize_particles=False."
        )
        raise


def find_max_plate_nesting(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any], *, in_plate: bool
) -> int:
    """How many dimensions the program's plates take, found by one run that leaves no trace of itself."""
    with _untraced(model, guide):
        return -_run(model, guide, args, kwargs, in_plate).particle_dim - 1


def _run(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    in_plate: bool,
    num_particles: int = 1,
    particle_dim: int | None = None,
) -> Run:
    model_sites, guide_sites = map(sample_sites, _traces(model, guide, args, kwargs))
    if particle_dim is None:
        frames = [f for s in (*model_sites.values(), *guide_sites.values()) for f in s["cond_indep_stack"]]
        particle_dim = min((f.dim for f in frames if f.vectorized), default=0) - 1
    check_sites(model_sites, guide_sites)
    if torch.is_grad_enabled():
        check_reparameterised(guide_sites)
    sites, batch_plate = _labelled(model_sites, guide_sites), None
    if in_plate:
        batch_plate = find_batch_plate(sites)  # before shapes are looked at: its messages say more
        check_densities(model_sites, guide_sites)
    check_shapes(model_sites, guide_sites, particle_dim)
    for site in sites.values():
        unmasked: Any = dict(site, log_prob=site["unscaled_log_prob"])
        check_site_shape(unmasked, max_plate_nesting=-particle_dim)
    return Run(model_sites, guide_sites, num_particles, particle_dim, batch_plate)


def _labelled(model: Sites, guide: Sites) -> Sites:
    labelled = {f"model site '{name}'": site for name, site in model.items()}
    return labelled | {f"guide site '{name}'": site for name, site in guide.items()}


def sample_sites(trace: Trace) -> Sites:
    """The sites with a density of their own: no parameters, no indices of plates, no ``pyro.deterministic``."""
    trace = prune_subsample_sites(trace)
    trace.compute_log_prob()
    sites: Sites = dict(trace.nodes)
    return {n: s for n, s in sites.items() if s["type"] == "sample" and not s["infer"].get("_deterministic")}


def run_log_weights(run: Run) -> Tensor:
    """The log-weights of one run, (K, N)."""
    total: Any = 0.0
    for sites, sign in ((run.model, 1), (run.guide, -1)):
        for site in sites.values():
            total = total + sign * per_datum(run, site, site["unscaled_log_prob"])
    return total


def per_datum(run: Run, site: Site, value: Tensor) -> Tensor:
    """A site's term, masked as the site is and summed over the plates nested in the batch plate: (K, N)."""
    value = scale_and_mask(value, mask=site["mask"])
    value = value.reshape((1,) * (-run.particle_dim - value.dim()) + tuple(value.shape))
    keep = {value.dim() + run.particle_dim, value.dim() + run.batch_plate.dim}
    nested = [dim for dim in range(value.dim()) if dim not in keep]
    return (value.sum(nested) if nested else value).expand(run.num_particles, run.batch_plate.size)


def datum_scale(run: Run) -> Tensor | float:
    """The scale that all sites share, such as N / b of a subsampled plate: a number, or a tensor (N,).

    Raises:
        ValueError: sites are scaled differently, so that no single number scales a datum's bound.
    """
    plate = run.batch_plate
    (first, site), *others = run.sites.items()
    scale = site["scale"]
    for words, other in others:
        if not equal(scale, other["scale"]):
            raise ValueError(
                f"scales differ between sites: expected one scale for the whole datum, got {scale} at {first} and "
                f"{other['scale']} at {words}. Scale model and guide alike, or use pv.ELBO's loss, in which each term "
                "may have its own scale."
            )
    if not isinstance(scale, Tensor) or scale.dim() == 0:
        return scale
    if scale.dim() < -plate.dim or scale.numel() != scale.shape[plate.dim]:
        raise ValueError(
            f"a scale varies inside a datum: expected a number or one value for each row of plate '{plate.name}', "
            f"got shape {tuple(scale.shape)}. Scale whole data, or use pv.ELBO's loss."
        )
    return scale.reshape(-1)
