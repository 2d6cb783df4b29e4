"""Runs a Pyro guide, and a model against it: the one place that does, for every bound and every gradient.

A run holds the sample sites of both with their log-densities. Which gradients can be taken from it depends on where
it lets them flow, and that is what a :class:`Flow` says. This file knows no objective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.infer.util import is_validation_enabled
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_site_shape
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyro_vae.compiled.tracing import being_traced
from pyro_vae.engine import rng
from pyro_vae.engine.agreement import (
    check_densities,
    check_reparameterised,
    check_shapes,
    check_sites,
    check_supports,
    not_reparameterised,
    unwrapped,
)
from pyro_vae.engine.batch_plate import PARTICLE_PLATE, Plate, Site, Sites, find_batch_plate
from pyro_vae.engine.modules import Program, evaluating, find_modules
from pyro_vae.engine.particles import DrawAsOneOf
from pyro_vae.errors import PyroVAEError

T = TypeVar("T")


@dataclass(frozen=True)
class Particles:
    """How many particles, and how they are run.

    Attributes:
        number: K, how many samples are drawn from the guide for each datum.
        vectorize: whether to run the program once for all of them.
        max_plate_nesting: how many dimensions the program's plates take; None finds it by one more run.
        chunk_size: how many the model is run with at a time; None is all. Where gradients are recorded, a chunk is
            run again in the backward pass, so that no more than one has to be in memory.
    """

    number: int
    vectorize: bool = True
    max_plate_nesting: int | None = None
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("num_particles", self.number), ("chunk_size", self.chunk_size)):
            if not (name == "chunk_size" and value is None) and (not isinstance(value, int) or value < 1):
                raise PyroVAEError(f"expected {name} to be a positive integer, got {value!r}.")
        if self.chunk_size is not None and not self.vectorize:
            raise PyroVAEError(
                "chunk_size splits the particles of a vectorised run: expected vectorize_particles=True with it, got "
                "False, which runs them one at a time. Drop one of the two."
            )


@dataclass(frozen=True)
class Flow:
    """Where gradients flow in a run, where they are recorded at all.

    Attributes:
        path: through the samples of which sites: ``"all"`` (one that can't be reparameterised is refused),
            ``"none"``, or ``"some"``: of those that can be reparameterised if any can't, else of none, as the score
            function wants it; ``"given"`` where the values come from outside, with whatever gradients they have.
        stopped: whether :attr:`Run.stopped` is wanted.
        scaled: whether the gradient that comes back from the model into the samples is to be scaled, by
            :attr:`Run.path_scale`.
        of_mean: whether the gradient is that of a mean over the guide's samples, to which a support that moves with the
            parameters adds what no score has.
        densities: whether the guide's latent sites need their log-densities, where no bound per datum is asked for: a KL in
            closed form is without.
    """

    path: Literal["all", "some", "none", "given"] = "all"
    stopped: bool = False
    scaled: bool = False
    of_mean: bool = True
    densities: bool = True


@dataclass
class PathScale:
    """What multiplies the gradient that the model sends back into the samples; known only once the weights are.

    Attributes:
        num_particles: K, of the run.
        value: the factor for each particle and datum, (K, N).
    """

    num_particles: int
    value: Tensor | None = None

    def hook(self, shape: list[int]) -> Callable[[Tensor], Tensor]:
        """What to do to the gradient of a sample, against which `shape` broadcasts."""

        def scaled(gradient: Tensor) -> Tensor:
            if self.value is None:
                raise RuntimeError("the gradient came back before the factor on its path was known.")
            return gradient * self.value.reshape(shape)

        return scaled


@dataclass(frozen=True)
class Run:
    """One run of a guide, and of the model against it.

    Attributes:
        model: the model's sample sites by name, in order, each with its ``unscaled_log_prob``.
        guide: the guide's sample sites, likewise.
        stopped: the guide's sites again, at the same values, through which no gradient flows: their log-densities
            differentiate to the score. None where the flow asks for none.
        scored: the guide's sites through whose samples no gradient flows.
        num_particles: K, how many particles this run holds.
        particle_dim: the dimension that holds them, counted from the right, left of every plate.
        batch_plate: the plate whose rows are the data; None where the run was not asked to have one.
        path_scale: where to put the factor on the path, if the flow asks for one.
    """

    model: Sites
    guide: Sites
    stopped: Sites | None
    scored: tuple[str, ...]
    num_particles: int
    particle_dim: int
    batch_plate: Plate
    path_scale: PathScale

    @property
    def sites(self) -> Sites:
        """All sites, by the words that an error names them by."""
        return labelled(self.model, self.guide)


def run_particles(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    particles: Particles,
    flow: Flow,
    *,
    in_plate: bool,
    read: Callable[[Run], T],
) -> list[T]:
    """Run the guide, and the model against it, and return what `read` reads off each run.

    There is one run with all K particles; or, not vectorised, K runs of one; or a run for each chunk. What has no
    meaning per datum is refused only if `in_plate`, since the ELBO, linear in the log-densities, needs no batch plate.
    """
    program = _Program(model, guide, args, kwargs, flow, in_plate)
    number = particles.number
    if number == 1:
        return program.run(read)
    if not particles.vectorize:
        results = []
        draws = DrawAsOneOf(number)
        for particle in range(number):
            with draws.of(particle):
                results += program.run(read)
        draws.finish()
        return results
    nesting = particles.max_plate_nesting
    if nesting is None:
        nesting = find_max_plate_nesting(model, guide, args, kwargs, in_plate=in_plate)
    try:
        return program.run(read, number, -nesting - 1, particles.chunk_size)
    except (RuntimeError, IndexError) as error:
        error.add_note(
            f"pyro_vae ran the program for {number} particles at once, so latent values have a leading dimension of "
            f"{number}. Expand x to it (x.expand(*z.shape[:-1], -1), say), or, where there is that option, pass vectorize_particles=False."
        )
        raise


def draw(model: Program, guide: Program, args: tuple[Any, ...], num_particles: int, max_plate_nesting: int) -> Run:
    """One vectorised run of both, to be read at leisure."""
    particles = Particles(num_particles, True, max_plate_nesting)
    (run,) = run_particles(model, guide, args, {}, particles, Flow(), in_plate=True, read=lambda run: run)
    return run


def run_at(
    model: Program,
    guide: Program | None,
    args: tuple[Any, ...],
    values: dict[str, Tensor],
    num_particles: int,
    max_plate_nesting: int,
    *,
    read: Callable[[Run], T],
) -> T:
    """Run guide and model at given values of all latent sites, and return what `read` reads off the run.

    The values have the particles in a leading dimension, left of every plate's. Without a guide the model's own latent
    sites stand in for one, so that the run's guide is the prior, at the cost of the model alone.
    """
    program = _Program(model, guide or model, args, {}, Flow("given"), in_plate=True)
    return program.run_at(values, num_particles, -max_plate_nesting - 1, read, prior=guide is None)


def simulate(
    model: Program, args: tuple[Any, ...], values: dict[str, Tensor] | None, num_particles: int, max_plate_nesting: int
) -> Sites:
    """The model's sites with what it observes drawn anew: at given values of the latents, or at draws from the prior."""
    program = poutine.uncondition(_in_particles(model, num_particles, -max_plate_nesting - 1))
    trace = poutine.trace(poutine.replay(program, trace=_given(values or {}))).get_trace(*args)
    return sample_sites(trace)


def prior(model: Program) -> Program:
    """The model's own latent sites, as a guide."""
    hidden: Program = poutine.block(model, hide_fn=lambda site: site["type"] == "sample" and site["is_observed"])
    return hidden


def find_max_plate_nesting(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any], *, in_plate: bool
) -> int:
    """How many dimensions the program's plates take, found by one run that leaves no trace of itself."""
    with _untraced(model, guide):
        program = _Program(model, guide, args, kwargs, Flow(), in_plate)
        return -program.run(lambda run: run.particle_dim)[0] - 1


