"""Checks of an objective: its reduction's laws, its mean, and every estimator of its gradient."""

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.errors import PyroVAEError
from pyro_vae.objectives import ELBO, RWS, Objective
from pyro_vae.testing.compiled import check_compiled
from pyro_vae.testing.programs import BernoulliProgram, NormalProgram, Outcomes, SmallProgram, X, leaves
from pyro_vae.testing.reductions import check_reduction
from pyro_vae.testing.reports import Report, reproducible
from pyro_vae.testing.slopes import derivatives

COPIES = 10_000  # of each datum, which one call of the objective bounds
MOST_TUPLES = 2**18  # outcomes of all particles together, over which an exact mean is a sum
NODES = 40  # of a normal latent, at most
FEWEST_NODES = 10
OPTIONS = ("vectorize_particles", "max_plate_nesting", "chunk_size")  # of every objective

Mean = Callable[[Tensor, Tensor, Tensor], Tensor]


def check_objective(
    objective: Objective | Callable[..., Objective],
    *,
    exact: Mean | None = None,
    biased: Collection[str] | None = None,
    tight: bool = True,
    programs: Sequence[SmallProgram] | None = None,
    compiled: bool = False,
    seed: int = 0,
) -> None:
    r"""Check an objective: its laws, its value and each of its gradients against exact means, and its forms of running.

    With K samples for each datum, the exact mean over small programs is a sum over the outcomes :math:`o` of the guide
    (Gauss-Hermite nodes of a normal latent, both values of a Bernoulli one), with probabilities :math:`\pi`,

    .. math:: \mathbb E\, R(\log w_1, \dots, \log w_K) = \sum_{o_1, \dots, o_K} \pi_{o_1} \cdots \pi_{o_K}\,
        R(\log w_{o_1}, \dots, \log w_{o_K})

    The checks by name:

    ``shapes``, ``columns``
        `reduce` takes (K, N) to (N,), and a datum's bound depends on the datum's own column.
    ``equal weights``, ``constant factor``
        :math:`R(c, \dots, c) = c` and :math:`R(\log w + c) = R(\log w) + c`. Then the bound is log p(x) at the exact
        posterior.
    ``slope``, ``curvature``
        the derivatives of `reduce` and `reduce_for_guide` against finite differences.
    ``float32``
        `reduce` in float32 against float64, also for log-weights that are far apart.
    ``mean``
        the mean of 10,000 bounds from :meth:`pyro_vae.Objective.bound` against the exact mean, by a z-test, in float64
        and float32.
    ``loss``
        :meth:`pyro_vae.Objective.differentiable_loss` is minus the sum of the bounds.
    ``gradient NAME``
        each estimator in `objective.gradients` against the derivative of the exact mean, by a z-test. The model's
        parameters follow `reduce`, the guide's follow `reduce_for_guide`.
    ``chunks``
        particles in chunks, and one by one, give the same bound and gradient.
    ``compiled``
        a compiled step gives the loss and the gradient of an uncompiled one.

    A z-test allows five standard errors. A program is skipped for an estimator that refuses it, as a discrete guide
    has no path. Each estimator has to accept one program.

    Arguments:
        objective: an objective with at most five samples, which keeps its constructor's arguments as attributes of the
            same names; or a function of the keywords `gradient`, `chunk_size` and `vectorize_particles` that returns
            one.
        exact: the bound as a function of log p(x|z), log p(z) and log q(z|x), each (K, M), to (M,), in nats. None is
            `reduce` of the log-weights, with the KL times beta for :class:`pyro_vae.ELBO`.
        biased: the gradients whose guide part is biased. Only the model's parameters are checked for these. None is
            ``"stl"`` (unless the reduction is linear), ``"covariance"``, and the gradient of :class:`pyro_vae.RWS`.
        tight: whether the bound is log p(x) at the exact posterior. False leaves ``equal weights`` and ``constant
            factor`` out.
        programs: the small programs to check on. None is one with a normal latent and one with a Bernoulli latent.
        compiled: whether to compile a step, which takes seconds and needs a C++ compiler.
        seed: where the random numbers start. The state of the random number generator is left as it was.

    Raises:
        AssertionError: a check fails. The message gives its name, the expected value, the value found, and the likely
            cause.
        ValueError: an argument is invalid, or the objective has too many samples for an exact mean.

    Example:
        >>> import pyro_vae as pv
        >>> class Mean(pv.Objective):
        ...     family = "mean"
        ...
        ...     def reduce(self, log_weights):
        ...         return log_weights.mean(0)
        >>> pv.testing.check_objective(Mean(num_particles=2))
    """
    variants = Variants(objective)
    whole = variants(chunk_size=None, vectorize_particles=True) or variants.base
    if isinstance(whole, ELBO) and whole.free_bits:
        raise PyroVAEError(
            f"expected a bound of each datum alone, got free_bits={whole.free_bits}, whose KL is a minibatch's mean. "
            "Check it with free_bits=0."
        )
    programs = [NormalProgram(), BernoulliProgram()] if programs is None else programs
    report = Report(repr(whole))
    with reproducible(seed):
        linear = check_reduction(report, whole, tight)
        biased = _biased(whole, linear) if biased is None else biased
        known = [_exact(whole, program, exact or _bound_of(whole)) for program in programs]
        _check_value(report, whole, known)
        for name, variant in variants.by_gradient().items():
            _check_gradient(report, variant, name, known, name in biased, seed)
            _check_apart(report, variants, variant, name, programs, seed)
        if compiled:
            _check_compiled(report, variants, programs)


