"""Bounds from the log of an average of importance weights: IWAE, Renyi, MIWAE, PIWAE, CIWAE, JVI."""

import math
from itertools import combinations
from typing import Unpack

import torch
from torch import Tensor

from pyro_vae.checks import Count, checked
from pyro_vae.devices import wide
from pyro_vae.errors import PyroVAEError
from pyro_vae.objectives.base import Gradient, Objective, Options
from pyro_vae.objectives.densities import of_log_weights


def log_mean_exp(log_weights: Tensor, dim: int = 0) -> Tensor:
    """The log of the mean of the weights."""
    return log_weights.logsumexp(dim) - math.log(log_weights.shape[dim])


def log_mean_exp_curvature(log_weights: Tensor, dim: int = 0) -> Tensor:
    """The second derivative of :func:`log_mean_exp` by each log-weight."""
    weights = log_weights.softmax(dim)
    return weights * (1 - weights)


class IWAE(Objective):
    r"""The importance-weighted bound.

    .. math:: \log p(x) \ge \mathbb{E} \log \frac1K \sum_{k=1}^K w_k, \qquad
        w_k = \frac{p(x, z_k)}{q(z_k \mid x)}, \quad z_k \sim q(z \mid x)

    A lower bound on log p(x): K = 1 is the ELBO, and it rises with K towards log p(x).

    Gradients: all except STL are unbiased. The signal-to-noise ratio of the guide's pathwise gradient falls as
    :math:`1 / \sqrt K` for large K (Rainforth et al. 2018). With ``"dreg"``, which weighs the path by the squares of
    the normalised weights, it rises as :math:`\sqrt K` (Tucker et al. 2019). STL at K > 1 has the bias
    :math:`\mathbb E \sum_k \tilde w_k \nabla \log q(z_k|x)`, and is zero at the exact posterior.

    Arguments:
        num_particles: K, the number of samples drawn from the guide for each datum; others as in :class:`Objective`.

    Raises:
        ValueError: when it runs: the program has no log-weight per datum; see :func:`pyro_vae.log_weights`.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.mlp_vae((3,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
        >>> pv.IWAE(64, gradient="dreg").differentiable_loss(vae, torch.randn(5, 3)).backward()

    References:
        Burda, Grosse and Salakhutdinov (2016), *Importance Weighted Autoencoders*, ICLR.
        Rainforth et al. (2018), *Tighter Variational Bounds are Not Necessarily Better*, ICML.
    """

    family = "IWAE"

    @of_log_weights
    def reduce(self, log_weights: Tensor) -> Tensor:
        """The log of the mean of the weights over particles."""
        return log_mean_exp(log_weights)

    @of_log_weights
    def curvature(self, log_weights: Tensor) -> Tensor:
        """w (1 - w), of the normalised weights w."""
        return log_mean_exp_curvature(log_weights)


class Renyi(Objective):
    r"""The variational Renyi bound, also known as VR and VR-IWAE.

    .. math:: \mathcal L_\alpha = \mathbb E \frac{1}{1 - \alpha} \log \frac1K \sum_{k=1}^K w_k^{1 - \alpha}, \qquad
        \alpha \ne 1

    It falls in alpha: alpha = 0 is IWAE, and the limit at alpha = 1 is the ELBO. For :math:`\alpha \ge 0` it is a lower
    bound on log p(x) at any K. As K grows it tends to log p(x) minus a Renyi divergence of q from the posterior. With
    :math:`\alpha < 0` that limit is **above** log p(x), and at finite K it may lie on either side.

    Gradients: all except STL are unbiased for the mean at this K; ``"dreg"`` weighs the path by
    :math:`\alpha v_k + (1 - \alpha) v_k^2`, with :math:`v_k \propto w_k^{1 - \alpha}` (Daudel et al. 2023).

    Arguments:
        alpha: the order, any finite number but 1.
        num_particles, gradient, options: as in :class:`Objective`.

    Raises:
        ValueError: alpha is 1 or not finite; when it runs, as :class:`IWAE`.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.mlp_vae((3,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
        >>> pv.Renyi(0.5, 16).differentiable_loss(vae, torch.randn(5, 3)).backward()

    References:
        Li and Turner (2016), *Renyi Divergence Variational Inference*, NeurIPS.
        Daudel, Benton, Shi and Doucet (2023), *Alpha-divergence Variational Inference Meets Importance Weighted
        Auto-Encoders*, JMLR.
    """

    family = "Renyi"

    @checked
    def __init__(
        self, alpha: float, num_particles: Count, gradient: Gradient = "pathwise", **options: Unpack[Options]
    ) -> None:
        if alpha == 1 or not math.isfinite(alpha):
            raise PyroVAEError(
                f"expected alpha to be a finite number other than 1, got {alpha!r}. Alpha = 1 is pv.ELBO."
            )
        self.alpha = alpha
        super().__init__(num_particles, gradient, **options)

    @property
    def is_bound(self) -> bool:
        """Whether alpha is at least 0."""
        return self.alpha >= 0

    def _settings(self) -> list[str]:
        return [f"alpha {self.alpha:g}"]

    @of_log_weights
    def reduce(self, log_weights: Tensor) -> Tensor:
        """The log of the weights' power mean with exponent 1 - alpha."""
        return log_mean_exp((1 - self.alpha) * log_weights) / (1 - self.alpha)

    @of_log_weights
    def curvature(self, log_weights: Tensor) -> Tensor:
        """(1 - alpha) v (1 - v), of the normalised powers v."""
        return (1 - self.alpha) * log_mean_exp_curvature((1 - self.alpha) * log_weights)


