"""Likelihoods of pixels with finitely many values: ordered grey levels, and unordered categories."""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any, Self

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import logsigmoid
from torch.types import _size

from pyro_vae.checks import Count, checked
from pyro_vae.errors import PyroVAEError
from pyro_vae.likelihoods.base import Likelihood


class Categorical(Likelihood):
    r"""A likelihood of elements in C categories, coded 0, ..., C - 1 as floats.

    .. math:: p(x \mid z) = \prod_d \operatorname{softmax}\bigl(l_d(z)\bigr)_{x_d}

    The mean of codes is meaningless, so `decode` and `impute` return the most probable category of each element.

    Arguments:
        decoder, event_shape: as in :class:`Likelihood`, with C logits for each element, one category after the other.
        categories: C, the number of categories.

    Raises:
        ValueError: `categories` is not an integer of at least 2.

    Example:
        >>> import torch, pyro_vae as pv
        >>> pv.Categorical(torch.nn.Linear(2, 3 * 4), (4,), categories=3).decode(torch.zeros(5, 2)).shape
        torch.Size([5, 4])
    """

    @checked
    def __init__(self, decoder: nn.Module, event_shape: Sequence[Count], categories: int) -> None:
        super().__init__(decoder, event_shape)
        self.categories = categories
        self.num_features = self.features_for(categories)

    @classmethod
    def features_for(cls, categories: int | None = None, **options: Any) -> int:
        """C."""
        if not isinstance(categories, int) or categories < 2:
            fix = "Pass categories=int(x.max()) + 1."
            raise PyroVAEError(f"expected categories to be an integer of at least 2, got {categories!r}. {fix}")
        return categories

    def pixel_distribution(self, *features: Tensor) -> dist.TorchDistribution:
        """The categorical distribution whose logits are the features."""
        # To subtract the sum of exponentials of large logits would lose digits.
        top = reduce(torch.maximum, features).detach()
        return Codes(logits=torch.stack([each - top for each in features], -1))

    def statistic(self, distribution: Any, x: Tensor | None = None) -> Tensor:
        """The probabilities of the categories, (*batch, *event, C)."""
        while not isinstance(distribution, Codes):
            distribution = distribution.base_dist
        return distribution.probs

    def from_statistic(self, statistic: Tensor) -> Tensor:
        """The most probable category of each element, (*batch, *event)."""
        return statistic.argmax(-1).to(statistic.dtype)

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless x is codes 0, ..., C - 1."""
        valid = (x >= 0) & (x < self.categories) & (x % 1 == 0)
        fix = "Number the categories from 0, or pass a larger number of categories."
        self._refuse_unless(valid, x, f"of codes 0, ..., {self.categories - 1}", fix)


class Codes(dist.Categorical):
    """Pyro's categorical distribution with samples in floating point, as the data are."""

    def sample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        """Codes of shape (*sample_shape, *batch)."""
        return super().sample(sample_shape).to(self.logits.dtype)


