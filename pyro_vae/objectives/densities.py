"""The log-densities that an objective reads off its runs, and how a gradient is put in place of another."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from pyro_vae.checks import is_dense, shown
from pyro_vae.engine.sites import Sites, is_factor
from pyro_vae.errors import PyroVAEError


@dataclass
class Densities:
    """The log-densities of a run, or of several runs one after another, each (K, N); None where none is needed."""

    log_p: Tensor  # log p(x, z)
    log_q: Tensor  # log q(z | x) and factors; sites with a learning signal add no gradient here, but in `score`
    stopped: Tensor | None  # the guide's densities at the same samples, through which no gradient flows
    factors: Tensor | None  # the guide's factors at these, for an estimator with a curvature
    score: Tensor | None  # the sum over sites without a path of the function whose derivative is the score
    scale: Tensor | float  # of a datum's bound, such as N / b of a subsampled plate
    # For each run: the number of its particles; its samples, and the shape in which a matrix (K, N) broadcasts to each.
    samples: list[tuple[int, list[tuple[Tensor, list[int]]]]]

    @classmethod
    def joined(cls, parts: list[Self]) -> Self:
        """The densities of all runs."""
        first, *others = parts
        if not others:
            return first
        matrices: dict[str, Any] = {
            name: torch.cat([getattr(part, name) for part in parts])
            for name in ("log_p", "log_q", "stopped", "factors", "score")
            if getattr(first, name) is not None
        }
        return replace(first, **matrices, samples=[run for part in parts for run in part.samples])


def of_log_weights(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let an objective's function of log-weights refuse what is no matrix (K, N) of real numbers."""

    @functools.wraps(function)
    def with_check(objective: Any, log_weights: Tensor) -> Tensor:
        if (
            not is_dense(log_weights)
            or not log_weights.is_floating_point()
            or log_weights.dim() not in (1, 2)
            or not log_weights.numel()
        ):
            raise PyroVAEError(
                f"expected log_weights to be a dense tensor (K, N) of floating point, got {shown(log_weights)}. Pass "
                "those of pv.log_weights."
            )
        return function(objective, log_weights)

    return with_check


def densities(guide: Sites) -> Sites:
    """The guide's sites without its factors, which are terms of the loss and no densities."""
    return {name: site for name, site in guide.items() if not is_factor(site)}


def with_gradient(value: Tensor, surrogate: Tensor) -> Tensor:
    """The value, with the derivative of the surrogate."""
    return value.detach() + surrogate - surrogate.detach()


def weighted(factor: Tensor, density: Tensor) -> Tensor:
    """The sum over particles; a particle of weight zero, and density zero, adds no derivative."""
    return torch.where(density.isfinite(), factor * density, 0.0).sum(0)
