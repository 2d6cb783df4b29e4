"""Normalizing flows for posteriors and priors: sequences of Pyro's invertible transforms."""

from copy import copy
from functools import partial
from typing import Any, Literal

import pyro.distributions.transforms as transforms
import torch
from pyro.nn import AutoRegressiveNN, ConditionalAutoRegressiveNN
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from pyro_vae.checks import Count, Shape, Whole, checked
from pyro_vae.errors import PyroVAEError

BINS = 8  # intervals of each spline
Kind = Literal["iaf", "spline", "coupling"]


class Flow(nn.Module):
    r"""A sequence of invertible transforms of :math:`\mathbb R^Z`. A network computes the parameters of each transform.

    .. math:: z = T_L \circ \dots \circ T_1(\epsilon), \qquad
        \log q(z) = \log q_0(\epsilon) - \sum_l \log \Bigl| \det \frac{\partial T_l}{\partial z_{l-1}} \Bigr|

    ``"iaf"``
        An affine autoregressive transform. A sample costs one pass; the density of any other value costs Z passes.
    ``"spline"``
        An autoregressive transform of each dimension by a monotonic rational spline, the identity outside of (-3, 3).
        It is the most flexible kind, and costs the same as ``"iaf"``. Pyro's splines read values of tensors, so they
        can't be compiled.
    ``"coupling"``
        An affine transform of half of the dimensions given the other half. Both directions cost one pass.

    Arguments:
        latent_dim: Z, at least 2.
        kind: the kind of transform.
        length: L, the number of transforms.
        hidden_dims: the widths of each network's hidden layers, at least Z; None is one layer of width max(64, 2 Z).
        context_dim: the length of the context, a further input of the networks; 0 is no context.

    Raises:
        ValueError: an unknown kind, fewer than 2 latent dimensions, no transform, or a hidden layer narrower than Z.

    Example:
        >>> len(Flow(3, "iaf", length=2)())
        2

    References:
        Kingma et al. (2016), *Improved Variational Inference with Inverse Autoregressive Flow*, NeurIPS.
        Dolatabadi, Erfani and Leckie (2020), *Invertible Generative Modeling using Linear Rational Splines*, AISTATS.
        Dinh, Sohl-Dickstein and Bengio (2017), *Density Estimation using Real NVP*, ICLR.
    """

    @checked
    def __init__(
        self,
        latent_dim: Count,
        kind: Kind = "iaf",
        length: Count = 2,
        hidden_dims: Shape | None = None,
        context_dim: Whole = 0,
    ) -> None:
        super().__init__()
        if kind not in _MAKERS:
            raise PyroVAEError(f"expected flow to be one of {', '.join(map(repr, _MAKERS))}, got {kind!r}.")
        hidden_dims = (max(64, 2 * latent_dim),) if hidden_dims is None else hidden_dims
        if latent_dim < 2:
            raise PyroVAEError(
                f"expected at least 2 latent dimensions, got latent_dim={latent_dim}. For one, use DiagonalNormal."
            )
        if min(hidden_dims) < latent_dim:
            expected = f"hidden layers of width latent_dim={latent_dim} or more"
            raise PyroVAEError(f"expected {expected}, got hidden_dims={hidden_dims!r}. Widen them.")
        # Every second transform reverses the order of the dimensions, so that each can depend on every other.
        order = torch.arange(latent_dim)
        self.context_dim = context_dim
        self.steps = nn.ModuleList(
            _MAKERS[kind](order.flip(0) if i % 2 else order, context_dim, list(hidden_dims)) for i in range(length)
        )
        self.flips = kind == "coupling"

    def forward(self, context: Tensor | None = None) -> list[Any]:
        """The sequence of Pyro's transforms, given a context of shape (*batch, context_dim) or None."""
        sequence: list[Any] = []
        step: Any
        for step in self.steps:
            # A transform caches values computed with the parameters of that time, so each distribution gets a copy.
            sequence.append(copy(step) if context is None else step.condition(context))
            if self.flips:
                sequence.append(Flip(cache_size=1))
        return sequence


class Flip(Transform):
    """The transform that reverses the order of the dimensions. It is its own inverse and preserves volume."""

    bijective = True
    domain = codomain = constraints.real_vector

    def _call(self, x: Tensor) -> Tensor:
        return x.flip(-1)

    _inverse = _call

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Zeros of shape (*batch,)."""
        return x.new_zeros(x.shape[:-1])


class Affine(transforms.AffineAutoregressive):
    """Pyro's affine autoregressive transform, with an inverse in the dtype of its argument."""

    def _inverse(self, y: Tensor) -> Tensor:
        default = torch.get_default_dtype()  # in which Pyro allocates the inverse
        torch.set_default_dtype(y.dtype)
        try:
            return super()._inverse(y)
        finally:
            torch.set_default_dtype(default)


class ConditionalAffine(transforms.ConditionalAffineAutoregressive):
    """Pyro's conditional affine autoregressive transform, conditioned to :class:`Affine`."""

    def condition(self, context: Tensor) -> Affine:
        """The transform given a context."""
        network = partial(self.nn, context=context)
        network.permutation = self.nn.permutation  # type: ignore[attr-defined]
        return Affine(network)


def _network(order: Any, context_dim: int, hidden_dims: list[int], numbers: list[int]) -> nn.Module:
    """An autoregressive network with a fixed order of dimensions."""
    # Pyro's default order is random and lies in a buffer, and a checkpoint of plain functions holds no buffers.
    if context_dim:
        return ConditionalAutoRegressiveNN(len(order), context_dim, hidden_dims, numbers, permutation=order)
    return AutoRegressiveNN(len(order), hidden_dims, numbers, permutation=order)


def _iaf(order: Tensor, context_dim: int, hidden_dims: list[int]) -> nn.Module:
    network = _network(order, context_dim, hidden_dims, [1, 1])
    return ConditionalAffine(network) if context_dim else Affine(network)


def _spline(order: Tensor, context_dim: int, hidden_dims: list[int]) -> nn.Module:
    network = _network(order, context_dim, hidden_dims, [BINS, BINS, BINS - 1, BINS])
    make = transforms.ConditionalSplineAutoregressive if context_dim else transforms.SplineAutoregressive
    return make(len(order), network, count_bins=BINS)


def _coupling(order: Tensor, context_dim: int, hidden_dims: list[int]) -> nn.Module:
    if context_dim:
        return transforms.conditional_affine_coupling(len(order), context_dim, hidden_dims)
    return transforms.affine_coupling(len(order), hidden_dims)


_MAKERS = {"iaf": _iaf, "spline": _spline, "coupling": _coupling}
