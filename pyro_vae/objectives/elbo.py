"""The evidence lower bound, with its KL term in closed form or by Monte Carlo."""

import math
from collections.abc import Callable
from dataclasses import replace
from numbers import Real
from typing import Any, Literal, Unpack

import torch
from pyro.distributions import Delta, MaskedDistribution
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.infer.util import is_validation_enabled
from torch import Tensor
from torch import distributions as td

from pyro_vae.checks import Count, checked, refuse_call
from pyro_vae.engine.program import Needs, Program, Run
from pyro_vae.engine.sites import Site, Sites, being_recorded, equal, family, masks, same_masks, unwrapped
from pyro_vae.engine.weights import Terms, total
from pyro_vae.errors import PyroVAEError
from pyro_vae.objectives.base import Gradient, Objective, Options
from pyro_vae.objectives.densities import densities, of_log_weights, with_gradient
from pyro_vae.objectives.gradients import DISARM, STL


class NoClosedFormError(PyroVAEError):
    """The KL of a latent site has no closed form."""


class ELBO(Objective):
    r"""The evidence lower bound, with the KL term in closed form or by Monte Carlo.

    .. math::
        \log p(x) \ge \frac1K \sum_k \log p(x \mid z_k) - \beta\, \mathrm{KL},
        \qquad z_k \sim q(z \mid x), \quad \beta = 1

    with :math:`\mathrm{KL} = \mathrm{KL}(q(z|x) \,\|\, p(z))` in closed form, or its estimate
    :math:`\frac1K \sum_k \log q(z_k|x) - \log p(z_k)`. Where beta is 1, both have the mean
    log p(x) - KL(q(z|x) || p(z|x)). With several latent sites, each has its own KL, given the sites sampled before it.
    All gradients are unbiased, except with free bits and a sampled KL: the maximum of a noisy mean is biased.

    With :math:`\beta > 1`, the objective of a beta-VAE, it is still a lower bound. With free bits it is one in the mean
    over a batch, not for each datum. With :math:`\beta < 1` it is not a bound. Report ``pv.ELBO().bound``.

    The loss is linear in the log-densities. Unlike :meth:`bound`, it needs no batch plate: it serves global latents,
    factors, subsampled nested plates and different scales. With ``"score"`` and ``"vimco"``, a program without a batch
    plate is one datum: the learning signal is the sum of all its terms, as in Pyro's ``Trace_ELBO``.

    Arguments:
        num_particles: K, the number of samples drawn from the guide for each datum.
        kl: ``"analytic"`` for the closed form, ``"monte_carlo"`` to estimate it from the samples. None is Monte Carlo
            with ``gradient="stl"`` or ``"dreg"``, which reduce the noise of the estimate; else the closed form.
        gradient: as in :class:`Objective`; or ``"disarm"`` for Bernoulli latents, from antithetic pairs of particles.
            It is unbiased and needs an even K. At K = 2 it is quieter than ``"vimco"``, above it noisier. All of them
            differentiate a KL in closed form directly.
        beta: the factor on the KL, at least 0; or a function from the step, which starts at 0, to the factor. A step is
            one differentiable loss; :attr:`step` counts them, and :func:`pyro_vae.fit` starts it at 0.
        free_bits: lambda, in nats: each latent dimension j contributes :math:`\max(\lambda, \mathrm{KL}_j)`, where the
            KL is averaged over the batch and has no gradient below lambda. It needs a guide with independent
            dimensions; 0 turns it off.
        **options: as in :class:`Objective`.

    Raises:
        ValueError: an argument is invalid. When it runs: the KL of a latent site has no closed form; or model and guide
            sample their sites in different orders, where a closed form given later sites would be wrong; or a site's
            scale or mask differs between them; or free bits meet a site whose dimensions depend on each other.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.mlp_vae((3,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
        >>> warm_up = pv.ELBO(num_particles=4, beta=lambda step: min(1.0, (step + 1) / 1000))
        >>> warm_up.differentiable_loss(vae, torch.randn(5, 3)).backward()
        >>> warm_up.step
        1

    References:
        Kingma and Welling (2014), *Auto-Encoding Variational Bayes*, ICLR.
        Higgins et al. (2017), *beta-VAE*, ICLR.
        Bowman et al. (2016), *Generating Sentences from a Continuous Space*, CoNLL (the schedule).
        Kingma et al. (2016), *Improved Variational Inference with Inverse Autoregressive Flow*, NeurIPS (free bits).
        Dong, Mnih and Tucker (2020), *DisARM: An Antithetic Gradient Estimator for Binary Latent Variables*, NeurIPS.
    """

    family = "ELBO"
    # A mean is linear, so that DReG's factors are STL's.
    gradients = Objective.gradients | {"dreg": replace(STL, suffix=", DReG", any_bound=False), "disarm": DISARM}

    @checked
    def __init__(
        self,
        num_particles: Count = 1,
        kl: Literal["analytic", "monte_carlo"] | None = None,
        gradient: Gradient | Literal["disarm"] = "pathwise",
        beta: float | Callable[[int], float] = 1.0,
        free_bits: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(num_particles, gradient, **options)
        if kl not in (None, "analytic", "monte_carlo"):
            raise PyroVAEError(f"expected kl to be 'analytic' or 'monte_carlo', got {kl!r}.")
        without_score = not self.estimator.score
        if kl == "analytic" and without_score:
            raise PyroVAEError(
                f"gradient={gradient!r} takes noise out of a sampled KL: expected kl='monte_carlo' with it, got "
                "'analytic'. Drop one of the two."
            )
        self.kl = kl or ("monte_carlo" if without_score else "analytic")
        if self.kl == "analytic" and self.chunk_size is not None:
            raise PyroVAEError(
                "a KL in closed form needs the whole run: expected kl='monte_carlo' with chunk_size, got 'analytic'. "
                "Pass kl='monte_carlo', or drop chunk_size."
            )
        if isinstance(beta, type) and beta.__module__ == "pyro_vae.schedules":
            raise PyroVAEError(f"expected beta to be a number or a function, got the class {beta.__name__}. Call it.")
        if not callable(beta):
            _check_beta(beta)
        if not 0 <= free_bits < math.inf:
            raise PyroVAEError(f"expected free_bits to be a number of nats, at least 0, got {free_bits!r}.")
        if free_bits and gradient != "pathwise":
            raise PyroVAEError(
                "free bits take the maximum of a mean, which has a pathwise gradient only: expected "
                f"gradient='pathwise' with free_bits, got {gradient!r}. Drop one of the two."
            )
        apart = self.chunk_size is not None or (num_particles > 1 and not self.vectorize_particles)
        if free_bits and apart:
            raise PyroVAEError(
                "free bits average the KL over all particles: expected vectorize_particles=True and no chunk_size with "
                "free_bits, got particles in several runs. Drop free_bits, or run them together."
            )
        self.beta, self.free_bits = beta, free_bits

    def _settings(self) -> list[str]:
        kl = "closed-form KL" if self.kl == "analytic" else "Monte Carlo KL"
        beta = "beta schedule" if callable(self.beta) else f"beta {self.beta:g}"
        free_bits = f"free bits {self.free_bits:g}"
        return [kl, *([] if self.beta == 1 else [beta]), *([free_bits] if self.free_bits else [])]

    @property
    def is_bound(self) -> bool:
        """Whether beta is at least 1; not with a schedule, whose steps differ."""
        return not callable(self.beta) and self.beta >= 1

    @property
    def quantity(self) -> str:
        """A bound on log p(x), unless the KL has a weight or free bits, which make it another objective."""
        return super().quantity if self.beta == 1 and not self.free_bits else self.name

    def scheduled(self) -> dict[str, float]:
        """Beta, from its schedule if it has one."""
        return {"beta": self._beta()}

    @of_log_weights
    def reduce(self, log_weights: Tensor) -> Tensor:
        """The mean over particles."""
        return log_weights.mean(0)

    def needs(self) -> Needs:
        """What its loss needs of the runs: no batch plate, where the loss is linear in the log-densities."""
        needs = super().needs()
        linear = type(self).reduce is ELBO.reduce and not self._has_two_reductions()
        by_path = linear and needs.path == "all"
        whole = linear and needs.sampler is None
        return replace(needs, per_datum=not by_path, whole=whole, densities=self.kl == "monte_carlo")

    def _loss(self, program: Program) -> Tensor:
        if program.needs.per_datum:
            return super()._loss(program)
        return -torch.stack(self._particles().read(program, self._total)).sum() / self.num_particles

    def _total(self, run: Run) -> Tensor:
        """The sum of all terms of a run, each masked and scaled."""
        if self._on_run is not None:
            self._on_run(run)
        found = total(self._model_terms(run)) - total(self._guide_terms(run, run.guide))
        if run.stopped is None:
            return found
        return with_gradient(found, found + total(self._guide_terms(run, densities(run.stopped))))

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
            elif self.kl == "monte_carlo" and not self.free_bits:
                yield site, self._weighed(site["unscaled_log_prob"])
            else:
                yield site, self._weighed(self.kl_at(run, name))

    def kl_at(self, run: Run, name: str) -> Tensor:
        """The KL of a site without beta, in the shape of its batch."""
        if self.free_bits:
            return self._free_kl(run, name)
        q, p = _both_sites(run, name)
        if any(mask is False for mask in masks(q)):  # which no density counts, whatever the families
            return torch.zeros(())
        kl = closed_form(q["fn"], p["fn"], name)
        _check_finite(kl, q, p, name)
        return kl

    def _weighed(self, term: Tensor) -> Tensor:
        beta = self._beta()
        return term if isinstance(beta, int | float) and beta == 1 else beta * term

    def _beta(self) -> float:
        if not callable(self.beta):
            return self.beta
        try:
            beta = self.beta(self.step)
        except TypeError as error:
            refuse_call(self.beta, (self.step,), "beta", error)
            raise
        return _check_beta(beta)

    def _free_kl(self, run: Run, name: str) -> Tensor:
        """The KL of one site, at least `free_bits` in each dimension of its event, in the shape of its batch."""
        guide, model = _both_sites(run, name)
        q, p = (_by_dimension(site["fn"], name) for site in (guide, model))
        if masks(guide):
            raise PyroVAEError(
                f"free_bits averages the KL over whole batches: expected no mask at site '{name}', got one. Drop the "
                "mask, or use free_bits=0."
            )
        sampled = self.kl == "monte_carlo"
        kl = q.log_prob(guide["value"]) - p.log_prob(guide["value"]) if sampled else closed_form(q, p, name)
        event_dim = guide["fn"].event_dim
        average = kl.flatten(0, kl.dim() - event_dim - 1).mean(0) if kl.dim() > event_dim else kl
        kl = torch.where(average > self.free_bits, kl, self.free_bits)
        return sum_rightmost(kl, event_dim)


def _check_beta(beta: Any) -> Any:
    try:
        number = float(beta) if isinstance(beta, Real | Tensor) else math.nan
    except (OverflowError, RuntimeError, ValueError):  # an integer beyond floating point, a tensor of several numbers
        number = math.inf
    if not 0 <= number < math.inf:
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


def _both_sites(run: Run, name: str) -> tuple[Site, Site]:
    """A site in the guide and in the model; refuse two that have no common KL."""
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
            f"{guide['scale']} in the guide: both densities of a KL have one scale. Use kl='monte_carlo'."
        )
    if not same_masks(guide, model):
        raise NoClosedFormError(
            f"ELBO(kl='analytic') expected one mask at site '{name}', got different ones in model and guide. Mask both "
            "alike, or use kl='monte_carlo'."
        )
    return guide, model


