"""Schedules of beta, the factor on the KL, for ``pv.ELBO(beta=...)``: functions of the training step."""

import math
from dataclasses import dataclass
from numbers import Real

from torch import Tensor

from pyro_vae.checks import checked, shown
from pyro_vae.errors import PyroVAEError, require_count

IN_EPOCHS = "For a number of epochs, multiply it by the minibatches of an epoch."


# The names are in lower case so that a schedule's repr, which checkpoints record, is the code that builds it.
@checked
@dataclass(frozen=True)
class warm_up:
    r"""Linear warm-up: beta rises from `start` to `stop`, so the decoder learns to use z before the KL has full weight.

    .. math:: \beta(t) = \mathrm{start} + (\mathrm{stop} - \mathrm{start}) \, \min(t / \mathrm{steps}, 1)

    The loss is minus a bound on log p(x) only at steps with beta of at least 1. During the warm-up, bounds of different
    epochs are not comparable.

    Arguments:
        steps: the number of steps of the warm-up. A step is one minibatch, so an epoch has N / batch_size, rounded up.
        start: beta at step 0.
        stop: beta from step `steps` on.

    Raises:
        ValueError: `steps` is not a positive integer, or `start` or `stop` is negative or not finite.

    Example:
        >>> import pyro_vae as pv
        >>> beta = pv.schedules.warm_up(1000)
        >>> [beta(step) for step in (0, 250, 1000, 5000)]
        [0.0, 0.25, 1.0, 1.0]
        >>> pv.ELBO(beta=beta)
        ELBO(num_particles=1, kl='analytic', beta=warm_up(steps=1000, start=0.0, stop=1.0))

    References:
        Bowman et al. (2016), *Generating Sentences from a Continuous Space*, CoNLL.
        Sønderby et al. (2016), *Ladder Variational Autoencoders*, NeurIPS.
    """

    steps: int
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        require_count("steps", self.steps, IN_EPOCHS)
        _check_values(start=self.start, stop=self.stop)

    def __call__(self, step: int) -> float:
        """Beta at a step, counted from 0."""
        _check_step(step)
        if step >= self.steps:
            return self.stop
        return self.start + (self.stop - self.start) * step / self.steps


@checked
@dataclass(frozen=True)
class cyclical:
    r"""Cyclical annealing: several warm-ups from 0, each of which starts from the parameters of the one before.

    .. math:: \beta(t) = \mathrm{stop} \cdot
        \min\Bigl(\frac{t \bmod \mathrm{period}}{\mathrm{ramp} \cdot \mathrm{period}}, 1\Bigr)
        \quad \text{for } t < \mathrm{cycles} \cdot \mathrm{period}, \qquad \text{then stop}

    Arguments:
        period: the number of steps of a cycle, as in :class:`warm_up`.
        cycles: the number of cycles.
        ramp: the fraction of a cycle in which beta rises, above 0 and at most 1. In the rest of the cycle beta is
            `stop`.
        stop: beta at the end of each cycle, and after the last cycle.

    Raises:
        ValueError: `period` or `cycles` is not a positive integer, `ramp` is out of range, or `stop` is negative or not
            finite.

    Example:
        >>> import pyro_vae as pv
        >>> beta = pv.schedules.cyclical(100, cycles=2)
        >>> [beta(step) for step in (0, 25, 50, 99, 100, 125, 200, 300)]
        [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0]

    References:
        Fu et al. (2019), *Cyclical Annealing Schedule: A Simple Approach to Mitigating KL Vanishing*, NAACL. The paper
        has M = 4 for `cycles` and R = 0.5 for `ramp`, and its cycles fill the training.
    """

    period: int
    cycles: int = 4
    ramp: float = 0.5
    stop: float = 1.0

    def __post_init__(self) -> None:
        require_count("period", self.period, IN_EPOCHS)
        require_count("cycles", self.cycles)
        if not 0 < self.ramp <= 1:
            expected = "a fraction of the cycle, above 0 and at most 1"
            raise PyroVAEError(f"expected ramp to be {expected}, got {self.ramp!r}. Divide steps by period.")
        _check_values(stop=self.stop)

    def __call__(self, step: int) -> float:
        """Beta at a step, counted from 0."""
        _check_step(step)
        if step >= self.period * self.cycles:
            return self.stop
        return self.stop * min(step % self.period / (self.ramp * self.period), 1.0)


def _check_step(step: object) -> None:
    if not isinstance(step, Real | Tensor):
        raise PyroVAEError(f"expected the number of a training step, got {shown(step)}.")


def _check_values(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise PyroVAEError(
                f"expected {name} to be a finite number, at least 0, got {value!r}. Beta is never negative."
            )
