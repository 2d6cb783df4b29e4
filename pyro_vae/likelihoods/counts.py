"""Likelihoods of counts 0, 1, 2, ...: Poisson and negative binomial."""

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from pyro_vae.checks import Count
from pyro_vae.devices import wide
from pyro_vae.likelihoods.base import Likelihood


class _Counts(Likelihood):
    def check(self, x: Tensor) -> None:
        """Raise ValueError unless x is counts 0, 1, 2, ..."""
        fix = "Pass the counts, neither normalised nor their logarithms, or use a Gaussian likelihood."
        self._refuse_unless((x >= 0) & (x % 1 == 0) & x.isfinite(), x, "of counts 0, 1, 2, ...", fix)
        if not x.is_floating_point():  # which has all the integers that it can hold
            return
        most = int(2 / torch.finfo(x.dtype).eps)
        fix = (
            f"Above {most}, {x.dtype} does not have all integers. Use float64, or a Gaussian likelihood of log counts."
        )
        self._refuse_unless(x <= most, x, f"of counts up to {most}", fix)


class Poisson(_Counts):
    r"""A Poisson likelihood of counts, whose variance equals the mean.

    .. math:: \log p(x \mid z) = \sum_d x_d \log \lambda_d(z) - \lambda_d(z) - \log x_d!

    Arguments:
        decoder, event_shape: as in :class:`Likelihood`, with one log rate for each element, clamped to [-30, 30].

    Example:
        >>> import torch, pyro_vae as pv
        >>> pv.Poisson(torch.nn.Linear(2, 4), (4,)).decode(torch.zeros(5, 2)).shape
        torch.Size([5, 4])

    References:
        Grønbech et al. (2020), *scVAE: variational auto-encoders for single-cell gene expression data*, Bioinformatics.
    """

    def pixel_distribution(self, *features: Tensor) -> dist.TorchDistribution:
        """The Poisson distribution whose log rates are the features."""
        (log_rate,) = features
        # A rate of 0 or infinity has no gradient. The sum clamps the value and keeps the gradient of the log rate.
        return WidePoisson(log_rate + (log_rate.clamp(-30, 30) - log_rate).detach())


class NegativeBinomial(_Counts):
    r"""A negative binomial likelihood of counts, whose variance exceeds the mean.

    It is a Poisson distribution with a gamma-distributed rate.

    .. math:: p(x_d \mid z) = \frac{\Gamma(x_d + r_d)}{x_d!\, \Gamma(r_d)}
        \left(\frac{r_d}{r_d + \mu_d(z)}\right)^{r_d} \left(\frac{\mu_d(z)}{r_d + \mu_d(z)}\right)^{x_d}

    The mean is :math:`\mu_d` and the variance is :math:`\mu_d + \mu_d^2 / r_d`. The dispersion r is a parameter for
    each element, shared by all data, between 0 and 1000 with initial value 1. Near 1000 the distribution is close to a
    Poisson.

    Arguments:
        decoder, event_shape: as in :class:`Likelihood`, with one log mean for each element of a datum.

    Example:
        >>> import torch, pyro_vae as pv
        >>> pv.NegativeBinomial(torch.nn.Linear(2, 4), (4,)).total_count
        tensor([1., 1., 1., 1.], grad_fn=<ExpBackward0>)

    References:
        Lopez, Regier, Cole, Jordan and Yosef (2018), *Deep generative modeling for single-cell transcriptomics*,
        Nature Methods.
    """

    def __init__(self, decoder: nn.Module, event_shape: Sequence[Count]) -> None:
        super().__init__(decoder, event_shape)
        self.raw_total_count = nn.Parameter(torch.full(self.event_shape, 1 / MOST).logit())

    @property
    def total_count(self) -> Tensor:
        """The dispersion r, of shape `event_shape`."""
        return self._log_total_count().exp()

    def pixel_distribution(self, *features: Tensor) -> dist.TorchDistribution:
        """The negative binomial distribution whose log means are the features."""
        (log_mean,) = features
        log_r = self._log_total_count()
        return WideNegativeBinomial(log_mean, log_r)

    def _log_total_count(self) -> Tensor:
        return math.log(MOST) + logsigmoid(self.raw_total_count)


#: The greatest dispersion. Above it, a Poisson fits as well.
MOST = 1000.0


class WidePoisson(dist.Poisson):
    """A Poisson distribution of a log rate, whose terms are added in float64: at counts of 1e6 they are of 1e7 nats."""

    def __init__(self, log_rate: Tensor, validate_args: bool | None = None) -> None:
        self.log_rate = log_rate
        super().__init__(log_rate.exp(), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> dist.TorchDistribution:
        """The same distribution with another batch shape."""
        return WidePoisson(self.log_rate.expand(batch_shape), validate_args=self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-probability, of shape `batch`."""
        if self._validate_args:
            self._validate_sample(value)
        log_rate, x = wide(self.log_rate), wide(value)
        return (x * log_rate - log_rate.exp() - (x + 1).lgamma()).to(self.log_rate)


class WideNegativeBinomial(dist.NegativeBinomial):
    """A negative binomial distribution of a log mean and a log dispersion, whose terms are added in float64."""

    def __init__(self, log_mean: Tensor, log_r: Tensor, validate_args: bool | None = None) -> None:
        self.log_mean, self.log_r = log_mean, log_r
        super().__init__(log_r.exp(), logits=log_mean - log_r, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> dist.TorchDistribution:
        """The same distribution with another batch shape."""
        log_mean, log_r = (each.expand(batch_shape) for each in (self.log_mean, self.log_r))
        return WideNegativeBinomial(log_mean, log_r, self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-probability, of shape `batch`."""
        if self._validate_args:
            self._validate_sample(value)
        log_mean, log_r, x = wide(self.log_mean), wide(self.log_r), wide(value)
        r, odds = log_r.exp(), log_mean - log_r
        choices = (x + r).lgamma() - (x + 1).lgamma() - r.lgamma()
        return (choices + r * logsigmoid(-odds) + x * logsigmoid(odds)).to(self.log_mean)
