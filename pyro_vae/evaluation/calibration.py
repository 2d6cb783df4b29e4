r"""Calibration of a guide on data that the model simulates, whose true latents are known.

The latents of a simulated datum are an exact draw from its posterior. So their log-weight, as one more row of the
log-weights, turns the IWAE bound into an upper bound,

    E log 1/K (w_true + w_1 + ... + w_{K-1}) >= log p(x) >= E log 1/K (w_1 + ... + w_K),

and their rank among the guide's draws is uniform if the guide is the posterior.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pandas as pd
import torch
from pyro.distributions import Delta
from torch import Tensor

from pyro_vae.checks import Seed
from pyro_vae.defaults import CALIBRATION_SAMPLES
from pyro_vae.devices import wide
from pyro_vae.engine.arguments import takes_program
from pyro_vae.engine.modules import PyroFunction
from pyro_vae.engine.program import Program, Run
from pyro_vae.engine.simulation import prior_that_draws
from pyro_vae.engine.sites import Sites, unwrapped
from pyro_vae.engine.weights import log_weights_of
from pyro_vae.errors import NoDensityError, PyroVAEError, require_count
from pyro_vae.evaluation.estimate import Estimate
from pyro_vae.evaluation.evidence import Evidence, LogLikelihood
from pyro_vae.evaluation.families import by_dimension, refuse_masks, require_latents
from pyro_vae.evaluation.parts import checked_parts
from pyro_vae.evaluation.pieces import Args, Pieces, progress_bar, rows_at_once
from pyro_vae.evaluation.proposals.search import Search, Settings
from pyro_vae.evaluation.runs import run, run_at
from pyro_vae.evaluation.simulation import simulate_data
from pyro_vae.printed import Printed

LEVELS = (0.5, 0.9, 0.95)
FEWEST_OF_PRIOR = 200  # draws that tell the scale of each dimension
SEEN = 3.5  # standard errors from which a difference counts: of 1,000 exact dimensions, one has one, from 100 data on


@dataclass(frozen=True, repr=False)
class Calibration(Printed):
    r"""The result of :func:`pyro_vae.calibrate`, on N simulated data with K draws of the guide for each.

    Attributes:
        log_weights: log-weights of the guide's draws, in nats, (K, N).
        true_log_weights: those of the true latents, (N,).
        ranks: the rank of each true latent among the guide's draws, from 0 to 1: a table with one row for each datum
            and one column for each site and dimension. It is uniform if the guide is the posterior. Ties, as discrete
            latents have them, are broken at random.
        weighted_ranks: the same among the draws with their weights, where the true latent has their mean weight.
        distance_ranks: the share of draws that are nearer to a random point than the true latents are, (N,), all
            dimensions together (TARP).
        x: the simulated data, as the program's argument, or a tuple of its arguments.
        refined: whether the draws are of refined proposals.
    """

    log_weights: Tensor
    true_log_weights: Tensor
    ranks: pd.DataFrame
    weighted_ranks: pd.DataFrame
    distance_ranks: Tensor
    x: Any
    refined: bool = False

    @property
    def lower(self) -> LogLikelihood:
        """The estimates of log p(x) from the K draws, whose mean is at most log p(x)."""
        return LogLikelihood.from_weights(self.log_weights)

    @property
    def upper_per_datum(self) -> Tensor:
        """The estimates with the true latents in place of the last draw, whose mean is at least log p(x), in nats."""
        return _mean_weight(self._with_true(self.log_weights))

    def _with_true(self, log_w: Tensor) -> Tensor:
        """Log-weights with those of the true latents in place of the last draw's."""
        return torch.cat([self.true_log_weights[None], log_w[:-1]])

    @property
    def upper(self) -> Estimate:
        """The mean of the upper bound over data."""
        return Estimate.of(self.upper_per_datum)

    @property
    def gap(self) -> Estimate:
        """The upper minus the lower bound. On average, what K draws of the guide lose is at most this."""
        return Estimate.of(self.upper_per_datum - self.lower.per_datum)

    @property
    def kl(self) -> Estimate:
        """KL(p(z|x) || q(z|x)) + KL(q(z|x) || p(z|x)), averaged over data, in nats.

        It is the gap of one draw, averaged over the draws; infinite where a draw has the weight zero. It says little of
        refined proposals, which are wider than the posterior on purpose.
        """
        return Estimate.of(self.true_log_weights - self.log_weights.mean(0))

    @property
    def bounds(self) -> pd.DataFrame:
        """Both bounds and their gap for 1, 2, 4, ... draws, with standard errors over data, in nats."""
        number, rows = len(self.log_weights), {}
        for k in sorted({*(2**i for i in range(number.bit_length())), number}):
            lower, upper = _mean_weight(self.log_weights[:k]), _mean_weight(self._with_true(self.log_weights[:k]))
            each = [Estimate.of(v) for v in (lower, upper, upper - lower)]
            rows[k] = [value for one in each for value in (one.value, one.standard_error)]
        columns = ["lower", "lower_se", "upper", "upper_se", "gap", "gap_se"]
        return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("particles")

    @property
    def dimensions(self) -> pd.DataFrame:
        """What the ranks of each dimension show, one row for each site and dimension.

        The ranks are turned into normal quantiles. If posterior and guide are normal, these have the posterior's mean
        and standard deviation, in those of the guide.

        - ``bias``: their mean; above 0, the guide's draws are too low. ``bias_z``: in standard errors.
        - ``spread``: their standard deviation; above 1, the guide is too narrow. ``spread_z``: the distance of its
          logarithm from 0 in standard errors.
        - ``verdict``: what is more than 3.5 standard errors away. Of few data, below 50, it is often wrong.
        """
        quantiles = torch.special.ndtri(torch.from_numpy(self.ranks.to_numpy().copy()).clamp(1e-12, 1 - 1e-12))
        count, bias, spread = len(quantiles), quantiles.mean(0), quantiles.std(0)
        bias_z, spread_z = math.sqrt(count) * bias / spread, math.sqrt(2 * count) * spread.log()
        verdict = [
            ", ".join(
                word
                for word, seen in (
                    ("too narrow", s > SEEN),
                    ("too wide", s < -SEEN),
                    ("too low", b > SEEN),
                    ("too high", b < -SEEN),
                )
                if seen
            )
            or "right as far as seen"
            for b, s in zip(bias_z.tolist(), spread_z.tolist(), strict=True)
        ]
        numbers = {"bias": bias, "bias_z": bias_z, "spread": spread, "spread_z": spread_z}
        columns = {name: value.numpy() for name, value in numbers.items()} | {"verdict": verdict}
        return pd.DataFrame(columns, self.ranks.columns)

    def coverage(self, levels: Sequence[float] = LEVELS) -> pd.DataFrame:
        """How often central intervals hold the true latents, over all data and dimensions, for each level.

        The columns are the share under the guide's draws, its standard error over data, and the same under the
        weighted draws.
        """
        rows = {}
        for level in levels:
            if not 0 < level < 1:
                raise PyroVAEError(f"expected levels between 0 and 1, got {level!r}. For 95%, pass 0.95.")
            row = []
            for table in (self.ranks, self.weighted_ranks):
                held = (table - 0.5).abs() <= level / 2
                share = Estimate.of(torch.from_numpy(held.mean(axis=1).to_numpy().copy()))
                row += [share.value, share.standard_error]
            rows[level] = row
        columns = ["guide", "guide_se", "weighted", "weighted_se"]
        return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("level")

    def _statement(self) -> str:
        low, high, number = self.lower.estimate, self.upper, len(self.log_weights)
        bounds = f"{low} <= log p(x) <= {high} nats per datum, a gap of {self.gap}"
        if self.gap.value < -1e-4:  # more than rounding; by noise, since the means are in order
            middle = (low.value + high.value) / 2
            bounds = f"log p(x) is near {middle:.2f} nats per datum: the bounds cross, with a gap of {self.gap}"
        data = f"(K = {number}, N = {self.log_weights.shape[1]} data simulated from the model)"
        if self.refined:
            return f"{bounds} {data}"
        return (
            f"{bounds} {data}\n"
            f"KL(p || q) + KL(q || p) = {self.kl} nats; 95% intervals of the guide hold {self._held()} of true "
            "latents\n"
            f"{self._verdicts()}"
        )

    def _rows(self) -> dict[str, object]:
        rows: dict[str, object] = {
            "lower bound, nats per datum": self.lower.estimate,
            "upper bound": self.upper,
            "gap": self.gap,
            "simulated data N": self.log_weights.shape[1],
            "draws K of a datum": len(self.log_weights),
        }
        if self.refined:
            return rows
        return rows | {
            "KL(p || q) + KL(q || p)": self.kl,
            "true latents in 95% intervals": self._held(),
            "verdict": self._verdicts(),
        }

    def _held(self) -> str:
        return f"{self.coverage((0.95,)).guide.iloc[0]:.1%}"

    def _verdicts(self) -> str:
        verdicts = self.dimensions.verdict
        return "; ".join(
            f"{count} of {len(verdicts)} dimensions: {word}" for word, count in verdicts.value_counts().items()
        )


