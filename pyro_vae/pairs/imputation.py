"""Missing elements of data, filled in by importance sampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_vae.errors import PyroVAEError
from pyro_vae.likelihoods import Likelihood

SAMPLES_AT_ONCE = 4096  # data times samples, of which the decoder's outputs are in memory


def impute(
    prior: Any, likelihood: Likelihood, q: Any, x: Tensor, mask: Tensor, num_samples: int, *given: Tensor
) -> Tensor:
    """The mean of what is missing given what is observed, as :meth:`pyro_vae.VAE.impute` says.

    Arguments:
        prior: the distribution of z.
        likelihood: gives that of x; its `statistic` is what is averaged.
        q: the guide's distribution for each datum, batch shape (N,).
        x: data (N, *event).
        mask: booleans of x's shape, True where an element is observed.
        num_samples: K, for each datum.
        given: what the likelihood is given besides.

    Returns:
        x with its missing elements filled in, (N, *event).

    Raises:
        ValueError: `num_samples` is no positive integer, or all weights of a datum are zero.
    """
    if not isinstance(num_samples, int) or num_samples < 1:
        raise PyroVAEError(f"expected num_samples to be a positive integer, got {num_samples!r}.")
    at_once = max(1, SAMPLES_AT_ONCE // max(1, len(x)))
    highest = x.new_full((len(x),), -torch.inf)
    total, statistic = torch.zeros_like(highest), x.new_zeros(())
    for start in range(0, num_samples, at_once):
        z = q.sample((min(at_once, num_samples - start),))
        decoded = likelihood(z, *given, mask=mask)
        log_w = prior.log_prob(z) + decoded.log_prob(x) - q.log_prob(z)
        # Sums of exponentials, relative to the highest so far; which is minus infinity where all weights are zero.
        before, highest = highest, torch.maximum(highest, log_w.amax(0))
        shift = highest.nan_to_num(neginf=0.0)
        kept, weights = (before - shift).exp(), (log_w - shift).exp()
        drawn = likelihood.statistic(decoded, x)
        by_datum = (-1, *[1] * (drawn.dim() - 2))
        total = total * kept + weights.sum(0)
        statistic = statistic * kept.reshape(by_datum) + (drawn * weights.reshape(len(z), *by_datum)).sum(0)
    if bool((total == 0).any()):
        raise PyroVAEError(
            f"all {num_samples} importance weights are zero at {int((total == 0).sum())} data: expected a guide whose samples "
            "explain what is observed. Take more samples, or train it on."
        )
    return torch.where(mask, x, likelihood.from_statistic(statistic / total.reshape(by_datum)))
