"""The learned scales of likelihoods: brought to the residuals in closed form, since a step of Adam moves them by lr."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pyro_vae.engine.arguments import takes_program
from pyro_vae.engine.minibatches import Batch
from pyro_vae.engine.modules import PyroFunction, recorded_calls
from pyro_vae.engine.program import Program
from pyro_vae.engine.sites import Site, element_weights, unwrapped
from pyro_vae.errors import PyroVAEError

EVERY_STEP = 16  # after so many steps, at each 8th part of an octave of them
RATE = 0.5  # after the first step: a mean over a few minibatches, of which the last ones count most


@dataclass
class Fitted:
    """A likelihood in a run of a program: what it returned, and the site that observes data there."""

    likelihood: Any
    distribution: Any
    site: Site

    def move(self, rate: float) -> None:
        """Move the likelihood's scale towards the residuals'."""
        with torch.no_grad():
            self.likelihood.fit_scale(self.distribution, self.site["value"], element_weights(self.site), rate)

    def below_floor(self, centre: Tensor | None) -> tuple[int, int, float]:
        """How many elements deviate from `centre` (None: their median) by less than the floor, of how many; the least.

        An element's deviation is a root mean square over the rows in which it is not at its median: elements that are
        constant, or nearly so, are what the floor is for.
        """
        x, weights = self.site["value"], element_weights(self.site)
        event = len(self.likelihood.event_shape)
        x, weights = (v.expand_as(x).reshape(-1, *x.shape[x.dim() - event :]) for v in (x, weights))
        observed = getattr(self.distribution, "observed", None)
        if observed is not None:
            weights = weights * observed.reshape(-1, *x.shape[1:])
        median = x.masked_fill(weights == 0, math.nan).nanmedian(0).values
        moves = (weights > 0) & (x != median)
        from_centre = x - (median if centre is None else centre.expand_as(self.site["value"]).reshape(x.shape))
        mean_square = from_centre.square().masked_fill(~moves, 0.0).sum(0) / moves.sum(0)
        deviations = mean_square.sqrt()[moves.any(0)]
        binding = deviations < self.likelihood.floor
        least = float(deviations[binding].min()) if bool(binding.any()) else math.inf
        return int(binding.sum()), len(deviations), least


class Scales:
    """The likelihoods of a program with a learned scale, or a floor under it, as `fit` treats them."""

    def __init__(self, fitted: list[Fitted], lr: float) -> None:
        self.learned = any(each.likelihood.has_learned_scale for each in fitted)
        self.floors = any(each.likelihood.floor for each in fitted)
        self.last = 1 / lr  # from this step on, gradients move a scale as fast as residuals change
        self.announced = announce(fitted, at_start=True)

    def before_step(self, number: int, program: Program, batch: Batch) -> None:
        """Move the scales before the step of that number, from 0, if it is time."""
        if self.learned and number <= self.last and is_due(number):
            for each in run(program.on(batch), training=True):
                each.move(1.0 if number == 0 else RATE)

    def at_end(self, program: Program) -> None:
        """Warn of a floor above the residuals of the first minibatch, unless there was a warning at the start."""
        if self.floors and not self.announced:
            announce(run(program))


def is_due(number: int) -> bool:
    """Whether to compute the scales before this step: at each of the first, and then ever more rarely."""
    return number % (1 << max(0, number.bit_length() - EVERY_STEP.bit_length() + 1)) == 0


@contextmanager
def found_in() -> Iterator[Any]:
    """Inside, calls of likelihoods are recorded; what it yields finds them in the model's trace."""
    with recorded_calls() as calls:

        def match(trace: Trace) -> list[Fitted]:
            outputs: list[tuple[nn.Module, Any]] = [(m, o) for m, o in calls if hasattr(m, "has_learned_scale")]
            return [
                Fitted(module, output, site)
                for site in trace.nodes.values()
                if site["type"] == "sample" and site["is_observed"]
                for module, output in outputs
                if _same_location(unwrapped(site["fn"]), unwrapped(output))
            ]

        yield match


def _same_location(first: Any, second: Any) -> bool:
    """Whether two distributions are one, which a plate expanded: it is then another object, of views."""
    mine, its = getattr(first, "loc", None), getattr(second, "loc", None)
    both = isinstance(mine, Tensor) and isinstance(its, Tensor) and type(first) is type(second)
    return both and mine.data_ptr() == its.data_ptr()  # type: ignore[union-attr]


def run(program: Program, *, training: bool = False) -> list[Fitted]:
    """The likelihoods in a run of the program that nothing else notices."""
    with found_in() as match:
        model_trace, _ = program.trace(training=training)
    return match(model_trace)


def announce(fitted: list[Fitted], *, at_start: bool = False) -> bool:
    """Warn of floors above the residuals; at the start, above the data's own deviations. Return whether it did."""
    told = False
    for each in fitted:
        if each.likelihood.floor:
            binding, number, least = each.below_floor(None if at_start else each.distribution.mean)
            if binding:
                told = True
                what = "the data" if at_start else "the residuals"
                warnings.warn(
                    f"the scale of a {type(each.likelihood).__name__} can't go below min_scale="
                    f"{each.likelihood.floor:g}, and {what} have deviations below it at {binding} of {number} elements "
                    f"that vary (the smallest is {least:.2g}): the bound is lower than it could be. Divide x by its "
                    f"standard deviation, or pass min_scale={least / 10:.1g}.",
                    stacklevel=5,
                )
    return told


@takes_program
def fit_scale(model: PyroFunction, guide: PyroFunction, *args: Any, **kwargs: Any) -> None:
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
    fitted = run(Program(model, guide, args, kwargs), training=True)
    if not any(each.likelihood.has_learned_scale for each in fitted):
        names = ", ".join(sorted({type(each.likelihood).__name__ for each in fitted})) or "none"
        raise PyroVAEError(
            "expected a program whose likelihood has a learned scale, a parameter that is not frozen, got the "
            f"likelihood {names}. Build it with scale='learned': pv.mlp_vae(..., likelihood='gaussian', "
            "scale='learned')."
        )
    for each in fitted:
        each.move(1.0)
    announce(fitted)
