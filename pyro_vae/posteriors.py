"""Approximate posteriors q(z|x), the guide's families: modules from data to a distribution over z."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import pyro.distributions as dist
from torch import Tensor, nn

from pyro_vae.networks import apply_batched


class Posterior(nn.Module, ABC):
    """What every amortised posterior shares: the encoder. One of your own is a subclass with a `latent_distribution`.

    Arguments:
        encoder: a network from (N, *event), and from what the posterior is given besides, to (N, features).
        event_shape: the shape of one datum.
    """

    def __init__(self, encoder: nn.Module, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder = encoder
        self.event_shape = tuple(event_shape)

    @classmethod
    @abstractmethod
    def features_for(cls, latent_dim: int, **options: Any) -> int:
        """How many features the encoder gives for a latent of so many dimensions."""

    def forward(self, x: Tensor, *given: Tensor) -> dist.TorchDistribution:
        """The distribution of z for each x of shape (*batch, *event): batch shape `batch`, event shape (Z,)."""
        return self.latent_distribution(apply_batched(self.encoder, x, len(self.event_shape), *given))

    @abstractmethod
    def latent_distribution(self, features: Tensor) -> dist.TorchDistribution:
        """The distribution of z from the encoder's features, (*batch, features)."""

    def embed(self, x: Tensor, *given: Tensor) -> Tensor:
        """The mean of q(z|x): (*batch, *event) to (*batch, Z)."""
        mean: Tensor = self(x, *given).mean
        return mean


class DiagonalNormal(Posterior):
    """A normal with independent dimensions, whose mean and log scale an encoder computes.

    .. math:: q(z \\mid x) = \\mathcal N\\bigl(z; \\mu(x), \\operatorname{diag} \\sigma(x)^2\\bigr)

    Arguments:
        encoder: a network from (N, *event) to (N, 2 Z): the means, then the logs of the scales.
        event_shape: the shape of one datum.

    Returns:
        When called with x of shape (*batch, *event): a distribution with batch shape `batch`, event shape (Z,).

    Raises:
        ValueError: the encoder has an odd number of outputs.

    Example:
        >>> import torch
        >>> from pyro_vae.networks import mlp
        >>> DiagonalNormal(mlp(4, [8], 2 * 3), (4,))(torch.zeros(5, 4)).event_shape
        torch.Size([3])

    References:
        Kingma and Welling (2014), *Auto-Encoding Variational Bayes*, ICLR.
    """

    @classmethod
    def features_for(cls, latent_dim: int, **options: Any) -> int:
        """Two for each latent dimension."""
        return 2 * latent_dim

    def latent_distribution(self, features: Tensor) -> dist.TorchDistribution:
        """Normal with the first half of the features as means, and the second as logs of the scales."""
        if features.shape[-1] % 2:
            raise ValueError(
                f"expected an encoder with 2 Z outputs, a mean and a log scale each, got {features.shape[-1]}."
            )
        loc, log_scale = features.chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)