class DiscretizedLogistic(Likelihood):
    r"""A likelihood of grey pixels on the grid 0, 1/(L - 1), ..., 1: a rounded logistic, or a mixture of these.

    .. math:: p(x_d \mid z) = \sum_m \pi_{dm}\, \left[\sigma\left(\tfrac{x_d + h - \mu_{dm}}{s_{dm}}\right)
        - \sigma\left(\tfrac{x_d - h - \mu_{dm}}{s_{dm}}\right)\right], \qquad h = \tfrac1{2 (L - 1)}

    At x = 1 the first term is 1, and at x = 0 the second term is 0, so that the end cells contain the tails. p(x|z) is
    a probability, not a density: log p(x) is at most 0, and is not comparable with log p(x) under a likelihood of real
    pixels. `decode` returns the exact mean, at the cost of L - 1 passes over the elements.

    Arguments:
        decoder, event_shape: as in :class:`Likelihood`, with a location and a log scale for each element, in units of
            x, and all log scales after all locations. M > 1 components have M logits, M locations, M log scales.
        levels: L, the number of grey levels.
        components: M, the number of logistics in the mixture.

    Raises:
        ValueError: `levels` is not an integer of at least 2, or `components` is not a positive integer.

    Example:
        >>> import torch, pyro_vae as pv
        >>> pv.DiscretizedLogistic(torch.nn.Linear(2, 2 * 4), (4,), levels=16).decode(torch.zeros(5, 2)).shape
        torch.Size([5, 4])

    References:
        Salimans, Karpathy, Chen and Kingma (2017), *PixelCNN++: Improving the PixelCNN with Discretized Logistic
        Mixture Likelihood and Other Modifications*, ICLR.
        Kingma et al. (2016), *Improved Variational Inference with Inverse Autoregressive Flow*, NeurIPS
        (one component).
    """

    @checked
    def __init__(
        self, decoder: nn.Module, event_shape: Sequence[Count], levels: int = 256, components: int = 1
    ) -> None:
        super().__init__(decoder, event_shape)
        self.levels = levels
        self.components = components
        self.num_features = self.features_for(levels, components)

    @classmethod
    def features_for(cls, levels: int = 256, components: int = 1, **options: Any) -> int:
        """2 for one component, 3 M for M components."""
        for name, value, least in (("levels", levels, 2), ("components", components, 1)):
            if not isinstance(value, int) or value < least:
                raise PyroVAEError(
                    f"expected {name} to be an integer of at least {least}, got {value!r}. Pass {name}={least} or more."
                )
        return 2 if components == 1 else 3 * components

    def pixel_distribution(self, *features: Tensor) -> dist.TorchDistribution:
        """The logistic distribution on the grid, or a mixture of such distributions."""
        if self.components == 1:
            loc, log_scale = features
            return LogisticOnGrid(loc, log_scale, self.levels)
        logits, loc, log_scale = torch.stack(features, -1).chunk(3, -1)
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), LogisticOnGrid(loc, log_scale, self.levels))

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless x is on the grid."""
        top = self.levels - 1
        fix = f"Pass bytes as x / 255, other grey values as (x * {top}).round() / {top}, or change levels."
        self._refuse_unless(_Grid(self.levels).check(x), x, f"on the grid 0, 1/{top}, ..., 1", fix)


class LogisticOnGrid(dist.TorchDistribution):
    """A logistic variable of shape `batch`, rounded to the nearest of the L levels 0, 1/(L - 1), ..., 1."""

    arg_constraints: dict[str, Any] = {"loc": constraints.real, "log_scale": constraints.real}  # noqa: RUF012

    def __init__(self, loc: Tensor, log_scale: Tensor, levels: int) -> None:
        self.levels = levels
        self.loc, log_scale = torch.broadcast_tensors(loc, log_scale)
        # Below 0.001 cells and above 1000 grid lengths no probability changes, and 1 / scale may overflow.
        self.log_scale = log_scale.clamp(-math.log(1e3 * (levels - 1)), math.log(1e3))
        super().__init__(self.loc.shape)

    @property
    def support(self) -> constraints.Constraint:
        """The grid of levels."""
        return _Grid(self.levels)

    def expand(self, batch_shape: _size, _instance: Any = None) -> Self:
        """The distribution with another batch shape."""
        new = self._get_checked_instance(LogisticOnGrid, _instance)
        new.levels = self.levels
        new.loc, new.log_scale = self.loc.expand(batch_shape), self.log_scale.expand(batch_shape)
        super(LogisticOnGrid, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-probability of a level, of shape (*batch,).

        In the tails sigma(a) - sigma(b) rounds to 0. The equal product sigma(a) sigma(-b) (1 - e^(b-a)) does not.
        """
        if self._validate_args:
            self._validate_sample(value)
        top = self.levels - 1
        level, cells = (value * top).round(), (-self.log_scale).exp() / top
        # Where the scale is much smaller than a cell, the rounding of the product would show.
        center, lost = self.loc * top, _rounding(self.loc, top)
        above, below = (((level + side - center) - lost) * cells for side in (0.5, -0.5))
        first, last = level == 0, level == top
        left = torch.where(first, 0.0, logsigmoid(-below))
        right = torch.where(last, 0.0, logsigmoid(above))
        return left + right + torch.where(first | last, 0.0, (-torch.expm1(-cells)).log())

    @torch.no_grad()
    def sample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        """Levels of shape (*sample_shape, *batch)."""
        shape = self._extended_shape(sample_shape)
        uniform = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)
        top = self.levels - 1
        return ((self.loc + self.log_scale.exp() * uniform.logit()) * top).round().clamp(0, top) / top

    @property
    def mean(self) -> Tensor:
        """The exact mean, of shape (*batch,), in L - 1 passes over the elements and the memory of one pass."""
        return self._sum_of_survivals(False)

    @property
    def variance(self) -> Tensor:
        """The exact variance, of shape (*batch,), at twice the cost of the mean."""
        return self._sum_of_survivals(True) - self.mean.square()

    def _sum_of_survivals(self, square: bool) -> Tensor:
        """The mean of X, sum_k P(X >= k), or of X^2, sum_k (2 k - 1) P(X >= k), where X counts cells; in units of x."""
        top = self.levels - 1
        inverse = (-self.log_scale).exp()
        total = torch.zeros_like(self.loc)
        for k in range(1, self.levels):
            survival = torch.sigmoid((self.loc - (k - 0.5) / top) * inverse)
            total = total + ((2 * k - 1) / top * survival if square else survival)
        return total / top


@torch.no_grad()
def _rounding(factor: Tensor, integer: int) -> Tensor:
    """What rounding takes off a product: the exact factor * integer minus the computed one."""
    split = factor * (2**17 + 1)  # the high part has so few digits that its product is exact (Dekker 1971)
    high = split - (split - factor)
    return (high * integer).sub_(factor * integer).add_(factor - high, alpha=integer)


class _Grid(constraints.Constraint):
    is_discrete = True

    def __init__(self, levels: int) -> None:
        self.levels = levels

    def check(self, value: Tensor) -> Tensor:
        level = value * (self.levels - 1)
        return ((level - level.round()).abs() < 0.01) & (value > -0.01 / self.levels) & (level < self.levels - 0.99)
