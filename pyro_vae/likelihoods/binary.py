"""Likelihoods of pixels in [0, 1]: Bernoulli for binary pixels, continuous Bernoulli for grey pixels."""

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_vae.errors import PyroVAEError
from pyro_vae.likelihoods.base import Likelihood


class Bernoulli(Likelihood):
    """A Bernoulli likelihood of binary pixels. Minus its log-density is the sum of binary cross-entropies.

    .. math:: \\log p(x \\mid z) = \\sum_d x_d \\log \\pi_d(z) + (1 - x_d) \\log (1 - \\pi_d(z))

    Arguments:
        decoder, event_shape: as in :class:`Likelihood`, with one logit for each element of a datum.

    Example:
        >>> import torch, pyro_vae as pv
        >>> pv.Bernoulli(torch.nn.Linear(2, 4), (4,))(torch.zeros(5, 2)).event_shape
        torch.Size([4])
    """

    def pixel_distribution(self, *features: Tensor) -> dist.TorchDistribution:
        """The Bernoulli distribution whose logits are the features."""
        (logits,) = features
        return PixelBernoulli(logits=logits)

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless x is zeros and ones."""
        if not torch.equal(x.clamp(0, 1).round_(), x):  # half the time of a selection, which each step would take
            others = x[(x != 0) & (x != 1)]
            raise PyroVAEError(
                f"a Bernoulli likelihood expected x of zeros and ones, got values from {x.min().item():.3g} to "
                f"{x.max().item():.3g}, such as {others[0].item():.3g}. Binarise it (pv.data.load(..., "
                "binarize='dynamic')), or use the likelihood ContinuousBernoulli for grey values in [0, 1], or "
                "Gaussian for real values."
            )


class PixelBernoulli(dist.Bernoulli):
    """PyTorch's Bernoulli distribution, with a log-density of events that takes half of the passes over memory."""

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> dist.TorchDistribution:
        """The distribution with batch dimensions on the right as event dimensions; None is all batch dimensions."""
        dims = len(self.batch_shape) if reinterpreted_batch_ndims is None else reinterpreted_batch_ndims
        return _PixelEvent(self, dims)


class _PixelEvent(dist.Independent):
    """Independent Bernoulli pixels with log p(x) = sum_d x_d l_d - log(1 + e^l_d)."""

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-probability, of shape (*batch,)."""
        if self._validate_args:
            self.base_dist._validate_sample(value)
        logits = self.base_dist.logits
        # The difference is taken pixel by pixel: each of its terms is large where a pixel is almost surely 1.
        if logits.requires_grad and torch.is_grad_enabled():
            minus = torch.addcmul(softplus(logits, threshold=40), value, logits, value=-1)  # 40 serves float64 too
            return -_flat(minus, self.event_dim).sum(-1)
        minus = torch.addcmul(logits.clamp(min=0), value, logits, value=-1)
        return -(_flat(minus, self.event_dim).sum(-1) + _sum_log1p_exp(_flat(logits, self.event_dim)))


def _flat(tensor: Tensor, event_dim: int) -> Tensor:
    return tensor.flatten(-event_dim) if event_dim else tensor.unsqueeze(-1)


def _sum_log1p_exp(logits: Tensor) -> Tensor:
    """The sum of log(1 + e^-|l|) over the last dimension."""
    # Logarithms take half of the time, so four pixels share the logarithm of a product, which is between 1 and 16.
    quarter = logits.shape[-1] // 4
    factors = logits.abs().neg_().exp_().add_(1)
    a, b, c, d, rest = factors.split([quarter, quarter, quarter, quarter, logits.shape[-1] - 4 * quarter], -1)
    return ((a * b) * (c * d)).log().sum(-1) + rest.log().sum(-1)


class ContinuousBernoulli(Likelihood):
    r"""A continuous Bernoulli likelihood of grey pixels in [0, 1]: the Bernoulli's formula, normalised to a density.

    .. math:: \log p(x \mid z) = \sum_d x_d\, l_d(z) - \log (1 + e^{l_d(z)}) + \log \frac{l_d(z)}{\tanh (l_d(z) / 2)}

    Arguments:
        decoder, event_shape: as in :class:`Likelihood`, with one logit l for each element of a datum.

    Example:
        >>> import torch, pyro_vae as pv
        >>> pv.ContinuousBernoulli(torch.nn.Linear(2, 4), (4,)).decode(torch.zeros(5, 2)).shape
        torch.Size([5, 4])

    References:
        Loaiza-Ganem and Cunningham (2019), *The continuous Bernoulli: fixing a pervasive error in variational
        autoencoders*, NeurIPS.
    """

    def pixel_distribution(self, *features: Tensor) -> dist.TorchDistribution:
        """The continuous Bernoulli distribution whose logits are the features."""
        (logits,) = features
        return GreyPixel(logits=logits)

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless x is in [0, 1]."""
        fix = "Rescale it (x / 255 for bytes), or use a Gaussian likelihood."
        self._refuse_unless((x >= 0) & (x <= 1), x, "in [0, 1]", fix)


class GreyPixel(dist.ContinuousBernoulli):
    """The continuous Bernoulli distribution, precise at any logit l.

    PyTorch's class computes with clamped probabilities. In float32, above |l| = 16, its density does not
    integrate to 1, and the normalising constant has no gradient. Near l = 0 its mean and variance are differences of
    large numbers.
    """

    def _near_zero(self) -> tuple[Tensor, Tensor]:
        """Where the series apply, and the logits with 1 in place of these, where the formulas' gradient is NaN."""
        near = self.logits.abs() < 0.3
        return near, torch.where(near, 1.0, self.logits)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density, of shape `batch`: log(a / (1 - e^-a)) - a y, where a = |l|.

        y is the distance from the likelier end: 1 - x if l is positive, else x. Near l = 0, where a has no derivative,
        it is a series in l.
        """
        if self._validate_args:
            self._validate_sample(value)
        (near, far), square = self._near_zero(), self.logits.square()
        series = self.logits * (value - 0.5) - square * (1 / 24 - square * (1 / 2880 - square / 181440))
        size = far.abs()
        norm = (size / -torch.expm1(-size)).log()
        return torch.where(near, series, norm - size * torch.where(far > 0, 1 - value, value))

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
        falling = -self.logits.abs().clamp(min=1e-6)  # a density that rises is the mirror image of one that falls
        value = torch.where(self.logits > 0, 1 - value, value)
        quantile = (torch.log1p(value * torch.expm1(falling)) / falling).clamp(0, 1)
        return torch.where(self.logits > 0, 1 - quantile, quantile)
