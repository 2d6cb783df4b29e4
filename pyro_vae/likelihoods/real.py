"""Likelihoods of real numbers that are independent given z: Gaussian and Student's t."""

import math
from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vae.errors import PyroVAEError
from pyro_vae.likelihoods.base import Likelihood


class _Scaled(Likelihood):
    """Base class of likelihoods with a location and a scale, where the scale is fixed, learned or a decoder output."""

    fixed_scale: Tensor

    def __init__(
        self,
        decoder: nn.Module,
        event_shape: tuple[int, ...],
        scale: float | Literal["learned", "per_pixel"] = 1.0,
        min_scale: float = 0.01,
    ) -> None:
        super().__init__(decoder, event_shape)
        self.scale = scale
        self.min_scale = min_scale
        self.num_features = self.features_for(scale=scale, min_scale=min_scale)
        if scale == "learned":
            self.log_scale = nn.Parameter(torch.zeros(()))
        elif not isinstance(scale, str):
            self.register_buffer("fixed_scale", torch.tensor(float(scale)), persistent=False)

    @classmethod
    def features_for(cls, scale: float | str = 1.0, min_scale: float = 0.01, **options: Any) -> int:
        """2 for ``scale="per_pixel"``, 1 otherwise."""
        refuse_min_scale(min_scale)
        if scale == "per_pixel":
            return 2
        if scale == "learned" or (isinstance(scale, int | float) and 0 < scale < math.inf):
            return 1
        raise PyroVAEError(
            f"expected scale to be a positive number, 'learned' or 'per_pixel', got {scale!r}. Try 'learned'."
        )

    def _loc_and_scale(self, features: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        if self.scale == "per_pixel":
            loc, raw = features
            return loc, softplus(raw) + self.min_scale
        (loc,) = features
        return loc, self.log_scale.exp() if self.scale == "learned" else self.fixed_scale


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
        scale: a positive number for a fixed sigma. ``"learned"`` is one sigma for all elements, a parameter with
            initial value 1. ``"per_pixel"`` is one sigma for each element of each datum.
        min_scale: a constant that ``"per_pixel"`` adds to each sigma. Without it the likelihood of a constant pixel is
            unbounded as sigma tends to 0.

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
        return dist.Normal(*self._loc_and_scale(features))


class StudentT(_Scaled):
    r"""A Student's t likelihood of real pixels. Outliers cost the logarithm of their distance, not its square.

    .. math:: p(x_d \mid z) \propto \frac1{\sigma_d}
        \left(1 + \frac{(x_d - \mu_d(z))^2}{\nu \sigma_d^2}\right)^{-\frac{\nu + 1}2}

    The variance is :math:`\sigma_d^2\, \nu / (\nu - 2)`, and infinite for :math:`\nu \le 2`.

    Arguments:
        decoder, event_shape, scale, min_scale: as in :class:`Gaussian`.
        df: the degrees of freedom :math:`\nu`, a number above 1, so that the mean exists. ``"learned"`` is one number
            for all elements, a parameter between 1 and 100 with initial value 4.

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

    def __init__(
        self,
        decoder: nn.Module,
        event_shape: tuple[int, ...],
        df: float | Literal["learned"] = 4.0,
        scale: float | Literal["learned", "per_pixel"] = 1.0,
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
        if df != "learned" and not (isinstance(df, int | float) and 1 < df < math.inf):
            raise PyroVAEError(f"expected df to be a number above 1, or 'learned', got {df!r}. Try 4.0.")
        return super().features_for(scale, min_scale)

    @property
    def df(self) -> Tensor:
        """The degrees of freedom, of shape ()."""
        # For large df, float32 loses the difference of two lgammas. At 100 the distribution is close to a normal.
        return 1 + 99 * self.raw_df.sigmoid() if hasattr(self, "raw_df") else self.fixed_df

    def pixel_distribution(self, *features: Tensor) -> dist.TorchDistribution:
        """The Student's t distribution whose locations are the first features."""
        return dist.StudentT(self.df, *self._loc_and_scale(features))
