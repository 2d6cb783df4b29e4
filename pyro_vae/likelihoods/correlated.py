"""Likelihoods of real elements that are correlated given z: a Gaussian with a low-rank covariance."""

import math
from collections.abc import Sequence
from typing import Any, Self

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus
from torch.types import _size

from pyro_vae.checks import Count, checked
from pyro_vae.distributions import low_rank_factors, low_rank_log_prob
from pyro_vae.errors import PyroVAEError, require_count
from pyro_vae.likelihoods.base import Likelihood
from pyro_vae.likelihoods.real import refuse_min_scale, varies, weighted_mean


class LowRankGaussian(Likelihood):
    r"""A normal likelihood of the whole datum, whose covariance is a diagonal matrix plus a matrix of low rank.

    .. math:: p(x \mid z) = \mathcal N\bigl(x; \mu(z), F F^\top + \operatorname{diag} \sigma^2\bigr),
        \qquad F \in \mathbb R^{D \times R}

    If elements are independent given z, noise that neighbours share is improbable, so means are blurred and samples are
    grainy. Here the noise is correlated through F. Cost and memory grow as D R, not as D^2.

    Arguments:
        decoder, event_shape: as in :class:`Likelihood`, with the D means. With ``shared=False`` the R columns of F,
            then the sigmas before softplus, come after the means.
        rank: R, the number of columns of F.
        shared: True for F and sigma as parameters that all data share, False for F and sigma as decoder outputs.
        min_scale: a constant that is added to each sigma, as in :class:`Gaussian`.

    A shared covariance starts with variances of about 1. :func:`pyro_vae.fit` and :func:`pyro_vae.fit_scale` bring the
    variance of each element to that of its residuals, and leave the correlations to the gradient.

    Raises:
        ValueError: `rank` is not a positive integer, `shared` is not a boolean, or `min_scale` is negative.

    Example:
        >>> import torch, pyro_vae as pv
        >>> pv.LowRankGaussian(torch.nn.Linear(2, 4), (2, 2), rank=1)(torch.zeros(5, 2)).rsample().shape
        torch.Size([5, 2, 2])

    References:
        Dorta, Vicente, Agapito, Campbell and Simpson (2018), *Structured Uncertainty Prediction Networks*, CVPR.
        Monteiro et al. (2020), *Stochastic Segmentation Networks*, NeurIPS (low rank).
    """

    @checked
    def __init__(
        self,
        decoder: nn.Module,
        event_shape: Sequence[Count],
        rank: int = 5,
        shared: bool = True,
        min_scale: float = 0.01,
    ) -> None:
        super().__init__(decoder, event_shape)
        self.rank = rank
        self.shared = shared
        self.min_scale = min_scale
        self.floor = min_scale
        self.num_features = self.features_for(rank, shared, min_scale)
        if shared:
            # F = 0 is a saddle point, at which F has no gradient. The initial softplus(raw_scale) is 1.
            self.factor = nn.Parameter(0.1 * torch.randn(*self.event_shape, rank))
            self.raw_scale = nn.Parameter(torch.full(self.event_shape, math.log(math.e - 1)))

    @classmethod
    def features_for(cls, rank: int = 5, shared: bool = True, min_scale: float = 0.01, **options: Any) -> int:
        """1 if the covariance is shared, R + 2 otherwise."""
        require_count("rank", rank, "For rank 0, use a Gaussian likelihood.")
        if not isinstance(shared, bool):
            raise PyroVAEError(
                f"expected shared to be True or False, got {shared!r}. Pass False for a covariance that depends on z."
            )
        refuse_min_scale(min_scale)
        return 1 if shared else rank + 2

    def event_distribution(self, *features: Tensor, mask: Tensor | None) -> dist.TorchDistribution:
        """The normal whose means are the first features. With a mask, the density includes only observed elements."""
        if not self.shared:
            loc, *columns, raw_scale = features
            factor = torch.stack(columns, -1)
        else:
            (loc,) = features
            factor, raw_scale = self.factor, self.raw_scale
        return LowRankEvent(loc, factor, softplus(raw_scale) + self.min_scale, len(self.event_shape), mask)

    @property
    def has_learned_scale(self) -> bool:
        """Whether the covariance is a parameter that is not frozen."""
        return self.shared and self.factor.requires_grad and self.raw_scale.requires_grad

    def fit_scale(self, mean: Tensor, x: Tensor, weights: Tensor, rate: float = 1.0) -> None:
        """Move each element's variance by `rate` of the way to its mean squared residual; correlations stay.

        The covariance F F^T + diag(sigma^2) of highest likelihood has these variances (Lawley and Maxwell 1971).
        """
        if not self.has_learned_scale:
            return
        found = weighted_mean((x - mean).square().masked_fill(weights == 0, 0.0), weights)
        scale = softplus(self.raw_scale) + self.min_scale
        ratio = 1 + rate * (found / (self.factor.square().sum(-1) + scale.square()) - 1)
        moves = varies(x, weights) & torch.isfinite(ratio) & (ratio > 0)
        ratio = torch.where(moves, ratio, 1.0).sqrt()
        self.factor.mul_(ratio[..., None])
        # At the floor, softplus keeps a slope, by which a gradient can leave it.
        above = (scale * ratio - self.min_scale).clamp(min=max(0.01 * self.min_scale, torch.finfo(x.dtype).tiny))
        self.raw_scale.copy_(torch.where(moves, above + (-torch.expm1(-above)).log(), self.raw_scale))

    def statistic(self, distribution: Any, x: Tensor | None = None) -> Tensor:
        """The mean, or the mean given the observed elements of x if there is an x."""
        return distribution.mean if x is None else distribution.conditional_mean(x)


