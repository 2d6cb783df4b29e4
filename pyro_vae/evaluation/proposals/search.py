r"""Proposals fitted to each datum, so that its estimate of log p(x) can be trusted.

A datum's latents, unconstrained, are one vector y. Three steps give its proposal:

1. Adam fits a normal to the posterior of y, by the sticking-the-landing gradient of its ELBO. It starts at the moments
   of the guide's draws.
2. Its tails become those of a Student t, and the guide itself keeps a small share.
3. Pilot draws show k-hat. Data whose k-hat is high get more components, fitted to their weighted pilot draws.

All decisions are taken on pilot draws. What is reported comes from fresh ones, so the weights stay unbiased for p(x).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from pyro.distributions import Delta
from torch import Tensor

from pyro_vae.defaults import REFINE_LR, REFINE_PARTICLES, REFINE_PILOT, REFINE_ROUNDS, REFINE_STEPS
from pyro_vae.devices import wide
from pyro_vae.engine.coverage import same_support
from pyro_vae.engine.modules import PyroFunction
from pyro_vae.engine.particles import Particles
from pyro_vae.engine.program import Program, Run
from pyro_vae.engine.sites import unwrapped
from pyro_vae.engine.traces import prior
from pyro_vae.engine.weights import log_weights_of
from pyro_vae.errors import NoDensityError
from pyro_vae.evaluation.families import refuse_masks, require_latents
from pyro_vae.evaluation.fitting import minimise
from pyro_vae.evaluation.hamiltonian import check_latents
from pyro_vae.evaluation.pieces import ELEMENTS_AT_ONCE, Pieces, on_rows, rows_at_once
from pyro_vae.evaluation.proposals.adaptation import Pilot, adapted, truncated
from pyro_vae.evaluation.proposals.guide import FittedSite, Mixture, Replacing
from pyro_vae.evaluation.proposals.layout import Layout
from pyro_vae.evaluation.proposals.posterior import Posterior
from pyro_vae.evaluation.proposals.student import Diagonal, Full, LowRank, Normal, Scale, Student
from pyro_vae.evaluation.runs import run, run_at

MOMENTS = 64  # draws of the guide, whose moments are the start
LEAST_SD = 1e-3  # of the start
FULL_UP_TO = 200  # latents of a datum; more get a covariance of low rank
LOW_RANK_UP_TO = 4000  # more get a diagonal one
RANK = 16
OFF_DIAGONAL = 0.25  # the power of D by which elements off the diagonal move slower
WIDER = 1.2  # how much wider the fitted normal is made
FEWEST_DF, MOST_DF = 3.0, 20.0  # of its tails, for few and for many latents, where heavy ones cost most of the draws
MOVED, MOST_BEYOND = 0.1, 1e-3  # how far a draw may be from its value's own, and the share of weight that may be
PILOT_AT_ONCE = 2**24  # numbers of pilot draws in memory
SHARE = 0.05  # of the guide itself: no weight is more than 20 times its weight under the guide


@dataclass(frozen=True)
class Settings:
    """The settings of :func:`pyro_vae.refine`."""

    num_steps: int = REFINE_STEPS
    num_particles: int = REFINE_PARTICLES
    lr: float = REFINE_LR
    num_pilot: int = REFINE_PILOT
    rounds: int = REFINE_ROUNDS
    vectorize: bool = True
    compile: bool = False


class Proposals(NamedTuple):
    """The proposals of the data of a minibatch, and what their pilot draws show."""

    mixture: Mixture
    pareto_k: Tensor  # (N,)
    variance: Tensor  # of one weight; see relative_variance


class Search:
    """A search for the proposals of data, in minibatches.

    Attributes:
        base: the function whose sites the proposals replace.
        layout: the place of its sites in the vector y.
        programs: the program on each minibatch.
        posterior: what the proposals are fitted to.
    """

    def __init__(self, data: Pieces, settings: Settings) -> None:
        self.settings, self.divisible = settings, data.divisible
        first = data.programs(MOMENTS, settings.vectorize)[0]
        self.base, self.has_guide, drawn, names = _base(first, settings.vectorize)
        self.layout = Layout.of(drawn, names)
        rows, size = rows_at_once(first.args) // settings.num_particles, self.layout.size
        in_memory = ELEMENTS_AT_ONCE // size ** (2 if size <= FULL_UP_TO else 1)
        in_memory = min(in_memory, PILOT_AT_ONCE // (settings.num_pilot * size))
        self.rows = max(1, min(rows, in_memory))  # of a minibatch
        self.programs = data.programs(1, settings.vectorize, self.rows)
        self.posterior = Posterior(self.programs[0], self.base, self.layout, settings.vectorize, settings.compile)

    def proposals(self, program: Program, bar: Any) -> Proposals:
        """Those of the data of a minibatch."""
        return _Minibatch(self, program).refined(bar)

    def parts(self, program: Program, mixture: Mixture, size: int) -> Iterator[Program]:
        """The program with proposals as its guide, on so many of its data at a time."""
        rows = torch.arange(len(program.args[0]))
        for part in rows.split(max(1, size)) if self.divisible else (rows,):
            own = program if len(part) == len(rows) else on_rows(program, part)
            yield replace(own, guide=self.guide(mixture.of(part.to(mixture.log_shares.device))))

    def normal(self, program: Program, proposals: Proposals, bar: Any) -> PyroFunction:
        """Normals near the posteriors, as the guide: fitted from the moments of weighted draws of proposals."""
        normal = _Minibatch(self, program).normal(proposals.mixture, bar)
        alone = normal.loc.new_tensor([-math.inf, 0.0])[:, None]
        return self.guide(Mixture([normal], alone.expand(2, len(normal.loc))))

    def guide(self, mixture: Mixture) -> PyroFunction:
        """The proposals as the guide of a program on their data."""
        guide: PyroFunction = Replacing(self.layout, mixture)(self.base)
        return guide


class _Minibatch:
    def __init__(self, search: Search, program: Program) -> None:
        self.search, self.program, self.settings = search, program, search.settings
        self.layout, self.base = search.layout, search.base
        number = self.settings.num_particles  # no more at once than the fit has
        runs = (run(program, number, self.settings.vectorize) for _ in range(-(-MOMENTS // number)))
        self.start = torch.cat([self._vectors(self._in_base(each)) for each in runs])

    def _in_base(self, drawn: Run) -> Run:
        """A run of the guide as one of the function whose sites the proposals replace, at the same latents."""
        if self.base is self.program.guide_or_prior:
            return drawn
        values = {part.name: drawn.model[part.name]["value"] for part in self.layout.parts}
        return run_at(replace(self.program, guide=self.base), values, drawn.num_particles, self.settings.vectorize)

    def _vectors(self, drawn: Run) -> Tensor:
        """The latents (K, N, D) of a run of the base, or of proposals."""
        parts = self.layout.parts
        return torch.cat(
            [self.layout.free(p, _own(drawn.guide[p.name]["fn"]), drawn.guide[p.name]["value"])[0] for p in parts], -1
        )

    def refined(self, bar: Any) -> Proposals:
        """The mixtures, by the best of their pilot draws."""
        share = SHARE if self.search.has_guide else 0.0
        log_shares = torch.tensor([share, 1 - share]).log().to(self.start)[:, None].expand(2, self.start.shape[1])
        normal = self._fitted(self.start.mean(0), self.start.std(0), bar)
        df = normal.df.new_full(normal.df.shape, max(FEWEST_DF, min(MOST_DF, self.layout.size)))
        mixture = Mixture([Student(normal.loc, normal.scale.wider(WIDER), df)], log_shares)
        pilot = self._pilot(self.program, mixture)
        rows = (~pilot.is_good).nonzero()[:, 0]
        if not len(rows) or not self.settings.rounds:
            return Proposals(mixture, pilot.pareto_k, pilot.variance)
        if not self.search.divisible:
            rows = torch.arange(len(pilot.ess), device=rows.device)
        there = rows.to(self.start.device)
        trial, best = self._adapted(mixture.of(there), pilot.of(there), there)
        shapes = pilot.pareto_k.index_put((rows,), best.pareto_k)
        variance = pilot.variance.index_put((rows,), best.variance)
        return Proposals(mixture.with_rows(there, trial), shapes, variance)

    def normal(self, mixture: Mixture, bar: Any) -> Normal:
        """The normal that Adam fits to each posterior, from the moments of weighted draws of proposals."""
        pilot = self._pilot(self.program, mixture)
        weights = truncated(pilot.log_w).to(pilot.y)[..., None]
        loc = (weights * pilot.y).sum(0)
        return self._fitted(loc, (weights * (pilot.y - loc).square()).sum(0).sqrt(), bar)

    def _adapted(self, mixture: Mixture, pilot: Pilot, rows: Tensor) -> tuple[Mixture, Pilot]:
        """Mixtures of more components for these rows, or the guide alone, and the best one's pilot draws."""
        program = on_rows(self.program, rows)
        best, shares = pilot, mixture.log_shares
        for _ in range(self.settings.rounds):
            mixture = adapted(mixture, pilot)
            pilot = self._pilot(program, mixture)
            best, shares = _better(best, shares, pilot, mixture.log_shares)
            if bool(best.is_good.all()):
                break
        if mixture.has_guide and not bool(best.is_good.all()):
            alone = torch.full_like(mixture.log_shares, -torch.inf)
            alone[0] = 0.0
            found = self._pilot(program, Mixture(mixture.students, alone, has_guide=True))
            best, shares = _better(best, shares, found, alone)
        return Mixture(mixture.students, shares, mixture.has_guide), best

    def _fitted(self, loc0: Tensor, sd0: Tensor, bar: Any) -> Normal:
        """The normal that Adam fits to each datum's posterior, from a mean and standard deviation, its units."""
        sd0 = sd0.clamp(min=LEAST_SD)
        number, d = loc0.shape
        moved, log_sd = torch.zeros_like(loc0), torch.zeros_like(loc0)
        leaves = [moved, log_sd]
        if d <= LOW_RANK_UP_TO:
            leaves.append(loc0.new_zeros(number, d, d if d <= FULL_UP_TO else RANK))
        if d > FULL_UP_TO and len(leaves) == 3:
            leaves[2].normal_(std=0.01)  # at zero, its columns would stay equal

        def scale() -> Scale:
            sd = sd0 * log_sd.exp()
            if len(leaves) == 2:
                return Diagonal(sd)
            if d > FULL_UP_TO:
                return LowRank(sd, sd0[..., None] * leaves[2])
            # A row has up to D elements, each with the noise of its gradient.
            return Full(sd0[..., None] * leaves[2].tril(-1) / d**OFF_DIAGONAL + torch.diag_embed(sd))

        def loss() -> Tensor:
            factor = scale()
            offset = factor.times_noise(self.settings.num_particles)
            y = loc0 + sd0 * moved + offset
            # The slope of log p - log q at the draws, with the parameters of q fixed: sticking the landing.
            with torch.no_grad():
                slope = self.search.posterior.slope(y, self.program.args) + factor.solved(offset)
            return -(slope * y).mean(0).sum()  # it has the gradient of the loss, not its value

        minimise(loss, leaves, self.settings.num_steps, self.settings.lr, bar)
        return Normal(loc0 + sd0 * moved, scale(), loc0.new_full((number,), math.inf))

    def _pilot(self, program: Program, mixture: Mixture) -> Pilot:
        replacing = Replacing(self.layout, mixture)
        guide = replacing(self.base)

        def read(run: Run) -> tuple[Tensor, Tensor, Tensor]:
            y, log_w = self._vectors(run), wide(log_weights_of(run))
            drawn = replacing.drawn
            if drawn is None or drawn[0].shape != y.shape:
                return y, log_w, torch.zeros_like(log_w, dtype=torch.bool)
            # Beyond the last value that a float can tell from an end of the support, all draws have one value.
            moved = ~((y - drawn[0]).abs().amax(-1) < MOVED) & (drawn[1] != 0)
            return y, log_w, moved.to(log_w.device)

        at_once = ELEMENTS_AT_ONCE // (len(program.args[0]) * max(self.layout.size, program.args[0][0].numel()))
        left, parts = self.settings.num_pilot, []
        while left:
            number = min(left, max(2, at_once))
            parts += Particles(number, self.settings.vectorize).read(replace(program, guide=guide), read)
            left -= number
        y, log_w, moved = (torch.cat(each) for each in zip(*parts, strict=True))
        beyond = torch.where(moved, log_w, -torch.inf).logsumexp(0) - log_w.logsumexp(0)
        return Pilot.of_draws(y, log_w, beyond > math.log(MOST_BEYOND))


