"""The base class of every objective: its loss, its gradients, its bound per datum."""

import functools
import inspect
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self, TypedDict

import pyro.infer
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.checks import Count, Whole, checked
from pyro_vae.engine.arguments import takes_program
from pyro_vae.engine.mixing import check_apart
from pyro_vae.engine.modules import PyroFunction
from pyro_vae.engine.particles import Particles
from pyro_vae.engine.program import Needs, Program, Run
from pyro_vae.engine.sites import Sites, is_factor
from pyro_vae.engine.weights import Terms, datum_scale, log_density, terms
from pyro_vae.errors import PyroVAEError
from pyro_vae.objectives import gradients
from pyro_vae.objectives.densities import Densities, densities, of_log_weights, weighted, with_gradient
from pyro_vae.objectives.gradients import ESTIMATORS, Estimator
from pyro_vae.objectives.known import Known
from pyro_vae.objectives.module import ObjectiveModule

Gradient = Literal["pathwise", "stl", "dreg", "score", "vimco"]
SMALLEST = 1e-20  # a factor on the model's density that may be divided by; far below float32's rounding of the largest


class Options(TypedDict, total=False):
    """The keyword arguments of every objective; see :class:`Objective`."""

    vectorize_particles: bool
    max_plate_nesting: Whole | None
    chunk_size: Count | None


_REDUCTIONS = ("reduce", "reduce_for_guide")
_OF_A_BOUND = (*_REDUCTIONS, "curvature")


