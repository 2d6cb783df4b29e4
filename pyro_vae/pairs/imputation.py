"""Imputation: the posterior mean of missing elements, by self-normalised importance sampling."""

from typing import Any

import torch
from torch import Tensor

from pyro_vae.errors import PyroVAEError
from pyro_vae.likelihoods import Likelihood

SAMPLES_AT_ONCE = 4096  # data times samples per call of the decoder, which bounds the memory


def impute(
    prior: Any, likelihood: Likelihood, q: Any, x: Tensor, mask: Tensor, num_samples: int, *given: Tensor
) -> Tensor:
    """Replace missing elements as :meth:`pyro_vae.VAE.impute` says, given q, the guide's distribution of z."""
    at_once = max(1, SAMPLES_AT_ONCE // max(1, len(x)))
    highest = x.new_full((len(x),), -torch.inf)
    total, statistic = torch.zeros_like(highest), x.new_zeros(())
    for start in range(0, num_samples, at_once):
        z = q.sample((min(at_once, num_samples - start),))
        decoded = likelihood(z, *given, mask=mask)
        log_w = prior.log_prob(z) + decoded.log_prob(x) - q.log_prob(z)
        # The sums are relative to the highest log-weight so far, which is minus infinity while all weights are zero.
        before, highest = highest, torch.maximum(highest, log_w.amax(0))
        shift = highest.nan_to_num(neginf=0.0)
        kept, weights = (before - shift).exp(), (log_w - shift).exp()
        drawn = likelihood.statistic(decoded, x)
        by_datum = (-1, *[1] * (drawn.dim() - 2))
        total = total * kept + weights.sum(0)
        statistic = statistic * kept.reshape(by_datum) + (drawn * weights.reshape(len(z), *by_datum)).sum(0)
    if bool((total == 0).any()):
        raise PyroVAEError(
            f"expected importance weights above zero for each datum, got {num_samples} weights of zero for "
            f"{int((total == 0).sum())} data. Increase num_samples, or train the guide for longer."
        )
    return torch.where(mask, x, likelihood.from_statistic(statistic / total.reshape(by_datum)))
