"""Inference gaps: how much of log p(x) - ELBO is due to the guide's family, and how much to its encoder."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import transform_to

from pyro_vae.checks import Seed
from pyro_vae.defaults import GAPS_LR, GAPS_STEPS, NUM_SAMPLES
from pyro_vae.engine import rng
from pyro_vae.engine.arguments import takes_program
from pyro_vae.engine.modules import PyroFunction
from pyro_vae.engine.program import Program, Run
from pyro_vae.engine.sites import family, layers, not_reparameterised, unwrapped
from pyro_vae.errors import PyroVAEError, require_count
from pyro_vae.evaluation.diagnostics import warn_of_high_k
from pyro_vae.evaluation.draws import draw_weights
from pyro_vae.evaluation.estimate import Estimate
from pyro_vae.evaluation.evidence import Evidence, LogLikelihood, check_same_data
from pyro_vae.evaluation.families import constructor_arguments, require_latents, same_for_all_particles, suffices
from pyro_vae.evaluation.fitting import minimise
from pyro_vae.evaluation.parts import checked_parts
from pyro_vae.evaluation.pieces import progress_bar
from pyro_vae.evaluation.proposals.guide import RefinedGuide
from pyro_vae.evaluation.runs import run
from pyro_vae.evaluation.sharing import sharing
from pyro_vae.objectives import ELBO
from pyro_vae.printed import Printed

PARTICLES = 8  # particles of the ELBO that is maximised for each datum
ADVICE = (
    "These weights are from the best member of the guide's family, so the approximation gap is probably too small. "
    "Pass log_likelihood=pv.log_likelihood(model, guide, x, refine=True)."
)


@dataclass(frozen=True, repr=False)
class Gaps(Printed):
    r"""The result of :func:`pyro_vae.inference_gaps`, in nats per datum.

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
        """log p(x) minus the best member's ELBO, which is the cost of the family. A more flexible family reduces it."""
        return Estimate.of(self.log_likelihood - self.best_elbo)

    @property
    def amortisation(self) -> Estimate:
        """The best member's ELBO minus the guide's, the cost of the encoder. A larger encoder reduces it."""
        return Estimate.of(self.best_elbo - self.elbo)

    @property
    def total(self) -> Estimate:
        """log p(x) minus the guide's ELBO, which is KL(q(z|x) || p(z|x))."""
        return Estimate.of(self.log_likelihood - self.elbo)

    def _statement(self) -> str:
        return (
            f"log p(x) - ELBO = {self.total} nats per datum = {self.approximation} (approximation) + "
            f"{self.amortisation} (amortisation), N = {len(self.elbo)}"
        )

    def _rows(self) -> dict[str, object]:
        return {
            "log p(x) - ELBO, nats per datum": self.total,
            "approximation gap": self.approximation,
            "amortisation gap": self.amortisation,
            "data N": len(self.elbo),
        }