@dataclass
class Known:
    """A program with the exact mean of a bound and its derivatives, each with the error of its quadrature.

    Attributes:
        program: the program.
        value: the mean of each datum's bound, (2,).
        gradient: its derivative by each parameter, (2, P).
        model_only: whether a parameter is the model's alone, P booleans.
        value_error: the error of `value`.
        gradient_error: the error of `gradient`.
    """

    program: SmallProgram
    value: Tensor
    gradient: Tensor
    model_only: Tensor
    value_error: Tensor
    gradient_error: Tensor


class Variants:
    """Makes an objective again with another gradient, or with particles that run apart.

    Arguments:
        objective: an objective, or a function of keywords that gives one.
    """

    def __init__(self, objective: Objective | Callable[..., Objective]) -> None:
        if isinstance(objective, Objective):
            self.base, self.make = objective, type(objective)
            parameters = inspect.signature(type(objective).__init__).parameters.values()
            named = [parameter for parameter in parameters if parameter.name != "self"]
        else:
            if not callable(objective):
                raise PyroVAEError(f"expected an objective such as pv.IWAE(3), got {objective!r}.")
            self.base, self.make = objective(), objective  # type: ignore[assignment]
            if not isinstance(self.base, Objective):
                raise PyroVAEError(f"expected a function that gives an objective, got one that gives {self.base!r}.")
            named = list(inspect.signature(objective).parameters.values())
        self.takes_more = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in named)
        single = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        self.names = [parameter.name for parameter in named if parameter.kind in single]
        self.settings = self._settings() if isinstance(objective, Objective) else {}

    def _settings(self) -> dict[str, Any]:
        """The constructor's arguments, read from the attributes of the same names."""
        missing = [name for name in self.names if not hasattr(self.base, name)]
        if missing:
            kind = type(self.base).__name__
            raise PyroVAEError(
                f"expected {kind} to keep its argument '{missing[0]}' as an attribute, so that it can be made again "
                f"with other gradients, got none. Write self.{missing[0]} = {missing[0]}, or pass a function: lambda "
                f"**options: {kind}(..., **options)."
            )
        names = [*self.names, *(name for name in OPTIONS if self.takes_more and name not in self.names)]
        return {name: getattr(self.base, name) for name in names}

    def __call__(self, **changes: Any) -> Objective | None:
        """The objective with some arguments changed; None if it does not take them, or refuses their values."""
        if not all(self.takes_more or name in self.names for name in changes):
            return None
        try:
            return self.make(**self.settings | changes)
        except PyroVAEError:
            return None

    def by_gradient(self) -> dict[str, Objective]:
        """The objective with each gradient that it takes next to its other arguments, all particles in one run."""
        apart = {"chunk_size": None, "vectorize_particles": True}
        found: dict[str, Objective] = {}
        for name in self.base.gradients:
            variant = self(gradient=name, **apart) or self(gradient=name)
            if variant is not None:
                found[name] = variant
        return found or {self.base.gradient: self.base}


