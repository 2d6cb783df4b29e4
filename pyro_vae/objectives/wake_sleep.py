"""Reweighted wake-sleep."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.engine.batch_plate import Site
from pyro_vae.engine.modules import Program
from pyro_vae.engine.program import Flow, sample_sites, trace_once
from pyro_vae.errors import PyroVAEError
from pyro_vae.objectives import gradients
from pyro_vae.objectives.base import Densities, Objective, Options, weighted, with_gradient
from pyro_vae.objectives.importance import log_mean_exp


class RWS(Objective):
    r"""Reweighted wake-sleep: the model follows the importance-weighted bound, the guide KL(p(z|x) || q(z|x)).

    With normalised weights :math:`\tilde w_k` of samples :math:`z_k \sim q(z|x)`, and a dream (z', x') of the model, steps are

    .. math:: \theta:\ \sum_k \tilde w_k \nabla_\theta \log p(x, z_k), \qquad
        \phi:\ (1 - s) \sum_k \tilde w_k \nabla_\phi \log q(z_k \mid x) + s\, \nabla_\phi \log q(z' \mid x'), \qquad
        z', x' \sim p(x, z)

    the wake phase of theta, the wake phase of phi and, with share s, its sleep phase. :meth:`bound` is the importance-weighted
    one, a lower bound on log p(x) whose gradient theta's step is, unbiased; differentiated, it gives phi the wake step. That is no gradient of it: it estimates
    that of -KL(p(z|x) || q(z|x)) with a bias of order 1/K; the sleep step, on dreams, is unbiased for its own. No gradient flows
    through a sample, so any guide serves, discrete ones too.

    Arguments:
        num_particles: K, the number of samples drawn from the guide for each datum.
        sleep: s, the share of the sleep phase, from 0 to 1. Above 0, each observation must be an argument as it is (or
            reshaped), since the guide is called with dreams in their place, and the model must look at it in no other way.
        **options: as in :class:`Objective`, but without `gradient`.

    Raises:
        ValueError: `sleep` is outside; when it runs: the program has no log-weight per datum (see
            :func:`pyro_vae.log_weights`), dreams can't take the place of any argument, or the model depends on the data.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.mlp_vae((3,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
        >>> pv.RWS(16, sleep=0.5).differentiable_loss(vae.model, vae.guide, torch.randn(5, 3)).backward()

    References:
        Bornschein and Bengio (2015), *Reweighted Wake-Sleep*, ICLR.
        Le, Kosiorek, Siddharth, Teh and Wood (2019), *Revisiting Reweighted Wake-Sleep for Models with Stochastic Control
        Flow*, UAI.
    """

    family = "RWS"
    gradients: ClassVar[tuple[str, ...]] = ("pathwise",)

    def __init__(self, num_particles: int, sleep: float = 0.0, **options: Unpack[Options]) -> None:
        if not 0 <= sleep <= 1:
            raise PyroVAEError(f"expected sleep to be a share from 0 to 1, got {sleep!r}.")
        self.sleep = sleep
        super().__init__(num_particles, **options)

    @property
    def name(self) -> str:
        """What tables and legends call it."""
        return f"{self.family}, sleep {self.sleep:g}" if self.sleep else self.family

    def _settings(self) -> dict[str, Any]:
        return {"num_particles": self.num_particles} | ({"sleep": self.sleep} if self.sleep else {})

    def reduce(self, log_weights: Tensor) -> Tensor:
        """The log of the mean of the weights over particles."""
        return log_mean_exp(log_weights)

    def _flow(self) -> Flow:
        return Flow(path="none", of_mean=False)  # the guide's density is fitted to the samples

    def _loss(self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        wake = super()._loss(model, guide, args, kwargs)
        if self.sleep == 0 or not torch.is_grad_enabled():
            return wake
        return with_gradient(wake, wake - self.sleep * _dreamt(model, guide, args, kwargs))

    def _estimate(self, parts: Densities) -> Tensor:
        log_weights = parts.log_p - parts.log_q
        factor = gradients.slope(self.reduce, log_weights) if torch.is_grad_enabled() else torch.zeros_like(log_weights)
        return with_gradient(self.reduce(log_weights), weighted(factor, parts.log_p + (1 - self.sleep) * parts.log_q))


def _dreamt(model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The guide's log-density of latents that the model dreamt, given the data it dreamt with them, summed over data."""
    with torch.no_grad():
        dream = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
    dreamt = [site for site in sample_sites(dream).values() if site["infer"].get("was_observed")]
    for site in dreamt:
        if not any(_observes(site, argument) for argument in (*args, *kwargs.values())):
            raise PyroVAEError(
                f"RWS(sleep) calls the guide with dreamt data: expected model site '{site['name']}' to observe an argument as "
                "it is, or reshaped, got other data. Observe the argument itself, or use sleep=0."
            )
    replaced = tuple(_dreamt_argument(argument, dreamt) for argument in args)
    named = {name: _dreamt_argument(argument, dreamt) for name, argument in kwargs.items()}
    if is_validation_enabled():
        _check_dream(model, dream, (args, kwargs), (replaced, named))
    sites = sample_sites(poutine.trace(poutine.replay(guide, trace=dream)).get_trace(*replaced, **named))
    for name, site in sites.items():
        if site["infer"].get("is_auxiliary"):
            raise PyroVAEError(
                f"RWS(sleep) takes the guide's density of a dreamt latent: expected a guide without auxiliary sites, got "
                f"'{name}', which no dream has. Use sleep=0, or sample the latents themselves."
            )
    terms = [scale_and_mask(site["unscaled_log_prob"], site["scale"], site["mask"]) for site in sites.values()]
    return torch.stack([term.sum() for term in terms]).sum()


