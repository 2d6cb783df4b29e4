"""The thermodynamic variational objective."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, Unpack

import torch
from torch import Tensor

from pyro_vae.checks import Count, checked
from pyro_vae.errors import PyroVAEError
from pyro_vae.objectives.base import Gradient, Objective, Options
from pyro_vae.objectives.densities import of_log_weights
from pyro_vae.objectives.gradients import Estimator


class TVO(Objective):
    r"""The thermodynamic variational objective: a left Riemann sum of the integral from ELBO to log p(x).

    .. math:: \log p(x) = \int_0^1 \mathbb E_{\pi_\beta} \log w \, d\beta
        \ge \sum_{t=0}^{T-1} (\beta_{t+1} - \beta_t)\, \mathbb E_{\pi_{\beta_t}} \log w, \qquad
        \pi_\beta \propto q^{1 - \beta}\, p(x, z)^\beta

    with each expectation estimated from the same K samples of q, weighted by :math:`w^\beta` and normalised. It is
    a lower bound on log p(x), between the ELBO and IWAE of the same particles at any K; T = 1 is the ELBO.

    The gradients of every objective are unbiased, except STL, for the mean at this K. ``"covariance"`` is the paper's:

    .. math:: \nabla \mathbb E_{\pi_\beta} \log w = \mathbb E_{\pi_\beta} \nabla \log w
        + \mathrm{Cov}_{\pi_\beta}(\nabla \log \tilde\pi_\beta, \log w)

    with normalised weights. It serves any guide, also a discrete one, and its bias is of order 1/K.

    Arguments:
        partitions: T, the number of intervals, or the points :math:`\beta_0 = 0 < \beta_1 < \dots < \beta_T = 1`.
            T intervals are [0, 0.025], and T - 1 from there to 1 of equal length in log beta.
        gradient: one of :class:`Objective`'s, or ``"covariance"``.
        num_particles, options: as in :class:`Objective`.

    Raises:
        ValueError: the points don't rise from 0 to 1; when it runs, see :class:`pyro_vae.IWAE`.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.mlp_vae((3,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
        >>> pv.TVO(16, partitions=5).differentiable_loss(vae, torch.randn(5, 3)).backward()

    References:
        Masrani, Le and Wood (2019), *The Thermodynamic Variational Objective*, NeurIPS.
    """

    family = "TVO"

    @checked
    def __init__(
        self,
        num_particles: Count,
        partitions: int | Sequence[float] = 5,
        gradient: Gradient | Literal["covariance"] = "pathwise",
        **options: Unpack[Options],
    ) -> None:
        given = tuple(map(float, partitions)) if hasattr(partitions, "__iter__") else ()
        points = _log_uniform(partitions) if isinstance(partitions, int) else given
        rising = all(low < high for low, high in pairwise(points))
        if len(points) < 2 or (points[0], points[-1]) != (0.0, 1.0) or not rising:
            raise PyroVAEError(
                "expected partitions to be a positive number of intervals, or points that rise from 0 to 1, such as "
                f"[0, 0.1, 1], got {partitions!r}."
            )
        self.partitions = points
        super().__init__(num_particles, gradient, **options)

    def _settings(self) -> list[str]:
        return [f"T = {len(self.partitions) - 1}"]

    @of_log_weights
    def reduce(self, log_weights: Tensor) -> Tensor:
        """The sum over intervals of width times mean log-weight; the mean is weighted by powers of the weights."""
        weights = self._weights(log_weights)
        # A weight of zero makes the plain mean minus infinity. In the other means, w log w is 0 there.
        return (weights * torch.where(weights > 0, log_weights, 0.0)).sum((0, 1))

    def _weights(self, log_weights: Tensor) -> Tensor:
        """Each interval's width times its normalised weights, (T, K, N)."""
        points = log_weights.new_tensor(self.partitions).reshape(-1, *(1 for _ in log_weights.shape))
        some = (log_weights > -torch.inf).any(0)  # else all weights are zero, and no mean but the plain one exists
        powers = [torch.zeros_like(log_weights[None]), points[1:-1] * torch.where(some, log_weights, 0.0)]
        return points.diff(dim=0) * torch.cat(powers).softmax(1)

    def covariance(self, log_weights: Tensor, c: Tensor) -> Tensor:
        """The factor (K, N) on the score: each log-weight minus its mean under each interval's weights, minus c."""
        weights = self._weights(log_weights)
        means = (weights * log_weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
        return (weights * (log_weights - means)).sum(0) - c

    gradients = Objective.gradients | {"covariance": Estimator(", covariance", "none", signal=covariance)}


def _log_uniform(intervals: int) -> tuple[float, ...]:
    """0, then points from 0.025 to 1 at equal distances of their logarithms."""
    return (0.0, *(0.025 ** (1 - i / (intervals - 1)) for i in range(intervals - 1)), 1.0) if intervals > 0 else ()