@dataclass(frozen=True)
class _Program:
    """A model and a guide with what they are called with, and how gradients flow between them."""

    model: Program
    guide: Program
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    flow: Flow
    in_plate: bool

    def run(
        self,
        read: Callable[[Run], T],
        number: int = 1,
        particle_dim: int | None = None,
        chunk_size: int | None = None,
    ) -> list[T]:
        """Run the guide once, and the model once for each chunk of the guide's particles."""
        guide = _in_particles(self.guide, number, particle_dim)
        trace = poutine.trace(guide).get_trace(*self.args, **self.kwargs)
        drawn = sample_sites(trace, latent=self.in_plate or self.flow.densities)
        stopped: Sites | None = None
        scored: tuple[str, ...] = ()
        if torch.is_grad_enabled():
            scored = tuple(not_reparameterised(drawn))
            stop_all = self.flow.path == "none" or (self.flow.path == "some" and not _differs_in_path(drawn))
            if stop_all or self.flow.stopped:
                at_values = self._stopped(guide, trace)
                if stop_all:
                    trace, drawn = at_values, sample_sites(at_values)
                    scored = tuple(drawn)
                else:
                    stopped = sample_sites(at_values)
            if self.flow.of_mean and (self.flow.stopped or self.flow.path != "all") and not being_traced():
                check_supports({name: drawn[name] for name in scored} if stopped is None else stopped)
        if chunk_size is None or chunk_size >= number:
            return [read(self._run_model(trace, drawn, stopped, scored, number, particle_dim))]

        def run_chunk(start: int) -> T:
            size = min(chunk_size, number - start)
            part = _rows(drawn, start, size, particle_dim)
            again = None if stopped is None else _rows(stopped, start, size, particle_dim)
            return read(self._run_model(trace, part, again, scored, size, particle_dim))

        starts = range(0, number, chunk_size)
        if not torch.is_grad_enabled():
            return [run_chunk(start) for start in starts]
        return [checkpoint(run_chunk, start, use_reentrant=False) for start in starts]

    def _run_model(
        self,
        trace: Trace,
        guide: Sites,
        stopped: Sites | None,
        scored: tuple[str, ...],
        number: int,
        particle_dim: int | None,
    ) -> Run:
        entering, hooked = trace.copy(), {}
        for name, site in guide.items():
            value = site["value"]
            if self.flow.scaled and isinstance(value, Tensor) and value.requires_grad:
                value = hooked[name] = value.view_as(value)
            entering.nodes[name] = site | {"value": value}
        program = poutine.replay(_in_particles(self.model, number, particle_dim), trace=entering)
        model = sample_sites(poutine.trace(program).get_trace(*self.args, **self.kwargs))
        run = self._as_run(model, guide, stopped, scored, number, particle_dim)
        for name, value in hooked.items():
            value.register_hook(run.path_scale.hook(shape_beside(run, guide[name])))
        return run

    def run_at(
        self, values: dict[str, Tensor], number: int, particle_dim: int, read: Callable[[Run], T], *, prior: bool
    ) -> T:
        """Run both at given values; `prior` says that the guide is the model's own latent sites."""
        given = _given(values)
        program = poutine.replay(_in_particles(self.guide, number, particle_dim), trace=given)
        sites = sample_sites(poutine.trace(program).get_trace(*self.args, **self.kwargs))
        if prior:
            latent = {name: site for name, site in sites.items() if not site["is_observed"]}
            return read(self._as_run(sites, latent, None, (), number, particle_dim))
        return read(self._run_model(given, sites, None, (), number, particle_dim))

    def _as_run(
        self,
        model: Sites,
        guide: Sites,
        stopped: Sites | None,
        scored: tuple[str, ...],
        number: int,
        particle_dim: int | None,
    ) -> Run:
        if particle_dim is None:
            frames = [f for s in (*model.values(), *guide.values()) for f in s["cond_indep_stack"]]
            particle_dim = min((f.dim for f in frames if f.vectorized), default=0) - 1
        batch_plate = self._check(model, guide, particle_dim)
        return Run(model, guide, stopped, scored, number, particle_dim, batch_plate, PathScale(number))

    def _check(self, model: Sites, guide: Sites, particle_dim: int) -> Plate:
        """Refuse what would give a wrong number; return the batch plate."""
        check_sites(model, guide)
        if torch.is_grad_enabled() and self.flow.path == "all":
            check_reparameterised(guide)
        sites, batch_plate = labelled(model, guide), None
        if self.in_plate:
            batch_plate = find_batch_plate(sites)  # before shapes are looked at: its messages say more
            if not being_traced():
                check_densities(model, guide)
        check_shapes(model, guide, particle_dim)
        for site in sites.values():
            unmasked: Any = dict(site, log_prob=site.get("unscaled_log_prob", _Shaped(site["fn"].batch_shape)))
            check_site_shape(unmasked, max_plate_nesting=-particle_dim)
        return batch_plate

    def _stopped(self, guide: Program, trace: Trace) -> Trace:
        """The guide's trace at the same values, through which no gradient flows.

        Where there is one site its distribution can't depend on a sample, so it serves again; where there are several,
        the guide runs again.
        """
        sites = sample_sites(trace)
        names = list(sites)
        stopped = trace.copy()
        for name, site in sites.items():
            kept: Any = {key: value for key, value in site.items() if "log_prob" not in key}
            stopped.nodes[name] = kept | {"value": site["value"].detach()}
        try:
            if len(names) > 1:
                stopped = poutine.trace(poutine.replay(guide, trace=stopped)).get_trace(*self.args, **self.kwargs)
            stopped.compute_log_prob()
        except (NotImplementedError, KeyError) as error:
            raise PyroVAEError(
                "the density of a guide site at a given value, without the sample's history, failed: expected "
                "distributions that can evaluate it, got one that can't (a flow without an inverse, most likely). Use "
                "gradient='pathwise', or a flow with an inverse."
            ) from error
        for name in names:
            fn = unwrapped(stopped.nodes[name]["fn"])
            if not isinstance(fn, Delta):
                continue
            # A loss that is linear in the densities has the path through the point; its log-density it would lose.
            if torch.as_tensor(fn.log_density).requires_grad or (self.in_plate and fn.v.requires_grad):
                raise PyroVAEError(
                    f"guide site '{name}' is a point (Delta) that depends on parameters besides auxiliary samples: expected a "
                    "fixed function of them, since its density is no score. Use gradient='pathwise', or sample "
                    f"'{name}' itself from a distribution."
                )
        if is_validation_enabled():
            for name in names:
                again: Any = stopped.nodes[name]
                if not torch.allclose(sites[name]["log_prob"], again["log_prob"], rtol=1e-3, atol=1e-2, equal_nan=True):
                    raise PyroVAEError(
                        f"guide site '{name}' has another density when the guide runs again at the same values: expected "
                        "a guide that is a function of its samples. Turn dropout off (eval()), or use "
                        "gradient='pathwise'."
                    )
        return stopped