class MIWAE(Objective):
    r"""The mean of M importance-weighted bounds of K particles each.

    .. math:: \log p(x) \ge \mathbb{E} \frac1M \sum_{m=1}^M \log \frac1K \sum_{k=1}^K w_{mk}

    Its mean is that of :class:`IWAE` with K particles, from M K samples. MIWAE(1, K) is IWAE(K), and MIWAE(M, 1) is the
    ELBO with M particles. The signal-to-noise ratio of the guide's pathwise gradient grows as :math:`\sqrt{M / K}`. All
    gradients except STL are unbiased.

    Arguments:
        num_outer: M, the number of bounds that are averaged.
        num_particles: K, the number of samples in each.
        gradient, options: as in :class:`Objective`.

    Raises:
        ValueError: `num_outer` is not a positive integer; when it runs, as :class:`IWAE`.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.mlp_vae((3,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
        >>> pv.MIWAE(8, 8).differentiable_loss(vae, torch.randn(5, 3)).backward()

    References:
        Rainforth et al. (2018), *Tighter Variational Bounds are Not Necessarily Better*, ICML.
    """

    family = "MIWAE"

    @checked
    def __init__(
        self, num_outer: Count, num_particles: Count, gradient: Gradient = "pathwise", **options: Unpack[Options]
    ) -> None:
        self.num_outer = num_outer
        super().__init__(num_particles, gradient, **options)

    @property
    def num_samples(self) -> int:
        """M K."""
        return self.num_outer * self.num_particles

    def _settings(self) -> list[str]:
        return [f"{self.num_outer} outer"]

    @of_log_weights
    def reduce(self, log_weights: Tensor) -> Tensor:
        """The mean over groups of K of the log-mean-weight of each."""
        return log_mean_exp(self._groups(log_weights), 1).mean(0)

    @of_log_weights
    def curvature(self, log_weights: Tensor) -> Tensor:
        """The curvature of each group's bound, over M."""
        return (log_mean_exp_curvature(self._groups(log_weights), 1) / self.num_outer).flatten(0, 1)

    def _groups(self, log_weights: Tensor) -> Tensor:
        if len(log_weights) != self.num_samples:
            raise PyroVAEError(
                f"expected log_weights with a row for each of {self.num_outer} x {self.num_particles} particles, got "
                f"{len(log_weights)} rows. Draw as many."
            )
        return log_weights.unflatten(0, (self.num_outer, self.num_particles))


class PIWAE(MIWAE):
    r"""Partially importance weighted: IWAE with all M K particles for the model, MIWAE for the guide.

    .. math:: \theta:\ \nabla_\theta \log \frac{1}{MK} \sum_{m,k} w_{mk}, \qquad
        \phi:\ \nabla_\phi \frac1M \sum_m \log \frac1K \sum_k w_{mk}

    The model follows the tightest bound, and the guide a bound with a stronger signal. :meth:`bound` is the model's,
    IWAE with M K particles. Each of the two gradients is unbiased for its own bound, except with STL. Together they are
    not the gradient of any function. Arguments, exceptions and the paper are those of :class:`MIWAE`.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.mlp_vae((3,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
        >>> pv.PIWAE(8, 8).differentiable_loss(vae, torch.randn(5, 3)).backward()
    """

    family = "PIWAE"

    @of_log_weights
    def reduce(self, log_weights: Tensor) -> Tensor:
        """The log of the mean of all weights."""
        return log_mean_exp(log_weights)

    reduce_for_guide = MIWAE.reduce
    curvature = MIWAE.curvature