def _biased(objective: Objective, linear: bool) -> set[str]:
    """The gradients of this package that are biased for the guide."""
    if isinstance(objective, RWS):
        return set(objective.gradients)
    return {"covariance"} if linear else {"covariance", "stl"}


def _bound_of(objective: Objective) -> Mean:
    """The bound as a function of the three log-densities."""
    beta = objective.scheduled()["beta"] if isinstance(objective, ELBO) else 1.0
    return lambda likelihood, prior, q: objective.reduce(likelihood + beta * (prior - q))


def _exact(objective: Objective, program: SmallProgram, mean: Mean) -> Known:
    nodes = _nodes(objective, program)
    one_bound = type(objective).reduce_for_guide is Objective.reduce_for_guide

    def for_guide(likelihood: Tensor, prior: Tensor, q: Tensor) -> Tensor:
        return objective.reduce_for_guide(likelihood + prior - q)

    def at(num_nodes: int) -> tuple[Tensor, Tensor, Tensor]:
        p_model, p_guide = leaves(program.p, len(X)), leaves(program.p, len(X))
        outcomes = Outcomes(program, num_nodes, X, p_model, p_guide)
        matrices = outcomes.log_likelihood, outcomes.log_prior, outcomes.log_q
        value = outcomes.mean(mean, objective.num_samples, *matrices)
        if not value.requires_grad:
            raise PyroVAEError(
                "expected exact to be differentiable, got a value without gradients. Write it in PyTorch."
            )
        guide = value if one_bound else outcomes.mean(for_guide, objective.num_samples, *matrices)
        by_model = torch.autograd.grad(value.sum(), list(p_model.values()), retain_graph=True, allow_unused=True)
        by_guide = torch.autograd.grad(guide.sum(), list(p_guide.values()), allow_unused=True)
        used = torch.tensor([gradient is not None for gradient in by_guide])
        zero = torch.zeros_like(X)
        both = zip(by_model, by_guide, strict=True)
        total = [(zero if m is None else m) + (zero if g is None else g) for m, g in both]
        return value.detach(), torch.stack(total, -1), ~used

    value, gradient, model_only = at(nodes)
    coarse_value, coarse_gradient, _ = at(max(1, nodes - 3))
    value_error, gradient_error = (value - coarse_value).abs(), (gradient - coarse_gradient).abs()
    return Known(program, value, gradient, model_only, value_error, gradient_error)


def _nodes(objective: Objective, program: SmallProgram) -> int:
    """How many nodes a normal latent may have; refuses an objective of too many samples."""
    count, normal = objective.num_samples, _normal(program)
    rest = MOST_TUPLES / 2.0 ** (count * normal.count(False))
    nodes = min(NODES, int(rest ** (1 / (count * normal.count(True))) + 1e-9)) if any(normal) else NODES
    if rest < 1 or nodes < FEWEST_NODES:
        raise PyroVAEError(
            f"expected an objective of few samples, whose exact mean is a sum over all outcomes, got {count} samples "
            f"of {len(normal)} latents. Check it with num_particles=2 or 3."
        )
    return nodes


def _normal(program: SmallProgram) -> list[bool]:
    """Whether each latent is normal under the guide, or else Bernoulli."""
    z: dict[str, Tensor] = {}
    found = []
    with torch.no_grad():
        for name in program.latents:
            q = program.posterior(program.p, name, z, X)
            found.append(isinstance(q, dist.Normal))
            z[name] = q.sample()
    return found


def _refusals(known: Sequence[Known], run: Callable[[Known], None]) -> Iterator[PyroVAEError]:
    """Run a check on each program, and give the refusals."""
    for case in known:
        try:
            run(case)
        except PyroVAEError as error:
            yield error


