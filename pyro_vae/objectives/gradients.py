r"""Estimators of a bound's gradient: the table of them as code. A new estimator is one row of `ESTIMATORS`.

A bound is a function R of a datum's K log-weights. Every estimator of its gradient has the form

.. math:: \sum_k \; a_k \nabla_\theta \log p(x, z_k)
    + b_k \, \nabla_\phi \log q(z_k \mid x) \big|_{z_k}
    + c_k \, \frac{\partial \log w_k}{\partial z_k} \nabla_\phi z_k

with factors on the model's density, on the guide's density at a fixed sample (the score), and on the path through the
sample. With :math:`g_k = \partial R / \partial \log w_k` and :math:`h_k = \partial^2 R / \partial (\log w_k)^2`:

==============  =====  =============================  =================
gradient        a      b                              c
==============  =====  =============================  =================
``pathwise``    g      -g                             g
``stl``         g      0                              g
``dreg``        g      0                              g - h
``score``       g      R - R' - (g - g')              0
``vimco``       g      the same, another baseline     0
``disarm``      g      (R - R'') / 2, for each        0
                       dimension's own score
==============  =====  =============================  =================

The last three rows are for sites that can't be reparameterised; beside them, other sites get the pathwise row. R' and
g' are R and g with the k-th log-weight replaced by a baseline, which does not depend on the k-th sample. So
:math:`g'_k \nabla \log q(z_k)` has mean zero, and -g + g' in place of -g leaves the mean as it is. Near the exact
posterior, where all weights are equal, it removes the noise: b is zero. Far from it, the ``score`` row with few
particles can be noisier. For the ELBO, g is constant, g - g' is zero, and ``vimco`` is REINFORCE with a leave-one-out
baseline. The baseline of ``score`` is the mean log-weight of the other data, that of ``vimco`` the mean of the datum's
other particles.

``disarm`` serves the ELBO only, and draws Bernoulli latents as antithetic pairs. R'' has the k-th log-weight replaced
by its partner's. With logits :math:`\alpha_d`, sample b and partner b', the score of dimension d is
:math:`(b_d - b'_d)\, \sigma(|\alpha_d|)\, \nabla_\phi \alpha_d`.

A ``pyro.factor`` in the guide is a term of the loss: it is subtracted from each log-weight and has no score. Its
parameters get -g, and its path c.

The ``dreg`` row holds for any R: by reparameterisation, the mean of :math:`f(z) \nabla \log q(z)` is that of
:math:`\partial_z f \, \nabla z`. The score in the pathwise gradient has f = -g, whose derivative along the path is -h.
For IWAE, g is the normalised weight and g - h its square.

References:
    Roeder, Wu and Duvenaud (2017), *Sticking the Landing*, NeurIPS.
    Tucker et al. (2019), *Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives*, ICLR.
    Mnih and Rezende (2016), *Variational Inference for Monte Carlo Objectives*, ICML.
    Williams (1992), *Simple Statistical Gradient-Following Algorithms*, Machine Learning.
    Dong, Mnih and Tucker (2020), *DisARM: An Antithetic Gradient Estimator for Binary Latent Variables*, NeurIPS.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae.engine.sites import Site
from pyro_vae.errors import PyroVAEError
from pyro_vae.objectives import antithetic

Reduction = Callable[[Tensor], Tensor]  # log-weights (K, N) to a value for each datum (N,)

LOWEST = -1e4  # stands for a weight of zero in a baseline, which may be any number but infinity
ELEMENTS_AT_ONCE = 2**19  # of a (K, K, N) array: what a processor's cache holds


@dataclass(frozen=True)
class Estimator:
    r"""A row of the table: one estimator of the gradient of any bound. An objective's `gradients` give it a name.

    Arguments:
        suffix: what it adds to the objective's name in tables and legends.
        path: through which samples gradients flow: ``"all"``, ``"none"``, or ``"some"``: those that can be
            reparameterised, if other sites can't be; else none.
        score: whether the score of reparameterised sites stays in the gradient (b = -g), or not (b = 0).
        curvature: whether c is g - h, or g.
        signal: b of the other sites: a function of the objective, its log-weights (K, N) and its factors c (K, N),
            to (K, N). None for an estimator that needs reparameterised sites.
        of_mean: whether it estimates the gradient of a mean over the guide's samples. Then it refuses a guide whose
            support depends on parameters.
        fewest: the smallest number of particles.
        even: whether the number of particles has to be even.
        sampler: makes a Pyro handler that draws the guide's samples, from the number of particles and their dimension;
            None draws them independently.
        score_term: the function of a guide site, in the shape of its log-density, whose derivative is the score that b
            multiplies; None is the log-density.
        any_bound: whether it estimates the gradient of any bound. If False, a subclass with another `reduce` does not
            inherit it. The subclass then gets the row of that name in `ESTIMATORS`, if there is one.
    """

    suffix: str
    path: Literal["all", "some", "none"] = "all"
    score: bool = True
    curvature: bool = False
    signal: Callable[[Any, Tensor, Tensor], Tensor] | None = None
    of_mean: bool = True
    fewest: int = 1
    even: bool = False
    sampler: Callable[[int, int], Messenger] | None = None
    score_term: Callable[[Site], Tensor] | None = None
    any_bound: bool = False

    def __post_init__(self) -> None:
        signals = self.signal is not None
        if signals == (self.path == "all") or (signals and (self.curvature or not self.score)):
            raise PyroVAEError(
                "expected an estimator of reparameterised sites (path='all', no signal), or one with a signal for the "
                f"others (path='some' or 'none', score=True, curvature=False), got {self}. A score that is left out, "
                "or a path with a curvature, is biased beside sites without a path."
            )


def slope(reduce: Reduction, log_weights: Tensor) -> Tensor:
    """g: the derivative of the reduction by each log-weight, (K, N)."""
    log_weights = log_weights.detach().requires_grad_()
    return torch.autograd.grad(reduce(log_weights).sum(), log_weights)[0]


def curvature(reduce: Reduction, log_weights: Tensor) -> Tensor:
    """h: the second derivative of the reduction by each log-weight, (K, N)."""
    log_weights = log_weights.detach()
    own = log_weights.clone().requires_grad_()
    parts = []
    for block, values in _each_replaced(reduce, log_weights, own):
        (first,) = torch.autograd.grad(values.sum(), own, create_graph=True)
        linear = not first.requires_grad
        second = torch.zeros_like(own) if linear else torch.autograd.grad(first.sum(), own)[0]
        parts.append(second[block])
    return torch.cat(parts)


def learning_signal(reduce: Reduction, log_weights: Tensor, baseline: Tensor) -> Tensor:
    """R - R' + g', (K, N): the k-th log-weight is replaced by a baseline that does not depend on the k-th sample."""
    log_weights, baseline = log_weights.detach(), baseline.detach().requires_grad_()
    signals = []
    for block, values in _each_replaced(reduce, log_weights, baseline):
        (slope_there,) = torch.autograd.grad(values.sum(), baseline)
        signals.append(slope_there[block] - values.detach())
    return reduce(log_weights) + torch.cat(signals)


def mean_of_other_data(log_weights: Tensor) -> Tensor:
    """For each datum, the mean log-weight of the other data, (K, N); zero for a single datum."""
    count, size = log_weights.shape
    log_weights = log_weights.nan_to_num(neginf=LOWEST)
    total = log_weights.sum(0)
    return ((total.sum() - total) / max(1, count * (size - 1))).expand(count, size)


def mean_of_other_particles(log_weights: Tensor) -> Tensor:
    """For each particle, the mean log-weight of the datum's other particles, (K, N)."""
    log_weights = log_weights.nan_to_num(neginf=LOWEST)
    return (log_weights.sum(0) - log_weights) / (len(log_weights) - 1)