def _check_dream(model: Program, dream: Trace, awake: tuple[Any, Any], asleep: tuple[Any, Any]) -> None:
    """What was dreamt has one density given the data and given the dream: the model saw no datum while it dreamt."""
    densities: list[dict[str, Tensor]] = []
    for (args, kwargs), program in ((awake, poutine.uncondition(model)), (asleep, model)):
        # Such a run is none to batch norm, and draws dropout from the state of the other, so that only the data differ.
        trace, _ = trace_once(poutine.replay(program, trace=dream), _nothing, *args, **kwargs)
        densities.append({name: site["log_prob"] for name, site in sample_sites(trace).items()})
    given, dreamt = densities
    for name in given:
        same = name in dreamt and given[name].shape == dreamt[name].shape
        if not same or not torch.allclose(given[name], dreamt[name], rtol=1e-3, atol=1e-2, equal_nan=True):
            raise PyroVAEError(
                f"RWS(sleep) dreams data that model site '{name}' depends on: expected a model that only observes them, got "
                "another density once dreams take their place (teacher forcing, as in an autoregressive likelihood). Use "
                "sleep=0, or pass what the model conditions on as an argument of its own."
            )


def _nothing(*args: Any, **kwargs: Any) -> None:
    """A guide without sites."""


def _dreamt_argument(argument: Any, dreamt: list[Site]) -> Any:
    """What the model dreamt where it observed an argument; the argument itself where it did not."""
    return next((site["value"].reshape(argument.shape) for site in dreamt if _observes(site, argument)), argument)


def _observes(site: Site, argument: Any) -> bool:
    """Whether a dreamt site observed this argument's numbers, in their order."""
    seen = site["infer"]["obs"]
    if seen is argument:
        return True
    if not (isinstance(argument, Tensor) and isinstance(seen, Tensor)):
        return False
    ordered = seen.is_contiguous() and argument.is_contiguous()
    return ordered and (seen.data_ptr(), seen.numel()) == (argument.data_ptr(), argument.numel())
