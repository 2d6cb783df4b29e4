"""Likelihoods p(x|z): modules from a latent to a distribution over one datum, through a decoder."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vae.networks import apply_batched


class Likelihood(nn.Module, ABC):
    """What every likelihood shares: the decoder, and the shape of its features.

    Arguments:
        decoder: a network from (N, Z) to (N, ...) with `num_features` numbers for each element of an event.
        event_shape: the shape of one datum.
    """

    #: How many numbers the decoder gives for each element of an event.
    num_features = 1

    def __init__(self, decoder: nn.Module, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.decoder = decoder
        self.event_shape = tuple(event_shape)

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        """The distribution of x for each z of shape (*batch, Z): batch shape `batch`, event shape `event`."""
        features = apply_batched(self.decoder, z, 1)
        expected = self.num_features * math.prod(self.event_shape)
        if features.numel() != expected * z[..., 0].numel():
            raise ValueError(
                f"expected a decoder with {expected} outputs a datum ({self.num_features} for each element of "
                f"{self.event_shape}), got features of shape {tuple(features.shape)} for z of shape {tuple(z.shape)}."
            )
        features = features.reshape(*z.shape[:-1], self.num_features, *self.event_shape)
        pixels = self.pixel_distribution(*features.unbind(z.dim() - 1))
        return pixels.to_event(len(self.event_shape))

    @abstractmethod
    def pixel_distribution(self, *features: Tensor) -> dist.TorchDistribution:
        """The distribution of each element of x, from `num_features` tensors of shape (*batch, *event)."""

    def check(self, x: Tensor) -> None:
        """Refuse data that the likelihood gives no density to; called while Pyro's validation is on."""


class Bernoulli(Likelihood):
    """Binary pixels; minus its log-density is the binary cross-entropy, summed.

    .. math:: \\log p(x \\mid z) = \\sum_d x_d \\log \\pi_d(z) + (1 - x_d) \\log (1 - \\pi_d(z))

    Arguments:
        decoder: a network from (N, Z) to one logit for each element of an event.
        event_shape: the shape of one datum.

    Raises:
        ValueError: when a model meets x with values other than 0 and 1.

    Example:
        >>> import torch
        >>> from pyro_vae.networks import mlp
        >>> Bernoulli(mlp(2, [8], 4), (4,))(torch.zeros(5, 2)).event_shape
        torch.Size([4])
    """

    def pixel_distribution(self, *features: Tensor) -> dist.TorchDistribution:
        """Bernoulli with the features as logits."""
        (logits,) = features
        return PixelBernoulli(logits=logits)

    def check(self, x: Tensor) -> None:
        """Refuse x that is not binary."""
        if not bool(((x == 0) | (x == 1)).all()):
            raise ValueError(
                f"a Bernoulli likelihood expected x of zeros and ones, got values from {x.min():.3g} to {x.max():.3g}. "
                "Binarise it (pv.data.load(..., binarize='dynamic')), or use a Gaussian likelihood."
            )


class PixelBernoulli(dist.Bernoulli):
    """Bernoulli whose log-density takes half the passes over memory that torch's own does: log sigmoid(l) + (x - 1) l."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Of shape (*batch, *event), as the logits."""
        if self._validate_args:
            self._validate_sample(value)
        # softplus(l, -1) is log sigmoid(l); the threshold is where float64 no longer tells it from l.
        log_sigmoid = softplus(self.logits, beta=-1, threshold=40)
        if torch.broadcast_shapes(value.shape, log_sigmoid.shape) != log_sigmoid.shape:
            return torch.addcmul(log_sigmoid, value - 1, self.logits)
        return log_sigmoid.addcmul_(value - 1, self.logits)  # a new tensor costs as much as the sum


class Gaussian(Likelihood):
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
        self.num_features = self.features_for(scale)
        if scale == "learned":
            self.log_scale = nn.Parameter(torch.zeros(()))
        elif not isinstance(scale, str):
            self.register_buffer("fixed_scale", torch.tensor(float(scale)), persistent=False)

    @staticmethod
    def features_for(scale: float | str) -> int:
        """How many features an element takes under a choice of `scale`; refuses what is no choice."""
        if scale == "per_pixel":
            return 2
        if scale == "learned" or (isinstance(scale, int | float) and 0 < scale < math.inf):
            return 1
        raise ValueError(f"expected scale to be a positive number, 'learned' or 'per_pixel', got {scale!r}.")

    def pixel_distribution(self, *features: Tensor) -> dist.TorchDistribution:
        """Normal with the first features as means."""
        if self.scale == "per_pixel":
            loc, raw = features
            return dist.Normal(loc, softplus(raw) + self.min_scale)
        (loc,) = features
        return dist.Normal(loc, self.log_scale.exp() if self.scale == "learned" else self.fixed_scale)
