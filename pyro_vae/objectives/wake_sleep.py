"""Reweighted wake-sleep."""

from typing import Any, Unpack

import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.checks import Count, checked
from pyro_vae.engine.agreement import check_draws
from pyro_vae.engine.drawing import drawing
from pyro_vae.engine.program import Program
from pyro_vae.engine.simulation import Call, given_either, prior_that_draws, same_density
from pyro_vae.engine.sites import Site, labelled, same_masks
from pyro_vae.engine.traces import sample_sites, traced
from pyro_vae.errors import PyroVAEError
from pyro_vae.objectives.base import Objective, Options
from pyro_vae.objectives.densities import densities, of_log_weights, with_gradient
from pyro_vae.objectives.gradients import Estimator
from pyro_vae.objectives.importance import log_mean_exp


class RWS(Objective):
    r"""Reweighted wake-sleep: the model follows the importance-weighted bound, the guide KL(p(z|x) || q(z|x)).

    With normalised weights :math:`\tilde w_k` of samples :math:`z_k \sim q(z|x)`, and a dream (z', x') of the model,

    .. math:: \theta:\ \sum_k \tilde w_k \nabla_\theta \log p(x, z_k), \qquad
        \phi:\ (1 - s) \sum_k \tilde w_k \nabla_\phi \log q(z_k \mid x) + s\, \nabla_\phi \log q(z' \mid x'), \qquad
        z', x' \sim p(x, z)

    are the steps: the wake phase of theta, the wake phase of phi and, with share s, its sleep phase. :meth:`bound` is
    that of :class:`IWAE`, and theta's step is its unbiased gradient. Its derivative by phi is the wake step, which is
    not the bound's gradient: it estimates the gradient of -KL(p(z|x) || q(z|x)) with a bias of order 1/K. The sleep
    step is an unbiased gradient for dreams. No gradient flows through a sample, so a discrete guide serves too.

    Arguments:
        sleep: s, the share of the sleep phase, from 0 to 1. Above 0, the model must observe an argument itself, or the
            argument reshaped, since the guide is called with dreams in its place. It must not read it otherwise.
        num_particles, options: as in :class:`Objective`, but without `gradient`.

    Raises:
        ValueError: `sleep` is out of range. When it runs: the program has no log-weight per datum (see
            :func:`pyro_vae.log_weights`), dreams can't replace any argument, or the model depends on the data.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.mlp_vae((3,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
        >>> pv.RWS(16, sleep=0.5).differentiable_loss(vae, torch.randn(5, 3)).backward()

    References:
        Bornschein and Bengio (2015), *Reweighted Wake-Sleep*, ICLR.
        Le, Kosiorek, Siddharth, Teh and Wood (2019), *Revisiting Reweighted Wake-Sleep for Models with Stochastic
        Control Flow*, UAI.
    """

    family = "RWS"
    # The guide's density is fitted to the samples, so its score has the normalised weights, with a positive sign.
    gradients = {  # noqa: RUF012
        "pathwise": Estimator("", "none", signal=lambda rws, _, c: (1 - rws.sleep) * c, of_mean=False, any_bound=True)
    }

    @checked
    def __init__(
        self, num_particles: Count, sleep: float = 0.0, gradient: str = "pathwise", **options: Unpack[Options]
    ) -> None:
        if not 0 <= sleep <= 1:
            raise PyroVAEError(f"expected sleep to be a share from 0 to 1, got {sleep!r}.")
        self.sleep = sleep
        super().__init__(num_particles, gradient, **options)

    def _settings(self) -> list[str]:
        return [f"sleep {self.sleep:g}"] if self.sleep else []

    @of_log_weights
    def reduce(self, log_weights: Tensor) -> Tensor:
        """The log of the mean of the weights over particles."""
        return log_mean_exp(log_weights)

    def _loss(self, program: Program) -> Tensor:
        wake = super()._loss(program)
        if self.sleep == 0 or not torch.is_grad_enabled():
            return wake
        return with_gradient(wake, wake - self.sleep * _dreamt(program))


def _dreamt(program: Program) -> Tensor:
    """The guide's log-density of dreamt latents given the data of the same dream, summed over data."""
    args, kwargs = program.args, program.kwargs
    with torch.no_grad(), prior_that_draws("sleep=0, or a prior that is a distribution"):
        dream = traced(drawing(program.model), args, kwargs)
    sites = sample_sites(dream)
    if is_validation_enabled():
        check_draws(labelled(sites, {}))
    dreamt = [site for site in sites.values() if site["infer"].get("was_observed")]
    for site in dreamt:
        if not any(_observes(site, argument) for argument in (*args, *kwargs.values())):
            raise PyroVAEError(
                f"RWS(sleep) calls the guide with dreamt data: expected model site '{site['name']}' to observe an "
                "argument as it is, or reshaped, got other data. Observe the argument itself, or use sleep=0."
            )
    replaced = tuple(_dreamt_argument(argument, dreamt) for argument in args)
    named = {name: _dreamt_argument(argument, dreamt) for name, argument in kwargs.items()}
    if is_validation_enabled():
        _check_dream(program, dream, (replaced, named))
    guide = poutine.replay(program.guide_or_prior, trace=dream)
    sites = densities(sample_sites(traced(guide, replaced, named)))
    for name, site in sites.items():
        if site["infer"].get("is_auxiliary"):
            raise PyroVAEError(
                "RWS(sleep) needs the guide's density of a dreamt latent: expected a guide without auxiliary sites, "
                f"got '{name}', which dreams don't have. Use sleep=0, or sample the latents themselves."
            )
    return torch.stack([site["log_prob_sum"] for site in sites.values()]).sum()


def _check_dream(program: Program, dream: Trace, asleep: Call) -> None:
    """Refuse a model that reads data while it dreams: it has another density given the data than given the dream."""
    given, dreamt = given_either(program.model, dream, (program.args, program.kwargs), asleep)
    for name, site in given.items():
        if not same_density(site, dreamt.get(name)) or not same_masks(site, dreamt[name]):
            raise PyroVAEError(
                f"RWS(sleep) dreams data that model site '{name}' depends on: expected a model that only observes its "
                "data, got another density when dreams replace them (teacher forcing, as in an autoregressive "
                "likelihood). Use sleep=0, or pass the conditions of the model as an argument of their own."
            )


def _dreamt_argument(argument: Any, dreamt: list[Site]) -> Any:
    """The dream that replaces an argument which the model observes; else the argument itself."""
    return next((site["value"].reshape(argument.shape) for site in dreamt if _observes(site, argument)), argument)


def _observes(site: Site, argument: Any) -> bool:
    """Whether a dreamt site observes this argument's numbers, in their order."""
    seen = site["infer"]["obs"]
    if seen is argument:
        return True
    if not (isinstance(argument, Tensor) and isinstance(seen, Tensor)):
        return False
    ordered = seen.is_contiguous() and argument.is_contiguous()
    return ordered and (seen.data_ptr(), seen.numel()) == (argument.data_ptr(), argument.numel())
