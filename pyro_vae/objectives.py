r"""Variational bounds on log p(x): each is one reduction of the log-weights, and a :class:`pyro.infer.ELBO`.

With log-weights log w[k, n] = log p(x_n, z_kn) - log q(z_kn | x_n), of shape (K particles, N data),

    ELBO    mean over k of log w[k, n]                        = log p(x_n) - KL(q || p(z | x_n)) on average
    IWAE    log of the mean over k of w[k, n]                 between the ELBO and log p(x_n), rising with K

A bound that is missing here is a subclass of :class:`Objective` with a `reduce` of its own.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, Literal

import pyro.infer
import torch
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vae.agreement import equal, family, same_masks, unwrapped
from pyro_vae.batch_plate import Site
from pyro_vae.weights import (
    Program,
    Run,
    check_num_particles,
    datum_scale,
    find_max_plate_nesting,
    per_datum,
    run_log_weights,
    run_particles,
)


class NoClosedFormError(ValueError):
    """A program has no closed form for the KL of one of its latent sites."""


class Objective(pyro.infer.ELBO):
    """What every bound shares: how to run the program, and losses and gradients made from the bound.

    Use it wherever Pyro takes a loss: ``SVI(model, guide, optim, loss=objective)``, or
    ``objective(model, guide)``, a :class:`torch.nn.Module` that returns the differentiable loss.

    Arguments:
        num_particles: K, the number of samples drawn from the guide for each datum.
        vectorize_particles: run the program once, with a leading dimension for the particles; False runs it K
            times, for programs whose networks take no leading dimension; see :func:`pyro_vae.log_weights`.
        max_plate_nesting: how many dimensions the program's plates take; None finds it at the first call with
            a model and guide, by one more run.

    Raises:
        ValueError: `num_particles` is not a positive integer.
    """

    #: What tables and legends call it.
    name: str

    def __init__(
        self, num_particles: int = 1, *, vectorize_particles: bool = True, max_plate_nesting: int | None = None
    ) -> None:
        check_num_particles(num_particles)
        super().__init__(num_particles=num_particles, vectorize_particles=vectorize_particles)
        self.max_plate_nesting = max_plate_nesting
        self._found_nesting: tuple[Program, Program, int] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_particles={self.num_particles})"

    def bound(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The bound on log p(x_n) for each datum, in nats, of shape (N,); differentiable.

        A scale, such as the N / b of a subsampled plate, is left out: these are nats of one datum.

        Raises:
            ValueError: the program has no bound per datum; see :func:`pyro_vae.log_weights`.
        """
        return self._bound_and_scale(model, guide, args, kwargs)[0]

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the sum over data of scale times bound, in nats, as a scalar tensor to differentiate."""
        bound, scale = self._bound_and_scale(model, guide, args, kwargs)
        return -(scale * bound).sum()

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The value of :meth:`differentiable_loss`."""
        return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The value of :meth:`differentiable_loss`, its gradient added to each parameter's ``grad``."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.item()

    @abstractmethod
    def reduce(self, log_weights: Tensor) -> Tensor:
        """Turn log-weights (K, N) into the bound (N,)."""

    def _bound_and_scale(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | float]:
        runs = self._runs(model, guide, args, kwargs, in_plate=True)
        scale = datum_scale(runs[0])
        return self.reduce(torch.cat([self._weights(run) for run in runs])), scale

    def _weights(self, run: Run) -> Tensor:
        return run_log_weights(run)

    def _runs(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any], *, in_plate: bool
    ) -> list[Run]:
        nesting = self.max_plate_nesting
        if nesting is None and self.num_particles > 1 and self.vectorize_particles:
            # A bound method compares equal to itself, so vae.model, which is made anew at each use, is found here.
            if self._found_nesting is None or self._found_nesting[:2] != (model, guide):
                nesting = find_max_plate_nesting(model, guide, args, kwargs, in_plate=in_plate)
                self._found_nesting = (model, guide, nesting)
            nesting = self._found_nesting[2]
        return run_particles(
            model,
            guide,
            args,
            kwargs,
            num_particles=self.num_particles,
            vectorize_particles=self.vectorize_particles,
            max_plate_nesting=nesting,
            in_plate=in_plate,
        )

    # Abstract in pyro.infer.ELBO, and used by its own machinery alone.
    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        raise TypeError("a pyro_vae objective has no single trace: use pyro_vae.log_weights for its parts.")