@takes_program
def inference_gaps(
    model: PyroFunction,
    guide: PyroFunction,
    x: Any,
    num_samples: int = NUM_SAMPLES,
    *,
    num_steps: int = GAPS_STEPS,
    lr: float = GAPS_LR,
    log_likelihood: Evidence | None = None,
    vectorize_particles: bool = True,
    seed: Seed | None = None,
    distributed: bool | None = None,
    progress: bool = True,
) -> Gaps:
    r"""Split log p(x) - ELBO into the approximation gap of the guide's family and the amortisation gap of its encoder.

    .. math:: \log p(x) - \mathrm{ELBO}(q) =
        \underbrace{\log p(x) - \max_{q^* \in \mathcal Q} \mathrm{ELBO}(q^*)}_{\text{approximation gap}}
        + \underbrace{\max_{q^* \in \mathcal Q} \mathrm{ELBO}(q^*) - \mathrm{ELBO}(q)}_{\text{amortisation gap}}

    The family :math:`\mathcal Q` of a guide site is its distribution's, with every parameter free for every datum. Adam
    maximises the ELBO over the family, from the encoder's parameters, by the sticking-the-landing gradient. Its step
    size falls to zero, and the last half of the iterates is averaged.

    Arguments:
        model, x, vectorize_particles, seed, distributed, progress: see :func:`pyro_vae.log_likelihood`.
        guide: its guide. The distributions at its sites must depend on the data alone, not on one another's samples.
            A guide of :func:`pyro_vae.refine` has its own proposal for each datum: it has no amortisation gap, and
            nothing is fitted.
        num_samples: the number of samples for each ELBO and for log p(x), at least 2. The proposals for log p(x) are
            the fitted guides.
        num_steps: the number of steps of Adam.
        lr: the first step size, for the unconstrained parameters.
        log_likelihood: a better estimate of log p(x) of the same data, such as ``pv.log_likelihood(..., refine=True)``
            or that of :func:`pyro_vae.ais`. Where the family is too narrow for the posterior, even its best member is a
            poor proposal.

    Raises:
        ValueError: a guide site depends on another site's sample, has a distribution whose parameters are not known (a
            flow), or can't be reparameterised; `log_likelihood` is of other data; or an error of
            :func:`pyro_vae.log_likelihood`.

    Warns:
        UserWarning: `log_likelihood` is None, and some data have a k-hat above 0.7.

    Example:
        The guide has the posterior's family and standard deviation, and its mean is off by 0.5.

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
    settings = {"num_samples": num_samples, "num_steps": num_steps, "lr": lr, "log_likelihood": log_likelihood}
    settings["vectorize_particles"] = vectorize_particles
    with sharing(distributed, "pv.inference_gaps", seed, settings, progress) as share:
        require_count("num_samples", num_samples, least=2, why=", to have an error bar")
        require_count("num_steps", num_steps)
        if not 0 < lr <= torch.finfo(torch.float32).max:
            raise PyroVAEError(f"expected a positive lr, got {lr!r}. Try {GAPS_LR}.")

        def estimates(program: Program) -> tuple[LogLikelihood, LogLikelihood]:
            if isinstance(guide, RefinedGuide):
                own = LogLikelihood.from_weights(draw_weights(program, num_samples, vectorize_particles))
                return own, own
            local = _FreeSites(program, vectorize_particles)
            local.fit(num_steps, lr, bar)
            return _best_and_own(program, local.guide, num_samples, vectorize_particles)

        results: list[list[LogLikelihood]] = []
        with checked_parts(model, guide, x, None, progress=share.progress) as parts:
            check_same_data(log_likelihood, parts.sure_number)
            for data in share.parts(parts):
                programs = data.programs(PARTICLES, vectorize_particles)
                with progress_bar(len(share.own(len(programs))) * num_steps, "step", "gaps", share.progress) as bar:
                    found = share.each(programs, estimates, data.device)
                number = len(data.program.args[0])
                results.append([LogLikelihood.joined(each, number, data.device) for each in zip(*found, strict=True)])
            check_same_data(log_likelihood, parts.seen)
        best, own = (LogLikelihood.together(each) for each in zip(*results, strict=True))
        if log_likelihood is None and share.speaks:
            warn_of_high_k(best.pareto_k, ADVICE)
    return Gaps((log_likelihood or best).per_datum, best.elbo, own.elbo)


def _best_and_own(
    program: Program, local: PyroFunction, num_samples: int, vectorize: bool
) -> tuple[LogLikelihood, LogLikelihood]:
    """The estimates from the best member of the family for each datum, and those from the guide itself."""

    def estimates() -> list[LogLikelihood]:
        """Both guides' estimates from the same noise, which cancels in the amortisation gap."""
        state, found = rng.get_state(), []
        for each in (replace(program, guide=local), program):
            rng.set_state(state)
            found.append(LogLikelihood.from_weights(draw_weights(each, num_samples, vectorize)))
        return found

    # Where the fit improved nothing, the best member is the encoder's. Separate samples decide that, or the selection
    # would bias the estimates.
    fitted, own = estimates()
    improved = fitted.elbo > own.elbo
    fitted, own = estimates()
    return fitted.where(improved, own), own


