"""Whose fault it is that the ELBO lies below log p(x): the guide's family's, or the encoder's."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import transform_to
from tqdm.auto import tqdm

from pyro_vae.engine import rng
from pyro_vae.engine.agreement import family, not_reparameterised, unwrapped
from pyro_vae.engine.modules import Program
from pyro_vae.engine.program import Run, draw, find_max_plate_nesting
from pyro_vae.errors import PyroVAEError
from pyro_vae.evaluation.defaults import GAPS_LR, GAPS_STEPS, NUM_SAMPLES
from pyro_vae.evaluation.estimate import Estimate
from pyro_vae.evaluation.families import constructor_arguments, same_for_all_particles
from pyro_vae.evaluation.likelihood import Evidence, Summary, check_same_data, draw_weights, summarise, warn_of_high_k
from pyro_vae.evaluation.pieces import Args, arguments, check_count, checked, rows_at_once
from pyro_vae.objectives import ELBO

PARTICLES = 8  # of the ELBO that is maximised for each datum
ADVICE = (
    "These are the weights of the best member of the guide's family: the approximation gap is probably too small. Pass "
    "log_likelihood=pv.ais(...)."
)
AVERAGED = 0.5  # the last half of the iterates is averaged, which takes the gradient's noise out


@dataclass(frozen=True)
class Gaps:
    r"""What :func:`pyro_vae.inference_gaps` returns; all in nats per datum.

    Attributes:
        log_likelihood: log p(x_n), (N,).
        best_elbo: the ELBO of the best member of the guide's family for each datum, (N,).
        elbo: the guide's own ELBO, (N,).
    """

    log_likelihood: Tensor
    best_elbo: Tensor
    elbo: Tensor

    @property
    def approximation(self) -> Estimate:
        """log p(x) less the best member's ELBO, which is what the family costs. A more flexible family closes it."""
        return Estimate.of(self.log_likelihood - self.best_elbo)

    @property
    def amortisation(self) -> Estimate:
        """The best member's ELBO less the guide's own, which is what the encoder costs. A larger or longer trained encoder closes it."""
        return Estimate.of(self.best_elbo - self.elbo)

    @property
    def total(self) -> Estimate:
        """log p(x) less the guide's ELBO, which is KL(q(z|x) || p(z|x))."""
        return Estimate.of(self.log_likelihood - self.elbo)

    def __str__(self) -> str:
        return (
            f"log p(x) - ELBO = {self.total} nats per datum = {self.approximation} (approximation) + {self.amortisation} "
            f"(amortisation), N = {len(self.elbo)}"
        )


