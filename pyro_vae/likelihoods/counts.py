"""Likelihoods of counts 0, 1, 2, ..., such as photons, reads or clicks."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from pyro_vae.likelihoods.base import Likelihood


class _Counts(Likelihood):
    def check(self, x: Tensor) -> None:
        """Refuse x that is no count."""
        fix = "Pass the counts themselves, neither normalised nor their logarithms, or use a Gaussian likelihood."
        self._refuse_unless((x >= 0) & (x % 1 == 0) & x.isfinite(), x, "of counts 0, 1, 2, ...", fix)


class Poisson(_Counts):
    r"""Counts whose variance is their mean.

    .. math:: \log p(x \mid z) = \sum_d x_d \log \lambda_d(z) - \lambda_d(z) - \log x_d!

    Arguments:
        decoder: a network from (N, Z) to one log rate for each element of an event, which is held between -30 and 30.
        event_shape: the shape of one datum.

    Raises:
        ValueError: when a model meets x other than 0, 1, 2, ...

    Example:
        >>> import torch
        >>> from pyro_vae.networks import mlp
        >>> Poisson(mlp(2, [8], 4), (4,)).decode(torch.zeros(5, 2)).shape
        torch.Size([5, 4])

    References:
        Grønbech et al. (2020), *scVAE: variational auto-encoders for single-cell gene expression data*, Bioinformatics.
    """

    def pixel_distribution(self, *features: Tensor) -> dist.TorchDistribution:
        """Poisson with the features as log rates."""
        (log_rate,) = features
        # a rate that underflows to 0, or overflows, leaves no gradient to come back by; nor would a clamp
        return dist.Poisson((log_rate + (log_rate.clamp(-30, 30) - log_rate).detach()).exp())


class NegativeBinomial(_Counts):
    r"""Counts that vary more than their mean: a Poisson whose rate is gamma-distributed.

    .. math:: p(x_d \mid z) = \frac{\Gamma(x_d + r_d)}{x_d!\, \Gamma(r_d)}
        \left(\frac{r_d}{r_d + \mu_d(z)}\right)^{r_d} \left(\frac{\mu_d(z)}{r_d + \mu_d(z)}\right)^{x_d}

    Its mean is :math:`\mu_d`, its variance :math:`\mu_d + \mu_d^2 / r_d`. The dispersion r is a parameter for each element,
    shared by all data, between 0 and 1000, at first 1; towards 1000 it is a Poisson.

    Arguments:
        decoder: a network from (N, Z) to one log mean for each element of an event.
        event_shape: the shape of one datum.

    Raises:
        ValueError: when a model meets x other than 0, 1, 2, ...

    Example:
        >>> import torch
        >>> from pyro_vae.networks import mlp
        >>> NegativeBinomial(mlp(2, [8], 4), (4,)).total_count
        tensor([1., 1., 1., 1.], grad_fn=<ExpBackward0>)

    References:
        Lopez, Regier, Cole, Jordan and Yosef (2018), *Deep generative modeling for single-cell transcriptomics*,
        Nature Methods.
    """

    def __init__(self, decoder: nn.Module, event_shape: tuple[int, ...]) -> None:
        super().__init__(decoder, event_shape)
        self.raw_total_count = nn.Parameter(torch.full(self.event_shape, 1 / MOST).logit())

    @property
    def total_count(self) -> Tensor:
        """The dispersion r, shape `event_shape`."""
        return self._log_total_count().exp()

    def pixel_distribution(self, *features: Tensor) -> dist.TorchDistribution:
        """Negative binomial with the features as log means."""
        (log_mean,) = features
        log_r = self._log_total_count()
        return dist.NegativeBinomial(log_r.exp(), logits=log_mean - log_r)

    def _log_total_count(self) -> Tensor:
        return math.log(MOST) + logsigmoid(self.raw_total_count)


#: The greatest dispersion; beyond it, float32 loses the difference of two lgammas, and a Poisson is what is meant.
MOST = 1000.0
