r"""Annealed importance sampling (ais), and its reverse, which bounds log p(x) from above (bdmc).

Annealed densities lead from a base that can be sampled, the prior or the guide, to the posterior:

    log f_b(z) = (1 - b) log base(z) + b log p(x, z),      0 = b_0 < b_1 < ... < b_T = 1.

A chain starts at a sample from the base and makes one Hamiltonian transition at each b. The product of the ratios
f_{b_t} / f_{b_{t-1}} at its states is its weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from pyro_vae.checks import Seed
from pyro_vae.compiled.function import CompiledFunction
from pyro_vae.defaults import NUM_CHAINS, NUM_LEAPFROG, NUM_STEPS, STEP_SIZE
from pyro_vae.engine.arguments import takes_program
from pyro_vae.engine.modules import PyroFunction
from pyro_vae.engine.program import Program
from pyro_vae.engine.simulation import prior_that_draws
from pyro_vae.errors import PyroVAEError, require_count
from pyro_vae.evaluation.estimate import Estimate
from pyro_vae.evaluation.evidence import Evidence
from pyro_vae.evaluation.hamiltonian import Chains, trial_length
from pyro_vae.evaluation.parts import checked_parts
from pyro_vae.evaluation.pieces import Args, progress_bar
from pyro_vae.evaluation.sharing import Sharing, sharing
from pyro_vae.evaluation.simulation import simulate_data
from pyro_vae.printed import Printed

Schedule = Literal["sigmoid", "linear"]


@dataclass(frozen=True, repr=False)
class AnnealedLikelihood(Evidence):
    """The result of :func:`pyro_vae.ais`; see :class:`pyro_vae.Evidence` for the other attributes.

    Attributes:
        log_weights: the log-weight of each chain and datum, (C, N); `num_samples` is C.
        acceptance: the mean acceptance probability of each transition, (T - 1,); about 0.65 where the step size could
            adapt.
    """

    log_weights: Tensor
    acceptance: Tensor

    _not_per_datum: ClassVar[tuple[str, ...]] = ("num_samples", "acceptance")

    @classmethod
    def from_weights(cls, log_w: Tensor, /, **other_fields: Any) -> Self:
        """The record of log-weights (C, N); see :meth:`pyro_vae.Evidence.from_weights`."""
        return super().from_weights(log_w, log_weights=log_w, **other_fields)

    def _statement(self) -> str:
        return (
            f"log p(x) >= {self.estimate} nats per datum (AIS, {len(self.acceptance) + 1} steps, {self.num_samples} "
            f"chains, N = {len(self.per_datum)}; Monte Carlo error {self.monte_carlo_error:.2g}, median ESS "
            f"{self.ess.median():.1f}, acceptance {self.acceptance.mean():.2f}{self._zeros()})"
        )

    def _rows(self) -> dict[str, object]:
        steps = {"steps": len(self.acceptance) + 1, "acceptance": f"{self.acceptance.mean():.2f}"}
        names = {"log p(x), nats per datum": "lower bound, nats per datum", "samples K of a datum": "chains of a datum"}
        return {names.get(name, name): value for name, value in super()._rows().items()} | steps


@dataclass(frozen=True, repr=False)
class Sandwich(Printed):
    r"""The result of :func:`pyro_vae.bdmc`: a lower and an upper bound of log p(x) on data simulated from the model.

    Attributes:
        lower: the forward chains' estimate, whose mean is at most log p(x).
        upper_per_datum: the reverse chains' estimate, whose mean is at least log p(x), in nats, (N,).
        x: the simulated data, as the program's argument, or a tuple of its arguments.
    """

    lower: AnnealedLikelihood
    upper_per_datum: Tensor
    x: Any

    @property
    def upper(self) -> Estimate:
        """The mean of the upper bound over data, with its standard error."""
        return Estimate.of(self.upper_per_datum)

    @property
    def gap(self) -> Estimate:
        """The upper minus the lower bound, by datum. On average, the error of AIS is at most this gap."""
        return Estimate.of(self.upper_per_datum - self.lower.per_datum)

    def _statement(self) -> str:
        low, high, gap = self.lower.mean, self.upper.value, self.gap
        bounds = f"{low:.2f} <= log p(x) <= {high:.2f} nats per datum, a gap of {gap}"
        if gap.value < 0:  # by noise, since the means are in order
            bounds = f"log p(x) is near {(low + high) / 2:.2f} nats per datum: the bounds cross, with a gap of {gap}"
        return (
            f"{bounds} (BDMC, {len(self.lower.acceptance) + 1} steps, {self.lower.num_samples} chains, "
            f"N = {len(self.upper_per_datum)} data simulated from the model)"
        )

    def _rows(self) -> dict[str, object]:
        return {
            "lower bound, nats per datum": self.lower.estimate,
            "upper bound": self.upper,
            "gap": self.gap,
            "simulated data N": len(self.upper_per_datum),
            "chains of a datum": self.lower.num_samples,
            "steps": len(self.lower.acceptance) + 1,
        }


@takes_program
def ais(
    model: PyroFunction,
    guide: PyroFunction | None,
    x: Any,
    num_steps: int = NUM_STEPS,
    num_chains: int = NUM_CHAINS,
    *,
    start: Literal["prior", "guide"] = "prior",
    schedule: Schedule | Sequence[float] | Tensor = "sigmoid",
    num_leapfrog: int = NUM_LEAPFROG,
    step_size: float = STEP_SIZE,
    vectorize_particles: bool = True,
    compile: bool = False,
    seed: Seed | None = None,
    distributed: bool | None = None,
    progress: bool = True,
) -> AnnealedLikelihood:
    r"""Estimate log p(x) of each datum by annealed importance sampling with Hamiltonian transitions.

    .. math:: \log \hat p(x_n) = \log \frac1C \sum_c w_{cn}, \qquad
        \log w_{cn} = \sum_{t=1}^T (b_t - b_{t-1})
        \bigl[\log p(x_n, z^{(t-1)}_{cn}) - \log \mathrm{base}(z^{(t-1)}_{cn})\bigr]

    The weights are unbiased for p(x), so the mean of their logarithm is a lower bound. It becomes tight as T grows,
    whatever the guide. A trial with a fifth of the steps adapts the step size for each datum and each step. The chains
    that count keep it fixed, or their weights would be biased. All chains of a minibatch move at once. Latents with
    constraints move in the unconstrained space.

    Arguments:
        model, x, seed, distributed, progress: see :func:`pyro_vae.log_likelihood`. The model's latent sites must be
            continuous.
        guide: its guide. It is not used, and may be None, where the chains start at the prior.
        num_steps: T, the number of temperatures after the base, at least 2.
        num_chains: C, at least 2.
        start: the base, ``"prior"`` or ``"guide"``.
        schedule: the temperatures: ``"sigmoid"``, dense at both ends; ``"linear"``; or T + 1 increasing numbers from 0
            to 1.
        num_leapfrog: the number of leapfrog steps in a transition.
        step_size: the leapfrog step size before adaptation.
        vectorize_particles: whether all chains of a datum run at once; see :func:`pyro_vae.log_weights`.
        compile: whether to run the densities and their derivatives as compiled code, see :func:`pyro_vae.compile_step`.
            Each call compiles anew, which pays off where it takes minutes.

    Raises:
        ValueError: an argument is invalid, a latent site is discrete or has bounds that depend on another latent, the
            guide is not a density of the latents, or an error of :func:`pyro_vae.log_likelihood`.
        FloatingPointError: a log-weight is NaN or plus infinity.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.mlp_vae((5,), latent_dim=2, hidden_dims=(16,), likelihood="gaussian")
        >>> annealed = pv.ais(vae, torch.randn(8, 5), num_steps=50, num_chains=4)
        >>> annealed.per_datum.shape
        torch.Size([8])

    References:
        Neal (2001), *Annealed Importance Sampling*, Statistics and Computing.
        Wu, Burda, Salakhutdinov and Grosse (2017), *On the Quantitative Analysis of Decoder-Based Generative Models*,
        ICLR.
    """
    given = num_steps, num_chains, start, schedule, num_leapfrog, step_size, vectorize_particles, compile
    with sharing(distributed, "pv.ais", seed, _named(given), progress) as share:
        return _annealed(model, guide, x, _Settings(*given), share, simulate=False)[0]


@takes_program
def bdmc(
    model: PyroFunction,
    guide: PyroFunction | None,
    x: Any,
    num_steps: int = NUM_STEPS,
    num_chains: int = NUM_CHAINS,
    *,
    start: Literal["prior", "guide"] = "prior",
    schedule: Schedule | Sequence[float] | Tensor = "sigmoid",
    num_leapfrog: int = NUM_LEAPFROG,
    step_size: float = STEP_SIZE,
    vectorize_particles: bool = True,
    compile: bool = False,
    seed: Seed | None = None,
    distributed: bool | None = None,
    progress: bool = True,
) -> Sandwich:
    r"""Bound log p(x) from both sides by annealing and its reverse, on data that the model simulates.

    .. math:: \mathbb E \log \hat p_{\text{forward}}(x) \le \log p(x) \le
        \mathbb E \Bigl[ -\log \tfrac1C \sum_c w^{-1}_{cn} \Bigr], \qquad x, z \sim p(x, z)

    The z of a simulated datum is an exact posterior sample. Reverse chains from there give weights :math:`w^{-1}` that
    are unbiased for 1 / p(x). The gap bounds the mean error of :func:`pyro_vae.ais` with these settings on the model's
    own data. For real data it is evidence, not proof.

    Arguments:
        model, guide, num_steps, num_chains, start, schedule: see :func:`pyro_vae.ais`.
        num_leapfrog, step_size, vectorize_particles, compile, seed, distributed, progress: see :func:`pyro_vae.ais`.
        x: data of the number and shapes to simulate. Arguments that the model observes, or elements of them such as
            ``x[:, t]``, are replaced by simulated ones; the others, such as labels, are kept.

    Raises:
        ValueError: an error of :func:`pyro_vae.ais`; or the model can't be simulated, because it has factors, an
            improper prior, reads what it observes, or observes something that is no part of an argument.

    Example:
        >>> import torch, pyro, pyro_vae as pv
        >>> pyro.set_rng_seed(0)
        >>> vae = pv.mlp_vae((5,), latent_dim=2, hidden_dims=(16,), likelihood="gaussian")
        >>> sandwich = pv.bdmc(vae, torch.randn(8, 5), num_steps=50, num_chains=4, seed=3)
        >>> bool(sandwich.upper.value > sandwich.lower.mean)
        True

    References:
        Grosse, Ghahramani and Adams (2015), *Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo*.
    """
    given = num_steps, num_chains, start, schedule, num_leapfrog, step_size, vectorize_particles, compile
    with sharing(distributed, "pv.bdmc", seed, _named(given), progress) as share:
        forward, backward, simulated = _annealed(model, guide, x, _Settings(*given), share, simulate=True)
    columns = tuple(torch.cat(column) for column in zip(*simulated, strict=True))
    return Sandwich(forward, torch.cat(backward), columns[0] if len(columns) == 1 else columns)


@dataclass(frozen=True)
class _Settings:
    """The settings of :func:`ais`, which :func:`bdmc` shares."""

    num_steps: int
    num_chains: int
    start: str
    schedule: Any
    num_leapfrog: int
    step_size: float
    vectorize: bool
    compile: bool

    def __post_init__(self) -> None:
        if self.start not in ("prior", "guide"):
            raise PyroVAEError(f"expected start to be 'prior' or 'guide', got {self.start!r}.")
        if self.compile and not self.vectorize:
            raise PyroVAEError(
                "compiled code runs all chains at once: expected vectorize_particles=True with compile=True, got "
                "False. Drop one of the two."
            )
        require_count("num_steps", self.num_steps, least=2)
        require_count("num_chains", self.num_chains, least=2, why=", to have an error bar")
        require_count("num_leapfrog", self.num_leapfrog)
        if not self.step_size > 0:
            raise PyroVAEError(f"expected a positive step_size, got {self.step_size!r}. Try {STEP_SIZE}.")


def _named(given: tuple[Any, ...]) -> dict[str, Any]:
    """The settings by name, before they are checked."""
    return dict(zip((each.name for each in fields(_Settings)), given, strict=True))


def _annealed(
    model: PyroFunction,
    guide: PyroFunction | None,
    x: Any,
    settings: _Settings,
    share: Sharing,
    *,
    simulate: bool,
) -> tuple[AnnealedLikelihood, list[Tensor], list[Args]]:
    """The forward chains' record; with `simulate`, of data like x, with these and their reverse chains' estimates."""
    start, num_steps, num_chains = settings.start, settings.num_steps, settings.num_chains
    if start == "guide" and guide is None:
        raise PyroVAEError("expected a guide to start from, got None. Pass it, or start='prior'.")
    temperatures = _temperatures(settings.schedule, num_steps)
    found: list[tuple[Tensor, Tensor, Tensor | None, Args]] = []
    evaluate: CompiledFunction | None = None
    used = guide if start == "guide" else None
    steps_of_each = (2 if simulate else 1) * num_steps + trial_length(num_steps - 1)

    def annealed(program: Program) -> tuple[Tensor, Tensor, Tensor | None, Args]:
        """The log-weights of a minibatch, the sum of its acceptance, the reverse chains' estimates, and their data."""
        nonlocal evaluate
        args, latents = simulate_data(program.model, program.args) if simulate else (program.args, {})
        program = program.on(args)
        chains = Chains(program, num_chains, settings.num_leapfrog, settings.vectorize, bar, evaluate)
        if settings.compile and evaluate is None:
            evaluate = chains.evaluate = CompiledFunction(chains.evaluated, program.modules())
        steps = chains.adapt(temperatures, settings.step_size)
        log_w, acceptance = chains.anneal(chains.start(), temperatures, steps)
        if not simulate:
            return log_w, acceptance.sum(1), None, ()
        reverse, _ = chains.anneal(chains.start(latents), temperatures.flip(0), steps.flip(0))
        return log_w, acceptance.sum(1), -Evidence.from_weights(reverse).per_datum, args

    instead = "pv.ais with start='guide', whose chains start at the guide's draws"
    with prior_that_draws(instead), checked_parts(model, used, x, None, progress=share.progress) as parts:
        for data in share.parts(parts):
            programs = data.programs(num_chains, settings.vectorize)
            total = len(share.own(len(programs))) * steps_of_each
            with progress_bar(total, "step", "annealing", share.progress) as bar:
                found += share.each(programs, annealed, data.device)
    log_w = torch.cat([each[0] for each in found], 1)
    acceptance = sum(each[1] for each in found) / log_w.shape[1]
    backward = [each[2] for each in found if each[2] is not None]
    return AnnealedLikelihood.from_weights(log_w, acceptance=acceptance), backward, [each[3] for each in found]


def _temperatures(schedule: Any, num_steps: int) -> Tensor:
    """b_0 = 0 to b_T = 1."""
    if isinstance(schedule, str):
        if schedule not in ("sigmoid", "linear"):
            raise PyroVAEError(f"expected schedule to be 'sigmoid', 'linear' or temperatures, got {schedule!r}.")
        even = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
        curve = (8 * even - 4).sigmoid()
        return even if schedule == "linear" else (curve - curve[0]) / (curve[-1] - curve[0])
    values = schedule.cpu() if isinstance(schedule, Tensor) else schedule
    temperatures = torch.as_tensor(values, dtype=torch.float64)
    rising = temperatures.dim() == 1 and bool((temperatures.diff() > 0).all())
    if not rising or len(temperatures) != num_steps + 1 or temperatures[0] != 0 or temperatures[-1] != 1:
        raise PyroVAEError(
            f"expected a schedule of num_steps + 1 = {num_steps + 1} increasing temperatures from 0 to 1, got "
            f"shape {tuple(temperatures.shape)} and values {temperatures.flatten()[:3].tolist()} ... . Pass "
            "torch.linspace(0, 1, num_steps + 1), for example."
        )
    return temperatures
