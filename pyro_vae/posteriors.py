"""Approximate posteriors q(z|x): modules that map x to a distribution of z through an encoder."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import ComposeTransform

from pyro_vae import distributions
from pyro_vae.checks import Count, Shape, Whole, checked, is_dense, refuse_invalid_parameters, shown
from pyro_vae.errors import PyroVAEError, require_count
from pyro_vae.flows import Flow, Kind
from pyro_vae.networks import apply_batched

__all__ = [
    "DiagonalNormal",
    "FlowPosterior",
    "FullNormal",
    "LowRankNormal",
    "MixturePosterior",
    "Posterior",
    "Unconditional",
]


class Posterior(nn.Module, ABC):
    """Base class of amortised posteriors: an encoder, and the distribution of z that the encoder's outputs parametrise.

    A subclass defines :meth:`features_for` and :meth:`latent_distribution`. Further arguments of its `__init__` are its
    options.

    Arguments:
        encoder: a network from (N, *event) to (N, features). Its further arguments are conditions such as labels.
        event_shape: the shape of one datum.

    Raises:
        ValueError: when it runs: the encoder has a number of outputs that is not :meth:`features_for` for any Z.
    """

    @checked
    def __init__(self, encoder: nn.Module, event_shape: Sequence[Count]) -> None:
        super().__init__()
        self.encoder = encoder
        self.event_shape = tuple(event_shape)

    @classmethod
    @abstractmethod
    def features_for(cls, latent_dim: int, **options: Any) -> int:
        """The number of encoder outputs for `latent_dim` latent dimensions. Irrelevant options are ignored."""

    @classmethod
    def build(cls, encoder: nn.Module, event_shape: tuple[int, ...], latent_dim: int, **options: Any) -> Self:
        """Build the posterior from an encoder with :meth:`features_for` outputs and from options of the class."""
        return cls(encoder, event_shape, **options)

    def forward(self, x: Tensor, *given: Tensor) -> dist.TorchDistribution:
        """The distribution of z for x of shape (*batch, *event), with batch shape `batch` and event shape (Z,)."""
        features = apply_batched(self.encoder, x, len(self.event_shape), *given)
        try:
            return self.latent_distribution(features)
        except ValueError as error:
            refuse_invalid_parameters(error)
            raise

    @abstractmethod
    def latent_distribution(self, features: Tensor) -> dist.TorchDistribution:
        """The distribution of z, given the encoder's outputs of shape (*batch, features)."""

    def embed(self, x: Tensor, *given: Tensor) -> Tensor:
        """The mean of q(z|x), of shape (*batch, Z), for x of shape (*batch, *event)."""
        return self(x, *given).mean


class DiagonalNormal(Posterior):
    """A normal with independent dimensions.

    .. math:: q(z \\mid x) = \\mathcal N\\bigl(z; \\mu(x), \\operatorname{diag} \\sigma(x)^2\\bigr)

    Arguments:
        encoder, event_shape: as in :class:`Posterior`, with 2 Z outputs: the means, then the logs of the scales.

    Example:
        >>> import torch, pyro_vae as pv
        >>> pv.DiagonalNormal(torch.nn.Linear(4, 2 * 3), (4,))(torch.zeros(5, 4)).event_shape
        torch.Size([3])

    References:
        Kingma and Welling (2014), *Auto-Encoding Variational Bayes*, ICLR.
    """

    @classmethod
    def features_for(cls, latent_dim: int, **options: Any) -> int:
        """2 Z."""
        return 2 * latent_dim

    def latent_distribution(self, features: Tensor) -> dist.TorchDistribution:
        """The normal whose means are the first half of the features, and whose log scales are the second half."""
        if features.shape[-1] % 2:
            raise _wrong_outputs("2 Z outputs (Z means, then Z log scales)", features)
        loc, log_scale = features.chunk(2, -1)
        return distributions.Normal(loc, log_scale.exp()).to_event(1)


