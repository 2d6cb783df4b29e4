"""Approximate posteriors q(z|x), the guide's families: modules from data to a distribution over z."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor, nn

from pyro_vae.networks import apply_batched


class DiagonalNormal(nn.Module):
    """A normal with independent dimensions, whose mean and log scale an encoder computes.

    .. math:: q(z \\mid x) = \\mathcal N\\bigl(z; \\mu(x), \\operatorname{diag} \\sigma(x)^2\\bigr)

    Arguments:
        encoder: a network from (N, *event) to (N, 2 Z): the means, then the logs of the scales.
        event_shape: the shape of one datum.

    Returns:
        When called with x of shape (*batch, *event): a distribution with batch shape `batch`, event shape (Z,).

    Example:
        >>> import torch
        >>> from pyro_vae.networks import mlp
        >>> DiagonalNormal(mlp(4, [8], 2 * 3), (4,))(torch.zeros(5, 4)).event_shape
        torch.Size([3])

    References:
        Kingma and Welling (2014), *Auto-Encoding Variational Bayes*, ICLR.
    """

    def __init__(self, encoder: nn.Module, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder = encoder
        self.event_shape = tuple(event_shape)

    def forward(self, x: Tensor) -> dist.TorchDistribution:
        """The guide's distribution of z for each x."""
        features = apply_batched(self.encoder, x, len(self.event_shape))
        if features.shape[-1] % 2:
            raise ValueError(
                f"expected an encoder with 2 Z outputs, a mean and a log scale each, got {features.shape[-1]}."
            )
        loc, log_scale = features.chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)