def _each_replaced(reduce: Reduction, log_weights: Tensor, value: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The reduction with the k-th log-weight replaced by ``value[k]``, (block, N), for each block of indices k."""
    particles = torch.arange(len(log_weights), device=log_weights.device)
    for block in particles.split(max(1, ELEMENTS_AT_ONCE // log_weights.numel())):
        at = particles[:, None] == block
        replaced = torch.where(at[..., None], value[block], log_weights[:, None])  # (K, block, N)
        yield block, reduce(replaced.flatten(1)).unflatten(0, replaced.shape[1:])


def _over(baseline: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """The b of the score function with a baseline."""
    return lambda objective, log_w, c: learning_signal(objective.reduce_for_guide, log_w, baseline(log_w)) - c


PATHWISE = Estimator("", any_bound=True)
STL = replace(PATHWISE, suffix=", STL", score=False)
#: The estimators that serve every bound, by name.
ESTIMATORS = {
    "pathwise": PATHWISE,
    "stl": STL,
    "dreg": replace(STL, suffix=", DReG", curvature=True),
    "score": Estimator(", score function", "some", signal=_over(mean_of_other_data), any_bound=True),
    "vimco": Estimator(", VIMCO", "some", signal=_over(mean_of_other_particles), fewest=2, any_bound=True),
}
#: An estimator for the ELBO alone: antithetic samples change the mean of a bound that is not linear.
DISARM = Estimator(
    ", DisARM",
    "some",
    signal=lambda _, log_w, c: c * (log_w - antithetic.partner(log_w, 0)) / 2,  # (R - R'') / 2 of a mean
    fewest=2,
    even=True,
    sampler=antithetic.Antithetic,
    score_term=antithetic.score_term,
)


def rows_of(owner: str, names: Iterable[str], rows: dict[str, Estimator]) -> dict[str, Estimator]:
    """The rows of these estimators, as the parent class has them; refuse a name without one."""
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if name not in rows:
            raise PyroVAEError(
                f"expected {owner}.gradients to name estimators of {', '.join(rows)}, got {name!r}. For a new one, "
                "pass a dictionary: gradients = pv.Objective.gradients | {name: Estimator(...)}."
            )
    return {name: rows[name] for name in names}
