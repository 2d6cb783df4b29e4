"""Diagnostics of each datum's importance weights: Pareto k-hat (by ArviZ), warnings."""

import warnings

import numpy as np
import torch
from torch import Tensor

from pyro_vae.checks import checked, shown
from pyro_vae.devices import of_float64, wide
from pyro_vae.errors import PyroVAEError

HIGH_K = 0.7  # above it, more samples do not make the average of the weights reliable
FEWEST_IN_TAIL = 6  # of five, the first quartile is the least, and ArviZ (1.3.3) fits none whose quartile is the least
FEWEST_SAMPLES = 5 * FEWEST_IN_TAIL  # of few samples, a fifth is the tail


@checked
def pareto_k(log_weights: Tensor) -> Tensor:
    r"""The shape k of a generalised Pareto distribution fitted to each datum's largest importance weights.

    The weights have about 1/k finite moments. Below 0.5 their variance is finite and standard errors are valid. Up to
    0.7 averages still converge at a practical rate. Above 0.7 neither the average nor its standard error is reliable.

    Arguments:
        log_weights: (K, N).

    Returns:
        (N,); infinity where so few weights are above zero in floating point that they have no tail; NaN where no fit is
        possible: fewer than 30 samples, a tail of equal weights, a NaN, or only weights of zero.

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
    if log_weights.dim() != 2 or log_weights.is_complex() or log_weights.is_meta or not len(log_weights):
        raise PyroVAEError(
            f"expected real log_weights of shape (K, N), got {shown(log_weights)}. For one datum, pass "
            "log_weights[:, None]."
        )
    rows = wide(log_weights.detach()).T.cpu().numpy()
    number = rows.shape[1]
    usable = np.isfinite(rows.max(1)) & ~np.isnan(rows).any(1) & (number >= FEWEST_SAMPLES)
    shapes = np.full(len(rows), np.nan)
    if usable.any():
        # The fit uses only the 3 sqrt(K) largest weights. From five times as many, with a matching relative efficiency,
        # ArviZ takes the same tail and sorts fewer weights.
        kept = min(number, int(15 * number**0.5) + 5)
        largest = np.partition(rows[usable], number - kept, axis=1)[:, number - kept :]
        shapes[usable] = _shapes(largest, tail=int(min(number / 5, 3 * number**0.5)), efficiency=kept / number)
    return torch.from_numpy(shapes).to(of_float64(log_weights.device))


def _shapes(rows: np.ndarray, tail: int, efficiency: float) -> np.ndarray:
    """The shape of each row's tail, which is of the weights above zero where these are fewer than `tail`."""
    above_zero = (rows > rows.max(1, keepdims=True) + np.log(np.finfo(float).tiny)).sum(1)
    shapes = np.full(len(rows), np.inf)
    for size in np.unique(above_zero[above_zero >= FEWEST_IN_TAIL].clip(max=tail)):
        chosen = above_zero.clip(max=tail) == size
        if size == tail:
            shapes[chosen] = _arviz_shapes(rows[chosen], size, efficiency)
        else:  # of less than 225 effective samples, ArviZ takes a fifth
            shapes[chosen] = _arviz_shapes(np.sort(rows[chosen])[:, -5 * size :], size, min(1.0, 200 / (5 * size)))
    return shapes


def _arviz_shapes(rows: np.ndarray, tail: int, efficiency: float) -> np.ndarray:
    varied = rows.max(1) > np.partition(rows, -tail, axis=1)[:, -tail]
    shapes = np.full(len(rows), np.nan)
    if not varied.any():
        return shapes  # ArviZ 1.x raises at a tail of equal weights
    with np.errstate(all="ignore"):  # a tail that can't be fitted gives NaN or infinity
        try:
            from arviz_stats.base import array_stats  # ArviZ 1.x, which takes log-ratios of the opposite sign

            fitted = array_stats.psislw(-rows[varied], r_eff=efficiency, axis=-1)[1]
        except ImportError:
            from arviz import psislw

            fitted = psislw(rows[varied], reff=efficiency)[1]
    shapes[varied] = np.where(np.isfinite(fitted), fitted, np.nan)
    return shapes


def relative_variance(log_w: Tensor) -> Tensor:
    """The variance of one weight over the squared mean, (N,), from log-weights (K, N), and two of its errors more."""
    number = len(log_w)
    w = number * log_w.softmax(0)
    second, fourth = w.square().mean(0), w.pow(4).mean(0)
    error = ((fourth / second.square() - 1).clamp(min=0) / number).sqrt()
    return (second * (1 + 2 * error) - 1).clamp(min=0)  # of equal weights, rounding may leave less


OF_LOG_P = (
    "a few weights dominate their estimate of log p(x), so that it is probably too low and its error bar too small"
)


def warn_of_high_k(shapes: Tensor, advice: str, meaning: str = OF_LOG_P) -> None:
    """Warn if some data have a k-hat above 0.7."""
    _warn(shapes > HIGH_K, f"have a Pareto k-hat above {HIGH_K}: {meaning}. {advice}")


def warn_of_zero_weights(zero_weights: Tensor, num_samples: int | Tensor, advice: str) -> None:
    """Warn if some data have no weight above zero."""
    text = "their estimate of log p(x) is minus infinity: p(x, z) is zero at all samples of the guide"
    _warn(zero_weights == num_samples, f"have only weights of zero, so that {text}. {advice}")


def _warn(affected: Tensor, what: str) -> None:
    if affected.any():
        warnings.warn(f"{wide(affected).mean():.1%} of the data {what}", stacklevel=5)  # the evaluation's caller
