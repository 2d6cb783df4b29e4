"""Likelihoods of real elements that are independent given z."""

from __future__ import annotations

import math
from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vae.errors import PyroVAEError
from pyro_vae.likelihoods.base import Likelihood


class _Scaled(Likelihood):
    """Elements with a location and a scale, which is fixed, learned or the decoder's; a subclass is a family of such."""

    fixed_scale: Tensor

    def __init__(
        self, decoder: nn.Module, event_shape: tuple[int, ...], scale: float | str, min_scale: float, **options: Any
    ) -> None:
        super().__init__(decoder, event_shape)
        self.scale = scale
        self.min_scale = min_scale
        self.num_features = self.features_for(scale=scale, min_scale=min_scale, **options)
        if scale == "learned":
            self.log_scale = nn.Parameter(torch.zeros(()))
        elif not isinstance(scale, str):
            self.register_buffer("fixed_scale", torch.tensor(float(scale)), persistent=False)

    @classmethod
    def features_for(cls, scale: float | str = 1.0, min_scale: float = 0.01, **options: Any) -> int:
        """How many features an element takes under a choice of `scale`; refuses what is no choice."""
        refuse_min_scale(min_scale)
        if scale == "per_pixel":
            return 2
        if scale == "learned" or (isinstance(scale, int | float) and 0 < scale < math.inf):
            return 1
        raise PyroVAEError(f"expected scale to be a positive number, 'learned' or 'per_pixel', got {scale!r}.")

    def _loc_and_scale(self, features: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        if self.scale == "per_pixel":
            loc, raw = features
            return loc, softplus(raw) + self.min_scale
        (loc,) = features
        return loc, self.log_scale.exp() if self.scale == "learned" else self.fixed_scale


def refuse_min_scale(min_scale: float) -> None:
    """Refuse a least scale that is none."""
    if not (isinstance(min_scale, int | float) and 0 <= min_scale < math.inf):
        raise PyroVAEError(f"expected min_scale to be a number of at least 0, got {min_scale!r}. Try 0.01.")


class Gaussian(_Scaled):
    """Real pixels; with a fixed scale, minus its log-density is the squared error over 2 sigma^2, plus a constant.

    .. math:: \\log p(x \\mid z)
        = -\\sum_d \\frac{(x_d - \\mu_d(z))^2}{2 \\sigma_d^2} + \\tfrac12 \\log 2 \\pi \\sigma_d^2

    Arguments:
        decoder: a network from (N, Z) to each element's mean and, for a scale per pixel, its scale before
            softplus: features (N, D), or (N, 2 D) with all means first.
        event_shape: the shape of one datum.
        scale: a number for a fixed sigma; ``"learned"`` for one sigma that is a parameter, shared by all
            elements, at first 1; ``"per_pixel"`` for a sigma for each element of each datum.
        min_scale: what ``"per_pixel"`` adds to each sigma: where a pixel is constant, the likelihood would
            otherwise grow without bound as sigma shrinks.

    Raises:
        ValueError: `scale` is none of these, or not positive.

    Example:
        >>> import torch
        >>> from pyro_vae.networks import mlp
        >>> Gaussian(mlp(2, [8], 2 * 4), (4,), scale="per_pixel")(torch.zeros(5, 2)).event_shape
        torch.Size([4])

    References:
        Rybkin, Daniilidis and Levine (2021), *Simple and Effective VAE Training with Calibrated Decoders*, ICML.
    """

    def __init__(
        self,
        decoder: nn.Module,
        event_shape: tuple[int, ...],
        scale: float | Literal["learned", "per_pixel"] = 1.0,
        min_scale: float = 0.01,
    ) -> None:
        super().__init__(decoder, event_shape, scale, min_scale)

    def pixel_distribution(self, *features: Tensor) -> dist.TorchDistribution:
        """Normal with the first features as means."""
        return dist.Normal(*self._loc_and_scale(features))


class StudentT(_Scaled):
    r"""Real pixels with heavy tails: outliers cost the logarithm of their distance, not its square.

    .. math:: p(x_d \mid z) \propto \frac1{\sigma_d}
        \left(1 + \frac{(x_d - \mu_d(z))^2}{\nu \sigma_d^2}\right)^{-\frac{\nu + 1}2}

    Its variance is :math:`\sigma_d^2\, \nu / (\nu - 2)`, infinite for :math:`\nu \le 2`.

    Arguments:
        decoder: as in :class:`Gaussian`.
        event_shape: the shape of one datum.
        df: the degrees of freedom :math:`\nu`, a number above 1, so that there is a mean to decode to; ``"learned"`` for
            one that is a parameter between 1 and 100, shared by all elements, at first 4.
        scale: sigma, with the choices of :class:`Gaussian`.
        min_scale: as in :class:`Gaussian`.

    Raises:
        ValueError: `df` or `scale` is none of these.

    Example:
        >>> import torch
        >>> from pyro_vae.networks import mlp
        >>> StudentT(mlp(2, [8], 4), (4,), df="learned")(torch.zeros(5, 2)).event_shape
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
        super().__init__(decoder, event_shape, scale, min_scale, df=df)
        if df == "learned":
            self.raw_df = nn.Parameter(torch.tensor(3 / 99).logit())
        else:
            self.register_buffer("fixed_df", torch.tensor(float(df)), persistent=False)

    @classmethod
    def features_for(
        cls, scale: float | str = 1.0, min_scale: float = 0.01, df: float | str = 4.0, **options: Any
    ) -> int:
        """How many features an element takes under a choice of `scale`; refuses a `df` or `scale` that is no choice."""
        if df != "learned" and not (isinstance(df, int | float) and 1 < df < math.inf):
            raise PyroVAEError(f"expected df to be a number above 1, or 'learned', got {df!r}. Try 4.0.")
        return super().features_for(scale, min_scale)

    @property
    def df(self) -> Tensor:
        """The degrees of freedom, shape ()."""
        # Bounded, since float32 loses the difference of two lgammas of many degrees of freedom; from 100 on it is a normal.
        return 1 + 99 * self.raw_df.sigmoid() if hasattr(self, "raw_df") else self.fixed_df

    def pixel_distribution(self, *features: Tensor) -> dist.TorchDistribution:
        """Student's t with the first features as locations."""
        return dist.StudentT(self.df, *self._loc_and_scale(features))