def _given(values: dict[str, Tensor]) -> Trace:
    """A trace to replay values from."""
    trace = Trace()
    for name, value in values.items():
        trace.add_node(name, name=name, type="sample", is_observed=False, value=value, infer={})
    return trace


def _in_particles(program: Program, number: int, particle_dim: int | None) -> Program:
    if particle_dim is None:
        return program
    in_plate: Program = pyro.plate(PARTICLE_PLATE, number, dim=particle_dim)(program)
    return in_plate


def _differs_in_path(guide: Sites) -> bool:
    """Whether some sites draw with a whole pathwise gradient, and the others with none at all."""
    without = not_reparameterised(guide)
    return 0 < len(without) < len(guide) and not any(guide[name]["fn"].has_rsample for name in without)


def _rows(sites: Sites, start: int, size: int, particle_dim: Any) -> Sites:
    """The sites' values and log-densities of some particles."""
    rows = {}
    for name, site in sites.items():
        log_prob, value = site["unscaled_log_prob"], site["value"]
        frames = (f._replace(size=size) if f.name == PARTICLE_PLATE else f for f in site["cond_indep_stack"])
        rows[name] = site | {
            "cond_indep_stack": tuple(frames),
            "unscaled_log_prob": log_prob.narrow(particle_dim, start, size),
            "value": value.narrow(particle_dim - site["fn"].event_dim, start, size),
        }
    return rows


