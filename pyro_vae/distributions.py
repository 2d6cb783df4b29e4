"""Mixture distributions for priors and posteriors, where Pyro's are biased or do not broadcast."""

import pyro.distributions as dist
import torch
from torch import Tensor


def wide(value: Tensor) -> Tensor:
    """The value in float64, on the CPU if its device has no float64."""
    return value.cpu().double() if value.device.type == "mps" else value.double()


class NormalMixture(dist.MixtureOfDiagNormals):
    r"""Pyro's mixture of diagonal normals, with a pathwise derivative that is unbiased in the logits too.

    The derivative is implicit, one dimension after the other. With :math:`F_d` the distribution function of :math:`z_d`
    given the earlier dimensions,

    .. math:: \mathrm d z_d = -\, \frac{\mathrm d F_d(z_d; \theta, z_{<d})}{p(z_d \mid z_{<d})}
    """

    @property
    def mean(self) -> Tensor:
        """The mean, of shape (*batch, Z)."""
        return (self.categorical.probs.unsqueeze(-1) * self.locs).sum(-2)

    def rsample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Reparameterised samples of shape (*sample_shape, *batch, Z)."""
        with torch.no_grad():
            which = self.categorical.sample(sample_shape)[..., None, None]
            shape = self._extended_shape(sample_shape)
            loc, scale = (
                tensor.expand(*shape[:-1], *tensor.shape[-2:]).gather(-2, which.expand(*shape[:-1], 1, shape[-1]))
                for tensor in (self.locs, self.coord_scale)
            )
            z: Tensor = loc.squeeze(-2) + scale.squeeze(-2) * torch.randn_like(loc.squeeze(-2))
        if not torch.is_grad_enabled():
            return z
        columns: list[Tensor] = []
        logits = self.categorical.logits
        for value, loc, scale in zip(z.unbind(-1), self.locs.unbind(-1), self.coord_scale.unbind(-1), strict=True):
            components, probs = dist.Normal(loc, scale, validate_args=False), logits.softmax(-1)
            below = (probs * components.cdf(value.unsqueeze(-1))).sum(-1)
            density = (probs * components.log_prob(value.unsqueeze(-1)).exp()).sum(-1)
            columns.append(value - (below - below.detach()) / density.detach())
            logits = logits + components.log_prob(columns[-1].unsqueeze(-1))
        return torch.stack(columns, -1)


class Mixture(dist.MixtureSameFamily):
    """Pyro's mixture, for components that don't broadcast, such as flows with one context for each component."""

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density, of shape (*batch,)."""
        components = self.component_distribution
        value = value.unsqueeze(-1 - len(self.event_shape))
        value = value.expand(torch.broadcast_shapes(value.shape, components.batch_shape + components.event_shape))
        logits = self.mixture_distribution.logits
        return torch.logsumexp(components.log_prob(value) + logits, -1)
