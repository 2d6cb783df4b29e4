"""The evidence lower bound, with its KL term in closed form or by Monte Carlo."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, Unpack

import torch
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import (
    HalfCauchy,
    HalfNormal,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
    kl_divergence,
)

from pyro_vae.engine.agreement import equal, family, masks, same_masks, unwrapped
from pyro_vae.engine.batch_plate import Site, Sites
from pyro_vae.engine.modules import Program
from pyro_vae.engine.program import Flow, Run
from pyro_vae.engine.weights import Terms
from pyro_vae.errors import PyroVAEError
from pyro_vae.objectives.base import NAMES, Gradient, Objective, Options, with_gradient


class NoClosedFormError(PyroVAEError):
    """A program has no closed form for the KL of one of its latent sites."""


class ELBO(Objective):
    r"""The evidence lower bound, with the KL term in closed form or by Monte Carlo.

    .. math::
        \log p(x) \ge \frac1K \sum_k \log p(x \mid z_k) - \beta\, \mathrm{KL},
        \qquad z_k \sim q(z \mid x), \quad \beta = 1

    with :math:`\mathrm{KL} = \mathrm{KL}(q(z|x) \,\|\, p(z))` in closed form, or its estimate
    :math:`\frac1K \sum_k \log q(z_k|x) - \log p(z_k)`. Both have the same mean, log p(x) - KL(q(z|x) || p(z|x)) where beta
    is 1. With several latent sites, each has its own KL, given the sites sampled before it. All gradients are unbiased,
    but that of free bits with a sampled KL, which takes the maximum of a noisy mean.

    With :math:`\beta > 1` it is a lower bound still, of a beta-VAE; with free bits it is one in the mean over a batch, not for
    each datum; with :math:`\beta < 1` it bounds nothing. Report ``pv.ELBO().bound``.

    The pathwise and STL losses are linear in the log-densities, so, unlike :meth:`bound`, they need no batch plate: global
    latents, factors, subsampled nested plates and different scales are all served.

    Arguments:
        num_particles: K, the number of samples drawn from the guide for each datum.
        kl: ``"analytic"`` for the closed form, ``"monte_carlo"`` to estimate it from the samples. None is the closed form,
            but with ``gradient="stl"`` or ``"dreg"``, which are about the noise of the estimate, Monte Carlo.
        gradient: as in :class:`Objective`; ``"score"`` takes the KL in closed form as it is.
        beta: the factor on the KL, at least 0; or a function that gives it for each step, starting at 0. A step is one
            differentiable loss; :attr:`step` counts them, and :func:`pyro_vae.fit` starts it at 0.
        free_bits: lambda, in nats: each latent dimension j contributes :math:`\max(\lambda, \mathrm{KL}_j)`, where the KL is
            averaged over the batch and has no gradient below lambda. For guides that are independent over
            dimensions; 0 is off.
        **options: as in :class:`Objective`.

    Raises:
        ValueError: an argument is none of these; when it runs: a latent site's pair of families has no closed form, model and
            guide sample their sites in different orders (a closed form given later sites would be wrong), a site's
            scale or mask differs between them, or free bits are asked for of a site whose dimensions depend on each other.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.mlp_vae((3,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
        >>> pv.ELBO(num_particles=4).bound(vae.model, vae.guide, torch.randn(5, 3)).shape
        torch.Size([5])
        >>> warm_up = pv.ELBO(beta=lambda step: min(1.0, (step + 1) / 1000))
        >>> warm_up.differentiable_loss(vae.model, vae.guide, torch.randn(5, 3)).backward()
        >>> warm_up.step
        1

    References:
        Kingma and Welling (2014), *Auto-Encoding Variational Bayes*, ICLR.
        Higgins et al. (2017), *beta-VAE*, ICLR. Bowman et al. (2016), *Generating Sentences from a Continuous Space*,
        CoNLL (the schedule).
        Kingma et al. (2016), *Improved Variational Inference with Inverse Autoregressive Flow*, NeurIPS (free bits).
    """

    family = "ELBO"

    def __init__(
        self,
        num_particles: int = 1,
        kl: Literal["analytic", "monte_carlo"] | None = None,
        gradient: Gradient = "pathwise",
        beta: float | Callable[[int], float] = 1.0,
        free_bits: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(num_particles, gradient, **options)
        if kl not in (None, "analytic", "monte_carlo"):
            raise PyroVAEError(f"expected kl to be 'analytic' or 'monte_carlo', got {kl!r}.")
        of_the_noise = gradient in ("stl", "dreg")
        if kl == "analytic" and of_the_noise:
            raise PyroVAEError(
                f"gradient={gradient!r} takes noise out of a sampled KL: expected kl='monte_carlo' with it, got 'analytic'. "
                "Drop one of the two."
            )
        self.kl = kl or ("monte_carlo" if of_the_noise else "analytic")
        if self.kl == "analytic" and self.chunk_size is not None:
            raise PyroVAEError(
                "a KL in closed form needs the whole run: expected kl='monte_carlo' with chunk_size, got 'analytic'. Pass "
                "kl='monte_carlo', or drop chunk_size."
            )
        if not callable(beta):
            _check_beta(beta)
        if not 0 <= free_bits < math.inf:
            raise PyroVAEError(f"expected free_bits to be a number of nats, at least 0, got {free_bits!r}.")
        if free_bits and gradient != "pathwise":
            raise PyroVAEError(
                f"free bits are a maximum over means, whose gradient is the pathwise one: expected gradient='pathwise' "
                f"with free_bits, got {gradient!r}."
            )
        apart = self.chunk_size is not None or (num_particles > 1 and not self.vectorize_particles)
        if free_bits and apart:
            raise PyroVAEError(
                "free bits average the KL over all particles: expected vectorize_particles=True and no chunk_size with "
                "free_bits, got particles that are run apart. Drop free_bits, or run them together."
            )
        self.beta, self.free_bits = beta, free_bits

    @property
    def name(self) -> str:
        """What tables and legends call it."""
        beta = "beta schedule" if callable(self.beta) else f"beta {self.beta:g}"
        parts = [
            "ELBO, closed-form KL" if self.kl == "analytic" else "ELBO, Monte Carlo KL",
            *([] if self.beta == 1 else [beta]),
            *([f"free bits {self.free_bits:g}"] if self.free_bits else []),
        ]
        return ", ".join(parts) + NAMES[self.gradient]

    def scheduled(self) -> dict[str, float]:
        """Beta, by its schedule if it has one."""
        return {"beta": self._beta()}

    def _settings(self) -> dict[str, Any]:
        shown = {"num_particles": self.num_particles, "kl": self.kl}
        if self.beta != 1:
            shown["beta"] = self.beta
        return shown | ({"free_bits": self.free_bits} if self.free_bits else {})

    def reduce(self, log_weights: Tensor) -> Tensor:
        """The mean over particles."""
        return log_weights.mean(0)

    def _flow(self) -> Flow:
        # A mean is linear: DReG's factors are the model's.
        return replace(super()._flow(), scaled=False, densities=self.kl == "monte_carlo")

    def _loss(self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if self._flow().path != "all":
            return super()._loss(model, guide, args, kwargs)
        totals = self._runs(model, guide, args, kwargs, in_plate=False, read=self._total)
        total = totals[0] if len(totals) == 1 else torch.stack(totals).sum()
        return -total / self.num_particles if self.num_particles > 1 else -total

    def _total(self, run: Run) -> Tensor:
        """The sum of all terms of a run, each masked and scaled."""
        total = _sum(self._model_terms(run)) - _sum(self._guide_terms(run, run.guide))
        if run.stopped is None:
            return total
        return with_gradient(total, total + _sum(self._guide_terms(run, run.stopped)))

    def _model_terms(self, run: Run) -> Terms:
        for name, site in run.model.items():
            if site["is_observed"]:
                yield site, site["unscaled_log_prob"]
            elif self.kl == "monte_carlo" and not (self.free_bits and name in run.guide):
                yield site, self._weighed(site["unscaled_log_prob"])

    def _guide_terms(self, run: Run, guide: Sites) -> Terms:
        if self.kl == "analytic":
            _check_order(run)
        for name, site in guide.items():
            if site["is_observed"]:  # a factor, which has no KL
                yield site, site["unscaled_log_prob"]
            elif self.free_bits:
                yield site, self._weighed(self._free_kl(run, name))
            else:
                sampled = self.kl == "monte_carlo"
                yield site, self._weighed(site["unscaled_log_prob"] if sampled else _site_kl(run, name))

    def _weighed(self, term: Tensor) -> Tensor:
        beta = self._beta()
        return term if isinstance(beta, int | float) and beta == 1 else beta * term

    def _beta(self) -> float:
        return _check_beta(self.beta(self.step)) if callable(self.beta) else self.beta

    def _free_kl(self, run: Run, name: str) -> Tensor:
        """The KL of one site, no less than `free_bits` in each dimension of its event, in the shape of its batch."""
        guide, model = _pair(run, name)
        q, p = (_by_dimension(site["fn"], name) for site in (guide, model))
        if masks(guide):
            raise PyroVAEError(
                f"free_bits averages the KL over whole batches: expected no mask at site '{name}', got one. Drop the mask, "
                "or use free_bits=0."
            )
        sampled = self.kl == "monte_carlo"
        kl = q.log_prob(guide["value"]) - p.log_prob(guide["value"]) if sampled else _closed_form(q, p, name)
        event_dim = guide["fn"].event_dim
        average = kl.flatten(0, kl.dim() - event_dim - 1).mean(0) if kl.dim() > event_dim else kl
        kl = torch.where(average > self.free_bits, kl, self.free_bits)
        return kl.flatten(-event_dim).sum(-1) if event_dim else kl


def _sum(terms: Terms) -> Tensor:
    first, *rest = [scale_and_mask(value, site["scale"], site["mask"]).sum() for site, value in terms] or [
        torch.zeros(())
    ]
    return sum(rest, first)


def _check_beta(beta: float) -> float:
    if not 0 <= beta < math.inf:
        raise PyroVAEError(
            f"expected beta to be a finite number, at least 0, or a function that gives one, got {beta!r}."
        )
    return beta


def _check_order(run: Run) -> None:
    guide = [name for name in run.guide if name in run.model]
    model = [name for name in run.model if name in run.guide]
    if guide != model:
        raise NoClosedFormError(
            f"ELBO(kl='analytic') expected model and guide to sample their latent sites in one order, got {model} in "
            f"the model and {guide} in the guide: a closed form given a site that is sampled later would be wrong. "
            "Reorder one of them, or use kl='monte_carlo'."
        )


def _pair(run: Run, name: str) -> tuple[Site, Site]:
    """A site in guide and model, which agree so far that they have one KL."""
    guide = run.guide[name]
    if name not in run.model:
        raise NoClosedFormError(
            f"ELBO(kl='analytic') has no closed form at site '{name}' ({family(guide['fn'])}), which only the guide "
            "has: expected a model site of that name. Use kl='monte_carlo'."
        )
    model = run.model[name]
    if not equal(guide["scale"], model["scale"]):
        raise NoClosedFormError(
            f"ELBO(kl='analytic') expected one scale at site '{name}', got {model['scale']} in the model and "
            f"{guide['scale']} in the guide: no KL weighs its two halves differently. Use kl='monte_carlo'."
        )
    if not same_masks(guide, model):
        raise NoClosedFormError(
            f"ELBO(kl='analytic') expected one mask at site '{name}', got different ones in model and guide. Mask both "
            "alike, or use kl='monte_carlo'."
        )
    return guide, model


def _site_kl(run: Run, name: str) -> Tensor:
    """KL(q || p) of one site in closed form, in the shape of its batch."""
    guide, model = _pair(run, name)
    return _closed_form(guide["fn"], model["fn"], name)


def _closed_form(q: Any, p: Any, name: str) -> Tensor:
    no_closed_form = NoClosedFormError(
        f"ELBO(kl='analytic') has no closed form at site '{name}' for the pair KL({family(q)} || {family(p)}). Use "
        "kl='monte_carlo'."
    )
    # Registered all the same: for a Delta half a KL, without its own log-density; for folded families that of the bases.
    if isinstance(unwrapped(q), Delta) or _folds(q) or _folds(p):
        raise no_closed_form
    try:
        return kl_divergence(_beside(q, p), _beside(p, q))
    except NotImplementedError as error:
        raise no_closed_form from error


def _beside(distribution: Any, other: Any) -> Any:
    """Independent normals as one with a covariance, where the other has one, for which PyTorch knows the KL."""
    normal = unwrapped(distribution)
    if not isinstance(unwrapped(other), MultivariateNormal | LowRankMultivariateNormal) or distribution.event_dim != 1:
        return distribution
    return (
        MultivariateNormal(normal.loc, scale_tril=torch.diag_embed(normal.scale))
        if isinstance(normal, Normal)
        else distribution
    )


def _folds(distribution: Any) -> bool:
    """Whether several values of the base become one, so that no KL is that of the bases."""
    fn = unwrapped(distribution)
    # These two fold a density that is symmetric about the fold, which changes no KL.
    if not isinstance(fn, TransformedDistribution) or isinstance(fn, HalfNormal | HalfCauchy):
        return False
    return not all(transform.bijective for transform in fn.transforms) or _folds(fn.base_dist)


def _by_dimension(distribution: Any, name: str) -> Any:
    """The distribution of each dimension of an event, which must be independent."""
    whole = distribution
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    if distribution.event_dim:
        raise PyroVAEError(
            f"free_bits needs a KL for each latent dimension: expected independent dimensions at site '{name}', as in "
            f"Normal(loc, scale).to_event(1), got {family(whole)}. Use free_bits=0."
        )
    return distribution