class Objective(pyro.infer.ELBO):
    r"""A variational bound: the base class. It turns a reduction of log-weights into a loss and its gradients.

    Use it wherever Pyro takes a loss: ``SVI(model, guide, optim, loss=objective)``. ``objective(vae)`` and
    ``objective(model, guide)`` are a :class:`torch.nn.Module` with the program's parameters, whose call returns the
    differentiable loss.

    To define a bound, write a subclass with a `reduce`; it inherits the gradients. With K particles, `gradient` is

    ``"pathwise"``
        the derivative through the reparameterised samples (Kingma and Welling 2014): unbiased, unless the log-weight
        jumps as z moves (a threshold, a rounding). :func:`pyro_vae.compare` shows such a bias as `grad_bias_z`.
    ``"stl"``
        sticking the landing (Roeder et al. 2017): pathwise without the score, which has mean zero in the ELBO. It is
        unbiased for the ELBO, and zero at the exact posterior. For other bounds with K > 1 it is **biased**.
    ``"dreg"``
        doubly reparameterised (Tucker et al. 2019): pathwise, with the score turned into a path. It is unbiased, and
        zero at the exact posterior. For IWAE its signal-to-noise ratio rises with K. For the ELBO it is ``"stl"``.
    ``"score"``
        the score function (Williams 1992), with the mean log-weight of the other data as baseline. It serves any guide
        and is noisy. It is unbiased unless a datum's weight depends on other data, as with batch norm in training mode.
        If only some sites can be reparameterised, these get the pathwise gradient.
    ``"vimco"``
        the score function with the mean log-weight of the other particles as baseline (Mnih and Rezende 2016). It is
        unbiased, serves any guide, and needs K of at least 2.

    *Unbiased* refers to the gradient of the bound's mean at this K. :mod:`pyro_vae.objectives.gradients` has the table
    of the estimators and their papers; a new one is a row. A subclass may set `gradients` to a tuple of their names, or
    to a dictionary from names to :class:`pyro_vae.objectives.gradients.Estimator`.

    Arguments:
        num_particles: K, the number of samples drawn from the guide for each datum.
        gradient: the estimator of the gradient, one of the above.
        vectorize_particles: whether the program runs once, with a leading dimension for the particles. False runs it K
            times, for networks that take no leading dimension; see :func:`pyro_vae.log_weights`.
        max_plate_nesting: how many dimensions the program's plates take; None finds it, by one more run.
        chunk_size: run the model for so many particles at a time, which needs less memory. The result is the same, and
            the model runs twice where gradients are recorded.

    Raises:
        ValueError: an argument is invalid, or `gradients` names an estimator that does not exist. When it runs: the
            program has no log-weight per datum (see :func:`pyro_vae.log_weights`); or the gradient needs a path through
            a guide site that can't be reparameterised; or it takes the score of a site whose support depends on
            parameters, such as a Uniform with learned bounds.

    Example:
        The bound of the largest weight, with all of these gradients:

        >>> import torch, pyro_vae as pv
        >>> class Best(pv.Objective):
        ...     family = "best weight"
        ...
        ...     def reduce(self, log_weights):
        ...         return log_weights.amax(0) - torch.tensor(len(log_weights)).log()
        >>> vae = pv.mlp_vae((3,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
        >>> Best(4, gradient="dreg")(vae)(torch.randn(5, 3)).backward()
    """

    #: The name of its kind in tables and legends; an instance's `name` adds its settings and the gradient.
    family: ClassVar[str]
    #: The estimators of its gradient, by name.
    gradients: ClassVar[dict[str, Estimator]] = ESTIMATORS
    _on_run: Callable[[Run], None] | None = None  # told of each run that a loss makes

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        first = {name: next(i for i, base in enumerate(cls.__mro__) if name in vars(base)) for name in _OF_A_BOUND}
        parents = [base for base in cls.__mro__[1:] if issubclass(base, Objective)]
        rows, names = parents[0].gradients, cls.gradients
        if any(getattr(cls, name) is not getattr(parents[0], name) for name in _REDUCTIONS):
            # What serves the parent's bound alone gives way to what serves any.
            rows = {n: r if r.any_bound else ESTIMATORS[n] for n, r in rows.items() if r.any_bound or n in ESTIMATORS}
        if first["curvature"] > min(first[name] for name in _REDUCTIONS):
            cls.curvature = Objective.curvature  # type: ignore[method-assign]
        if any(names is parent.gradients for parent in parents):
            names = rows
        cls.gradients = names if isinstance(names, dict) else gradients.rows_of(cls.__name__, names, rows)

    @checked
    def __init__(
        self,
        num_particles: Count = 1,
        gradient: str = "pathwise",
        *,
        vectorize_particles: bool = True,
        max_plate_nesting: Whole | None = None,
        chunk_size: Count | None = None,
    ) -> None:
        Particles(num_particles, vectorize_particles, chunk_size)  # refuses invalid arguments
        super().__init__(num_particles=num_particles, vectorize_particles=vectorize_particles)
        if gradient not in self.gradients:
            raise PyroVAEError(f"expected gradient to be one of {', '.join(self.gradients)}, got {gradient!r}.")
        self.gradient = gradient
        self.max_plate_nesting = max_plate_nesting
        self.chunk_size = chunk_size
        self._check_particles()
        self.step = 0  #: how many differentiable losses it has computed, which is the argument of a schedule
        self._known = Known()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_known": Known()}  # a lambda can't be pickled, and a deep copy would copy the networks

    def __copy__(self) -> Self:
        found = object.__new__(type(self))
        vars(found).update(vars(self))
        return found

    def _check_particles(self) -> None:
        fewest, even = self.estimator.fewest, self.estimator.even
        if self.num_samples < fewest or (even and self.num_samples % 2):
            raise PyroVAEError(
                f"gradient={self.gradient!r} compares each particle with others: expected num_particles to be at least "
                f"{fewest}{' and even' if even else ''}, got {self.num_samples}. Take {fewest}, or gradient='score'."
            )
        if self.estimator.sampler is not None and (self.chunk_size is not None or not self.vectorize_particles):
            raise PyroVAEError(
                f"gradient={self.gradient!r} compares particles of one run: expected vectorize_particles=True and no "
                "chunk_size, got particles in several runs. Drop these, or use gradient='vimco'."
            )

    @takes_program
    def __call__(self, model: PyroFunction, guide: PyroFunction) -> ObjectiveModule:
        """The loss as a module with the program's parameters: called with the program's arguments, it returns the loss.

        Arguments:
            model, guide: as in :meth:`bound`.
        """
        return ObjectiveModule(self, model, guide)

    @property
    def estimator(self) -> Estimator:
        """The row of its gradient; derived, so that an objective holds no function and can be pickled."""
        return self.gradients[self.gradient]

    @property
    def num_samples(self) -> int:
        """How many samples are drawn from the guide for each datum in all."""
        return self.num_particles

    @property
    def name(self) -> str:
        """Its name in tables and legends."""
        return ", ".join([self.family, *self._settings()]) + self.estimator.suffix

    @property
    def is_bound(self) -> bool:
        """Whether its mean is a lower bound on log p(x) with its settings, if the guide has no factor."""
        return True

    @property
    def quantity(self) -> str:
        """What its value is called on an axis."""
        return "bound on log p(x)" if self.is_bound else self.name

    def _settings(self) -> list[str]:
        """What its name says of its settings."""
        return []

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._arguments().items())})"

    def _arguments(self) -> dict[str, Any]:
        """The arguments that it was made with, where they are not the defaults; the number of particles always."""
        parameters: dict[str, inspect.Parameter] = {}
        for cls in type(self).__mro__:
            if issubclass(cls, Objective) and "__init__" in vars(cls):
                own = inspect.signature(vars(cls)["__init__"]).parameters
                parameters = parameters | {n: p for n, p in own.items() if n not in parameters}
                if not any(p.kind is p.VAR_KEYWORD for p in own.values()):
                    break
        values = {name: getattr(self, name) for name in parameters if name != "self" and hasattr(self, name)}
        return {n: v for n, v in values.items() if n == "num_particles" or v != parameters[n].default}

    def scheduled(self) -> dict[str, float]:
        """The settings that may change from step to step, by attribute, with their values at this :attr:`step`."""
        return {}

    @takes_program
    def bound(self, model: PyroFunction, guide: PyroFunction, *args: Any, **kwargs: Any) -> Tensor:
        """The bound on log p(x_n) for each datum, in nats, of shape (N,); differentiable.

        A scale, such as the N / b of a subsampled plate, is left out: these are nats of one datum. Modules stay in
        their mode: call ``vae.eval()`` first to turn dropout off and to fix the statistics of batch norm.

        Arguments:
            model: a Pyro model; or a model/guide pair, or a tuple ``(model, guide)``, in place of `model` and `guide`.
            guide: its guide.
            *args: the arguments of both.
            **kwargs: the keyword arguments of both.

        Raises:
            ValueError: the program has no bound per datum; see :func:`pyro_vae.log_weights`.
        """
        program = self.program(model, guide, args, kwargs, per_datum=True)
        return self._estimate(Densities.joined(self._particles().read(program, self._read)))

    @takes_program
    def differentiable_loss(self, model: PyroFunction, guide: PyroFunction, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the sum over data of scale times bound, in nats: a scalar tensor to differentiate."""
        loss = self._loss(self.program(model, guide, args, kwargs))
        self.step += torch.is_grad_enabled()
        return loss

    @takes_program
    def loss(self, model: PyroFunction, guide: PyroFunction, *args: Any, **kwargs: Any) -> float:
        """The value of :meth:`differentiable_loss`."""
        with torch.no_grad():
            return self._loss(self.program(model, guide, args, kwargs)).item()

    @takes_program
    def loss_and_grads(self, model: PyroFunction, guide: PyroFunction, *args: Any, **kwargs: Any) -> float:
        """The value of :meth:`differentiable_loss`; its gradient is added to each parameter's ``grad``."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.item()

    @abstractmethod
    def reduce(self, log_weights: Tensor) -> Tensor:
        """Turn log-weights (K, N) into the bound (N,)."""

    def reduce_for_guide(self, log_weights: Tensor) -> Tensor:
        """The bound (N,) whose gradient the guide follows: the model's, except in :class:`PIWAE`."""
        return self.reduce(log_weights)

    @of_log_weights
    def curvature(self, log_weights: Tensor) -> Tensor:
        """The second derivative of :meth:`reduce_for_guide` by each log-weight, (K, N), for the DReG estimator.

        This serves any reduction, in time that grows as the square of K. A subclass may define a closed form.
        """
        return gradients.curvature(self.reduce_for_guide, log_weights)

    def needs(self) -> Needs:
        """What its loss needs of the runs."""
        row, two = self.estimator, self._has_two_reductions()
        return Needs(
            path=row.path,
            stopped=not row.score,
            samples=row.curvature or two,
            of_mean=row.of_mean,
            factors=True,
            sampler=row.sampler,
        )

    def program(
        self,
        model: PyroFunction,
        guide: PyroFunction,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        per_datum: bool | None = None,
    ) -> Program:
        """The program as this objective runs it; `per_datum` demands a batch plate, which some losses do without."""
        needs = self.needs() if per_datum is None else replace(self.needs(), per_datum=per_datum, whole=False)
        program = Program(model, guide, args, kwargs, needs, self.max_plate_nesting)
        if not (self._run_together() or needs.per_datum):
            return program
        nesting = self._known.nesting(program, self.step)
        if nesting is not None:
            return replace(program, nesting=nesting)
        program = program.with_nesting()
        self.remember(program)
        return program

    def remember(self, program: Program, traces: tuple[Trace, Trace] | None = None) -> None:
        """Keep the nesting of a program's plates, so that later calls need no run to find it.

        A program that mixes particles or data is refused. Its traces for one particle, if given, serve this check.
        """
        if program.nesting is not None and program.guide is not None:
            check_apart(program, together=self._run_together(), traces=traces)
            self._known = self._known.with_program(program)

    def _run_together(self) -> bool:
        return self.num_samples > 1 and self.vectorize_particles

    def _has_two_reductions(self) -> bool:
        return type(self).reduce_for_guide is not Objective.reduce_for_guide

    def _particles(self) -> Particles:
        return Particles(self.num_samples, self.vectorize_particles, self.chunk_size)

    def _loss(self, program: Program) -> Tensor:
        parts = Densities.joined(self._particles().read(program, self._read))
        return -(parts.scale * self._estimate(parts)).sum()

    def _model_terms(self, run: Run) -> Terms:
        """The summands of log p(x, z)."""
        return terms(run.model)

    def _guide_terms(self, run: Run, guide: Sites) -> Terms:
        """The summands of log q(z | x), and factors; `guide` has the run's guide sites, or those at stopped samples."""
        return terms(guide)

    def _read(self, run: Run) -> Densities:
        if self._on_run is not None:
            self._on_run(run)
        scale = datum_scale(run)  # first, since its message is more specific than those of the terms
        guide, row, score, stopped, factors = run.guide, self.estimator, None, None, None
        if row.signal is not None:
            scored = {name: guide[name] for name in run.scored}
            guide = guide | {n: s | {"unscaled_log_prob": s["unscaled_log_prob"].detach()} for n, s in scored.items()}
            term = row.score_term
            own = terms(scored) if term is None else ((s, term(s)) for s in scored.values())
            score = log_density(run, own, scaled=False)
        if run.stopped is not None:
            stopped = log_density(run, self._guide_terms(run, densities(run.stopped)))
            found = {name: site for name, site in run.stopped.items() if is_factor(site)}
            factors = log_density(run, terms(found)) if found and row.curvature else None
        return Densities(
            log_density(run, self._model_terms(run)),
            log_density(run, self._guide_terms(run, guide)),
            stopped,
            factors,
            score,
            scale,
            [(run.num_particles, run.samples)],
        )

    def _estimate(self, parts: Densities) -> Tensor:
        """The bound (N,), whose derivative is the gradient's estimate, by the table of :mod:`.gradients`."""
        log_weights = parts.log_p - parts.log_q
        bound, row, two = self.reduce(log_weights), self.estimator, self._has_two_reductions()
        if not torch.is_grad_enabled() or (row is gradients.PATHWISE and not two):
            return bound
        fixed = log_weights.detach()
        a = gradients.slope(self.reduce, fixed)
        g = gradients.slope(self.reduce_for_guide, fixed) if two else a
        c = g - self.curvature(fixed) if row.curvature else g
        if row.curvature or two:
            # The gradient that reaches the samples has the factor a, which may be tiny, but not zero where c is not.
            a = torch.where(a.abs() < SMALLEST, SMALLEST, a)
            ratios = (c / a).split([size for size, _ in parts.samples])
            for (_, samples), ratio in zip(parts.samples, ratios, strict=True):
                for sample, shape in samples:
                    sample.register_hook(functools.partial(torch.mul, ratio.reshape(shape).to(sample.dtype)))
        surrogate = weighted(a, parts.log_p) - weighted(c, parts.log_q)
        if parts.stopped is not None:
            surrogate = surrogate + weighted(c, parts.stopped)
        if parts.factors is not None:  # c is right for their path alone
            surrogate = surrogate - weighted(g - c, parts.factors)
        if row.signal is not None and parts.score is not None:
            surrogate = surrogate + weighted(row.signal(self, fixed, c), parts.score)
        return with_gradient(bound, surrogate)

    # Abstract in pyro.infer.ELBO, and used by its own machinery alone.
    def _get_trace(self, model: PyroFunction, guide: PyroFunction, args: Any, kwargs: Any) -> Any:
        raise TypeError("a pyro_vae objective has no single trace: use pyro_vae.log_weights for its parts.")
