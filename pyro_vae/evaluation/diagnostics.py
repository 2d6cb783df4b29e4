"""Diagnostics of each datum's importance weights: Pareto k-hat, warnings."""

import math
import warnings

import numpy as np
import torch
from torch import Tensor

from pyro_vae.checks import checked, shown
from pyro_vae.devices import of_float64, wide
from pyro_vae.errors import PyroVAEError

HIGH_K = 0.7  # above it, more samples do not make the average of the weights reliable
FEWEST_IN_TAIL = 6  # of five, the first quartile is the least, which is none of a generalised Pareto distribution
FEWEST_SAMPLES = 5 * FEWEST_IN_TAIL  # of few samples, a fifth is the tail
LEAST = np.log(np.finfo(float).tiny)  # below it, relative to the largest, a weight is zero


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
        Zhang and Stephens (2009), *A New and Efficient Estimation Method for the Generalized Pareto Distribution*,
        Technometrics, for the fit.
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
        tail = math.ceil(min(number / 5, 3 * number**0.5))
        largest = np.partition(rows[usable], number - tail - 1, axis=1)[:, number - tail - 1 :]
        with np.errstate(all="ignore"):  # a tail that can't be fitted gives NaN or infinity
            shapes[usable] = [_shape(row) for row in largest]
    return torch.from_numpy(shapes).to(of_float64(log_weights.device))


def _shape(log_weights: np.ndarray) -> float:
    """The shape of the tail of a datum, from its largest weights: one more than the tail has, which it begins above.

    Where fewer are above zero, these are the tail.
    """
    ordered = np.sort(log_weights - log_weights.max())
    least = max(ordered[0], LEAST)
    tail = ordered[ordered > least]
    if ordered[1] <= LEAST and len(tail) < FEWEST_IN_TAIL:
        return math.inf
    if len(tail) < 5 or tail[0] == tail[-1]:
        return math.nan
    shape = _fitted(np.exp(tail) - np.exp(least))
    return shape if math.isfinite(shape) else math.nan


def _fitted(tail: np.ndarray) -> float:
    """The shape of a generalised Pareto distribution: Zhang and Stephens (2009), with the prior of Vehtari et al.

    The numbers are those of ``psislw`` in ArviZ 0.2x. In 1.x, the tail may have a weight fewer. `tail` is sorted, and
    above zero.
    """
    number = len(tail)
    places = 30 + int(number**0.5)
    b = 1 - np.sqrt(places / (np.arange(1, places + 1) - 0.5))
    b = b / (3 * tail[int(number / 4 + 0.5) - 1]) + 1 / tail[-1]
    k = np.log1p(-b[:, None] * tail).mean(1)
    log_likelihood = number * (np.log(-b / k) - k - 1)
    weights = 1 / np.exp(log_likelihood - log_likelihood[:, None]).sum(1)
    kept = weights >= 10 * np.finfo(float).eps
    mean = (b[kept] * weights[kept]).sum() / weights[kept].sum()
    shape = float(np.log1p(-mean * tail).mean())
    return (number * shape + 10 * 0.5) / (number + 10)  # ten samples of a tail of 0.5


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
