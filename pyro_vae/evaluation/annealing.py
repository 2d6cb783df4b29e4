r"""Annealed importance sampling, and the sandwich of log p(x) that it makes with its own reverse.

A path of densities leads from a base that can be sampled, the prior or the guide, to the posterior:

    log f_b(z) = (1 - b) log base(z) + b log p(x, z),      0 = b_0 < b_1 < ... < b_T = 1.

A chain starts at the base, and takes one transition of Hamiltonian Monte Carlo at each b; the product of the ratios
f_{b_t} / f_{b_{t-1}} at its states is an unbiased weight for p(x). Run backwards from a posterior sample, the same chain
gives an unbiased weight for 1 / p(x).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self

import torch
from pyro import poutine
from pyro.distributions import Delta, Unit
from torch import Tensor
from torch.distributions import biject_to
from tqdm.auto import tqdm

from pyro_vae.engine import rng
from pyro_vae.engine.agreement import equal, family, same_masks, unwrapped
from pyro_vae.engine.batch_plate import Sites
from pyro_vae.engine.modules import Program
from pyro_vae.engine.program import Run, draw, find_max_plate_nesting, prior, run_at, sample_sites, shape_beside
from pyro_vae.engine.weights import log_density, per_datum, terms
from pyro_vae.errors import PyroVAEError
from pyro_vae.evaluation.defaults import NUM_CHAINS, NUM_LEAPFROG, NUM_STEPS, STEP_SIZE
from pyro_vae.evaluation.estimate import Estimate
from pyro_vae.evaluation.evidence import Evidence
from pyro_vae.evaluation.pieces import Args, arguments, check_count, checked, rows_at_once
from pyro_vae.evaluation.supports import same_support

ACCEPTANCE = 0.65  # what the step size is adapted to, as Neal's analysis of HMC advises
GAIN = 0.3  # on the logarithm of the step size, for each transition of the trial run
TRIAL = 5  # the trial run has a fifth of the steps
CIRCULAR = {"VonMises", "SineBivariateVonMises"}  # whose declared support is the line, and whose densities are periodic
JITTER = 0.2  # of the step size, so that no trajectory is a whole period long

Schedule = Literal["sigmoid", "linear"]


@dataclass(frozen=True)
class AnnealedLikelihood(Evidence):
    """What :func:`pyro_vae.ais` returns; see :class:`pyro_vae.Evidence` for the other attributes.

    Attributes:
        log_weights: of each chain and datum, (C, N); `num_samples` is C.
        acceptance: the share of proposals accepted at each step, (T - 1,); about 0.65 where the step size could adapt.
    """

    log_weights: Tensor = field(repr=False)
    acceptance: Tensor = field(repr=False)

    _not_per_datum: ClassVar[tuple[str, ...]] = ("num_samples", "acceptance")

    @classmethod
    def from_weights(cls, log_w: Tensor, /, **other_fields: Any) -> Self:
        """The record of log-weights (C, N); see :meth:`pyro_vae.Evidence.from_weights`."""
        return super().from_weights(log_w, log_weights=log_w, **other_fields)

    def __str__(self) -> str:
        return (
            f"log p(x) >= {self.estimate} nats per datum (AIS, {len(self.acceptance) + 1} steps, {self.num_samples} chains, "
            f"N = {len(self.per_datum)}; Monte Carlo error {self.monte_carlo_error:.2g}, median ESS "
            f"{self.ess.median():.1f}, acceptance {self.acceptance.mean():.2f}{self._zeros()})"
        )


@dataclass(frozen=True)
class Sandwich:
    r"""What :func:`pyro_vae.bdmc` returns: two sides of log p(x) on data simulated from the model.

    Attributes:
        lower: the forward chains' estimate, whose mean is at most log p(x).
        upper_per_datum: the reverse chains' estimate, whose mean is at least log p(x), in nats, (N,).
        x: the simulated data, as the program's argument, or a tuple of its arguments.
    """

    lower: AnnealedLikelihood
    upper_per_datum: Tensor
    x: Any = field(repr=False)

    @property
    def upper(self) -> Estimate:
        """The upper side, its mean over data with its standard error."""
        return Estimate.of(self.upper_per_datum)

    @property
    def gap(self) -> Estimate:
        """Upper less lower side, with the standard error of the paired difference; AIS is off by no more, on average."""
        return Estimate.of(self.upper_per_datum - self.lower.per_datum)

    def __str__(self) -> str:
        return (
            f"{self.lower.mean:.2f} <= log p(x) <= {self.upper.value:.2f} nats per datum, a gap of {self.gap} (BDMC, "
            f"{len(self.lower.acceptance) + 1} steps, {self.lower.num_samples} chains, N = {len(self.upper_per_datum)} "
            "data simulated from the model)"
        )


def ais(
    model: Program,
    guide: Program | None,
    x: Any,
    num_steps: int = NUM_STEPS,
    num_chains: int = NUM_CHAINS,
    *,
    start: Literal["prior", "guide"] = "prior",
    schedule: Schedule | Sequence[float] | Tensor = "sigmoid",
    num_leapfrog: int = NUM_LEAPFROG,
    step_size: float = STEP_SIZE,
    seed: int | None = None,
    progress: bool = True,
) -> AnnealedLikelihood:
    r"""Estimate log p(x) of each datum by annealed importance sampling with Hamiltonian transitions.

    .. math:: \log \hat p(x_n) = \log \frac1C \sum_c w_{cn}, \qquad
        \log w_{cn} = \sum_{t=1}^T (b_t - b_{t-1}) \bigl[\log p(x_n, z^{(t-1)}_{cn}) - \log \mathrm{base}(z^{(t-1)}_{cn})\bigr]

    The weights are unbiased for p(x), so that the mean of their logarithm is a lower bound, tight as T grows whatever the
    guide. A trial run with a fifth of the steps adapts the step size, for each datum and each step; the run that counts
    keeps it fixed, as unbiasedness asks. All chains of a piece of the data move at once; latents with constraints move in
    the unconstrained space.

    Arguments:
        model: a Pyro model with a batch plate and continuous latent sites.
        guide: its guide; not used, and None will do, when the chains start at the prior.
        x: data (N, ...), a split of :mod:`pyro_vae.data`, or a tuple of tensors that are passed as several arguments.
        num_steps: T, the number of temperatures after the base, at least 2.
        num_chains: C, at least 2.
        start: the base, ``"prior"`` or ``"guide"``.
        schedule: b_1 to b_T: ``"sigmoid"``, dense at both ends; ``"linear"``; or T + 1 increasing numbers from 0 to 1.
        num_leapfrog: leapfrog steps of a transition.
        step_size: of the first leapfrog step, before it is adapted.
        seed: where the random numbers start; None goes on from the generators' state.
        progress: whether to show a progress bar, in a terminal.

    Raises:
        ValueError: an argument is none of these, a latent site is discrete or has bounds that depend on another, the guide
            is no density of the latents, the data hold NaN or infinity, or the program has no log-weight per datum (see
            :func:`pyro_vae.log_weights`).
        FloatingPointError: a log-weight is NaN or plus infinity.

    Example:
        >>> import torch, pyro, pyro_vae as pv
        >>> pyro.set_rng_seed(0)
        >>> vae = pv.mlp_vae((5,), latent_dim=2, hidden_dims=(16,), likelihood="gaussian")
        >>> annealed = pv.ais(vae.model, None, torch.randn(8, 5), num_steps=50, num_chains=4, seed=0)
        >>> annealed.per_datum.shape
        torch.Size([8])

    References:
        Neal (2001), *Annealed Importance Sampling*, Statistics and Computing.
        Wu, Burda, Salakhutdinov and Grosse (2017), *On the Quantitative Analysis of Decoder-Based Generative Models*, ICLR.
    """
    args = arguments(x)
    base = _base(guide, start)
    settings = _settings(num_steps, num_chains, schedule, num_leapfrog, step_size)
    with checked(model, base, args) as data, rng.seeded(seed):
        pieces = data.minibatches(rows_at_once(args) // num_chains)
        weights, accepted = [], []
        with _bar(settings, len(pieces), 1, progress) as bar:
            for piece in pieces:
                path = _Path(model, base, piece, num_chains)
                steps = path.adapt(settings, bar)
                log_w, acceptance = path.anneal(path.start(), settings.temperatures, steps, num_leapfrog, bar)
                weights.append(log_w)
                accepted.append(acceptance)
    return _joined(weights, accepted)


def bdmc(
    model: Program,
    guide: Program | None,
    x: Any,
    num_steps: int = NUM_STEPS,
    num_chains: int = NUM_CHAINS,
    *,
    start: Literal["prior", "guide"] = "prior",
    schedule: Schedule | Sequence[float] | Tensor = "sigmoid",
    num_leapfrog: int = NUM_LEAPFROG,
    step_size: float = STEP_SIZE,
    seed: int | None = None,
    progress: bool = True,
) -> Sandwich:
    r"""Sandwich log p(x) between annealing and its reverse, on data that the model itself simulates.

    .. math:: \mathbb E \log \hat p_{\text{forward}}(x) \le \log p(x) \le
        \mathbb E \Bigl[ -\log \tfrac1C \sum_c w^{-1}_{cn} \Bigr], \qquad x, z \sim p(x, z)

    A simulated datum comes with one exact posterior sample, its z, and reverse chains from there give weights
    :math:`w^{-1}` that are unbiased for 1 / p(x). The gap says how far off :func:`pyro_vae.ais` with these settings can be, on data
    like the model's own; on real data it is evidence, not proof.

    Arguments:
        model, guide, num_steps, num_chains, start, schedule, num_leapfrog, step_size, seed, progress: see :func:`pyro_vae.ais`.
        x: data of which as many are simulated, in the same shapes. Arguments that the model observes are replaced by
            simulated ones; the others, such as labels, stay.

    Raises:
        ValueError: as :func:`pyro_vae.ais`; or the model can't be simulated: it has factors, or observes something that is not
            an argument.

    Example:
        >>> import torch, pyro, pyro_vae as pv
        >>> pyro.set_rng_seed(0)
        >>> vae = pv.mlp_vae((5,), latent_dim=2, hidden_dims=(16,), likelihood="gaussian")
        >>> sandwich = pv.bdmc(vae.model, None, torch.randn(8, 5), num_steps=50, num_chains=4, seed=0)
        >>> bool(sandwich.upper.value > sandwich.lower.mean)
        True

    References:
        Grosse, Ghahramani and Adams (2015), *Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo*.
        Wu, Burda, Salakhutdinov and Grosse (2017), *On the Quantitative Analysis of Decoder-Based Generative Models*, ICLR.
    """
    args = arguments(x)
    base = _base(guide, start)
    settings = _settings(num_steps, num_chains, schedule, num_leapfrog, step_size)
    with checked(model, base, args) as data, rng.seeded(seed):
        forward, backward, accepted, simulated = [], [], [], []
        pieces = data.minibatches(rows_at_once(args) // num_chains)
        with _bar(settings, len(pieces), 2, progress) as bar:
            for piece in pieces:
                piece, latents = _simulate(model, piece)
                path = _Path(model, base, piece, num_chains)
                steps = path.adapt(settings, bar)
                log_w, acceptance = path.anneal(path.start(), settings.temperatures, steps, num_leapfrog, bar)
                reverse, _ = path.anneal(
                    path.at(latents), settings.temperatures.flip(0), steps.flip(0), num_leapfrog, bar
                )
                forward.append(log_w)
                backward.append(-Evidence.from_weights(reverse).per_datum)
                accepted.append(acceptance)
                simulated.append(piece)
    columns = tuple(torch.cat(column) for column in zip(*simulated, strict=True))
    return Sandwich(_joined(forward, accepted), torch.cat(backward), columns[0] if len(columns) == 1 else columns)


@dataclass(frozen=True)
class _Settings:
    temperatures: Tensor  # b_0 = 0 to b_T = 1
    num_leapfrog: int
    step_size: float


@dataclass(frozen=True)
class _State:
    """Where the chains are, unconstrained, with both log-densities (C, N) and their derivatives there."""

    position: dict[str, Tensor]
    log_base: Tensor
    log_joint: Tensor
    base_slope: dict[str, Tensor]
    joint_slope: dict[str, Tensor]

    def log_density(self, temperature: float) -> Tensor:
        return (1 - temperature) * self.log_base + temperature * self.log_joint

    def slope(self, name: str, temperature: float) -> Tensor:
        return (1 - temperature) * self.base_slope[name] + temperature * self.joint_slope[name]


class _Path:
    """The annealed densities of some data: `num_chains` chains for each move at once.

    Each chain and datum is a system of its own, since a datum's density depends on its own latents alone: so one pass
    backwards through their sum differentiates all of them.
    """

    def __init__(self, model: Program, base: Program | None, args: Args, num_chains: int) -> None:
        self.model, self.base, self.args, self.num_chains = model, base, args, num_chains
        self.guide = prior(model) if base is None else base
        self.nesting = find_max_plate_nesting(model, self.guide, args, {}, in_plate=True)
        first, second = self._draw(), self._draw()
        self.run = first
        self.names = [name for name, site in first.model.items() if not site["is_observed"]]
        _check_latents(first.model, first.guide, second.model)
        self.transforms = {name: biject_to(first.model[name]["fn"].support) for name in self.names}

    def _draw(self) -> Run:
        return draw(self.model, self.guide, self.args, self.num_chains, self.nesting)

    def start(self) -> _State:
        """Draws from the base."""
        run = self._draw()
        return self._constrained({name: run.guide[name]["value"] for name in self.names})

    def at(self, latents: dict[str, Tensor]) -> _State:
        """All chains at one value of the latents."""
        values = {}
        for name in self.names:
            shape = self.run.guide[name]["value"].shape
            value = latents[name]
            values[name] = value.reshape((1,) * (len(shape) - value.dim()) + tuple(value.shape)).expand(shape)
        return self._constrained(values)

    def _constrained(self, values: dict[str, Tensor]) -> _State:
        return self.evaluate({name: self.transforms[name].inv(value) for name, value in values.items()})

    @torch.enable_grad()
    def evaluate(self, position: dict[str, Tensor]) -> _State:
        """Both densities, with the change of volume from the unconstrained space, and their derivatives."""
        leaves = {name: value.detach().requires_grad_() for name, value in position.items()}
        values = {name: self.transforms[name](leaf) for name, leaf in leaves.items()}

        def read(run: Run) -> tuple[Tensor, Tensor]:
            volume: Any = 0.0
            for name in self.names:
                log_volume = self.transforms[name].log_abs_det_jacobian(leaves[name], values[name])
                log_volume = sum_from(log_volume, run.guide[name]["unscaled_log_prob"].dim())
                volume = volume + per_datum(run, run.guide[name], log_volume)
            return log_density(run, terms(run.guide)) + volume, log_density(run, terms(run.model)) + volume

        densities = run_at(self.model, self.base, self.args, values, self.num_chains, self.nesting, read=read)
        slopes = [
            torch.autograd.grad(
                density.sum(), list(leaves.values()), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for density in densities
        ]
        log_base, log_joint = (density.detach().double() for density in densities)
        base_slope, joint_slope = (dict(zip(leaves, slope, strict=True)) for slope in slopes)
        detached = {name: leaf.detach() for name, leaf in leaves.items()}
        return _State(detached, log_base, log_joint, base_slope, joint_slope)

    def anneal(
        self, state: _State, temperatures: Tensor, step_sizes: Tensor, num_leapfrog: int, bar: Any
    ) -> tuple[Tensor, Tensor]:
        """Run the chains along the temperatures, up or down: log-weights (C, N) and acceptance (T - 1, N)."""
        log_weights: Any = 0.0
        accepted = []
        last = len(temperatures) - 2
        for t, (before, now) in enumerate(pairwise(temperatures.tolist())):
            log_weights = log_weights + (now - before) * (state.log_joint - state.log_base)
            if t < last:
                state, probability = self.transition(state, now, step_sizes[t], num_leapfrog)
                accepted.append(probability.mean(0))
            bar.update()
        return log_weights, torch.stack(accepted)

    def adapt(self, settings: _Settings, bar: Any) -> Tensor:
        """A step size for each transition and datum, (T - 1, N), from a shorter run."""
        temperatures = settings.temperatures.tolist()
        number = len(temperatures) - 2
        trial = torch.linspace(0, number - 1, max(min(number, 50), number // TRIAL)).round().long().unique()
        state, log_step = self.start(), None
        found = []
        for t in trial.tolist():
            if log_step is None:
                log_step = torch.full_like(state.log_base[0], settings.step_size).log()
            state, probability = self.transition(state, temperatures[t + 1], log_step.exp(), settings.num_leapfrog)
            log_step = log_step + GAIN * (probability.mean(0) - ACCEPTANCE)
            found.append(log_step)
            bar.update()
        nearest = torch.bucketize(torch.arange(number), trial).clamp(max=len(trial) - 1)
        return torch.stack(found)[nearest].exp()

    def transition(
        self, state: _State, temperature: float, step_size: Tensor, num_leapfrog: int
    ) -> tuple[_State, Tensor]:
        """One transition of Hamiltonian Monte Carlo at one temperature; with it the probabilities of acceptance (C, N)."""
        jitter = 1 + JITTER * (2 * torch.rand_like(state.log_base) - 1)
        steps = self._beside(jitter * step_size)
        momentum = {name: torch.randn_like(value) for name, value in state.position.items()}
        energy = self._kinetic(momentum) - state.log_density(temperature)
        proposal = state
        for _ in range(num_leapfrog):
            half = {n: p + 0.5 * steps[n] * proposal.slope(n, temperature) for n, p in momentum.items()}
            position = {n: proposal.position[n] + steps[n] * p for n, p in half.items()}
            proposal = self.evaluate(position)
            momentum = {n: p + 0.5 * steps[n] * proposal.slope(n, temperature) for n, p in half.items()}
        change = energy - (self._kinetic(momentum) - proposal.log_density(temperature))
        # A trajectory that left the numbers ends in NaN: it is rejected, as one of infinite energy.
        probability = torch.where(change.isnan(), 0.0, change.clamp(max=0).exp())
        return self._choose(torch.rand_like(probability) < probability, proposal, state), probability

    def _choose(self, accept: Tensor, proposal: _State, state: _State) -> _State:
        beside = self._beside(accept)

        def pick(new: dict[str, Tensor], old: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: torch.where(beside[name], new[name], old[name]) for name in new}

        return _State(
            pick(proposal.position, state.position),
            torch.where(accept, proposal.log_base, state.log_base),
            torch.where(accept, proposal.log_joint, state.log_joint),
            pick(proposal.base_slope, state.base_slope),
            pick(proposal.joint_slope, state.joint_slope),
        )

    def _beside(self, matrix: Tensor) -> dict[str, Tensor]:
        """A matrix (C, N) in shapes that broadcast to each site's value, and numbers of its type."""
        beside = {}
        for name in self.names:
            site = self.run.guide[name]
            shaped = matrix.reshape(shape_beside(self.run, site))
            beside[name] = shaped.to(site["value"]) if matrix.is_floating_point() else shaped
        return beside

    def _kinetic(self, momentum: dict[str, Tensor]) -> Tensor:
        energy: Any = 0.0
        for name, p in momentum.items():
            site = self.run.guide[name]
            unmasked = site | {"mask": None}
            energy = energy + per_datum(self.run, unmasked, sum_from(0.5 * p.square(), site["unscaled_log_prob"].dim()))
        return energy


