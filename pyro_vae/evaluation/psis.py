"""Pareto k-hat, by ArviZ: whether importance weights have tails that an average survives."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyro_vae.errors import PyroVAEError

HIGH = 0.7  # above it, the error of an average of the weights can't be relied on, whatever their number
FEWEST = 25  # samples, a fifth of which are the tail: ArviZ fits no fewer than 5


def pareto_k(log_weights: Tensor) -> Tensor:
    r"""The shape k of a generalised Pareto distribution fitted to each datum's largest importance weights.

    Weights have about 1/k finite moments. Below 0.5 their variance is finite, and standard errors mean what they say; up to
    0.7 averages still converge at a practical rate; above, neither the average nor its error can be trusted.

    Arguments:
        log_weights: (K, N).

    Returns:
        (N,); NaN where none can be computed: fewer than 25 samples, a tail of equal weights, or NaN or only zeros.

    Raises:
        ValueError: `log_weights` are no matrix.

    Example:
        >>> import torch, pyro, pyro_vae as pv
        >>> pyro.set_rng_seed(0)
        >>> exponential = -torch.log(1 - torch.rand(10_000, 1))
        >>> shape = pv.pareto_k(0.8 * exponential)  # weights e^(0.8 E) have the Pareto tail 0.8
        >>> bool(abs(shape - 0.8) < 0.3)  # three standard errors of this fit
        True

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), *Pareto Smoothed Importance Sampling*, JMLR.
    """
    if log_weights.dim() != 2:
        raise PyroVAEError(
            f"expected log_weights of shape (K, N), got {tuple(log_weights.shape)}. For one datum, pass log_weights[:, None]."
        )
    rows = log_weights.detach().double().T.cpu().numpy()
    number = rows.shape[1]
    usable = np.isfinite(rows.max(1)) & ~np.isnan(rows).any(1) & (number >= FEWEST)
    if usable.any():
        tail = int(min(number / 5, 3 * number**0.5))  # as ArviZ cuts it
        usable &= np.partition(rows, number - tail, axis=1)[:, number - tail] < rows.max(1)
    shapes = np.full(len(rows), np.nan)
    if usable.any():
        # The fit sees the largest 3 sqrt(K) weights alone. Of a sample five times that, with the efficiency that makes up for
        # it, ArviZ cuts the same tail, and need not sort the rest.
        kept = min(number, int(15 * number**0.5) + 5)
        largest = np.partition(rows[usable], number - kept, axis=1)[:, number - kept :]
        shapes[usable] = _arviz_shapes(largest, kept / number)
    shapes[~np.isfinite(shapes)] = np.nan
    return torch.from_numpy(shapes).to(log_weights.device)


def _arviz_shapes(rows: np.ndarray, efficiency: float) -> np.ndarray:
    with np.errstate(all="ignore"):  # a tail that can't be fitted comes back as NaN or infinity
        try:
            from arviz_stats.base import array_stats  # ArviZ 1.x, which takes log-ratios with the sign turned
        except ImportError:
            from arviz import psislw

            return np.asarray(psislw(rows, reff=efficiency)[1])
        return np.asarray(array_stats.psislw(-rows, r_eff=efficiency, axis=-1)[1])