def shape_beside(run: Run, site: Site) -> list[int]:
    """The shape in which a matrix (K, N) broadcasts to the site's value."""
    shape = [1] * -run.particle_dim
    shape[run.particle_dim], shape[run.batch_plate.dim] = run.num_particles, run.batch_plate.size
    event_dim = site["fn"].event_dim
    return shape[len(shape) + event_dim - site["value"].dim() :] + [1] * event_dim


def labelled(model: Sites, guide: Sites) -> Sites:
    """All sites, by the words that an error names them by."""
    labelled = {f"model site '{name}'": site for name, site in model.items()}
    return labelled | {f"guide site '{name}'": site for name, site in guide.items()}


class _Shaped(NamedTuple):
    """What stands for a log-density that nobody computed."""

    shape: torch.Size


def sample_sites(trace: Trace, *, latent: bool = True) -> Sites:
    """The sites with a density of their own: no parameters, no indices of plates, no ``pyro.deterministic``.

    Those that are not observed come without it where `latent` says so.
    """
    trace = prune_subsample_sites(trace)
    trace.compute_log_prob(lambda _, site: latent or site["is_observed"])
    sites: Sites = dict(trace.nodes)
    return {n: s for n, s in sites.items() if s["type"] == "sample" and not s["infer"].get("_deterministic")}


def trace_once(
    model: Program, guide: Program, *args: Any, values: dict[str, Tensor] | None = None, **kwargs: Any
) -> tuple[Trace, Trace]:
    """The traces of one run of the model and of the guide, at given values if any, which leaves nothing of itself behind."""
    if values is not None:
        guide = poutine.replay(guide, trace=_given(values))
    with _untraced(model, guide):
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


def require_parameters(*traces: Trace) -> dict[str, Tensor]:
    """The parameters in these traces, by name; refuse a program without any."""
    found = {name: value for trace in traces for name, value in parameters_of(trace).items()}
    if not found:
        raise PyroVAEError(
            "expected a program with parameters to train, got none: neither model nor guide has a pyro.param or "
            "pyro.module statement."
        )
    return found


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