class ELBO(Objective):
    r"""The evidence lower bound, with the KL term in closed form or by Monte Carlo.

    .. math::
        \log p(x) \ge \frac1K \sum_k \log \frac{p(x, z_k)}{q(z_k \mid x)}
        \qquad\text{or}\qquad
        \frac1K \sum_k \log p(x \mid z_k) - \mathrm{KL}\bigl(q(z \mid x) \,\|\, p(z)\bigr),
        \qquad z_k \sim q(z \mid x)

    Both have the same mean, log p(x) - KL(q(z|x) || p(z|x)), and an unbiased pathwise gradient; the closed form
    usually varies less. With several latent sites, each has its own KL, given the sites sampled before it.

    The loss is linear in the log-densities, so, unlike :meth:`bound`, it needs no batch plate: global latents,
    factors, subsampled nested plates and different scales are all served.

    Arguments:
        num_particles: K, the number of samples drawn from the guide for each datum.
        kl: ``"analytic"`` for the closed form, ``"monte_carlo"`` to estimate it from the samples.
        vectorize_particles: as in :class:`Objective`.
        max_plate_nesting: as in :class:`Objective`.

    Raises:
        ValueError: `kl` is neither; when it runs with ``kl="analytic"``: a latent site's pair of families has no
            closed form, model and guide sample their sites in different orders (a closed form given later
            sites would be wrong), or a site's scale or mask differs between them.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.mlp_vae((3,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
        >>> pv.ELBO(num_particles=4).bound(vae.model, vae.guide, torch.randn(5, 3)).shape
        torch.Size([5])

    References:
        Kingma and Welling (2014), *Auto-Encoding Variational Bayes*, ICLR.
    """

    def __init__(
        self,
        num_particles: int = 1,
        kl: Literal["analytic", "monte_carlo"] = "analytic",
        *,
        vectorize_particles: bool = True,
        max_plate_nesting: int | None = None,
    ) -> None:
        if kl not in ("analytic", "monte_carlo"):
            raise ValueError(f"expected kl to be 'analytic' or 'monte_carlo', got {kl!r}.")
        super().__init__(num_particles, vectorize_particles=vectorize_particles, max_plate_nesting=max_plate_nesting)
        self.kl = kl
        self.name = "ELBO, closed-form KL" if kl == "analytic" else "ELBO, Monte Carlo KL"

    def __repr__(self) -> str:
        return f"ELBO(num_particles={self.num_particles}, kl={self.kl!r})"

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the sum over all terms of scale times term, in nats, as a scalar tensor to differentiate."""
        runs = self._runs(model, guide, args, kwargs, in_plate=False)
        terms = [scale_and_mask(v, s["scale"], s["mask"]).sum() for run in runs for s, v in self._terms(run)]
        return -sum(terms, torch.zeros(())) / self.num_particles

    def reduce(self, log_weights: Tensor) -> Tensor:
        """The mean over particles."""
        return log_weights.mean(0)

    def _weights(self, run: Run) -> Tensor:
        return torch.stack([per_datum(run, site, value) for site, value in self._terms(run)]).sum(0)

    def _terms(self, run: Run) -> Iterator[tuple[Site, Tensor]]:
        """The summands of the ELBO, each with the site whose scale and mask it takes."""
        if self.kl == "analytic":
            _check_order(run)
        for site in run.model.values():
            if site["is_observed"] or self.kl == "monte_carlo":
                yield site, site["unscaled_log_prob"]
        for name, site in run.guide.items():
            sampled = self.kl == "monte_carlo" or site["is_observed"]  # a guide's factor has no KL
            yield site, -(site["unscaled_log_prob"] if sampled else _site_kl(run, name))


class IWAE(Objective):
    r"""The importance-weighted bound.

    .. math:: \log p(x) \ge \mathbb{E} \log \frac1K \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k \mid x)},
        \qquad z_k \sim q(z \mid x)

    K = 1 is the ELBO; the bound rises with K towards log p(x). Its pathwise gradient is unbiased, but at given
    parameters the signal-to-noise ratio of the guide's gradient falls as :math:`1 / \sqrt K` once K is large
    (Rainforth et al. 2018).

    Arguments:
        num_particles: K, the number of samples drawn from the guide for each datum.
        vectorize_particles: as in :class:`Objective`.
        max_plate_nesting: as in :class:`Objective`.

    Raises:
        ValueError: when it runs: the program has no log-weight per datum; see :func:`pyro_vae.log_weights`.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.mlp_vae((3,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
        >>> pv.IWAE(64).bound(vae.model, vae.guide, torch.randn(5, 3)).shape
        torch.Size([5])

    References:
        Burda, Grosse and Salakhutdinov (2016), *Importance Weighted Autoencoders*, ICLR.
        Rainforth et al. (2018), *Tighter Variational Bounds are Not Necessarily Better*, ICML.
    """

    name = "IWAE"

    def reduce(self, log_weights: Tensor) -> Tensor:
        """The log of the mean of the weights over particles."""
        return log_weights.logsumexp(0) - math.log(len(log_weights))


def _check_order(run: Run) -> None:
    guide = [name for name in run.guide if name in run.model]
    model = [name for name in run.model if name in run.guide]
    if guide != model:
        raise NoClosedFormError(
            f"ELBO(kl='analytic') expected model and guide to sample their latent sites in one order, got {model} in "
            f"the model and {guide} in the guide: a closed form given a site that is sampled later would be wrong. "
            "Reorder one of them, or use kl='monte_carlo'."
        )


def _site_kl(run: Run, name: str) -> Tensor:
    """KL(q || p) of one site, in the shape of its batch."""
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
    no_closed_form = NoClosedFormError(
        f"ELBO(kl='analytic') has no closed form at site '{name}' for the pair KL({family(guide['fn'])} || "
        f"{family(model['fn'])}). Use kl='monte_carlo'."
    )
    if isinstance(
        unwrapped(guide["fn"]), Delta
    ):  # Pyro registers half a KL here: it leaves out the Delta's own log-density
        raise no_closed_form
    try:
        return kl_divergence(guide["fn"], model["fn"])
    except NotImplementedError as error:
        raise no_closed_form from error