class CIWAE(Objective):
    r"""A convex combination of the ELBO and the importance-weighted bound.

    .. math:: \log p(x) \ge \beta\, \mathbb E \frac1K \sum_k \log w_k
        + (1 - \beta)\, \mathbb E \log \frac1K \sum_k w_k, \qquad 0 \le \beta \le 1

    A lower bound on log p(x): beta = 0 is IWAE, beta = 1 the ELBO, both with K particles. All gradients except
    STL are unbiased.

    Arguments:
        beta: the share of the ELBO, from 0 to 1.
        num_particles, gradient, options: as in :class:`Objective`.

    Raises:
        ValueError: beta is outside; when it runs, as :class:`IWAE`.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.mlp_vae((3,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
        >>> pv.CIWAE(0.5, 16).differentiable_loss(vae, torch.randn(5, 3)).backward()

    References:
        Rainforth et al. (2018), *Tighter Variational Bounds are Not Necessarily Better*, ICML.
    """

    family = "CIWAE"

    @checked
    def __init__(
        self, beta: float, num_particles: Count, gradient: Gradient = "pathwise", **options: Unpack[Options]
    ) -> None:
        if not 0 <= beta <= 1:
            raise PyroVAEError(f"expected beta to be a number from 0 (IWAE) to 1 (ELBO), got {beta!r}.")
        self.beta = beta
        super().__init__(num_particles, gradient, **options)

    def _settings(self) -> list[str]:
        return [f"beta {self.beta:g}"]

    @of_log_weights
    def reduce(self, log_weights: Tensor) -> Tensor:
        """The mean of the log-weights and the log of the mean weight, combined."""
        elbo, iwae = log_weights.mean(0), log_mean_exp(log_weights)
        if self.beta in (0, 1):  # 0 times the logarithm of a weight of zero would be NaN
            return elbo if self.beta else iwae
        return self.beta * elbo + (1 - self.beta) * iwae

    @of_log_weights
    def curvature(self, log_weights: Tensor) -> Tensor:
        """The share of the importance-weighted bound; the ELBO has no curvature."""
        return (1 - self.beta) * log_mean_exp_curvature(log_weights)


class JVI(Objective):
    r"""The jackknife estimate of log p(x): bounds of fewer particles take the bias out of one with K.

    .. math:: \mathcal J_{K,m} = \sum_{j=0}^m c_j\, \bar{\mathcal L}_{K-j}, \qquad
        c_j = (-1)^j \frac{(K - j)^m}{(m - j)!\, j!}

    where :math:`\bar{\mathcal L}_{K-j}` is the mean of the importance-weighted bound over all choices of K - j of the
    K particles. Its bias is of order :math:`K^{-(m+1)}`; order 0 is IWAE, with a bias of order 1/K. It is **not a
    bound**: at finite K its mean may lie on either side of log p(x). All gradients but STL are unbiased for that mean.

    Use it for evaluation, or train with care: it has no upper bound, so a guide can raise it by spreading the weights
    without raising log p(x), and training can diverge.

    Arguments:
        order: m, less than K. The number of subsets, K choose m, is limited.
        num_particles, gradient, options: as in :class:`Objective`.

    Raises:
        ValueError: `order` is negative or not below K, or there are more than 10,000 subsets of a size; when it runs,
            as :class:`IWAE`.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.mlp_vae((3,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
        >>> pv.JVI(16, order=1).differentiable_loss(vae, torch.randn(5, 3)).backward()

    References:
        Nowozin (2018), *Debiasing Evidence Approximations: On Importance-weighted Autoencoders and Jackknife
        Variational Inference*, ICLR.
    """

    family = "JVI"

    @checked
    def __init__(
        self, num_particles: Count, order: int = 1, gradient: Gradient = "pathwise", **options: Unpack[Options]
    ) -> None:
        self.order = order
        super().__init__(num_particles, gradient, **options)
        valid = isinstance(order, int) and 0 <= order < num_particles
        if not valid or max(math.comb(num_particles, j) for j in range(order + 1)) > 10_000:
            raise PyroVAEError(
                f"expected order to be an integer from 0 to num_particles - 1 with at most 10,000 subsets of K - order "
                f"particles, got {order!r} and {num_particles} particles. Take a lower order or fewer particles."
            )

    @property
    def is_bound(self) -> bool:
        """Whether the order is 0, which is IWAE."""
        return self.order == 0

    def _settings(self) -> list[str]:
        return [f"order {self.order}"]

    @of_log_weights
    def reduce(self, log_weights: Tensor) -> Tensor:
        """The jackknife's combination of bounds over subsets."""
        if len(log_weights) <= self.order:
            raise PyroVAEError(
                f"expected log_weights with more than {self.order} rows, the order, got {len(log_weights)}."
            )
        total, count, order = torch.zeros((), dtype=torch.float64), self.num_particles, self.order
        whole = wide(log_weights)  # the factors alternate and are large: float32 loses all digits
        for left_out in range(order + 1):
            factor = (-1) ** left_out * (count - left_out) ** order
            factor /= math.factorial(order - left_out) * math.factorial(left_out)
            subsets = torch.tensor(list(combinations(range(count), count - left_out)), device=whole.device)
            total = total + factor * log_mean_exp(whole[subsets], 1).mean(0)
        return total.to(log_weights)
