r"""The marginal likelihood log p(x) by importance sampling, with all that says whether to believe it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae.compiled.step import CompiledFunction
from pyro_vae.engine import rng
from pyro_vae.engine.modules import Program
from pyro_vae.engine.program import find_max_plate_nesting
from pyro_vae.engine.weights import log_weights
from pyro_vae.errors import NotFiniteError, PyroVAEError
from pyro_vae.evaluation.defaults import NUM_SAMPLES
from pyro_vae.evaluation.estimate import Estimate
from pyro_vae.evaluation.pieces import Args, Pieces, arguments, check_count, checked, rows_at_once
from pyro_vae.evaluation.psis import HIGH, pareto_k

ADVICE = "Train a more flexible guide, take more samples, or check the number with pv.ais, which needs no guide."
Draw = Callable[[Args], Tensor]  # from a minibatch to its log-weights (K, N)
RUNS_AT_ONCE = 16  # of the model, on samples of one run of the guide
WEIGHTS_AT_ONCE = 2**22  # what is kept of a minibatch where particles run one at a time


@dataclass(frozen=True)
class Evidence:
    r"""Estimates of log p(x_n) from K importance weights for each datum.

    Attributes:
        per_datum: :math:`\log \frac1K \sum_k w_{kn}` in nats, (N,); minus infinity where all weights are zero.
        per_datum_error: its Monte Carlo standard error by the delta method,
            :math:`\operatorname{std}_k(w_{kn}) / (\sqrt K \, \bar w_n)`, in nats, (N,). Where k-hat is above 0.7 it is too small.
        ess: the effective sample size :math:`(\sum_k w_{kn})^2 / \sum_k w_{kn}^2`, between 1 and K, (N,).
        zero_weights: how many of a datum's weights are zero, (N,). They count in every number here.
        num_samples: K.
    """

    per_datum: Tensor
    per_datum_error: Tensor
    ess: Tensor
    zero_weights: Tensor
    num_samples: int

    @property
    def estimate(self) -> Estimate:
        """The mean over data, with its standard error over data, which has the Monte Carlo error in it."""
        return Estimate.of(self.per_datum)

    @property
    def mean(self) -> float:
        """The mean over data, in nats per datum."""
        return self.estimate.value

    @property
    def standard_error(self) -> float:
        r"""Of the mean, over data, :math:`\operatorname{std}_n / \sqrt N`, in nats."""
        return self.estimate.standard_error

    @property
    def monte_carlo_error(self) -> float:
        r"""Of the mean, for these data, :math:`\frac1N \sqrt{\sum_n \mathrm{se}_n^2}`, in nats."""
        return self.per_datum_error.square().sum().sqrt().item() / len(self.per_datum_error)

    def _zeros(self) -> str:
        lost = int((self.zero_weights == self.num_samples).sum())
        some = int((self.zero_weights > 0).sum())
        if not some:
            return ""
        return (
            f"; weights of zero at {some} data, all of them at {lost}" if lost else f"; weights of zero at {some} data"
        )


@dataclass(frozen=True)
class LogLikelihood(Evidence):
    r"""What :func:`pyro_vae.log_likelihood` returns; see :class:`pyro_vae.Evidence` for the other attributes.

    Attributes:
        elbo: the mean log-weight :math:`\frac1K \sum_k \log w_{kn}`, (N,): an estimate of the ELBO.
        pareto_k: :func:`pyro_vae.pareto_k` of each datum's weights, (N,); NaN where it can't be computed.
    """

    elbo: Tensor = field(repr=False)
    pareto_k: Tensor = field(repr=False)

    @property
    def share_high_k(self) -> float:
        """The share of data whose k-hat is above 0.7."""
        return (self.pareto_k > HIGH).double().mean().item()

    @property
    def share_no_k(self) -> float:
        """The share of data whose k-hat can't be computed."""
        return self.pareto_k.isnan().double().mean().item()

    def of(self, rows: slice) -> LogLikelihood:
        """The estimates of some of the data."""
        changes = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "num_samples"}
        return replace(self, **changes)

    @property
    def kl_to_posterior(self) -> Estimate:
        """KL(q(z|x) || p(z|x)) = log p(x) - ELBO, averaged over data; as much of the ELBO's value is the guide's fault."""
        return Estimate.of(self.per_datum - self.elbo)

    def __str__(self) -> str:
        without = f", {self.share_no_k:.1%} without" if self.share_no_k else ""
        return (
            f"log p(x) = {self.estimate} nats per datum (importance sampling, K = {self.num_samples}, "
            f"N = {len(self.per_datum)}; Monte Carlo error {self.monte_carlo_error:.2g}, median ESS "
            f"{self.ess.median():.0f}, k-hat > {HIGH}: {self.share_high_k:.1%}{without}{self._zeros()})"
        )


