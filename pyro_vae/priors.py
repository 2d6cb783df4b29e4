"""Priors p(z): modules that, called without arguments, return a distribution over one datum's latent."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn


class StandardNormal(nn.Module):
    """The standard normal prior.

    .. math:: p(z) = \\mathcal N(z; 0, I)

    Arguments:
        latent_dim: Z, the number of latent dimensions.

    Returns:
        When called: a distribution with event shape (Z,).

    Example:
        >>> StandardNormal(3)().event_shape
        torch.Size([3])
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(latent_dim), persistent=False)

    def forward(self) -> dist.TorchDistribution:
        """The prior, with event shape (Z,)."""
        return dist.Normal(self.loc, self.scale).to_event(1)
