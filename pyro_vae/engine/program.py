"""Runs a Pyro guide, and a model against its samples: the one place that does, for every bound and every evaluation.

A :class:`Program` is a model and a guide with their arguments. A :class:`Run` holds the sample sites of both with their
log-densities. :class:`Needs` says through which samples gradients flow. This file knows no objective.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, Self

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.util import check_site_shape
from torch import Tensor

from pyro_vae.devices import moved
from pyro_vae.engine import agreement, rng
from pyro_vae.engine.batch_plate import find_batch_plate
from pyro_vae.engine.coverage import check_periods
from pyro_vae.engine.drawing import Shapes, ShowsDeterministic, drawing
from pyro_vae.engine.modules import PyroFunction, buffers_kept, eval_mode, find_modules
from pyro_vae.engine.ownership import merged, parameters_of
from pyro_vae.engine.sites import (
    PARTICLE_PLATE,
    WRAPPERS,
    Plate,
    Site,
    Sites,
    being_recorded,
    derived,
    is_factor,
    labelled,
    not_reparameterised,
    particle_dim_of,
    unwrapped,
)
from pyro_vae.engine.supports import check_fixed_supports
from pyro_vae.engine.traces import At, OwnSubsamples, at_once, given, in_particles, prior, sample_sites, traced
from pyro_vae.errors import PyroVAEError


@dataclass(frozen=True)
class Needs:
    """What an estimator needs of a run; where gradients are recorded, through which samples they flow."""

    per_datum: bool = True  # whether each datum needs a log-weight of its own, and so the program a batch plate
    whole: bool = False  # whether a program without a batch plate may be one datum instead
    # "all" refuses a site that can't be reparameterised; "none" stops every gradient. "some" serves the score function:
    # if some sites can be reparameterised and others can't, gradients flow through the former; else through none.
    path: Literal["all", "some", "none"] = "all"
    stopped: bool = False  # whether Run.stopped is needed
    samples: bool = False  # whether Run.samples is needed
    of_mean: bool = True  # of the guide's samples: the score misses what a moving support adds, which is refused
    densities: bool = True  # whether latents need log-densities without `per_datum`; a closed KL needs none
    factors: bool = False  # whether the guide may have pyro.factor statements: terms of a loss, which are no densities
    # Makes a handler around the guide that draws its K samples in that dimension; None draws them independently.
    sampler: Callable[[int, int], Messenger] | None = None


class Drawn(NamedTuple):
    """The guide's part of a :class:`Run`."""

    trace: Trace  # what the model is replayed against
    sites: Sites
    stopped: Sites | None
    scored: tuple[str, ...]
    number: int
    particle_dim: int | None  # None if the guide ran for one particle

    def rows(self, start: int, size: int) -> Self:
        """Some of the particles."""
        sites = _rows(self.sites, start, size, self.particle_dim)
        stopped = None if self.stopped is None else _rows(self.stopped, start, size, self.particle_dim)
        return self._replace(sites=sites, stopped=stopped, number=size)


class Run(NamedTuple):
    """One run of a guide, and of the model against it."""

    model: Sites  # the model's sample sites by name, in order, each with its unscaled_log_prob if Needs asks for it
    guide: Sites
    stopped: Sites | None  # the guide's, with no gradient through values: log-densities differentiate to the score
    scored: tuple[str, ...]  # the names of the guide's latent sites through whose samples no gradient flows
    num_particles: int  # K
    particle_dim: int  # counted from the right; it lies left of every plate
    batch_plate: Plate  # whose rows are the data; None if no log-weight per datum is needed, or all is one datum
    # The guide's samples as the model sees them, each with the shape in which a matrix (K, N) broadcasts to it. A hook
    # on them scales the gradient that comes back from the model.
    samples: list[tuple[Tensor, list[int]]]

    def shape_beside_plates(self) -> list[int]:
        """The shape in which a matrix (K, N) broadcasts to a site's log-density."""
        shape = [1] * -self.particle_dim
        shape[self.particle_dim], shape[self.batch_plate.dim] = self.num_particles, self.batch_plate.size
        return shape

    def shape_beside(self, site: Site) -> list[int]:
        """The shape in which a matrix (K, N) broadcasts to the site's value."""
        shape = self.shape_beside_plates()
        event_dim = site["fn"].event_dim
        return shape[len(shape) + event_dim - site["value"].dim() :] + [1] * event_dim