class FullNormal(Posterior):
    r"""A normal with a full covariance matrix, parametrised by its Cholesky factor.

    .. math:: q(z \mid x) = \mathcal N\bigl(z; \mu(x), L(x) L(x)^\top\bigr), \qquad
        L = \operatorname{diag} \sigma(x) \, \bigl(I + \tfrac1Z N(x)\bigr)

    N is strictly lower triangular. The factor 1/Z keeps the initial posterior close to a diagonal normal for any Z.

    The KL to a standard normal has a closed form. The density costs O(Z^2) operations for each datum.

    Arguments:
        encoder, event_shape: as in :class:`Posterior`, with Z (Z + 3) / 2 outputs: the means, then the rows of a lower
            triangle. The triangle has the logs of sigma on its diagonal and N below the diagonal.

    Example:
        >>> import torch, pyro_vae as pv
        >>> pv.FullNormal(torch.nn.Linear(4, pv.FullNormal.features_for(3)), (4,))(torch.zeros(5, 4)).event_shape
        torch.Size([3])
    """

    @classmethod
    def features_for(cls, latent_dim: int, **options: Any) -> int:
        """Z (Z + 3) / 2."""
        return latent_dim * (latent_dim + 3) // 2

    def latent_distribution(self, features: Tensor) -> dist.TorchDistribution:
        """The normal whose means are the first Z features; the other features are the lower triangle."""
        size = features.shape[-1]
        latent_dim = (math.isqrt(9 + 8 * size) - 3) // 2
        if self.features_for(latent_dim) != size:
            raise PyroVAEError(f"expected an encoder with Z (Z + 3) / 2 outputs, got {size}. For Z = 2, use 5 outputs.")
        loc, rows = features.split([latent_dim, size - latent_dim], -1)
        below, across = torch.tril_indices(latent_dim, latent_dim, device=features.device)
        triangle = features.new_zeros(*features.shape[:-1], latent_dim, latent_dim)
        triangle[..., below, across] = rows
        scale = triangle.diagonal(dim1=-2, dim2=-1).exp()
        unit = triangle.tril(-1) / latent_dim + torch.eye(latent_dim, dtype=features.dtype, device=features.device)
        return distributions.MultivariateNormal(loc, scale_tril=scale.unsqueeze(-1) * unit)


class LowRankNormal(Posterior):
    r"""A normal whose covariance is a diagonal matrix plus a matrix of low rank.

    .. math:: q(z \mid x) = \mathcal N\bigl(z; \mu(x), \operatorname{diag} \sigma(x)^2 + F(x) F(x)^\top\bigr)

    In flexibility and cost it lies between :class:`DiagonalNormal` and :class:`FullNormal`. The KL to a standard
    normal has a closed form.

    Arguments:
        encoder, event_shape: as in :class:`Posterior`, with (2 + R) Z outputs: the means, the logs of sigma, then the
            columns of F.
        rank: R, the number of columns of F.

    Raises:
        ValueError: `rank` is not a positive integer.

    Example:
        >>> import torch, pyro_vae as pv
        >>> pv.LowRankNormal(torch.nn.Linear(4, 4 * 3), (4,), rank=2)(torch.zeros(5, 4)).event_shape
        torch.Size([3])

    References:
        Ong, Nott and Smith (2018), *Gaussian Variational Approximation with a Factor Covariance Structure*, JCGS.
    """

    @checked
    def __init__(self, encoder: nn.Module, event_shape: Sequence[Count], rank: int = 2) -> None:
        super().__init__(encoder, event_shape)
        self.features_for(1, rank=rank)
        self.rank = rank

    @classmethod
    def features_for(cls, latent_dim: int, rank: int = 2, **options: Any) -> int:
        """(2 + R) Z."""
        require_count("rank", rank, "For rank 0, use DiagonalNormal.")
        return (2 + rank) * latent_dim

    def latent_distribution(self, features: Tensor) -> dist.TorchDistribution:
        """The normal whose means, log scales and columns of F are consecutive parts of the features."""
        if features.shape[-1] % (2 + self.rank):
            parts = f"(Z means, Z log scales and {self.rank} columns of length Z)"
            raise _wrong_outputs(f"{2 + self.rank} Z outputs {parts}", features)
        loc, log_scale, *columns = features.chunk(2 + self.rank, -1)
        return distributions.LowRankMultivariateNormal(loc, torch.stack(columns, -1), (2 * log_scale).exp())


