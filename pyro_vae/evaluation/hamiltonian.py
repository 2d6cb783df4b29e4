"""Annealing by Hamiltonian transitions, for many data at once, in unconstrained space, with adaptive step sizes."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import biject_to

from pyro_vae.devices import wide
from pyro_vae.engine.coverage import is_circular, same_support
from pyro_vae.engine.program import Program, Run
from pyro_vae.engine.sites import Site, Sites, family, unwrapped
from pyro_vae.engine.supports import MixedInterval, Unknown, plain, support_of
from pyro_vae.engine.weights import log_density, terms
from pyro_vae.errors import PyroVAEError
from pyro_vae.evaluation.families import require_latents
from pyro_vae.evaluation.runs import run, run_at

ACCEPTANCE = 0.65  # acceptance rate that the step size is adapted to, from Neal's analysis of HMC
GAIN = 0.3  # change of the log step size for each unit of excess acceptance, in each transition of the trial
TRIAL = 5  # the trial has one transition for every five
JITTER = 0.2  # relative jitter of the step size, so that no trajectory is exactly one period long


@dataclass(frozen=True)
class State:
    """The chains' unconstrained positions, with the log-densities of base and p(x, z) and their derivatives there."""

    position: dict[str, Tensor]
    log_densities: Tensor  # (2, C, N)
    slopes: dict[str, Tensor]  # by site, (2, ...)

    def log_density(self, temperature: float) -> Tensor:
        """The annealed log-density, (C, N)."""
        return (1 - temperature) * self.log_densities[0] + temperature * self.log_densities[1]

    def slope(self, name: str, temperature: float) -> Tensor:
        """The derivative of the annealed log-density in a site's position."""
        return (1 - temperature) * self.slopes[name][0] + temperature * self.slopes[name][1]