@dataclass(frozen=True)
class Program:
    """A Pyro model and its guide, with the arguments of both."""

    model: PyroFunction
    guide: PyroFunction | None  # None for programs that are only run at given values, or traced
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    needs: Needs = Needs()
    nesting: int | None = None  # how many dimensions the plates take; None finds it by one more run
    deterministic: Shapes = field(default_factory=dict)  # the pyro.deterministic sites that are sites like others
    device: torch.device | None = None  # where `on` moves arguments; None leaves them where they are

    @property
    def guide_or_prior(self) -> PyroFunction:
        """The guide; without one, the prior. A guide may be a module without parts, which is false."""
        if self.guide is None:
            return prior(self.model)
        # Pyro's AutoNormalMessenger and its kin run the model with other distributions at its latent sites.
        return prior(self.guide) if isinstance(poutine.unwrap(self.guide), Messenger) else self.guide

    def on(self, args: tuple[Any, ...]) -> Self:
        """The same program with other arguments, on its device, and no keyword arguments."""
        return replace(self, args=moved(args, self.device), kwargs={})

    def with_nesting(self) -> Self:
        """The same program, with the number of its plates' dimensions."""
        if self.nesting is not None:
            return self
        with self.unnoticed():
            fewer = replace(self.needs, path="all", stopped=False, samples=False, of_mean=True, sampler=None)
            run = replace(self, needs=fewer).run()
        return replace(self, nesting=-run.particle_dim - 1)

    def run(self, number: int = 1) -> Run:
        """Run the guide, and the model against it, once for all particles; one particle needs no `nesting`."""
        with at_once(number):
            return self.run_model(self.run_guide(number))

    def run_guide(self, number: int = 1) -> Drawn:
        """Draw particles from the guide."""
        particle_dim = None if number == 1 else -self.depth
        guide = in_particles(self.guide_or_prior, number, particle_dim)
        sampling = nullcontext() if self.needs.sampler is None else self.needs.sampler(number, particle_dim or 0)
        with sampling:
            trace = traced(guide, self.args, self.kwargs)
        sites = self._sites(trace)
        if not torch.is_grad_enabled():
            return Drawn(trace, sites, None, (), number, particle_dim)
        stopped, scored = None, tuple(not_reparameterised(sites))
        latent = tuple(name for name, site in sites.items() if not is_factor(site))
        # Whether some sites draw with a complete pathwise gradient, and the others with none at all.
        differ = 0 < len(scored) < len(latent) and not any(sites[name]["fn"].has_rsample for name in scored)
        if self.needs.path == "none" or (self.needs.path == "some" and not differ):
            trace = self._stopped(guide, trace)
            sites, scored = sample_sites(trace), latent
        elif self.needs.stopped:
            stopped = sample_sites(self._stopped(guide, trace))
        if self.needs.of_mean and (self.needs.stopped or self.needs.path != "all") and not being_recorded():
            check_fixed_supports({name: sites[name] for name in scored} if stopped is None else stopped)
        return Drawn(trace, sites, stopped, scored, number, particle_dim)

    def run_model(self, drawn: Drawn) -> Run:
        """Run the model at the guide's samples."""
        entering, views = drawn.trace.copy(), {}
        for name, site in drawn.sites.items():
            value = site["value"]
            if self.needs.samples and isinstance(value, Tensor) and value.requires_grad:
                value = views[name] = derived(value, lambda each: each.view_as(each))
            entering.nodes[name] = site | {"value": value}
        own = OwnSubsamples(drawn.trace)(self._model(drawn.number, drawn.particle_dim))
        model = poutine.replay(own, trace=entering)
        trace = traced(model, self.args, self.kwargs)
        if torch.is_grad_enabled() and not pyro.settings.get("module_local_params"):
            merged(*map(parameters_of, (drawn.trace, trace)))  # refuses two modules with one name
        run = self._as_run(self._sites(trace), drawn)
        run.samples.extend((value, run.shape_beside(drawn.sites[name])) for name, value in views.items())
        return run

    def _sites(self, trace: Trace) -> Sites:
        """The sites of a trace, with the log-densities that the estimator needs."""
        return sample_sites(trace, latent=self.needs.per_datum or self.needs.densities)

    def _model(self, number: int, particle_dim: int | None) -> PyroFunction:
        """The model for several particles."""
        model = in_particles(self.model, number, particle_dim)
        return ShowsDeterministic(self.deterministic)(model) if self.deterministic else model

    def run_at(self, values: dict[str, Tensor], number: int | None = None) -> Run:
        """Run guide and model at given values of all latent sites, whose particles lie left of the plates.

        With None for their number, the values are of one particle and have no dimension for particles. Without a guide
        the model runs once, and its own latent sites are the run's guide.
        """
        fixed, particle_dim = given(values), None if number is None else -self.depth
        first = in_particles(self.model if self.guide is None else self.guide_or_prior, number or 1, particle_dim)
        sites = sample_sites(traced(At(values)(first), self.args, self.kwargs))
        drawn = Drawn(fixed, sites, None, (), number or 1, particle_dim)
        program = replace(self, needs=Needs(path="none"))  # the values bring the gradients that they have
        if self.guide is not None:
            return program.run_model(drawn)
        return program._as_run(sites, drawn._replace(sites={n: s for n, s in sites.items() if not s["is_observed"]}))

    def simulate(self, values: dict[str, Tensor] | None, number: int | None = None) -> Sites:
        """The model's sites with new data: at given values of the latents, or at draws from the prior."""
        particle_dim = None if number is None else -self.depth
        model = drawing(self._model(number or 1, particle_dim))
        return sample_sites(traced(At(values or {})(model), self.args))

    def trace(self, values: dict[str, Tensor] | None = None, *, training: bool = False) -> tuple[Trace, Trace]:
        """Pyro's traces of one run of model and guide, at given values if any; nothing else notices the run.

        With `training`, modules stay in the mode that they are in, with dropout and a minibatch's own statistics.
        """
        guide = self.guide_or_prior
        if values is not None:
            guide = At(values)(guide)
        with self.unnoticed(training=training):
            guide_trace = traced(guide, self.args, self.kwargs)
            model = poutine.replay(self.model, trace=guide_trace)
            return traced(model, self.args, self.kwargs), guide_trace

    @contextmanager
    def unnoticed(self, *, training: bool = False) -> Iterator[None]:
        """Around a run that Pyro's handlers, gradients, random number generators and batch norm must not notice."""
        mode = buffers_kept() if training else eval_mode(self.modules())
        with torch.no_grad(), poutine.block(), rng.preserved(), mode:
            pyro.set_rng_seed(int(torch.randint(2**31, ())))  # initial values drawn here must not come again as noise
            yield

    def modules(self) -> list[torch.nn.Module]:
        """The modules that model and guide are, or are methods of."""
        return find_modules(self.model, *([] if self.guide is None else [self.guide]))

    def check(self, model: Sites, guide: Sites, particle_dim: int) -> Plate:
        """Refuse a program whose number would be wrong; return the batch plate."""
        agreement.check_sites(model, guide, factors=self.needs.factors)
        if not being_recorded():  # it reads the values of parameters
            check_periods(model, guide)
        if torch.is_grad_enabled() and self.needs.path == "all":
            agreement.check_reparameterised(guide)
        sites, batch_plate = labelled(model, guide), None
        if self.needs.per_datum:
            try:
                batch_plate = find_batch_plate(sites)  # before the shapes, since its messages are more specific
            except PyroVAEError:
                if not self.needs.whole:
                    raise
            if not being_recorded():
                agreement.check_densities(model, guide)
        agreement.check_shapes(model, guide, particle_dim)
        for site in sites.values():
            shaped = SimpleNamespace(shape=site["fn"].batch_shape)  # in place of a log-density that was not computed
            unmasked: Any = dict(site, log_prob=site.get("unscaled_log_prob", shaped))
            check_site_shape(unmasked, max_plate_nesting=-particle_dim)
        return batch_plate

    def _as_run(self, model: Sites, drawn: Drawn) -> Run:
        particle_dim = drawn.particle_dim or particle_dim_of(model, drawn.sites)  # both are negative
        batch_plate = self.check(model, drawn.sites, particle_dim)
        if self.needs.per_datum and not being_recorded():
            self._check_absent(model, drawn)
        return Run(model, drawn.sites, drawn.stopped, drawn.scored, drawn.number, particle_dim, batch_plate, [])

    def _check_absent(self, model: Sites, drawn: Drawn) -> None:
        """Refuse a masked latent on which a later site depends that is not masked with it: it has no density there.

        An object that is absent from a scene has such a latent, and nothing depends on it: with another sample in its
        place, each later density is the same.
        """
        pairs = agreement.masked_before_unmasked(model)
        if not pairs:
            return

        def densities(entering: Trace) -> dict[str, Tensor]:
            function = in_particles(self.model, drawn.number, drawn.particle_dim)
            sites = sample_sites(traced(poutine.replay(function, trace=entering), self.args, self.kwargs))
            return {name: scale_and_mask(s["unscaled_log_prob"], mask=s["mask"]) for name, s in sites.items()}

        with self.unnoticed():
            as_drawn = drawn.trace.copy()
            as_drawn.nodes.update(drawn.sites)  # of these particles alone
            other = as_drawn.copy()
            for name in {latent for latent, _ in pairs}:
                site, counts = model[name], agreement.where_it_counts(name, model)
                counts = counts.reshape(*counts.shape, *[1] * site["fn"].event_dim)
                value = agreement.another(site["fn"], site["value"])
                other.nodes[name] = site | {"value": torch.where(counts, site["value"], value)}
            first, second = densities(as_drawn), densities(other)
        for latent, later in pairs:
            same = later in second and first[later].shape == second[later].shape
            if not same or not torch.allclose(first[later], second[later], rtol=1e-6, atol=1e-6, equal_nan=True):
                raise PyroVAEError(
                    f"model site '{latent}' is masked where the later site '{later}' is not: expected all that depends "
                    f"on a masked latent to be masked with it, since its sample has no density there. Mask '{later}' "
                    "too, make it independent of the masked sample (as of an object that is absent), or use pv.ELBO's "
                    "pathwise loss."
                )

    @property
    def depth(self) -> int:
        """How many dimensions the plates take, with that of the particles, which lies left of them."""
        if self.nesting is None:
            raise RuntimeError("a run of many particles needs the nesting: call with_nesting first.")
        return self.nesting + 1

    def _stopped(self, guide: PyroFunction, trace: Trace) -> Trace:
        """The guide's trace at the same values, through which no gradient flows.

        The distribution of a single site can't depend on a sample, so it serves again. With several sites, the guide
        runs again.
        """
        sites = sample_sites(trace)
        stopped = trace.copy()
        for name, site in sites.items():
            cleared: Any = {key: value for key, value in site.items() if "log_prob" not in key}
            stopped.nodes[name] = cleared | {"value": derived(site["value"], Tensor.detach)}
        try:
            if len(sites) > 1:
                stopped = traced(poutine.replay(guide, trace=stopped), self.args, self.kwargs)
            stopped.compute_log_prob()
        except (NotImplementedError, KeyError) as error:
            raise PyroVAEError(
                "the density of a guide site at a given value can't be computed: expected distributions that can "
                "evaluate it without the sample's history, got a distribution that can't, most likely a flow without "
                "an inverse. Use gradient='pathwise', or a flow with an inverse."
            ) from error
        for name, site in sites.items():
            again: Any = stopped.nodes[name]
            fn = unwrapped(again["fn"])
            # A loss that is linear in the densities keeps the path through the point; it would lose the log-density.
            if isinstance(fn, Delta) and (
                torch.as_tensor(fn.log_density).requires_grad or (self.needs.per_datum and fn.v.requires_grad)
            ):
                raise PyroVAEError(
                    f"guide site '{name}' is a point (Delta) that depends on parameters besides auxiliary samples: "
                    "expected a fixed function of them, since its density has no score. Use gradient='pathwise', or "
                    f"sample '{name}' itself from a distribution."
                )
            densities = site["log_prob"], again["log_prob"]
            if is_validation_enabled() and not torch.allclose(*densities, rtol=1e-3, atol=1e-2, equal_nan=True):
                raise PyroVAEError(
                    f"guide site '{name}' has another density when the guide runs again at the same values: expected a "
                    "guide that is a function of its samples. Turn dropout off (eval()), or use gradient='pathwise'."
                )
        return stopped