def _check_value(report: Report, objective: Objective, known: Sequence[Known]) -> None:
    def run(case: Known, dtype: torch.dtype) -> None:
        x = X.to(dtype).repeat(COPIES)
        program = case.program.with_parameters(len(x), dtype)
        with torch.no_grad():
            bounds = objective.bound(program.model, program.guide, x)
        cause = "The bound is not the mean that `reduce`, or `exact`, gives. Look for a factor, or for a term left out."
        report.require(bounds.shape == x.shape, "mean", f"bounds of shape {tuple(x.shape)}", tuple(bounds.shape), cause)
        report.require(
            bounds.dtype == dtype, "mean", f"bounds of {dtype}", bounds.dtype, "A tensor is made in another type."
        )
        rounding = 0.0 if dtype == torch.float64 else 1e-5 * (1 + case.value.abs())
        slack = case.value_error + rounding
        name = f"on {type(case.program).__name__}, {dtype}, the mean"
        report.z_test("mean", bounds.reshape(COPIES, -1), case.value, cause, slack=slack, what=lambda index: name)

    for dtype in (torch.float64, torch.float32):
        refusals = list(_refusals(known, partial(run, dtype=dtype)))
        _require_one(report, "mean", refusals, known)


def _require_one(report: Report, check: str, refusals: Sequence[PyroVAEError], known: Sequence[Known]) -> None:
    if len(refusals) == len(known):
        report.fail(
            check,
            "one program at least that takes it",
            f"refusals only: {refusals[0]}",
            "Pass `programs` that take it.",
        )


def _check_gradient(
    report: Report, objective: Objective, name: str, known: Sequence[Known], biased: bool, seed: int
) -> None:
    check = f"gradient {name}"

    def run(case: Known) -> None:
        x = X.repeat(COPIES)
        program = case.program.with_parameters(len(x))
        objective.bound(program.model, program.guide, x)  # finds the plates, once
        torch.manual_seed(seed)
        bounds = objective.bound(program.model, program.guide, x).detach()
        torch.manual_seed(seed)
        loss = objective.differentiable_loss(program.model, program.guide, x)
        cause = "The differentiable loss is another number than the bound."
        rounding = 1e-10 * (1 + bounds.abs().sum().item())
        report.close("loss", loss, -bounds.sum(), rounding, cause, f"minus the sum of the bounds ({name}),")
        found = derivatives(loss, program.parameters())
        draws = -torch.stack(found, -1).reshape(COPIES, len(X), -1)
        kept = case.model_only if biased else torch.ones_like(case.model_only)
        names = [parameter for parameter, keep in zip(program.p, kept.tolist(), strict=True) if keep]
        where = type(case.program).__name__
        report.z_test(
            check,
            draws[..., kept],
            case.gradient[:, kept],
            f"If the estimator is biased by design, pass biased=('{name}',). Else look for a detached term.",
            slack=case.gradient_error[:, kept],
            what=lambda index: f"on {where}, the derivative by {names[index[1]]}",
        )

    _require_one(report, check, list(_refusals(known, run)), known)


def _check_apart(
    report: Report, variants: Variants, whole: Objective, name: str, programs: Sequence[SmallProgram], seed: int
) -> None:
    """Particles in chunks and one by one against all at once."""
    if whole.num_samples == 1:
        return
    x = X.repeat(3)
    for changes in ({"chunk_size": 1}, {"vectorize_particles": False}):
        apart = variants(gradient=name, **changes) or (variants(**changes) if name == variants.base.gradient else None)
        if apart is None:
            continue
        for program in programs:
            if not apart.vectorize_particles and _normal(program) != [True]:
                continue  # it draws other numbers, particle by particle
            values = []
            for objective in (whole, apart):
                try:
                    objective.bound(program.model, program.guide, x)
                    torch.manual_seed(seed)
                    loss = objective.differentiable_loss(program.model, program.guide, x)
                except PyroVAEError:
                    break
                found = derivatives(loss, program.parameters())
                values.append(torch.stack([loss, *found]).detach())
            if len(values) == 2:
                cause = "Something depends on how many particles run at once. Let `reduce` alone combine them."
                tolerance = 1e-9 * (1 + values[0].abs().max().item())
                report.close("chunks", values[1], values[0], tolerance, cause, f"with {changes}, {name}: the")


def _check_compiled(report: Report, variants: Variants, programs: Sequence[SmallProgram]) -> None:
    objective = variants(chunk_size=None, vectorize_particles=True) or variants.base
    refusals = 0
    for program in programs:
        try:
            objective.differentiable_loss(program.model, program.guide, X)
        except PyroVAEError:
            refusals += 1
            continue
        check_compiled(report, program.model, program.guide, objective, program.parameters(), X)
    if refusals == len(programs):
        report.fail("compiled", "one program at least that takes it", "refusals only", "Pass `programs` that take it.")