def closed_form(q: Any, p: Any, name: str) -> Tensor:
    """KL(q || p) at one site, in the shape of its batch."""
    try:
        if isinstance(unwrapped(q), Delta) or _is_wrong(q, p):
            raise NotImplementedError
        return _kl(q, p)
    except NotImplementedError as error:
        raise NoClosedFormError(
            f"ELBO(kl='analytic') has no closed form at site '{name}' for KL({family(q)} || {family(p)}): expected "
            "families whose KL PyTorch knows. Use kl='monte_carlo'."
        ) from error


def _check_finite(kl: Tensor, q: Site, p: Site, name: str) -> None:
    """Refuse a guide that gives probability to values where the prior has none, if Pyro validates."""
    # A normal prior covers all numbers, and most are normal: to read values takes time in each step.
    if isinstance(unwrapped(p["fn"]), td.Normal) or being_recorded() or not is_validation_enabled():
        return
    if bool((kl == math.inf).any()):
        raise PyroVAEError(
            f"the KL at site '{name}' is infinite for KL({family(q['fn'])} || {family(p['fn'])}): expected a guide on "
            "the support of the prior, got one that exceeds it. Narrow the guide's support, or widen the prior's."
        )


def _is_wrong(q: Any, p: Any) -> bool:
    """Whether the formula that PyTorch takes is not that of these families; a Delta's has no log-density."""
    if any(_folds(each) or _has_own_density(each) for each in (q, p)):
        return True  # a formula of the base, or of the parent
    infinite = td.ContinuousBernoulli, td.Uniform  # by mistake
    return {family for family in infinite for each in (q, p) if isinstance(unwrapped(each), family)} == {*infinite}