def sum_from(value: Tensor, dim: int) -> Tensor:
    """Sum over the dimensions from `dim` on: those of an event."""
    return value.flatten(dim).sum(-1) if value.dim() > dim else value


def _base(guide: Program | None, start: str) -> Program | None:
    if start not in ("prior", "guide"):
        raise PyroVAEError(f"expected start to be 'prior' or 'guide', got {start!r}.")
    if start == "guide" and guide is None:
        raise PyroVAEError("expected a guide to start from, got None. Pass it, or start='prior'.")
    return guide if start == "guide" else None


def _settings(num_steps: int, num_chains: int, schedule: Any, num_leapfrog: int, step_size: float) -> _Settings:
    check_count("num_steps", num_steps, 2)
    check_count("num_chains", num_chains, 2, ", to have an error bar")
    check_count("num_leapfrog", num_leapfrog, 1)
    if not step_size > 0:
        raise PyroVAEError(f"expected a positive step_size, got {step_size!r}. Try {STEP_SIZE}.")
    even = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    if isinstance(schedule, str):
        if schedule not in ("sigmoid", "linear"):
            raise PyroVAEError(f"expected schedule to be 'sigmoid', 'linear' or temperatures, got {schedule!r}.")
        curve = (8 * even - 4).sigmoid()
        temperatures = even if schedule == "linear" else (curve - curve[0]) / (curve[-1] - curve[0])
    else:
        temperatures = torch.as_tensor(schedule, dtype=torch.float64).cpu()
        rising = temperatures.dim() == 1 and bool((temperatures.diff() > 0).all())
        if not rising or len(temperatures) != num_steps + 1 or temperatures[0] != 0 or temperatures[-1] != 1:
            raise PyroVAEError(
                f"expected a schedule of num_steps + 1 = {num_steps + 1} increasing temperatures from 0 to 1, got shape "
                f"{tuple(temperatures.shape)} and values {temperatures.flatten()[:3].tolist()} ... . Pass "
                "torch.linspace(0, 1, num_steps + 1), say."
            )
    return _Settings(temperatures, num_leapfrog, step_size)


