"""Normalizing flows from Pyro's transforms, for posteriors and priors: invertible maps of a latent with known Jacobians."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import partial
from typing import Any, Literal

import pyro.distributions.transforms as transforms
import torch
from pyro.nn import AutoRegressiveNN, ConditionalAutoRegressiveNN
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from pyro_vae.errors import PyroVAEError

BINS = 8  # of a spline
Kind = Literal["iaf", "spline", "coupling"]


class Flow(nn.Module):
    r"""Transforms in a row, each a bijection of :math:`\mathbb R^Z` whose parameters a network computes.

    .. math:: z = T_L \circ \dots \circ T_1(\epsilon), \qquad
        \log q(z) = \log q_0(\epsilon) - \sum_l \log \Bigl| \det \frac{\partial T_l}{\partial z_{l-1}} \Bigr|

    ``"iaf"``
        affine, autoregressive: to sample costs one pass; the density of a value that it did not sample costs Z.
    ``"spline"``
        monotonic rational splines of each dimension, autoregressive: as flexible as it gets, with the same costs; the identity
        outside of (-3, 3). Pyro's reads values, so that steps with it can't be compiled.
    ``"coupling"``
        affine, of half of the dimensions given the other half: one pass in both directions.

    Arguments:
        latent_dim: Z, at least 2.
        kind: which transform.
        length: L, how many.
        hidden_dims: the widths of each network's hidden layers, at least Z; None is one of 64, or of 2 Z if that is more.
        context_dim: how many numbers beside z the networks see; 0 is none.

    Raises:
        ValueError: none of these, or too small.

    References:
        Kingma et al. (2016), *Improved Variational Inference with Inverse Autoregressive Flow*, NeurIPS.
        Dolatabadi, Erfani and Leckie (2020), *Invertible Generative Modeling using Linear Rational Splines*, AISTATS.
        Dinh, Sohl-Dickstein and Bengio (2017), *Density Estimation using Real NVP*, ICLR.
    """

    def __init__(
        self,
        latent_dim: int,
        kind: Kind = "iaf",
        length: int = 2,
        hidden_dims: Sequence[int] | None = None,
        context_dim: int = 0,
    ) -> None:
        super().__init__()
        if kind not in _MAKERS:
            raise PyroVAEError(f"expected a flow of kind {', '.join(map(repr, _MAKERS))}, got {kind!r}.")
        hidden_dims = (max(64, 2 * latent_dim),) if hidden_dims is None else hidden_dims
        if latent_dim < 2 or not isinstance(length, int) or length < 1:
            raise PyroVAEError(
                f"expected at least 2 latent dimensions and 1 transform, got latent_dim={latent_dim} and length={length!r}. With one "
                "dimension, use DiagonalNormal."
            )
        if isinstance(hidden_dims, int) or not hidden_dims or min(hidden_dims) < latent_dim:
            raise PyroVAEError(
                f"expected hidden layers no narrower than the latent, {latent_dim}, got hidden_dims={hidden_dims!r}. Widen them."
            )
        # Every other transform goes through the dimensions the other way round.
        order = torch.arange(latent_dim)
        make = _MAKERS[kind]
        self.context_dim = context_dim
        self.steps = nn.ModuleList(
            make(order.flip(0) if i % 2 else order, context_dim, list(hidden_dims)) for i in range(length)
        )
        self.flips = kind == "coupling"

    def forward(self, context: Tensor | None = None) -> list[Any]:
        """Pyro's transforms, given a context of shape (*batch, context_dim) where there is one."""
        row: list[Any] = []
        step: Any
        for step in self.steps:
            # Each remembers the last value that it mapped, with the parameters of that time: a new one for each distribution.
            row.append(copy(step) if context is None else step.condition(context))
            if self.flips:
                row.append(Flip(cache_size=1))
        return row


class Flip(Transform):
    """The dimensions in reverse order: its own inverse, and of Jacobian 1."""

    bijective = True
    domain = codomain = constraints.real_vector

    def _call(self, x: Tensor) -> Tensor:
        return x.flip(-1)

    _inverse = _call

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Zero, of shape (*batch,)."""
        return x.new_zeros(x.shape[:-1])


class Affine(transforms.AffineAutoregressive):
    """Pyro's, whose inverse is of the values' type rather than the default one."""

    def _inverse(self, y: Tensor) -> Tensor:
        default = torch.get_default_dtype()
        torch.set_default_dtype(y.dtype)
        try:
            inverse: Tensor = super()._inverse(y)
        finally:
            torch.set_default_dtype(default)
        return inverse


class ConditionalAffine(transforms.ConditionalAffineAutoregressive):
    """Pyro's, of :class:`Affine`."""

    def condition(self, context: Tensor) -> Affine:
        """The transform at a context."""
        network = partial(self.nn, context=context)
        network.permutation = self.nn.permutation  # type: ignore[attr-defined]
        return Affine(network)


def _network(order: Any, context_dim: int, hidden_dims: list[int], numbers: list[int]) -> nn.Module:
    """An autoregressive network, of the same order in every build, as a checkpoint of functions alone has no buffers."""
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
