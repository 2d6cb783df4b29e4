"""Likelihoods of pixels in [0, 1]: ink or none, and grey."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_vae.errors import PyroVAEError
from pyro_vae.likelihoods.base import Likelihood


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
        others = x[(x != 0) & (x != 1)]
        if len(others):
            raise PyroVAEError(
                f"a Bernoulli likelihood expected x of zeros and ones, got values from {x.min():.3g} to {x.max():.3g}, such as "
                f"{others[0]:.3g}. Binarise it (pv.data.load(..., binarize='dynamic')), or, since Bernoulli gives grey no "
                "density, take the likelihood ContinuousBernoulli for grey in [0, 1], or Gaussian for any real values."
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


class ContinuousBernoulli(Likelihood):
    r"""Grey pixels in [0, 1]: the Bernoulli's form, and the constant that makes it a density of grey.

    .. math:: \log p(x \mid z) = \sum_d x_d\, l_d(z) - \log (1 + e^{l_d(z)}) + \log \frac{l_d(z)}{\tanh (l_d(z) / 2)}

    Arguments:
        decoder: a network from (N, Z) to one logit l for each element of an event.
        event_shape: the shape of one datum.

    Raises:
        ValueError: when a model meets x outside [0, 1].

    Example:
        >>> import torch
        >>> from pyro_vae.networks import mlp
        >>> ContinuousBernoulli(mlp(2, [8], 4), (4,)).decode(torch.zeros(5, 2)).shape
        torch.Size([5, 4])

    References:
        Loaiza-Ganem and Cunningham (2019), *The continuous Bernoulli: fixing a pervasive error in variational
        autoencoders*, NeurIPS.
    """

    def pixel_distribution(self, *features: Tensor) -> dist.TorchDistribution:
        """Continuous Bernoulli with the features as logits."""
        (logits,) = features
        return GreyPixel(logits=logits)

    def check(self, x: Tensor) -> None:
        """Refuse x outside [0, 1]."""
        fix = "Rescale it (x / 255 for bytes), or use a Gaussian likelihood."
        self._refuse_unless((x >= 0) & (x <= 1), x, "in [0, 1]", fix)


class GreyPixel(dist.ContinuousBernoulli):
    """Continuous Bernoulli that keeps its precision at any logit l.

    PyTorch's own goes by clamped probabilities: in float32, beyond |l| = 16 it no longer integrates to 1 and decoders get no
    gradient of its constant, and near l = 0 its mean and variance are differences of large numbers.
    """

    def _near_zero(self) -> tuple[Tensor, Tensor]:
        """Where the series serve; and the logits elsewhere, with 1 in place of those, whose gradient would be NaN."""
        near = self.logits.abs() < 0.3
        return near, torch.where(near, 1.0, self.logits)

    def _cont_bern_log_norm(self) -> Tensor:
        (near, far), square = self._near_zero(), self.logits.square()
        series = math.log(2) + square * (1 / 12 - square * (7 / 1440 - square * (31 / 90720)))
        return torch.where(near, series, (far / (far / 2).tanh()).log())

    @property
    def mean(self) -> Tensor:
        """1 / (1 - e^-l) - 1 / l."""
        (near, far), square = self._near_zero(), self.logits.square()
        series = 0.5 + self.logits * (1 / 12 - square * (1 / 720 - square / 30240))
        return torch.where(near, series, 0.5 + 0.5 / (far / 2).tanh() - 1 / far)

    @property
    def variance(self) -> Tensor:
        """1 / l^2 - 1 / (2 sinh(l / 2))^2."""
        (near, far), square = self._near_zero(), self.logits.square()
        series = 1 / 12 - square * (1 / 240 - square * (1 / 6048 - square / 172800))
        return torch.where(near, series, 1 / far.square() - (2 * (far / 2).sinh()).square().reciprocal())

    def icdf(self, value: Tensor) -> Tensor:
        """The quantile of each value in [0, 1]."""
        falling = -self.logits.abs().clamp(min=1e-6)  # the density falls; where it rises, it is the mirror image
        value = torch.where(self.logits > 0, 1 - value, value)
        quantile = (torch.log1p(value * torch.expm1(falling)) / falling).clamp(0, 1)
        return torch.where(self.logits > 0, 1 - quantile, quantile)