class MixturePosterior(Posterior):
    r"""A mixture of diagonal normals.

    .. math:: q(z \mid x) = \sum_{k=1}^K \pi_k(x)\, \mathcal N\bigl(z; \mu_k(x), \operatorname{diag} \sigma_k(x)^2\bigr)

    Samples are reparameterised. Their implicit pathwise derivative is unbiased in all parameters, whereas the
    derivative of Pyro's ``MixtureOfDiagNormals`` is biased in the logits. The KL has no closed form: use
    ``pv.ELBO(kl="monte_carlo")``.

    Arguments:
        encoder, event_shape: as in :class:`Posterior`, with K (2 Z + 1) outputs: the logits of the weights, then the
            means and the log scales of each component.
        components: K, the number of components.

    Raises:
        ValueError: `components` is not a positive integer.

    Example:
        >>> import torch, pyro_vae as pv
        >>> pv.MixturePosterior(torch.nn.Linear(4, 2 * 7), (4,), components=2)(torch.zeros(5, 4)).event_shape
        torch.Size([3])

    References:
        Figurnov, Mohamed and Mnih (2018), *Implicit Reparameterization Gradients*, NeurIPS.
    """

    @checked
    def __init__(self, encoder: nn.Module, event_shape: Sequence[Count], components: int = 5) -> None:
        super().__init__(encoder, event_shape)
        self.features_for(1, components=components)
        self.components = components

    @classmethod
    def features_for(cls, latent_dim: int, components: int = 5, **options: Any) -> int:
        """K (2 Z + 1)."""
        require_count("components", components)
        return components * (2 * latent_dim + 1)

    def latent_distribution(self, features: Tensor) -> dist.TorchDistribution:
        """The mixture whose logits are the first K features; the other features are the means and log scales."""
        number, size = self.components, features.shape[-1]
        latent_dim = (size // number - 1) // 2
        if self.features_for(latent_dim, components=number) != size or latent_dim < 1:
            parts = f"(a logit, Z means and Z log scales for each of {number} components)"
            raise _wrong_outputs(f"{number} (2 Z + 1) outputs {parts}", features)
        logits, rest = features.split([number, size - number], -1)
        loc, log_scale = rest.reshape(*rest.shape[:-1], number, 2 * latent_dim).chunk(2, -1)
        return distributions.NormalMixture(loc, log_scale.exp(), logits.log_softmax(-1))


class FlowPosterior(Posterior):
    r"""A diagonal normal transformed by a :class:`~pyro_vae.flows.Flow` that depends on x.

    .. math:: z = T\bigl(\mu(x) + \sigma(x) \epsilon; h(x)\bigr), \qquad \epsilon \sim \mathcal N(0, I)

    The KL has no closed form: use ``pv.ELBO(kl="monte_carlo")``.

    Arguments:
        encoder, event_shape: as in :class:`Posterior`, with 2 Z + C outputs: the means, the logs of the scales, then
            the context h(x).
        latent_dim, length, hidden_dims: as in :class:`~pyro_vae.flows.Flow`.
        flow: the `kind` of the :class:`~pyro_vae.flows.Flow`, ``"iaf"``, ``"spline"`` or ``"coupling"``.
        context_dim: C, the length of h(x); None is Z.

    Raises:
        ValueError: an invalid argument of :class:`~pyro_vae.flows.Flow`, or a negative `context_dim`.

    Example:
        >>> import torch, pyro_vae as pv
        >>> pv.FlowPosterior(torch.nn.Linear(4, 9), (4,), latent_dim=3, flow="spline")(torch.zeros(5, 4)).event_shape
        torch.Size([3])

    References:
        Rezende and Mohamed (2015), *Variational Inference with Normalizing Flows*, ICML.
    """

    @checked
    def __init__(
        self,
        encoder: nn.Module,
        event_shape: Sequence[Count],
        latent_dim: Count,
        flow: Kind = "iaf",
        length: Count = 2,
        hidden_dims: Shape | None = None,
        context_dim: Whole | None = None,
    ) -> None:
        super().__init__(encoder, event_shape)
        self.latent_dim = latent_dim
        size = self.features_for(latent_dim, context_dim) - 2 * latent_dim
        self.flow = Flow(latent_dim, flow, length, hidden_dims, size)

    @classmethod
    def features_for(cls, latent_dim: int, context_dim: int | None = None, **options: Any) -> int:
        """2 Z + C."""
        size = latent_dim if context_dim is None else context_dim
        if not isinstance(size, int) or size < 0:
            fix = "Pass 0 for a flow that does not depend on x."
            raise PyroVAEError(f"expected context_dim to be an integer of at least 0, got {size!r}. {fix}")
        return 2 * latent_dim + size

    @classmethod
    def build(cls, encoder: nn.Module, event_shape: tuple[int, ...], latent_dim: int, **options: Any) -> Self:
        """Build the posterior from an encoder with :meth:`features_for` outputs and from options of the class."""
        return cls(encoder, event_shape, latent_dim, **options)

    def latent_distribution(self, features: Tensor) -> dist.TorchDistribution:
        """The normal with the first 2 Z features as means and log scales, transformed given the other features."""
        base, context = self._base(features)
        return dist.TransformedDistribution(base, self.flow(context))

    def embed(self, x: Tensor, *given: Tensor) -> Tensor:
        """The image of the normal's mean under the flow, (*batch, Z), since the mean of q(z|x) has no closed form."""
        base, context = self._base(apply_batched(self.encoder, x, len(self.event_shape), *given))
        return ComposeTransform(self.flow(context))(base.mean)

    def _base(self, features: Tensor) -> tuple[Any, Tensor | None]:
        sizes = [self.latent_dim, self.latent_dim, self.flow.context_dim]
        if features.shape[-1] != sum(sizes):
            parts = "({} means, {} log scales and a context of length {})".format(*sizes)
            raise _wrong_outputs(f"{sum(sizes)} outputs {parts}", features)
        loc, log_scale, context = features.split(sizes, -1)
        return distributions.Normal(loc, log_scale.exp()).to_event(1), context if sizes[2] else None


def _wrong_outputs(expected: str, features: Tensor) -> PyroVAEError:
    return PyroVAEError(f"expected an encoder with {expected}, got {features.shape[-1]}. Change its last layer.")


class Unconditional(nn.Module):
    r"""A normal q(z) of Z = `latent_dim` dimensions that does not depend on x, to demonstrate posterior collapse.

    .. math:: q(z \mid x) = \mathcal N(z; \mu, \operatorname{diag} \sigma^2) \quad \text{for every } x

    The ELBO is highest where q is the prior and the decoder ignores z: the posterior collapses by construction.

    Example:
        >>> import torch
        >>> Unconditional(3, (4,))(torch.zeros(5, 4)).batch_shape
        torch.Size([5])
    """

    @checked
    def __init__(self, latent_dim: Count, event_shape: Sequence[Count]) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.loc = nn.Parameter(torch.zeros(latent_dim))
        self.log_scale = nn.Parameter(torch.zeros(latent_dim))

    def forward(self, x: Tensor) -> dist.TorchDistribution:
        """The distribution of z, the same for each x of shape (*batch, *event): batch shape `batch`, event (Z,)."""
        if not is_dense(x):
            raise PyroVAEError(f"expected x to be a dense tensor of shape (*batch, *event), got {shown(x)}.")
        batch = x.shape[: x.dim() - len(self.event_shape)]
        return distributions.Normal(self.loc, self.log_scale.exp()).expand((*batch, len(self.loc))).to_event(1)