def _own(fn: Any) -> Any:
    """The distribution that a proposal replaces at a site."""
    inside = fn
    while inside is not None and not isinstance(inside, FittedSite):
        inside = getattr(inside, "base_dist", None)
    return fn if inside is None else inside.own


def _better(best: Pilot, shares: Tensor, other: Pilot, its_shares: Tensor) -> tuple[Pilot, Tensor]:
    """For each datum the better of two mixtures, of which the second may have more components: draws and shares."""
    better = other.is_better(best)
    lacking = shares.new_full((len(its_shares) - len(shares), shares.shape[1]), -torch.inf)
    return best.where(better, other), torch.where(better.to(shares.device), its_shares, torch.cat([shares, lacking]))


def _base(program: Program, vectorize: bool) -> tuple[PyroFunction, bool, Run, list[str]]:
    """The function whose sites a proposal replaces, whether it is the guide, a run, and the names of its latent sites.

    It is the guide, if that has a density at any value of the latents, or else the prior.
    """
    drawn = run(program, MOMENTS, vectorize)
    require_latents(drawn)
    refuse_masks(drawn)
    model = {name: site for name, site in drawn.model.items() if not site["is_observed"]}
    own = all(
        name in model and not isinstance(unwrapped(s["fn"]), Delta) and same_support(model[name]["fn"], s["fn"])
        for name, s in drawn.guide.items()
    )
    if own:
        try:  # at the values of other particles
            run_at(program, {n: s["value"].flip(0) for n, s in drawn.guide.items()}, MOMENTS, vectorize)
        except NoDensityError:
            own = False
    sites = drawn.guide if own else model
    check_latents(drawn.model, sites, run(program, MOMENTS, vectorize).model)
    return program.guide_or_prior if own else prior(program.model), own, drawn, list(sites)
