"""Diagnostics of each datum's importance weights: Pareto k-hat (by ArviZ), warnings."""

import warnings

import numpy as np
import torch
from torch import Tensor

from pyro_vae.errors import PyroVAEError

HIGH_K = 0.7  # above it, more samples do not make the average of the weights reliable
FEWEST_SAMPLES = 25  # a fifth of the samples is the tail, and ArviZ fits no tail of fewer than 5


def pareto_k(log_weights: Tensor) -> Tensor:
    r"""The shape k of a generalised Pareto distribution fitted to each datum's largest importance weights.

    The weights have about 1/k finite moments. Below 0.5 their variance is finite and standard errors are valid. Up to
    0.7 averages still converge at a practical rate. Above 0.7 neither the average nor its standard error is reliable.

    Arguments:
        log_weights: (K, N).

    Returns:
        (N,); infinity where so few weights are above zero in floating point that they have no tail; NaN where no fit is
        possible: fewer than 25 samples, a tail of equal weights, a NaN, or only weights of zero.

    Raises:
        ValueError: `log_weights` is not a matrix.

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
            f"expected log_weights of shape (K, N), got {tuple(log_weights.shape)}. For one datum, pass "
            "log_weights[:, None]."
        )
    rows = log_weights.detach().double().T.cpu().numpy()
    number = rows.shape[1]
    usable = np.isfinite(rows.max(1)) & ~np.isnan(rows).any(1) & (number >= FEWEST_SAMPLES)
    if usable.any():
        tail = int(min(number / 5, 3 * number**0.5))  # ArviZ's own rule
        usable &= np.partition(rows, number - tail, axis=1)[:, number - tail] < rows.max(1)
    shapes = np.full(len(rows), np.nan)
    if usable.any():
        # The fit uses only the 3 sqrt(K) largest weights. From five times as many, with a matching relative efficiency,
        # ArviZ takes the same tail and sorts fewer weights.
        kept = min(number, int(15 * number**0.5) + 5)
        largest = np.partition(rows[usable], number - kept, axis=1)[:, number - kept :]
        found = _arviz_shapes(largest, kept / number)
        above_zero = (largest > largest.max(1, keepdims=True) + np.log(np.finfo(float).tiny)).sum(1)
        # ArviZ gives infinity too where rounding leaves few different weights, which is no tail either, but harmless.
        shapes[usable] = np.where(np.isfinite(found), found, np.where(above_zero < FEWEST_SAMPLES / 5, np.inf, np.nan))
    return torch.from_numpy(shapes).to(log_weights.device)


def _arviz_shapes(rows: np.ndarray, efficiency: float) -> np.ndarray:
    with np.errstate(all="ignore"):  # a tail that can't be fitted gives NaN or infinity
        try:
            from arviz_stats.base import array_stats  # ArviZ 1.x, which takes log-ratios of the opposite sign
        except ImportError:
            from arviz import psislw

            return np.asarray(psislw(rows, reff=efficiency)[1])
        return np.asarray(array_stats.psislw(-rows, r_eff=efficiency, axis=-1)[1])


def warn_of_high_k(shapes: Tensor, advice: str) -> None:
    """Warn if some data have a k-hat above 0.7."""
    text = (
        "a few weights dominate their estimate of log p(x), so that it is probably too low and its error bar too small"
    )
    _warn(shapes > HIGH_K, f"have a Pareto k-hat above {HIGH_K}: {text}. {advice}")


def warn_of_zero_weights(zero_weights: Tensor, num_samples: int, advice: str) -> None:
    """Warn if some data have no weight above zero."""
    text = "their estimate of log p(x) is minus infinity: p(x, z) is zero at all samples of the guide"
    _warn(zero_weights == num_samples, f"have only weights of zero, so that {text}. {advice}")


def _warn(affected: Tensor, what: str) -> None:
    if affected.any():
        warnings.warn(f"{affected.double().mean():.1%} of the data {what}", stacklevel=5)  # the evaluation's caller