def log_likelihood(
    model: Program,
    guide: Program,
    x: Any,
    num_samples: int = NUM_SAMPLES,
    *,
    seed: int | None = None,
    vectorize_particles: bool = True,
    compile: bool = False,
    progress: bool = True,
) -> LogLikelihood:
    r"""Estimate log p(x) of each datum by importance sampling from the guide.

    .. math:: \log \hat p(x_n) = \log \frac1K \sum_{k=1}^K w_{kn}, \qquad
        w_{kn} = \frac{p(x_n, z_{kn})}{q(z_{kn} \mid x_n)}, \quad z_{kn} \sim q(z \mid x_n)

    The average of the weights is unbiased for p(x), so its logarithm is low by about half of its squared standard error:
    it is the IWAE bound with K particles. Whether K samples are enough is what k-hat and the effective sample size say.
    Data and particles run in pieces of one size, so that the memory in use depends on neither number.

    Arguments:
        model: a Pyro model with a batch plate.
        guide: its guide.
        x: data (N, ...), a split of :mod:`pyro_vae.data`, or a tuple of tensors that are passed as several arguments.
            Modules that model or guide is a method of are run in evaluation mode.
        num_samples: K, at least 2.
        seed: where the random numbers start; None goes on from the generators' state.
        vectorize_particles: see :func:`pyro_vae.log_weights`; False is slow.
        compile: whether to run the program as compiled code, see :func:`pyro_vae.compile_step`, which is compiled anew in each
            call: worth it from minutes of work on. It draws in other portions, so the estimate is another one.
        progress: whether to show a progress bar, in a terminal.

    Returns:
        The estimates with their errors and diagnostics; ``print`` it for one line that can be quoted.

    Raises:
        ValueError: fewer than 2 samples or data, NaN or infinity in the data, data outside the support of the
            likelihood, or a program without a log-weight per datum (see :func:`pyro_vae.log_weights`); with `compile`, one
            that can't be traced, by its line.
        FloatingPointError: a log-weight is NaN or plus infinity.

    Warns:
        UserWarning: some data have a k-hat above 0.7, or only weights of zero.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_vae as pv
        >>> pyro.set_rng_seed(0)
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.8))
        >>> x = torch.randn(64)
        >>> ll = pv.log_likelihood(model, guide, x, num_samples=1000)
        >>> exact = dist.Normal(0.0, 2**0.5).log_prob(x)
        >>> bool(abs(ll.mean - exact.mean()) < 4 * ll.monte_carlo_error)
        True

    References:
        Burda, Grosse and Salakhutdinov (2016), *Importance Weighted Autoencoders*, ICLR.
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), *Pareto Smoothed Importance Sampling*, JMLR.
    """
    check_count("num_samples", num_samples, 2, ", to have an error bar")
    if compile and not vectorize_particles:
        raise PyroVAEError(
            "compiled code runs many particles at once: expected vectorize_particles=True with compile=True, got False. Drop one "
            "of the two."
        )
    args = arguments(x)
    with checked(model, guide, args) as pieces, rng.seeded(seed):
        result = estimate_evidence(model, guide, pieces, num_samples, vectorize_particles, progress, compile)
    _warn_of_zeros(result, stacklevel=2)
    warn_of_high_k(result.pareto_k, ADVICE, stacklevel=2)
    return result