@takes_program
def calibrate(
    model: PyroFunction,
    guide: PyroFunction,
    like: Any,
    num_samples: int = CALIBRATION_SAMPLES,
    *,
    refine: bool = False,
    vectorize_particles: bool = True,
    seed: Seed | None = None,
    progress: bool = True,
) -> Calibration:
    r"""Compare a guide with exact posterior draws, on data that the model simulates.

    .. math:: x, z_0 \sim p(x, z), \qquad z_k \sim q(z \mid x), \qquad
        \mathbb E \log \tfrac1K \sum_{k=1}^{K} w_k \;\le\; \mathbb E \log p(x) \;\le\;
        \mathbb E \log \tfrac1K \sum_{k=0}^{K-1} w_k

    The sandwich holds for any latents, discrete ones too, and for every K, without a Markov chain. At K = 1 its width
    is KL(p || q) + KL(q || p). The rank of each true latent among the guide's draws is uniform for an exact guide
    (simulation-based calibration). Ranks near both ends show a guide that is too narrow, ranks near the middle one that
    is too wide, and ranks near one end a biased one.

    All this is about the model's own data. If real data differ from them, so may the guide's errors.

    Arguments:
        model, guide, vectorize_particles, seed, progress: see :func:`pyro_vae.log_likelihood`.
        like: data of the number and shapes to simulate; see `x` of :func:`pyro_vae.bdmc`.
        num_samples: K, the number of the guide's draws for each datum, at least 2.
        refine: whether to fit a proposal to each simulated datum first, and to calibrate it in place of the guide; see
            :func:`pyro_vae.refine`.

    Returns:
        The bounds, ranks, coverage and their tables; ``pv.plots.calibration`` draws them.

    Raises:
        ValueError: the guide has auxiliary sites, so that its density at the true latents is not known; or an error of
            :func:`pyro_vae.bdmc` or :func:`pyro_vae.log_likelihood`.

    Example:
        The guide's standard deviation is 0.5. The posterior's is 0.71.

        >>> import torch, pyro, pyro.distributions as dist, pyro_vae as pv
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5))
        >>> found = pv.calibrate(model, guide, like=torch.zeros(2000), seed=0, progress=False)
        >>> found.dimensions.verdict.tolist()
        ['too narrow']
        >>> q, p = dist.Normal(0.0, 0.5), dist.Normal(0.0, 0.5**0.5)
        >>> kl = torch.distributions.kl_divergence
        >>> bool(abs(found.kl.value - kl(p, q) - kl(q, p)) < 4 * found.kl.standard_error)
        True

    References:
        Grosse, Ghahramani and Adams (2015), *Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo*.
        Talts, Betancourt, Simpson, Vehtari and Gelman (2018), *Validating Bayesian Inference Algorithms with
        Simulation-Based Calibration*.
        Lemos, Coogan, Hezaveh and Perreault-Levasseur (2023), *Sampling-Based Accuracy Testing of Posterior Estimators
        for General Inference*, ICML.
    """
    require_count("num_samples", num_samples, least=2)
    found: list[_Part] = []
    instead = "pv.log_likelihood, on data"
    with (
        prior_that_draws(instead),
        checked_parts(model, guide, like, seed, least=2, progress=progress) as parts,
    ):
        for data in parts:
            found += _simulated(data, num_samples, refine, vectorize_particles, progress)
    columns = tuple(torch.cat(column) for column in zip(*(part.args for part in found), strict=True))
    index = pd.MultiIndex.from_tuples(found[0].names, names=["site", "dimension"])

    def table(ranks: Iterable[Tensor]) -> pd.DataFrame:
        return pd.DataFrame(torch.cat([*ranks]).cpu().numpy(), columns=index)

    return Calibration(
        log_weights=torch.cat([part.log_w for part in found], 1),
        true_log_weights=torch.cat([part.true for part in found]),
        ranks=table(part.ranks for part in found),
        weighted_ranks=table(part.weighted for part in found),
        distance_ranks=torch.cat([part.distances for part in found]),
        x=columns[0] if len(columns) == 1 else columns,
        refined=refine,
    )


