"""Likelihoods of real numbers that are independent given z: Gaussian and Student's t."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vae import distributions
from pyro_vae.checks import Count, checked
from pyro_vae.errors import PyroVAEError
from pyro_vae.likelihoods.base import Likelihood

EM_ROUNDS = 20

LEARNED = ("learned", "per_column")  # the scales that are parameters
Scale = float | Literal["learned", "per_column", "per_pixel"]


class _Scaled(Likelihood):
    """Base class of likelihoods with a location and a scale, where the scale is fixed, learned or a decoder output."""

    fixed_scale: Tensor
    log_scale: nn.Parameter

    @checked
    def __init__(
        self,
        decoder: nn.Module,
        event_shape: Sequence[Count],
        scale: Scale = 1.0,
        min_scale: float = 0.01,
    ) -> None:
        super().__init__(decoder, event_shape)
        self.scale = scale
        self.min_scale = min_scale
        self.num_features = self.features_for(scale=scale, min_scale=min_scale)
        if scale in LEARNED:
            self.log_scale = nn.Parameter(torch.zeros(self.event_shape if scale == "per_column" else ()))
        elif scale == "per_pixel":
            self.floor = min_scale
        else:
            self.register_buffer("fixed_scale", torch.tensor(float(scale)), persistent=False)

    @classmethod
    def features_for(cls, scale: float | str = 1.0, min_scale: float = 0.01, **options: Any) -> int:
        """2 for ``scale="per_pixel"``, 1 otherwise."""
        refuse_min_scale(min_scale)
        if scale == "per_pixel":
            return 2
        if scale in LEARNED or (isinstance(scale, int | float) and 0 < scale < math.inf):
            return 1
        raise PyroVAEError(
            "expected scale to be a positive number, 'learned' (one for all elements), 'per_column' (one for each "
            f"element of a datum) or 'per_pixel' (a decoder output), got {scale!r}. Try 'learned'."
        )

    @property
    def has_learned_scale(self) -> bool:
        """Whether the scale is a parameter that is not frozen."""
        return self.scale in LEARNED and self.log_scale.requires_grad

    def fit_scale(self, mean: Tensor, x: Tensor, weights: Tensor, rate: float = 1.0) -> None:
        """Move sigma squared by `rate` of the way to the value at which these data are most probable."""
        if not self.has_learned_scale:
            return
        squares = (x - mean).square().masked_fill(weights == 0, 0.0)
        before = (2 * self.log_scale).exp()
        if self.scale == "learned":
            found = self._best_variance(squares.flatten(), weights.flatten(), before)
        else:
            found = self._best_variance(squares, weights, before)
            found = torch.where(varies(x, weights), found, before)
        moved = torch.lerp(before, found, rate)
        self.log_scale.copy_(torch.where(torch.isfinite(moved) & (moved > 0), 0.5 * moved.log(), self.log_scale))

    def _best_variance(self, squares: Tensor, weights: Tensor, before: Tensor) -> Tensor:
        """The sigma squared at which residuals are most probable, from their squares; over the first dimension."""
        raise NotImplementedError

    def _loc_and_scale(self, features: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        if self.scale == "per_pixel":
            loc, raw = features
            return loc, softplus(raw) + self.min_scale
        (loc,) = features
        return loc, self.log_scale.exp() if self.scale in LEARNED else self.fixed_scale


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """The mean over the first dimension; NaN where all weights are zero."""
    return (values * weights).sum(0) / weights.sum(0)


def varies(x: Tensor, weights: Tensor) -> Tensor:
    """Whether an element has more than one value in these rows: the residual of a constant tells nothing of noise."""
    highest, lowest = x.masked_fill(weights == 0, -math.inf).amax(0), x.masked_fill(weights == 0, math.inf).amin(0)
    return highest > lowest


def refuse_min_scale(min_scale: float) -> None:
    """Raise ValueError unless `min_scale` is finite and at least 0."""
    if not (isinstance(min_scale, int | float) and 0 <= min_scale < math.inf):
        raise PyroVAEError(f"expected min_scale to be a number of at least 0, got {min_scale!r}. Try 0.01.")


class Gaussian(_Scaled):
    """A normal likelihood of real pixels. With a fixed scale, minus its log-density is a scaled squared error.

    .. math:: \\log p(x \\mid z)
        = -\\sum_d \\frac{(x_d - \\mu_d(z))^2}{2 \\sigma_d^2} + \\tfrac12 \\log 2 \\pi \\sigma_d^2

    Arguments:
        decoder, event_shape: as in :class:`Likelihood`, with one mean for each element of a datum. With
            ``"per_pixel"``, the sigmas before softplus come after all means.
        scale: a positive number for a fixed sigma. ``"learned"`` is one sigma for all elements, a parameter.
            ``"per_column"`` is a parameter for each element of a datum, such as each column of a table. Both are 1
            until :func:`pyro_vae.fit` or :func:`pyro_vae.fit_scale` brings them to the scale of the residuals.
            ``"per_pixel"`` is one sigma for each element of each datum, a decoder output.
        min_scale: a constant, in units of x, that ``"per_pixel"`` adds to each sigma. Without it the likelihood of a
            constant pixel is unbounded as sigma tends to 0. :func:`pyro_vae.fit` warns if the residuals are smaller.

    Raises:
        ValueError: `scale` is not one of these values, or `min_scale` is negative.

    Example:
        >>> import torch, pyro_vae as pv
        >>> pv.Gaussian(torch.nn.Linear(2, 2 * 4), (4,), scale="per_pixel")(torch.zeros(5, 2)).event_shape
        torch.Size([4])

    References:
        Rybkin, Daniilidis and Levine (2021), *Simple and Effective VAE Training with Calibrated Decoders*, ICML.
    """

    def pixel_distribution(self, *features: Tensor) -> dist.TorchDistribution:
        """The normal whose means are the first features."""
        return distributions.Normal(*self._loc_and_scale(features))

    def _best_variance(self, squares: Tensor, weights: Tensor, before: Tensor) -> Tensor:
        return weighted_mean(squares, weights)


class StudentT(_Scaled):
    r"""A Student's t likelihood of real pixels. Outliers cost the logarithm of their distance, not its square.

    .. math:: p(x_d \mid z) \propto \frac1{\sigma_d}
        \left(1 + \frac{(x_d - \mu_d(z))^2}{\nu \sigma_d^2}\right)^{-\frac{\nu + 1}2}

    The variance is :math:`\sigma_d^2\, \nu / (\nu - 2)`, and infinite for :math:`\nu \le 2`.

    Arguments:
        decoder, event_shape, scale, min_scale: as in :class:`Gaussian`.
        df: the degrees of freedom :math:`\nu`, a number above 1, so that the mean exists, and up to 1e30.
            ``"learned"`` is one number for all elements, a parameter between 1 and 100 with initial value 4.

    Raises:
        ValueError: `df`, `scale` or `min_scale` is not one of these values.

    Example:
        >>> import torch, pyro_vae as pv
        >>> pv.StudentT(torch.nn.Linear(2, 4), (4,), df="learned")(torch.zeros(5, 2)).event_shape
        torch.Size([4])

    References:
        Takahashi, Iwata, Yamanaka, Yamada and Yagi (2018), *Student-t Variational Autoencoder for Robust Density
        Estimation*, IJCAI.
    """

    fixed_df: Tensor

    @checked
    def __init__(
        self,
        decoder: nn.Module,
        event_shape: Sequence[Count],
        df: float | Literal["learned"] = 4.0,
        scale: Scale = 1.0,
        min_scale: float = 0.01,
    ) -> None:
        super().__init__(decoder, event_shape, scale, min_scale)
        self.features_for(df=df)
        if df == "learned":
            self.raw_df = nn.Parameter(torch.tensor(3 / 99).logit())
        else:
            self.register_buffer("fixed_df", torch.tensor(float(df)), persistent=False)

    @classmethod
    def features_for(
        cls, scale: float | str = 1.0, min_scale: float = 0.01, df: float | str = 4.0, **options: Any
    ) -> int:
        """2 for ``scale="per_pixel"``, 1 otherwise."""
        if df != "learned" and not (isinstance(df, int | float) and 1 < df <= 1e30):
            raise PyroVAEError(f"expected df to be a number above 1 and up to 1e30, or 'learned', got {df!r}. Try 4.0.")
        return super().features_for(scale, min_scale)

    @property
    def df(self) -> Tensor:
        """The degrees of freedom, of shape ()."""
        # For large df, float32 loses the difference of two lgammas. At 100 the distribution is close to a normal.
        return 1 + 99 * self.raw_df.sigmoid() if hasattr(self, "raw_df") else self.fixed_df

    def pixel_distribution(self, *features: Tensor) -> dist.TorchDistribution:
        """The Student's t distribution whose locations are the first features."""
        return distributions.StudentT(self.df, *self._loc_and_scale(features))

    def _best_variance(self, squares: Tensor, weights: Tensor, before: Tensor) -> Tensor:
        # EM with an expanded parameter (Kent, Tyler and Vardi 1994), which is in its limit after a few rounds.
        for _ in range(EM_ROUNDS):
            precision = weights / (self.df + squares / before)
            before = weighted_mean(squares, precision)
        return before
