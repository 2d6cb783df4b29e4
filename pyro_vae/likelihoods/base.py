"""What every likelihood p(x|z) shares."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.errors import PyroVAEError
from pyro_vae.networks import apply_batched


class Likelihood(nn.Module):
    """What every likelihood shares: the decoder, and the shape of its features.

    One of your own is a subclass with a `num_features` and a `pixel_distribution`, of elements that are independent given z,
    or else an `event_distribution`; a `check` of its data, if it likes.

    Arguments:
        decoder: a network from (N, Z), and from what the likelihood is given besides, to (N, ...) with `num_features` numbers
            for each element of an event: the first of all elements, then the second of all, as (N, num_features, *event) has them.
        event_shape: the shape of one datum.
    """

    #: How many numbers the decoder gives for each element of an event.
    num_features: int = 1
    #: What stands for an element that is missing; it has to be in the support.
    filler: float = 0.0

    def __init__(self, decoder: nn.Module, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        if not isinstance(decoder, nn.Module):
            raise PyroVAEError(f"expected decoder to be a torch.nn.Module, got {decoder!r}. Build it: Decoder(), say.")
        if not isinstance(event_shape, tuple | list | torch.Size):
            raise PyroVAEError(
                f"expected event_shape to be the shape of one datum, got {event_shape!r}. Write ({event_shape},)."
            )
        self.decoder = decoder
        self.event_shape = tuple(event_shape)

    @classmethod
    def features_for(cls, **options: Any) -> int:
        """`num_features` of a likelihood with these options, to build its decoder by; it may refuse their values."""
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
        batch = torch.broadcast_shapes(z.shape[:-1], *(y.shape[:-1] for y in given))
        if features.numel() != expected * math.prod(batch):
            raise PyroVAEError(
                f"expected a decoder with {expected} outputs a datum ({self.num_features} for each element of "
                f"{self.event_shape}), got features of shape {tuple(features.shape)} for z of shape {tuple(z.shape)}."
            )
        features = features.reshape(*batch, self.num_features, *self.event_shape)
        return self.event_distribution(*features.unbind(len(batch)), mask=mask)

    def event_distribution(self, *features: Tensor, mask: Tensor | None) -> dist.TorchDistribution:
        """The distribution of x from `num_features` tensors of shape (*batch, *event): here, of independent elements."""
        pixels = self.pixel_distribution(*features)
        if pixels.event_shape or pixels.batch_shape != features[0].shape:
            raise PyroVAEError(
                f"expected {type(self).__name__}.pixel_distribution to give a distribution of each element, of batch shape "
                f"{tuple(features[0].shape)} and no event, got {tuple(pixels.batch_shape)} and {tuple(pixels.event_shape)}. Drop "
                "to_event from it."
            )
        return (pixels if mask is None else pixels.mask(mask)).to_event(len(self.event_shape))

    def pixel_distribution(self, *features: Tensor) -> dist.TorchDistribution:
        """The distribution of each element of x, from `num_features` tensors of shape (*batch, *event)."""
        raise NotImplementedError(
            f"expected {type(self).__name__} to have a pixel_distribution or an event_distribution, got neither. Define one."
        )

    def decode(self, z: Tensor, *given: Tensor) -> Tensor:
        """The mean of p(x|z), or what stands for it: (*batch, Z) to (*batch, *event)."""
        return self.from_statistic(self.statistic(self(z, *given)))

    def statistic(self, distribution: Any, x: Tensor | None = None) -> Tensor:
        """What of p(x|z) can be averaged over z, as :meth:`VAE.impute` does: its mean, (*batch, *event).

        Arguments:
            distribution: what :meth:`forward` gives.
            x: where the distribution has a mask, the data, given whose observed elements the mean is.
        """
        mean: Tensor = distribution.mean
        return mean

    def from_statistic(self, statistic: Tensor) -> Tensor:
        """x from a statistic or an average of it, (*batch, *event): the mean as it is."""
        return statistic

    def check(self, x: Tensor) -> None:
        """Refuse data that the likelihood gives no density to; called while Pyro's validation is on."""

    def _refuse_unless(self, valid: Tensor, x: Tensor, expected: str, fix: str) -> None:
        if not bool(valid.all()):
            got = f"{x[~valid].flatten()[0].item():.6g}"
            fix = "Where a value is missing, pass a mask of those that are not." if got == "nan" else fix
            raise PyroVAEError(f"a {type(self).__name__} likelihood expected x {expected}, got {got}. {fix}")