class _Part(NamedTuple):
    """The attributes of :class:`Calibration` for a minibatch."""

    log_w: Tensor  # (K, N)
    true: Tensor  # (N,)
    ranks: Tensor  # (N, D)
    weighted: Tensor  # (N, D)
    distances: Tensor  # (N,)
    names: list[tuple[str, int]]
    args: Args


def _simulated(data: Pieces, number: int, refine: bool, vectorize: bool, progress: bool) -> list[_Part]:
    """The parts of a calibration on data like these, a minibatch each."""
    found: list[_Part] = []
    search = Search(data, Settings(vectorize=vectorize)) if refine else None
    rows = len(data.minibatches(rows_at_once(data.program.args) // number)[0][0])
    if search is not None:
        rows = min(rows, search.rows)
    programs = data.programs(number, vectorize, rows)
    scales = _scales(programs[0], vectorize)
    steps = len(programs) * (search.settings.num_steps if search else 1)
    with progress_bar(steps, "step", "calibrating", progress) as bar:
        for program in programs:
            args, latents = simulate_data(program.model, program.args)
            simulated = program.on(args)
            if search is not None:
                mixture = search.proposals(simulated, bar).mixture
                simulated = replace(simulated, guide=search.guide(mixture))
            found.append(_calibrated(simulated, latents, number, vectorize, scales))
            if search is None:
                bar.update()
    return found


def _scales(program: Program, vectorize: bool) -> Tensor:
    """The standard deviation of each dimension under the prior, (D,), in which distances are measured."""
    drawn, found = run(program, 2, vectorize), list[Tensor]()
    while not found or len(found) * len(found[0]) < FEWEST_OF_PRIOR:
        found.append(_vectors_of(drawn, simulate_data(program.model, program.args)[1]))
    return torch.cat(found).std(0).clamp(min=1e-12)


def _calibrated(program: Program, latents: dict[str, Tensor], number: int, vectorize: bool, scales: Tensor) -> _Part:
    drawn = run(program, number, vectorize)
    require_latents(drawn)
    refuse_masks(drawn)
    for name, site in drawn.guide.items():
        if name not in drawn.model or isinstance(unwrapped(site["fn"]), Delta):
            raise PyroVAEError(
                f"guide site '{name}' is auxiliary, or a point: expected a guide with a density at each latent site of "
                "the model alone, since its density at the true latents is needed. Pass refine=True."
            )
    # The true latents, as the values of one particle.
    values = {name: latents[name].expand(site["value"][:1].shape) for name, site in drawn.guide.items()}
    try:
        there = run_at(program, values, 1, vectorize)
    except NoDensityError as error:
        raise NoDensityError(
            f"{error} Or pass refine=True, whose proposals have a density at the true latents."
        ) from error
    log_w, true = wide(log_weights_of(drawn)), wide(log_weights_of(there))[0]
    Evidence.from_weights(torch.cat([log_w, true[None]]))  # refuses weights that are no numbers
    draws, truth = _vectors(drawn), _vectors(there)[0]
    w = log_w.softmax(0)[..., None]
    below, same = ((w * each).sum(0) for each in (draws < truth, draws == truth))
    weighted = (below + torch.rand_like(truth) * (same + 1 / number)) / (1 + 1 / number)  # it has the mean weight
    point = _vectors_of(drawn, simulate_data(program.model, program.args)[1])
    far, distances = (((each - point) / scales).square().sum(-1) for each in (truth, draws))
    sizes = {name: by_dimension(drawn, site, site["value"]).shape[-1] for name, site in _latents(drawn).items()}
    names = [(name, i) for name, size in sizes.items() for i in range(size)]
    return _Part(log_w, true, _ranks(draws, truth), weighted, _ranks(distances, far), names, program.args)


def _ranks(draws: Tensor, truth: Tensor) -> Tensor:
    """The rank of each true value among K draws, uniform from 0 to 1 where it is one of them, with ties at random."""
    below, same = (draws < truth).sum(0), (draws == truth).sum(0)
    return (below + torch.rand_like(truth) * (same + 1)) / (len(draws) + 1)


def _latents(drawn: Run) -> Sites:
    return {name: site for name, site in drawn.model.items() if not site["is_observed"]}


def _vectors_of(drawn: Run, latents: dict[str, Tensor]) -> Tensor:
    """The latents of all sites of one particle, (N, D), in the order of a run."""
    sites = _latents(drawn).items()
    each = (by_dimension(drawn, site, latents[name].expand(site["value"][:1].shape))[0] for name, site in sites)
    return torch.cat([*map(wide, each)], -1)


def _vectors(drawn: Run) -> Tensor:
    """The latents of all sites, (K, N, D)."""
    return torch.cat([wide(by_dimension(drawn, site, site["value"])) for site in _latents(drawn).values()], -1)


def _mean_weight(log_w: Tensor) -> Tensor:
    """The logarithm of the mean weight of each datum, (N,)."""
    return log_w.logsumexp(0) - math.log(len(log_w))