class _Unscaled(Messenger):
    """A handler that takes scales away: log p(x) of a datum has none."""

    def _pyro_sample(self, msg: Any) -> None:
        msg["scale"] = 1.0


class _FreeSites(Messenger):
    """A handler that gives the guide's sites free parameters for each datum, which start at the guide's own values."""

    def __init__(self, program: Program, vectorize: bool) -> None:
        super().__init__()
        self.program, self.guide, self.vectorize = program, self(program.guide_or_prior), vectorize
        drawn = run(program, 2, vectorize)
        _check(drawn)
        self.fns = {name: site["fn"] for name, site in drawn.guide.items()}
        self.free: dict[str, dict[str, Tensor]] = {}
        for name, fn in self.fns.items():
            constraints = unwrapped(fn).arg_constraints
            # All particles have the same parameters, so the first one's serve.
            values = {key: value[0].detach() for key, value in constructor_arguments(fn).items()}
            self.free[name] = {k: transform_to(constraints[k]).inv(v).clone() for k, v in values.items()}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.fns:
            return
        fn, free = self.fns[msg["name"]], self.free[msg["name"]]
        base = unwrapped(fn)
        values = {key: transform_to(base.arg_constraints[key])(value) for key, value in free.items()}
        msg["fn"] = type(base)(**values).to_event(fn.event_dim - base.event_dim)
        if isinstance(fn, MaskedDistribution):
            msg["fn"] = msg["fn"].mask(fn._mask[0] if isinstance(fn._mask, Tensor) else fn._mask)

    def fit(self, num_steps: int, lr: float, bar: Any) -> None:
        """Maximise the ELBO of all data at once; no two data share a parameter."""
        leaves = [value for site in self.free.values() for value in site.values()]
        options: Any = {"max_plate_nesting": self.program.nesting, "vectorize_particles": self.vectorize}
        objective = ELBO(PARTICLES, "monte_carlo", "stl", **options)
        model, guide = (_Unscaled()(function) for function in (self.program.model, self.guide))
        minimise(lambda: objective.differentiable_loss(model, guide, *self.program.args), leaves, num_steps, lr, bar)


def _has_family(fn: Any) -> bool:
    """Whether a distribution can be rebuilt from independent parameters and, outermost, its mask."""
    base, values = unwrapped(fn), constructor_arguments(fn)
    bounded = any(isinstance(bound, Tensor) for name in values for bound in vars(base.arg_constraints[name]).values())
    inner_mask = any(isinstance(layer, MaskedDistribution) for layer in [*layers(fn)][1:])
    return suffices(values, fn) and not bounded and not inner_mask


def _check(run: Run) -> None:
    """Raise an error unless each guide site has a parametric, reparameterised family that depends on x alone."""
    require_latents(run)
    for name, site in run.guide.items():
        if name not in run.model or not _has_family(site["fn"]):
            raise PyroVAEError(
                f"guide site '{name}' has a distribution whose parameters are not known ({family(site['fn'])}): "
                "expected a parametric family, such as a normal, at each latent site, so that its best member can be "
                "found. Pass a guide with such sites."
            )
        if not same_for_all_particles(site):
            raise PyroVAEError(
                f"guide site '{name}' depends on another site's sample: expected a guide whose distributions depend on "
                "the data alone, since a conditional family has no free parameters for each datum. Sample the latents "
                "from one joint distribution, such as a multivariate normal."
            )
    for name in not_reparameterised(run.guide):
        raise PyroVAEError(
            f"guide site '{name}' can't be reparameterised ({family(run.guide[name]['fn'])}): expected a distribution "
            "with rsample, to maximise the ELBO by its pathwise gradient. Choose a reparameterised family."
        )
