"""Likelihoods p(x|z): modules from a latent to a distribution over one datum, through a decoder."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vae.networks import apply_batched


class Likelihood(nn.Module, ABC):
    """What every likelihood shares: the decoder, and the shape of its features.

    One of your own, of independent elements, is a subclass with a `num_features` and a `pixel_distribution`.

    Arguments:
        decoder: a network from (N, Z), and from what the likelihood is given besides, to (N, ...) with `num_features` numbers
            for each element of an event.
        event_shape: the shape of one datum.
    """

    #: How many numbers the decoder gives for each element of an event.
    num_features = 1

    def __init__(self, decoder: nn.Module, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.decoder = decoder
        self.event_shape = tuple(event_shape)

    @classmethod
    def features_for(cls, **options: Any) -> int:
        """`num_features` of a likelihood with these options, to build its decoder by; refuses options that are none."""
        return cls.num_features

    def forward(self, z: Tensor, *given: Tensor, mask: Tensor | None = None) -> dist.TorchDistribution:
        """The distribution of x for each z of shape (*batch, Z): batch shape `batch`, event shape `event`.

        Arguments:
            z: latents, (*batch, Z).
            given: what the decoder takes besides z, such as labels.
            mask: booleans that broadcast to (*batch, *event): which elements are observed; the density of the others is left out.
        """
        features = apply_batched(self.decoder, z, 1, *given)
        expected = self.num_features * math.prod(self.event_shape)
        if features.numel() != expected * z[..., 0].numel():
            raise ValueError(
                f"expected a decoder with {expected} outputs a datum ({self.num_features} for each element of "
                f"{self.event_shape}), got features of shape {tuple(features.shape)} for z of shape {tuple(z.shape)}."
            )
        features = features.reshape(*z.shape[:-1], self.num_features, *self.event_shape)
        return self.event_distribution(*features.unbind(z.dim() - 1), mask=mask)

    def event_distribution(self, *features: Tensor, mask: Tensor | None) -> dist.TorchDistribution:
        """The distribution of x from `num_features` tensors of shape (*batch, *event): here, of independent elements."""
        pixels = self.pixel_distribution(*features)
        return (pixels if mask is None else pixels.mask(mask)).to_event(len(self.event_shape))

    @abstractmethod
    def pixel_distribution(self, *features: Tensor) -> dist.TorchDistribution:
        """The distribution of each element of x, from `num_features` tensors of shape (*batch, *event)."""

    def decode(self, z: Tensor, *given: Tensor) -> Tensor:
        """The mean of p(x|z): (*batch, Z) to (*batch, *event)."""
        mean: Tensor = self(z, *given).mean
        return mean

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
    """Bernoulli pixels whose log-density, summed over an event, takes a third of the passes over memory of torch's own."""

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> dist.TorchDistribution:
        """One event of the dimensions on the right."""
        return _PixelEvent(
            self, len(self.batch_shape) if reinterpreted_batch_ndims is None else reinterpreted_batch_ndims
        )


class _PixelEvent(dist.Independent):
    """log p(x) = sum_d x_d l_d - log(1 + e^l_d): one new tensor of the logits' size, and a matrix-vector product.

    Its two sums cancel where pixels are surely on, but not at the many that are surely off.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Of shape (*batch,)."""
        if self._validate_args:
            self.base_dist._validate_sample(value)
        size = self.event_shape.numel()
        logits = self.base_dist.logits.reshape(*self.batch_shape, size)
        x = value.reshape(*value.shape[: value.dim() - self.event_dim], size)
        on = logits @ x.reshape(size) if x.numel() == size else torch.linalg.vecdot(x, logits)
        return on - _sum_softplus(logits)


def _sum_softplus(logits: Tensor) -> Tensor:
    """The sum of log(1 + e^l) over the last dimension.

    Without a gradient, four pixels share a logarithm, which is half of the work: log(1 + e^l) = max(l, 0) + log(1 + e^-|l|),
    and the sum of four logarithms is that of a product, which is between 1 and 16.
    """
    if logits.requires_grad and torch.is_grad_enabled():
        return softplus(logits, threshold=40).sum(-1)  # from 40 on float64 can't tell softplus(l) from l
    quarter = logits.shape[-1] // 4
    factors = logits.abs().neg_().exp_().add_(1)
    a, b, c, d, rest = factors.split([quarter, quarter, quarter, quarter, logits.shape[-1] - 4 * quarter], -1)
    return logits.clamp(min=0).sum(-1) + ((a * b) * (c * d)).log().sum(-1) + rest.log().sum(-1)


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

    @classmethod
    def features_for(cls, scale: float | str = 1.0, **options: Any) -> int:
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


#: The likelihoods by the names that :func:`pyro_vae.mlp_vae` and the command line know them by.
BY_NAME: dict[str, type[Likelihood]] = {"bernoulli": Bernoulli, "gaussian": Gaussian}