class LowRankEvent(dist.TorchDistribution):
    """A normal with covariance F F^T + diag(scale^2) of the elements of an event of any shape.

    PyTorch's class takes vectors, and its density is a difference of large numbers where F is much larger than the
    scale. For 784 pixels, R = 4, F of 1 and scale 0.02 its error in float32 is 4 nats. Here the quadratic form is a sum
    of squares in float64.

    `loc` has shape (*batch, *event), with `event_dim` event dimensions. `factor` has shape (*event, R) or
    (*batch, *event, R), and `scale` that shape without R. `log_prob` is the marginal density of the elements where
    `mask` is True. Samples and moments include all elements.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(self, loc: Tensor, factor: Tensor, scale: Tensor, event_dim: int, mask: Tensor | None = None) -> None:
        event_shape = loc.shape[loc.dim() - event_dim :]
        self.loc = loc.flatten(-event_dim)
        self.factor = factor.flatten(-event_dim - 1, -2)
        self.scale = scale.flatten(-event_dim)
        if mask is not None:
            mask = mask.expand(torch.broadcast_shapes(mask.shape, event_shape)).flatten(-event_dim)
        self.observed = mask
        super().__init__(self.loc.shape[:-1], event_shape)

    @property
    def support(self) -> constraints.Constraint:
        """Events of real numbers."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: _size, _instance: Any = None) -> Self:
        """The distribution with another batch shape."""
        new = self._get_checked_instance(LowRankEvent, _instance)
        new.loc = self.loc.expand(*batch_shape, -1)
        new.factor, new.scale, new.observed = self.factor, self.scale, self.observed
        super(LowRankEvent, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density, of shape (*batch,)."""
        if self._validate_args:
            self._validate_sample(value)
        x = value.flatten(-len(self.event_shape))
        return low_rank_log_prob(x, self.loc, self.factor, self.scale, self.observed)

    def conditional_mean(self, value: Tensor) -> Tensor:
        """The mean given the observed elements of `value`, of shape (*batch, *event)."""
        x = value.flatten(-len(self.event_shape))
        u = low_rank_factors(x, self.loc, self.factor, self.scale, self.observed)
        return (self.loc + _rows(self.factor, u)).unflatten(-1, self.event_shape)

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        """Samples of shape (*sample_shape, *batch, *event)."""
        shape = (*sample_shape, *self.batch_shape)
        alone = self.scale * torch.randn(*shape, self.loc.shape[-1], dtype=self.loc.dtype, device=self.loc.device)
        together = torch.randn(*shape, self.factor.shape[-1], dtype=self.loc.dtype, device=self.loc.device)
        return (self.loc + _rows(self.factor, together) + alone).unflatten(-1, self.event_shape)

    @property
    def mean(self) -> Tensor:
        """The mean, of shape (*batch, *event)."""
        return self.loc.unflatten(-1, self.event_shape)

    @property
    def variance(self) -> Tensor:
        """The variance of each element, of shape (*batch, *event)."""
        variance = self.factor.square().sum(-1) + self.scale.square()
        return variance.expand(self.loc.shape).unflatten(-1, self.event_shape)


def _rows(matrix: Tensor, vector: Tensor) -> Tensor:
    return torch.einsum("...r,...dr->...d", vector, matrix)