def _kl(q: Any, p: Any) -> Tensor:
    """KL(q || p), of which one alone may have a mask, if a handler masks the other."""
    if isinstance(q, MaskedDistribution):
        return scale_and_mask(_kl(q.base_dist, p), mask=q._mask)
    if isinstance(p, MaskedDistribution):
        return scale_and_mask(_kl(q, p.base_dist), mask=p._mask)
    events = [each.reinterpreted_batch_ndims for each in (q, p) if isinstance(each, td.Independent)]
    if len(events) == 2 and events[0] == events[1]:
        return sum_rightmost(_kl(q.base_dist, p.base_dist), events[0])
    return td.kl_divergence(_beside(q, p), _beside(p, q))


def _beside(distribution: Any, other: Any) -> Any:
    """Independent normals as a multivariate normal, if the other is one: PyTorch knows the KL of two of these."""
    normal, multivariate = unwrapped(distribution), td.MultivariateNormal | td.LowRankMultivariateNormal
    if isinstance(normal, td.Normal) and isinstance(unwrapped(other), multivariate) and distribution.event_dim == 1:
        return td.MultivariateNormal(normal.loc, scale_tril=torch.diag_embed(normal.scale))
    return distribution


def _folds(distribution: Any) -> bool:
    """Whether a transform takes several values of the base to one, so that the KL is not that of the bases."""
    fn = unwrapped(distribution)
    # These two fold a density that is symmetric about the fold, which leaves the KL as it is.
    if not isinstance(fn, td.TransformedDistribution) or isinstance(fn, td.HalfNormal | td.HalfCauchy):
        return False
    return not all(transform.bijective for transform in fn.transforms) or _folds(fn.base_dist)


def _has_own_density(distribution: Any) -> bool:
    """Whether a subclass outside of torch and Pyro has a `log_prob` of its own, and inherits a family's closed form."""
    fn = unwrapped(distribution)
    kinds = type(fn).__mro__
    own = next(i for i, kind in enumerate(kinds) if "log_prob" in vars(kind))
    if kinds[own].__module__.split(".")[0] not in ("torch", "pyro", "pyro_vae"):
        known = {family for pair in td.kl._KL_REGISTRY for family in pair}
        if known.isdisjoint(kinds[: own + 1]):  # unless its formula is registered for it
            return True
    return isinstance(fn, td.TransformedDistribution) and _has_own_density(fn.base_dist)


def _by_dimension(distribution: Any, name: str) -> Any:
    """The distribution of each dimension of an event; refuse dimensions that depend on each other."""
    whole = distribution
    while isinstance(distribution, td.Independent):
        distribution = distribution.base_dist
    if distribution.event_dim:
        raise PyroVAEError(
            f"free_bits needs a KL for each latent dimension: expected independent dimensions at site '{name}', as in "
            f"Normal(loc, scale).to_event(1), got {family(whole)}. Use free_bits=0."
        )
    return distribution
