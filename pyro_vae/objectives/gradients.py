r"""Derivatives of a reduction of log-weights, and learning signals: functions of matrices (K, N), which know no Pyro.

A bound is a function R of a datum's K log-weights. Every estimator of its gradient has the form

.. math:: \sum_k \; a_k \nabla_\theta \log p(x, z_k)
    + b_k \, \nabla_\phi \log q(z_k \mid x) \big|_{z_k}
    + c_k \, \frac{\partial \log w_k}{\partial z_k} \nabla_\phi z_k

with factors on the model's density, on the guide's density at a fixed sample (the score), and on the path through the
sample. With :math:`g_k = \partial R / \partial \log w_k` and :math:`h_k = \partial^2 R / \partial (\log w_k)^2`:

==============  =====  ===========================  =================
gradient        a      b                            c
==============  =====  ===========================  =================
``pathwise``    g      -g                           g
``stl``         g      0                            g
``dreg``        g      0                            g - h
``score``       g      -g + R(log w) - R(with the   0
                       k-th replaced by baseline)
``vimco``       g      the same, another baseline   0
==============  =====  ===========================  =================

The ``dreg`` row for any R: by reparameterisation, the mean of :math:`f(z) \nabla \log q(z)` is that of
:math:`\partial_z f \, \nabla z`; the score that pathwise keeps has f = -g, whose derivative is -h along the path. For
IWAE, g is the normalised weight and g - h its square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Reduction = Callable[[Tensor], Tensor]  # log-weights (K, N) to a value for each datum (N,)

LOWEST = -1e4  # what a weight of zero counts as in a baseline, which may be anything, but not infinite
ELEMENTS_AT_ONCE = 2**19  # of a (K, K, N) array: what a processor's cache holds


def slope(reduce: Reduction, log_weights: Tensor) -> Tensor:
    """g: the derivative of the reduction by each log-weight, (K, N)."""
    log_weights = log_weights.detach().requires_grad_()
    return torch.autograd.grad(reduce(log_weights).sum(), log_weights)[0]


def curvature(reduce: Reduction, log_weights: Tensor) -> Tensor:
    """h: the second derivative of the reduction by each log-weight, (K, N)."""
    log_weights = log_weights.detach()
    own = log_weights.clone().requires_grad_()
    parts = []
    for block in _blocks(log_weights):
        values = _each_replaced(reduce, log_weights, own, block)
        (first,) = torch.autograd.grad(values.sum(), own, create_graph=True)
        linear = not first.requires_grad
        second = torch.zeros_like(own) if linear else torch.autograd.grad(first.sum(), own)[0]
        parts.append(second[block])
    return torch.cat(parts)


def learning_signal(reduce: Reduction, log_weights: Tensor, baseline: Tensor) -> Tensor:
    """What each particle adds to the reduction over a `baseline` log-weight (K, N) in its place, (K, N).

    The baseline of particle k must not depend on its sample: then the score times this is unbiased.
    """
    log_weights = log_weights.detach()
    replaced = [_each_replaced(reduce, log_weights, baseline, block) for block in _blocks(log_weights)]
    return reduce(log_weights) - torch.cat(replaced)


def mean_of_other_data(log_weights: Tensor) -> Tensor:
    """For each datum, the mean log-weight of the others, (K, N); zero if there are none."""
    count, size = log_weights.shape
    log_weights = log_weights.nan_to_num(neginf=LOWEST)
    total = log_weights.sum(0)
    return ((total.sum() - total) / max(1, count * (size - 1))).expand(count, size)


def mean_of_other_particles(log_weights: Tensor) -> Tensor:
    """For each particle, the mean log-weight of the datum's others, (K, N)."""
    log_weights = log_weights.nan_to_num(neginf=LOWEST)
    return (log_weights.sum(0) - log_weights) / (len(log_weights) - 1)


def _each_replaced(reduce: Reduction, log_weights: Tensor, value: Tensor, block: Tensor) -> Tensor:
    """The reduction with the k-th log-weight replaced by ``value[k]``, for each k of a block: (block, N)."""
    at = torch.arange(len(log_weights), device=log_weights.device)[:, None] == block
    replaced = torch.where(at[..., None], value[block], log_weights[:, None])  # (K, block, N)
    return reduce(replaced.flatten(1)).unflatten(0, replaced.shape[1:])


def _blocks(log_weights: Tensor) -> Iterator[Tensor]:
    """Indices of particles, as many at a time as memory allows."""
    particles = torch.arange(len(log_weights), device=log_weights.device)
    return iter(particles.split(max(1, ELEMENTS_AT_ONCE // log_weights.numel())))