def _bar(settings: _Settings, pieces: int, runs: int, progress: bool) -> Any:
    number = len(settings.temperatures) - 2
    total = pieces * (runs * (number + 1) + max(min(number, 50), number // TRIAL))
    return tqdm(total=total, leave=False, disable=None if progress else True, unit="step", desc="annealing")


def _joined(log_weights: list[Tensor], acceptance: list[Tensor]) -> AnnealedLikelihood:
    """The record of all data from each piece's log-weights (C, n) and acceptance (T - 1, n)."""
    return AnnealedLikelihood.from_weights(torch.cat(log_weights, 1), acceptance=torch.cat(acceptance, 1).mean(1))


def _check_latents(model: Sites, guide: Sites, again: Sites) -> None:
    """Every latent moves in one continuous space, the same for model and guide and whatever the other latents."""
    for name, site in guide.items():
        if name not in model or isinstance(unwrapped(site["fn"]), Delta):
            raise PyroVAEError(
                f"guide site '{name}' is auxiliary, or a point: expected a guide with a density at each latent site of the "
                "model alone, since annealing moves the latents themselves. Pass start='prior'."
            )
        own, base, kind = model[name]["fn"].support, site["fn"].support, family(model[name]["fn"])
        if own.is_discrete:
            raise PyroVAEError(
                f"model site '{name}' is discrete ({kind}): expected continuous latents, which "
                "Hamiltonian transitions can move. Sum it out of the model, or use pv.log_likelihood."
            )
        if kind in CIRCULAR or not _has_flat_space(own):
            raise PyroVAEError(
                f"model site '{name}' is on a curved or periodic space ({kind}): expected latents that a transform takes to "
                "as many unconstrained numbers, dimension by dimension. Use pv.log_likelihood."
            )
        if not same_support(own, again[name]["fn"].support):
            raise PyroVAEError(
                f"model site '{name}' has a support that depends on another latent: expected bounds that stay. Sample it on "
                "fixed bounds and transform it."
            )
        if not same_support(own, base):
            raise PyroVAEError(
                f"model and guide disagree on the support of site '{name}': expected one, got {own} in the model and "
                f"{base} in the guide. Choose a guide on {own}, or pass start='prior'."
            )


def _has_flat_space(support: Any) -> bool:
    try:
        transform = biject_to(support)
    except NotImplementedError:
        return False
    return bool(transform.domain.event_dim == transform.codomain.event_dim)


def _simulate(model: Program, args: Args) -> tuple[Args, dict[str, Tensor]]:
    """Draws from p(x, z): the arguments with x in place of what the model observes, and z."""
    observed = sample_sites(poutine.trace(model).get_trace(*args))
    trace = poutine.trace(poutine.uncondition(model)).get_trace(*args)
    drawn = sample_sites(trace)
    replaced, latents = list(args), {}
    for name, site in observed.items():
        value = site["value"]
        if not site["is_observed"]:
            latents[name] = drawn[name]["value"]
            continue
        if isinstance(unwrapped(site["fn"]), Unit):
            raise PyroVAEError(
                f"model site '{name}' is a factor: expected a model that can be simulated. Use pv.ais, on data."
            )
        places = [i for i, a in enumerate(args) if a.numel() == value.numel() and equal(a.reshape(value.shape), value)]
        if not places:
            raise PyroVAEError(
                f"model site '{name}' observes something that is not an argument of the model: expected obs= to be given "
                "an argument as it is, so that simulated data can take its place. Preprocess x before it is passed."
            )
        for place in places:
            replaced[place] = drawn[name]["value"].reshape(args[place].shape).to(args[place])
    again = sample_sites(poutine.trace(poutine.replay(model, trace=trace)).get_trace(*replaced))
    for name in observed:
        pair = drawn[name]["unscaled_log_prob"], again[name]["unscaled_log_prob"]
        alike = torch.allclose(*pair, rtol=1e-3, atol=1e-2, equal_nan=True)
        if not alike or not same_masks(drawn[name], again[name]):
            raise PyroVAEError(
                f"model site '{name}' has another density, or mask, when the model is called with the data that it simulated: "
                "expected a model that reads x only to observe it, since another can't be simulated in one run. Use "
                "pv.ais, on data."
            )
    return tuple(replaced), latents