def _rows(sites: Sites, start: int, size: int, particle_dim: Any) -> Sites:
    """The sites' values, log-densities and masks of some particles."""
    part, rows = functools.partial(_part, start=start, size=size), {}
    for name, site in sites.items():
        frames = (f._replace(size=size) if f.name == PARTICLE_PLATE else f for f in site["cond_indep_stack"])
        rows[name] = site | {
            "cond_indep_stack": tuple(frames),
            "fn": _with_masks(site["fn"], part, particle_dim),
            "value": derived(site["value"], functools.partial(part, dim=particle_dim - site["fn"].event_dim)),
            **{key: part(site[key], particle_dim) for key in ("unscaled_log_prob", "mask")},
        }
    return rows


def _part(value: Any, dim: int, start: int, size: int) -> Any:
    """Some of the particles in that dimension, if the value is a tensor that has it."""
    has_it = isinstance(value, Tensor) and value.dim() >= -dim and value.shape[dim] > 1
    return value.narrow(dim, start, size) if has_it else value


def _with_masks(distribution: Any, part: Callable[[Any, int], Any], dim: int) -> Any:
    """A distribution with the masks of some particles. Its parameters, which serve no more, remain those of all."""
    if not isinstance(distribution, WRAPPERS):
        return distribution
    found = copy.copy(distribution)
    inner = dim - len(distribution.event_shape) + len(distribution.base_dist.event_shape)
    found.base_dist = _with_masks(distribution.base_dist, part, inner)
    shape = part(torch.empty(distribution.batch_shape, device="meta"), dim).shape
    vars(found).update(_batch_shape=shape, _mask=part(getattr(distribution, "_mask", None), dim))
    return found