def estimate_evidence(
    model: Program,
    guide: Program,
    data: Pieces,
    num_samples: int,
    vectorize: bool,
    progress: bool,
    compile: bool = False,
) -> LogLikelihood:
    """The estimates for all data, a minibatch after another; see :func:`pyro_vae.log_likelihood`."""
    rows, nesting = rows_at_once(data.args), None
    batch_size = max(1, rows // num_samples if vectorize else min(rows, WEIGHTS_AT_ONCE // num_samples))
    batches = data.minibatches(batch_size)
    if vectorize:
        nesting = find_max_plate_nesting(model, guide, batches[0], {}, in_plate=True)

    def uncompiled(batch: Args) -> Tensor:
        return draw_weights(model, guide, batch, num_samples, vectorize, nesting)

    draw: Draw = uncompiled
    if compile:
        draw = _compiled_draw(model, guide, data, num_samples, nesting)
    # One block, and not a small tensor for each minibatch: those would pin the large ones' memory between them.
    columns = torch.empty(len(Summary._fields), len(data.args[0]), dtype=torch.float64, device=data.args[0].device)
    done = 0
    bar = tqdm(total=len(data.args[0]), leave=False, disable=None if progress else True, unit="datum", desc="log p(x)")
    with bar:
        for batch in batches:
            columns[:, done : done + len(batch[0])] = torch.stack(summarise(draw(batch)))
            done += len(batch[0])
            bar.update(len(batch[0]))
    found = Summary(*columns)
    return LogLikelihood(
        found.per_datum, found.error, found.ess, found.zeros.long(), num_samples, found.elbo, found.pareto_k
    )


def draw_weights(
    model: Program, guide: Program, batch: Args, num_samples: int, vectorize: bool = True, nesting: int | None = None
) -> Tensor:
    """Log-weights (K, N) of a minibatch, in float64, from runs of so many particles as fit at once."""
    chunk_size = _evenly(num_samples, max(1, rows_at_once(batch) // len(batch[0]))) if vectorize else None
    at_once = RUNS_AT_ONCE * chunk_size if chunk_size else num_samples
    pieces, left = [], num_samples
    while left:
        piece = log_weights(
            model,
            guide,
            *batch,
            num_particles=min(at_once, left),
            vectorize_particles=vectorize,
            max_plate_nesting=nesting,
            chunk_size=chunk_size,
        )
        pieces.append(piece.double())
        left -= len(piece)
    return torch.cat(pieces)


def _compiled_draw(model: Program, guide: Program, data: Pieces, num_samples: int, nesting: int | None) -> Draw:
    """Draws log-weights (K, N) of minibatches, as :func:`draw_weights` does, by compiled code."""
    if not data.same_supports:
        raise PyroVAEError(
            "compiled code looks at no sample: expected a guide on the support of the model's latents, got one that reaches "
            "beyond, where each sample must be looked at. Use a guide on that support, or compile=False."
        )

    def weigh(number: int, *batch: Tensor) -> Tensor:
        log_w = log_weights(model, guide, *batch, num_particles=number, max_plate_nesting=nesting)
        return log_w.double()

    compiled = CompiledFunction(weigh, model, guide)

    def draw(batch: Args) -> Tensor:
        # Half of what an uncompiled run takes: there is little of Python's time to spread, and less leaves the cache. All
        # portions have one size, for which the code is compiled once; what the last has too many is left out.
        portion = _evenly(num_samples, max(1, rows_at_once(batch) // (2 * len(batch[0]))))
        portions = [compiled(portion, *batch) for _ in range(-(-num_samples // portion))]
        return torch.cat(portions)[:num_samples]

    return draw


def _evenly(number: int, most: int) -> int:
    """The size of equal chunks, of at most `most`: one size of tensors finds its memory again."""
    return -(-number // -(-number // most))


class Summary(NamedTuple):
    """What is said of each datum's log-weights, each (N,): see :class:`LogLikelihood`."""

    per_datum: Tensor
    error: Tensor
    ess: Tensor
    zeros: Tensor
    elbo: Tensor
    pareto_k: Tensor


def summarise(log_w: Tensor) -> Summary:
    """Reduce log-weights (K, N).

    Raises:
        FloatingPointError: one is NaN or plus infinity.
    """
    if bool((log_w.isnan() | (log_w == math.inf)).any()):
        raise NotFiniteError(
            "expected finite log-weights, or minus infinity for a weight of zero, got NaN or plus infinity. Look for scales "
            "of zero, or densities that overflow: pv.log_weights(...).isfinite() says at which data."
        )
    number = len(log_w)
    top = log_w.max(0).values
    weights = (log_w - torch.where(top.isfinite(), top, 0.0)).exp()
    mean = weights.mean(0)
    error = weights.std(0) / (math.sqrt(number) * mean)
    ess = weights.sum(0).square() / weights.square().sum(0)
    zeros = (log_w == -math.inf).sum(0).double()
    return Summary(top + mean.log(), error, ess, zeros, log_w.mean(0), pareto_k(log_w))


def check_same_data(evidence: Evidence, args: Args) -> None:
    """Refuse an estimate of other data."""
    if len(evidence.per_datum) != len(args[0]):
        raise PyroVAEError(
            f"expected log_likelihood to be of the same data, got {len(evidence.per_datum)} of them for {len(args[0])} "
            "data. Estimate it on x."
        )


def warn_of_high_k(shapes: Tensor, advice: str, *, stacklevel: int) -> None:
    """Say how many data have weights that can't be trusted, and what to do."""
    share = (shapes > HIGH).double().mean().item()
    if share:
        warnings.warn(
            f"{share:.1%} of the data have a Pareto k-hat above {HIGH}: a few weights carry their estimate of log p(x), which "
            f"is probably too low, and its error bar too small. {advice}",
            stacklevel=stacklevel + 1,
        )


def _warn_of_zeros(result: LogLikelihood, *, stacklevel: int) -> None:
    lost = (result.zero_weights == result.num_samples).double().mean().item()
    if lost:
        warnings.warn(
            f"{lost:.1%} of the data have weights of zero alone, so that their estimate of log p(x) is minus infinity: the "
            f"guide puts its samples where p(x, z) is zero. {ADVICE}",
            stacklevel=stacklevel + 1,
        )