def inference_gaps(
    model: Program,
    guide: Program,
    x: Any,
    num_samples: int = NUM_SAMPLES,
    *,
    num_steps: int = GAPS_STEPS,
    lr: float = GAPS_LR,
    log_likelihood: Evidence | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> Gaps:
    r"""Split log p(x) - ELBO into the gap of the guide's family and that of its encoder.

    .. math:: \log p(x) - \mathrm{ELBO}(q) =
        \underbrace{\log p(x) - \max_{q^* \in \mathcal Q} \mathrm{ELBO}(q^*)}_{\text{approximation gap}}
        + \underbrace{\max_{q^* \in \mathcal Q} \mathrm{ELBO}(q^*) - \mathrm{ELBO}(q)}_{\text{amortisation gap}}

    The family :math:`\mathcal Q` of a guide site is that of its distribution, with every parameter free for every datum.
    It is fitted by Adam, from where the encoder put it, on the sticking-the-landing gradient of the ELBO, with a step size
    that falls to zero and the last half of the iterates averaged.

    Arguments:
        model: a Pyro model with a batch plate.
        guide: its guide, whose sites' distributions depend on the data alone, not on one another's samples.
        x: data (N, ...), a split of :mod:`pyro_vae.data`, or a tuple of tensors that are passed as several arguments.
        num_samples: how many samples each ELBO, and log p(x), are estimated with; at least 2. The fitted guides
            are the proposals for log p(x).
        num_steps: how many steps of Adam.
        lr: the first step size, of the unconstrained parameters.
        log_likelihood: a better estimate of log p(x) of the same data, such as :func:`pyro_vae.ais` gives; a family that is
            too narrow for the posterior makes a poor proposal even at its best.
        seed: where the random numbers start; None goes on from the generators' state.
        progress: whether to show a progress bar, in a terminal.

    Raises:
        ValueError: a guide site depends on another's sample, has a distribution whose parameters are not known (a
            flow), or can't be reparameterised; `log_likelihood` is of other data; as :func:`pyro_vae.log_likelihood`.

    Warns:
        UserWarning: log p(x) is estimated here, and some data have a k-hat above 0.7.

    Example:
        The guide has the posterior's family and deviation, and its mean is off by 0.5.

        >>> import torch, pyro, pyro.distributions as dist, pyro_vae as pv
        >>> pyro.set_rng_seed(0)
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2 + 0.5, 0.5**0.5))
        >>> gaps = pv.inference_gaps(model, guide, torch.randn(50), 500, num_steps=300)
        >>> abs(round(gaps.approximation.value, 2)), round(gaps.amortisation.value, 2)
        (0.0, 0.25)

    References:
        Cremer, Li and Duvenaud (2018), *Inference Suboptimality in Variational Autoencoders*, ICML.
    """
    check_count("num_samples", num_samples, 2, ", to have an error bar")
    check_count("num_steps", num_steps, 1)
    if not 0 < lr < math.inf:
        raise PyroVAEError(f"expected a positive lr, got {lr!r}. Try {GAPS_LR}.")
    args = arguments(x)
    if log_likelihood is not None:
        check_same_data(log_likelihood, args)
    best, own = [], []
    with checked(model, guide, args) as data, rng.seeded(seed):
        pieces = data.minibatches(rows_at_once(args) // PARTICLES)
        nesting = find_max_plate_nesting(model, guide, pieces[0], {}, in_plate=True)
        with tqdm(
            total=len(pieces) * num_steps, leave=False, disable=None if progress else True, unit="step", desc="gaps"
        ) as bar:
            for piece in pieces:
                local = _LocalGuide(model, guide, piece, nesting)
                local.fit(num_steps, lr, bar)

                def pair(local: Program = local, piece: Args = piece) -> list[Summary]:
                    """Both guides' weights from one noise, which cancels in the amortisation gap."""
                    state, found = rng.get_state(), []
                    for each in (local, guide):
                        rng.set_state(state)
                        found.append(summarise(draw_weights(model, each, piece, num_samples, nesting=nesting)))
                    return found

                # The encoder's own member stays where, on samples apart from those that count, the search found no better.
                fitted, amortised = pair()
                better = fitted.elbo > amortised.elbo
                fitted, amortised = pair()
                best.append(Summary(*(torch.where(better, a, b) for a, b in zip(fitted, amortised, strict=True))))
                own.append(amortised.elbo)
    if log_likelihood is None:
        warn_of_high_k(torch.cat([summary.pareto_k for summary in best]), ADVICE, stacklevel=2)
        log_p = torch.cat([summary.per_datum for summary in best])
    else:
        log_p = log_likelihood.per_datum
    return Gaps(log_p, torch.cat([summary.elbo for summary in best]), torch.cat(own))


class _LocalGuide:
    """The guide with the parameters of each site's distribution free, for each datum; at first the guide's own."""

    def __init__(self, model: Program, guide: Program, args: Args, nesting: int) -> None:
        self.model, self.guide, self.args, self.nesting = model, guide, args, nesting
        run = draw(model, guide, args, 2, nesting)
        _check(run)
        self.fns = {name: site["fn"] for name, site in run.guide.items()}
        self.free: dict[str, dict[str, Tensor]] = {}
        for name, fn in self.fns.items():
            constraints = unwrapped(fn).arg_constraints
            values = {
                key: value[0].detach() for key, value in constructor_arguments(fn).items()
            }  # one particle's: all are equal
            self.free[name] = {k: transform_to(constraints[k]).inv(v).clone() for k, v in values.items()}

    def __call__(self, *args: Any) -> Any:
        with _Replaced({name: self._distribution(name) for name in self.fns}):
            return self.guide(*args)

    def _distribution(self, name: str) -> Any:
        fn, base = self.fns[name], unwrapped(self.fns[name])
        constraints = base.arg_constraints
        values = {key: transform_to(constraints[key])(value) for key, value in self.free[name].items()}
        local = type(base)(**values)
        local = local.to_event(fn.event_dim - base.event_dim)
        return local.mask(fn._mask[0] if isinstance(fn._mask, Tensor) else fn._mask) if _masked(fn) else local

    @torch.enable_grad()
    def fit(self, num_steps: int, lr: float, bar: Any) -> None:
        """Maximise the ELBO of every datum, all at once: they share nothing."""
        leaves = [value.requires_grad_() for site in self.free.values() for value in site.values()]
        objective = ELBO(PARTICLES, "monte_carlo", "stl", max_plate_nesting=self.nesting)
        adam = torch.optim.Adam(leaves, lr=lr)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, num_steps)
        total = [torch.zeros_like(leaf) for leaf in leaves]
        first = int((1 - AVERAGED) * num_steps)
        for step in range(num_steps):
            loss = objective.differentiable_loss(self.model, self, *self.args)
            for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
                leaf.grad = gradient
            adam.step()
            falling.step()
            if step >= first:
                for mean, leaf in zip(total, leaves, strict=True):
                    mean += leaf.detach() / (num_steps - first)
            bar.update()
        with torch.no_grad():
            for leaf, mean in zip(leaves, total, strict=True):
                leaf.copy_(mean)
        for leaf in leaves:
            leaf.requires_grad_(False)


class _Replaced(Messenger):
    """Puts other distributions at some sites."""

    def __init__(self, fns: dict[str, Any]) -> None:
        super().__init__()
        self.fns = fns

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.fns:
            msg["fn"] = self.fns[msg["name"]]


def _masked(fn: Any) -> bool:
    return isinstance(fn, MaskedDistribution)


def _has_family(fn: Any) -> bool:
    """Whether a distribution can be made again from parameters that are free of one another, with its mask outermost."""
    base, values = unwrapped(fn), constructor_arguments(fn)
    bounded = any(isinstance(bound, Tensor) for name in values for bound in vars(base.arg_constraints[name]).values())
    inner = fn.base_dist if _masked(fn) else fn
    if not values or bounded or getattr(inner, "_mask", None) is not None:
        return False
    layers = [fn]
    while hasattr(layers[-1], "base_dist") and layers[-1] is not base:
        layers.append(layers[-1].base_dist)
    if any(_masked(layer) for layer in layers[1:]):
        return False
    taken = inspect.signature(type(base)).parameters.values()
    needed = {a.name for a in taken if a.default is a.empty and a.kind is a.POSITIONAL_OR_KEYWORD}
    return needed <= values.keys()


def _check(run: Run) -> None:
    """Every site of the guide has a family of its own, whose parameters can be freed."""
    for name, site in run.guide.items():
        if name not in run.model or not _has_family(site["fn"]):
            raise PyroVAEError(
                f"guide site '{name}' has a distribution whose parameters are not known ({family(site['fn'])}): expected a "
                "parametric family at each latent site, such as a normal, whose best member can be searched for. Pass a "
                "guide of such sites."
            )
        if not same_for_all_particles(site):
            raise PyroVAEError(
                f"guide site '{name}' depends on another site's sample: expected a guide whose distributions depend on the "
                "data alone, since a conditional family has no parameters of its own for each datum. Sample the latents "
                "from one joint distribution, such as a multivariate normal."
            )
    for name in not_reparameterised(run.guide):
        raise PyroVAEError(
            f"guide site '{name}' can't be reparameterised ({family(run.guide[name]['fn'])}): expected a distribution with "
            "rsample, to maximise the ELBO by its pathwise gradient."
        )
