"""The learned scales of likelihoods: brought to the residuals in closed form, since a step of Adam moves them by lr."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.engine.arguments import takes_program
from pyro_vae.engine.minibatches import Batch
from pyro_vae.engine.modules import PyroFunction, likelihood_calls
from pyro_vae.engine.particles import Particles
from pyro_vae.engine.program import Program
from pyro_vae.engine.rows import Count
from pyro_vae.engine.sites import Sites, element_weights, unwrapped
from pyro_vae.engine.weights import log_weights_of
from pyro_vae.errors import PyroVAEError
from pyro_vae.objectives import ELBO, Objective, gradients
from pyro_vae.training.ranks import Ranks

EVERY_STEP = 16  # after so many steps, at each 8th part of an octave of them
RATE = 0.5  # after the first step: a mean over a few minibatches, of which the last ones count most


@dataclass
class Fitted:
    """A likelihood in a run of a program, with tensors of shape (R, *event), a row for each datum and particle."""

    likelihood: Any
    mean: Tensor  # of p(x|z)
    x: Tensor
    weights: Tensor  # how much each element counts; 0 where it is missing

    def move(self, rate: float) -> None:
        """Move the likelihood's scale towards the residuals'."""
        with torch.no_grad():
            self.likelihood.fit_scale(self.mean, self.x, self.weights, rate)

    def below_floor(self, *, of_data: bool) -> tuple[int, int, float]:
        """How many elements have residuals, or data, below the floor, of how many; and the least of these.

        An element's residual is a root mean square over the rows in which x is not at its median: elements that are
        constant, or nearly so, are what the floor is for. The data's is taken from the median.
        """
        median = self.x.masked_fill(self.weights == 0, math.nan).nanmedian(0).values
        moves = (self.weights > 0) & (self.x != median)
        squares = (self.x - (median if of_data else self.mean)).square().masked_fill(~moves, 0.0)
        sizes = (squares.sum(0) / moves.sum(0)).sqrt()[moves.any(0)]
        below = sizes[sizes < self.likelihood.floor]
        return len(below), len(sizes), float(below.min()) if len(below) else math.inf


class Scales:
    """The likelihoods of a program with a learned scale, or a floor under it, as `fit` treats them."""

    def __init__(self, program: Program, objective: Any, fitted: list[Fitted], lr: float, whole: int) -> None:
        self.program, self.objective, self.whole = program, objective, whole
        parts: Any = (part for module in program.modules() for part in module.modules())
        own = [part for part in parts if hasattr(part, "has_learned_scale")]
        self.known = list(dict.fromkeys([*own, *(each.likelihood for each in fitted)]))  # in one order on all ranks
        self.learned = any(each.likelihood.has_learned_scale for each in fitted)
        self.floors = any(each.likelihood.floor for each in fitted)
        # From this step on, gradients move a scale as fast as residuals change; never without a step size.
        self.last = 1 / lr if lr else math.inf
        self.announced = announce(fitted, of_data=True, stacklevel=7)

    def see(self, program: Program) -> None:
        """Treat the likelihoods of a run that takes another path than the first one, too."""
        fitted = residuals(program)
        self.known += [each.likelihood for each in fitted if each.likelihood not in self.known]
        self.learned = self.learned or any(each.likelihood.has_learned_scale for each in fitted)
        self.floors = self.floors or any(each.likelihood.floor for each in fitted)

    def before_step(
        self, number: int, batch: Batch | None, data: Count | None, moves: Callable[[Any], bool], ranks: Ranks
    ) -> None:
        """Move the scales before the step of that number, from 0, if it is time, by the residuals of all ranks.

        `moves` says whether a likelihood is in training.
        """
        if not (self.learned and number <= self.last and is_due(number)):
            return
        own = None if batch is None else ranks.attempt(residuals, self.program.on(batch), self.objective)
        fitted, count = self._of_all(own or [], 0.0 if data is None else data.own, ranks)
        for each in fitted:
            if moves(each.likelihood):
                ranks.attempt(each.move, 1.0 if number == 0 else RATE * min(1.0, count / self.whole))

    def _of_all(self, own: list[Fitted], count: float, ranks: Ranks) -> tuple[list[Fitted], float]:
        """The likelihoods with the rows of all ranks, and the number of these."""
        if ranks.group is None:
            return own, count
        sent = ranks.attempt(self._placed, own) or []
        found, rows = ranks.gather((count, sent)), dict[int, list[Any]]()
        for _, fits in found:
            for place, columns in fits:
                rows.setdefault(place, []).append(columns)
        device = self.program.device or "cpu"
        joined_rows = [
            Fitted(self.known[place], *(torch.cat(column).to(device) for column in zip(*parts, strict=True)))
            for place, parts in sorted(rows.items())
        ]
        return joined_rows, sum(each for each, _ in found)

    def _placed(self, fitted: list[Fitted]) -> list[Any]:
        return [(self.known.index(each.likelihood), (each.mean, each.x, each.weights)) for each in fitted]

    def values(self) -> dict[str, float]:
        """The learned scales, by name; of several in one likelihood, their mean."""
        parts: Any = (part for module in self.program.modules() for part in module.modules())
        learned = [part for part in dict.fromkeys(parts) if getattr(part, "has_learned_scale", False)]
        with torch.no_grad():
            means = [float(part.log_scale.exp().mean()) for part in learned if hasattr(part, "log_scale")]
        return {"sigma" if i == 0 else f"sigma {i + 1}": mean for i, mean in enumerate(means)}

    def at_end(self) -> None:
        """Warn of a floor above the residuals of the first minibatch, unless there was a warning at the start."""
        if self.floors and not self.announced:
            announce(residuals(self.program), stacklevel=6)


def is_due(number: int) -> bool:
    """Whether to compute the scales before this step: at each of the first, and then ever more rarely."""
    return number % (1 << max(0, number.bit_length() - EVERY_STEP.bit_length() + 1)) == 0


def residuals(program: Program, objective: Any = None) -> list[Fitted]:
    """The likelihoods in a run of the program that nothing else notices, in the mode that modules are in.

    If the objective weighs particles, such as IWAE, each counts by its weight: by the slope of the bound.
    """
    with likelihoods_in() as matched:
        if not isinstance(objective, Objective) or type(objective).reduce is ELBO.reduce or objective.num_samples == 1:
            model_trace, _ = program.trace(training=True)
            return joined(matched(dict(model_trace.nodes)))
        with program.unnoticed(training=True):
            args = (program.model, program.guide_or_prior, program.args, program.kwargs)
            runs = Particles(objective.num_samples, objective.vectorize_particles, objective.chunk_size).read(
                objective.program(*args),
                lambda run: (log_weights_of(run), matched(run.model), run.shape_beside_plates()),
            )
        log_weights = torch.cat([each for each, *_ in runs])
        slopes = gradients.slope(objective.reduce, log_weights)
        if bool((slopes < 0).any()):  # a jackknife's differences of weights give no mean square
            slopes = log_weights.softmax(0)
        parts = slopes.split([len(each) for each, *_ in runs])
        weighted = [
            fit | {"particles": part.reshape(shape)}
            for part, (_, fits, shape) in zip(parts, runs, strict=True)
            for fit in fits
        ]
    return joined(weighted)


@contextmanager
def likelihoods_in() -> Iterator[Callable[[Sites], list[dict[str, Any]]]]:
    """Inside, calls of likelihoods are recorded; what it yields finds them at the sites that observe data."""
    with likelihood_calls() as calls:

        def matched(sites: Sites) -> list[dict[str, Any]]:
            return [
                {"likelihood": likelihood, "distribution": output, "site": site}
                for site in sites.values()
                if site["type"] == "sample" and site["is_observed"]
                for likelihood, output in calls
                if likelihood.has_learned_scale or likelihood.floor
                if _same_location(unwrapped(site["fn"]), unwrapped(output))
            ]

        yield matched


def joined(fits: list[dict[str, Any]]) -> list[Fitted]:
    """A record for each likelihood, with the rows of all its sites and runs."""
    rows: dict[Any, list[list[Tensor]]] = {}
    for fit in fits:
        likelihood, distribution, site = fit["likelihood"], fit["distribution"], fit["site"]
        event = tuple(likelihood.event_shape)
        weights = element_weights(site)
        observed = getattr(distribution, "observed", None)  # the mask of a joint density
        if observed is not None:
            weights = weights * observed.unflatten(-1, event)
        if "particles" in fit:
            weights = weights * fit["particles"].reshape(*fit["particles"].shape, *[1] * len(event))
        tensors = torch.broadcast_tensors(distribution.mean, site["value"], weights)
        rows.setdefault(likelihood, []).append([tensor.reshape(-1, *event) for tensor in tensors])
    return [
        Fitted(likelihood, *(torch.cat(columns) for columns in zip(*parts, strict=True)))
        for likelihood, parts in rows.items()
    ]


def _same_location(first: Any, second: Any) -> bool:
    """Whether two distributions are one, which a plate expanded: it is then another object, of views."""
    mine, its = getattr(first, "loc", None), getattr(second, "loc", None)
    both = isinstance(mine, Tensor) and isinstance(its, Tensor) and type(first) is type(second)
    return both and mine.data_ptr() == its.data_ptr()  # type: ignore[union-attr]


def announce(fitted: list[Fitted], *, of_data: bool = False, stacklevel: int = 4) -> bool:
    """Warn of floors above the residuals, or above the deviations of the data. Return whether it did."""
    told = False
    for each in fitted:
        number, whole, least = each.below_floor(of_data=of_data) if each.likelihood.floor else (0, 0, 0.0)
        if number:
            told = True
            what = "data deviate from their medians by less" if of_data else "residuals are less"
            warnings.warn(
                f"the scale of a {type(each.likelihood).__name__} can't go below min_scale={each.likelihood.floor:g}, "
                f"and {what} at {number} of {whole} elements that vary (the least is {least:.2g}), so the "
                "bound is lower than it could be. Divide x by its standard deviation, or pass "
                f"min_scale={least / 10:.1g}.",
                stacklevel=stacklevel,
            )
    return told


@takes_program
def fit_scale(model: PyroFunction, guide: PyroFunction, *args: Any, objective: Any = None, **kwargs: Any) -> None:
    r"""Set the learned scale of a program's likelihood to that of the residuals, in closed form.

    .. math:: \sigma^2 \leftarrow \frac1{|O|} \sum_{(n, d) \in O} \bigl(x_{nd} - \mu_d(z_n)\bigr)^2,
        \qquad z_n \sim q(z \mid x_n)

    over the observed elements O of x. This is the maximum of the ELBO in sigma, with everything else fixed and one
    sample of each latent. For ``scale="per_column"`` each element d has its own mean, and stays as it is if it is
    constant in x. A :class:`pyro_vae.StudentT` gets its sigma of highest likelihood. A
    :class:`pyro_vae.LowRankGaussian` gets the variance of each element; its correlations stay.

    An optimiser such as Adam moves the logarithm of sigma by lr a step, so that from sigma = 1 to 0.05 it takes 3,000
    steps at ``lr=1e-3``. :func:`pyro_vae.fit` does this by itself: before the first step, and then half of the way
    before each of the first 16 steps, and 8 times while their number doubles, up to step 1 / lr. In a loop of your own,
    with ``pyro.infer.SVI`` or :func:`pyro_vae.compile_step`, call it before the first step, and then now and then.

    Random number generators, batch norm's statistics and gradients stay as they are, and modules in their modes.
    A scale that is frozen (``requires_grad=False``) stays too.

    Arguments:
        model, guide: a program, or a pair in place of both; see :func:`pyro_vae.fit`.
        args, kwargs: arguments of both: all data, or a minibatch of some hundred rows.
        objective: the bound that is trained, by whose weights samples of z count; None is the ELBO.

    Raises:
        ValueError: no likelihood with a learned scale observes data in the model.

    Example:
        >>> import torch, pyro, pyro_vae as pv
        >>> x = 0.05 * torch.randn(500, 6)
        >>> vae = pv.mlp_vae((6,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian", scale="learned")
        >>> svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss=pv.ELBO())
        >>> for step in range(200):
        ...     if step % 10 == 0:
        ...         pv.fit_scale(vae, x)
        ...     loss = svi.step(x)
        >>> bool(vae.likelihood.log_scale.exp() < 0.2)
        True

    References:
        Rybkin, Daniilidis and Levine (2021), *Simple and Effective VAE Training with Calibrated Decoders*, ICML.
    """
    fitted = residuals(Program(model, guide, args, kwargs), objective)
    if not any(each.likelihood.has_learned_scale for each in fitted):
        raise PyroVAEError(
            "expected a program that observes data through a likelihood with a learned scale, a parameter that is not "
            "frozen, got none. Build it with scale='learned': pv.mlp_vae(..., likelihood='gaussian', scale='learned')."
        )
    for each in fitted:
        each.move(1.0)
    announce(fitted)