class Chains:
    """`num_chains` chains for each datum, between p(x, z) and the density of a base: the program's guide, or the prior.

    A datum's density depends on its own latents alone, so every chain of every datum is a system of its own. One
    backward pass through the sum of their densities differentiates all of them.
    """

    def __init__(
        self,
        program: Program,
        num_chains: int,
        num_leapfrog: int,
        vectorize: bool,
        bar: Any,
        evaluate: Callable[..., tuple[Tensor, ...]] | None = None,  # in place of `evaluated`
    ) -> None:
        self.program, self.num_chains, self.num_leapfrog, self.bar = program, num_chains, num_leapfrog, bar
        self.vectorize, self.evaluate = vectorize, evaluate or self.evaluated
        self.example = first = self._run()  # for the shapes of the sites
        require_latents(first)
        check_latents(first.model, first.guide, self._run().model)
        self.names = [name for name, site in first.model.items() if not site["is_observed"]]
        self.transforms = {name: biject_to(support_of(first.model[name]["fn"])) for name in self.names}

    def _run(self) -> Run:
        return run(self.program, self.num_chains, self.vectorize)

    def start(self, latents: dict[str, Tensor] | None = None) -> State:
        """The state at samples from the base, or with all chains of a datum at the given latents."""
        if latents is None:
            drawn = self._run()
            values = {name: drawn.guide[name]["value"] for name in self.names}
        else:
            values = {name: latents[name].expand(self.example.guide[name]["value"].shape) for name in self.names}
        return self.densities_at({name: self.transforms[name].inv(value) for name, value in values.items()})

    def densities_at(self, position: dict[str, Tensor]) -> State:
        """The state at an unconstrained position."""
        log_densities, *slopes = self.evaluate(position, *self.program.args)
        return State(position, log_densities, dict(zip(position, slopes, strict=True)))

    @torch.enable_grad()
    def evaluated(self, position: dict[str, Tensor], *args: Tensor) -> tuple[Tensor, ...]:
        """Both log-densities of these data at a position, with the log-Jacobian, (2, C, N); their slopes by site."""
        leaves = {name: value.detach().requires_grad_() for name, value in position.items()}
        values = {name: self.transforms[name](leaf) for name, leaf in leaves.items()}
        there = run_at(self.program.on(args), values, self.num_chains, self.vectorize)
        volumes = {n: self.transforms[n].log_abs_det_jacobian(leaves[n], values[n]) for n in self.names}
        volume = log_density(there, ((there.guide[n], _sum_of_event(there.guide[n], v)) for n, v in volumes.items()))
        densities = [log_density(there, terms(sites)) + volume for sites in (there.guide, there.model)]
        slopes = [
            torch.autograd.grad(
                density.sum(), list(leaves.values()), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for density in densities
        ]
        found = torch.stack([wide(density.detach()) for density in densities])
        return found, *(torch.stack(pair) for pair in zip(*slopes, strict=True))

    def adapt(self, temperatures: Tensor, step_size: float) -> Tensor:
        """A step size for each transition and datum, (T - 1, N), from a trial with fewer transitions."""
        number = len(temperatures) - 2
        trial = torch.linspace(0, number - 1, trial_length(number)).round().long().unique()
        state, found = self.start(), []
        log_step = torch.full_like(state.log_densities[0, 0], step_size).log()
        for t in trial.tolist():
            state, probability = self.transition(state, temperatures[t + 1].item(), log_step.exp())
            log_step = log_step + GAIN * (probability.mean(0) - ACCEPTANCE)
            found.append(log_step)
            self.bar.update()
        nearest = torch.bucketize(torch.arange(number), trial).clamp(max=len(trial) - 1)
        return torch.stack(found)[nearest].exp()

    def anneal(self, state: State, temperatures: Tensor, step_sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Move the chains along the temperatures: log-weights (C, N) and acceptance (T - 1, N)."""
        log_weights: Any = 0.0
        accepted = []
        for t, (before, now) in enumerate(pairwise(temperatures.tolist())):
            log_base, log_joint = state.log_densities
            log_weights = log_weights + (now - before) * (log_joint - log_base)
            if t < len(step_sizes):
                state, probability = self.transition(state, now, step_sizes[t])
                accepted.append(probability.mean(0))
            self.bar.update()
        return log_weights, torch.stack(accepted)

    def transition(self, state: State, temperature: float, step_size: Tensor) -> tuple[State, Tensor]:
        """One transition at one temperature: the new state and the acceptance probabilities (C, N)."""
        jitter = 1 + JITTER * (2 * torch.rand_like(state.log_densities[0]) - 1)
        steps = self._by_site(jitter * step_size)
        momentum = {name: torch.randn_like(value) for name, value in state.position.items()}
        energy = self._kinetic(momentum) - state.log_density(temperature)
        proposal = state
        for _ in range(self.num_leapfrog):
            half = {n: p + 0.5 * steps[n] * proposal.slope(n, temperature) for n, p in momentum.items()}
            proposal = self.densities_at({n: proposal.position[n] + steps[n] * p for n, p in half.items()})
            momentum = {n: p + 0.5 * steps[n] * proposal.slope(n, temperature) for n, p in half.items()}
        change = energy - (self._kinetic(momentum) - proposal.log_density(temperature))
        # A diverging trajectory ends in NaN. It is rejected, like one of infinite energy.
        probability = torch.where(change.isnan(), 0.0, change.clamp(max=0).exp())
        accept = torch.rand_like(probability) < probability
        at_site = self._by_site(accept)

        def pick(new: dict[str, Tensor], old: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: torch.where(at_site[name], new[name], old[name]) for name in new}

        log_densities = torch.where(accept, proposal.log_densities, state.log_densities)
        position, slopes = pick(proposal.position, state.position), pick(proposal.slopes, state.slopes)
        return State(position, log_densities, slopes), probability

    def _by_site(self, matrix: Tensor) -> dict[str, Tensor]:
        """A matrix (C, N) on each site's device, numbers in its dtype, in a shape that broadcasts to its value."""
        shaped = {}
        for name in self.names:
            site = self.example.guide[name]
            values = matrix.reshape(self.example.shape_beside(site))
            shaped[name] = values.to(site["value"] if matrix.is_floating_point() else site["value"].device)
        return shaped

    def _kinetic(self, momentum: dict[str, Tensor]) -> Tensor:
        sites = ((self.example.guide[name] | {"mask": None}, p) for name, p in momentum.items())
        return wide(log_density(self.example, ((site, _sum_of_event(site, 0.5 * p.square())) for site, p in sites)))


def trial_length(number: int) -> int:
    """How many transitions the trial for `number` transitions has."""
    return max(min(number, 50), number // TRIAL)


def _sum_of_event(site: Site, value: Tensor) -> Tensor:
    """The sum over a site's event dimensions, if the value has them."""
    dim = site["unscaled_log_prob"].dim()
    return value.flatten(dim).sum(-1) if value.dim() > dim else value


def check_latents(model: Sites, guide: Sites, again: Sites) -> None:
    """Raise an error unless each latent has one continuous, flat space in model, guide and a second run."""
    for name, site in guide.items():
        if name not in model or isinstance(unwrapped(site["fn"]), Delta):
            raise PyroVAEError(
                f"guide site '{name}' is auxiliary, or a point: expected a guide with a density at each latent site of "
                "the model alone, since annealing moves the latents themselves. Pass start='prior'."
            )
        own, base, kind = support_of(model[name]["fn"]), support_of(site["fn"]), family(model[name]["fn"])
        if own.is_discrete:
            raise PyroVAEError(
                f"model site '{name}' is discrete ({kind}): expected continuous latents, whose density has a "
                "gradient. Sum it out of the model, or use pv.log_likelihood."
            )
        if isinstance(plain(own), Unknown | MixedInterval):
            raise PyroVAEError(
                f"model site '{name}' ({kind}) has the support {plain(own)}: expected one with a transform of "
                "PyTorch's from unconstrained space. Choose a prior with a known support, or use pv.log_likelihood."
            )
        if is_circular(model[name]["fn"]) or not _has_flat_space(own):
            raise PyroVAEError(
                f"model site '{name}' is on a curved or periodic space ({kind}): expected latents with a one-to-one "
                "transform to as many unconstrained numbers. Use pv.log_likelihood."
            )
        if not same_support(model[name]["fn"], again[name]["fn"]):
            raise PyroVAEError(
                f"model site '{name}' has a support that depends on another latent: expected fixed bounds. Sample it "
                "on fixed bounds and transform it."
            )
        if not same_support(model[name]["fn"], site["fn"]):
            raise PyroVAEError(
                f"model and guide disagree on the support of site '{name}': expected one support, got {own} in the "
                f"model and {base} in the guide. Choose a guide on {own}, or pass start='prior'."
            )


def _has_flat_space(support: Any) -> bool:
    try:
        transform = biject_to(support)
    except NotImplementedError:
        return False
    return bool(transform.domain.event_dim == transform.codomain.event_dim)
