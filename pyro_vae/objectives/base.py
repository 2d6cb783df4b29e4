"""What every objective shares: how to run the program, and where gradients flow."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypedDict, TypeVar

import pyro.infer
import torch
from torch import Tensor

from pyro_vae.engine.modules import Program
from pyro_vae.engine.program import Flow, Particles, PathScale, Run, find_max_plate_nesting, run_particles
from pyro_vae.engine.weights import Terms, datum_scale, log_density, terms
from pyro_vae.errors import PyroVAEError
from pyro_vae.objectives import gradients

T = TypeVar("T")
Gradient = Literal["pathwise", "stl", "dreg", "score", "vimco"]
SMALLEST = 1e-20  # a factor on the model's density that may be divided by; far below float32's rounding of the largest


NAMES = {  # of the gradients, after the objective's own
    "pathwise": "",
    "stl": ", STL",
    "dreg": ", DReG",
    "score": ", score function",
    "vimco": ", VIMCO",
    "covariance": ", covariance",
}


class Options(TypedDict, total=False):
    """What every objective takes by name besides its own arguments; see :class:`Objective`."""

    vectorize_particles: bool
    max_plate_nesting: int | None
    chunk_size: int | None


@dataclass
class Densities:
    """What an objective reads off runs of the program, each (K, N).

    Attributes:
        log_p: log p(x, z).
        log_q: log q(z | x).
        stopped: log q(z | x) at the same samples, through which no gradient flows, if the gradient asks for it.
        score: the part of log q(z | x) whose samples are not reparameterised.
        scale: that of a datum's bound, such as N / b of a subsampled plate.
        paths: where to put each run's factors on the path.
    """

    log_p: Tensor
    log_q: Tensor
    stopped: Tensor | None
    score: Tensor
    scale: Tensor | float
    paths: list[PathScale]

    @classmethod
    def joined(cls, parts: list[Densities]) -> Densities:
        """Those of all runs, one after another."""
        stopped = [part.stopped for part in parts if part.stopped is not None]
        return cls(
            torch.cat([part.log_p for part in parts]),
            torch.cat([part.log_q for part in parts]),
            torch.cat(stopped) if stopped else None,
            torch.cat([part.score for part in parts]),
            parts[0].scale,
            [path for part in parts for path in part.paths],
        )


class Objective(pyro.infer.ELBO):
    r"""What every bound shares: how to run the program, and losses and gradients made from the bound.

    Use it wherever Pyro takes a loss: ``SVI(model, guide, optim, loss=objective)``, or
    ``objective(model, guide)``, a :class:`torch.nn.Module` that returns the differentiable loss.

    A bound of your own is a subclass with a `reduce`: its gradients come with it. With K particles, `gradient` is

    ``"pathwise"``
        the derivative through the reparameterised samples (Kingma and Welling 2014): unbiased.
    ``"stl"``
        sticking the landing (Roeder et al. 2017): pathwise without the score, whose mean is zero in the ELBO's gradient, so
        for the ELBO unbiased; zero at the exact posterior. For other bounds with K > 1 it is **biased**.
    ``"dreg"``
        doubly reparameterised (Tucker et al. 2019): pathwise with the score turned into a path; unbiased, zero at the exact
        posterior. For IWAE its signal-to-noise ratio rises with K. For the ELBO it is ``"stl"``.
    ``"score"``
        the score function (Williams 1992), with the other data's mean log-weight as baseline: unbiased as long as data don't
        enter each other's weights (batch norm in training makes them), noisy, for any guide. At sites that can be reparameterised
        next to some that can't, the path is taken.
    ``"vimco"``
        the score function with the other particles' mean log-weight as baseline (Mnih and Rezende 2016): unbiased, for any
        guide, K at least 2. For the ELBO it is REINFORCE with a leave-one-out baseline.

    All are unbiased, where they are, for the gradient of the bound's mean at this K. :mod:`pyro_vae.objectives.gradients`
    has them in one table.

    Arguments:
        num_particles: K, the number of samples drawn from the guide for each datum.
        gradient: the estimator of the gradient, one of the above.
        vectorize_particles: run the program once, with a leading dimension for the particles; False runs it K
            times, for programs whose networks take no leading dimension; see :func:`pyro_vae.log_weights`.
        max_plate_nesting: how many dimensions the program's plates take; None finds it at the first call with
            a model and guide, by one more run.
        chunk_size: run the model with so many particles at a time, to need less memory; the result is the same, and the
            model is run twice where gradients are recorded.

    Raises:
        ValueError: an argument is none of these; when it runs: the program has no log-weight per datum (see
            :func:`pyro_vae.log_weights`), a guide site can't be reparameterised and the gradient needs that, or its support
            depends on parameters, as a Uniform's with learned bounds, and the gradient takes a score.

    References:
        Roeder, Wu and Duvenaud (2017), *Sticking the Landing*, NeurIPS.
        Tucker, Lawson, Gu and Maddison (2019), *Doubly Reparameterized Gradient Estimators for Monte Carlo
        Objectives*, ICLR.
        Mnih and Rezende (2016), *Variational Inference for Monte Carlo Objectives*, ICML.
        Williams (1992), *Simple Statistical Gradient-Following Algorithms*, Machine Learning.
    """

    #: What tables and legends call its kind; an instance's `name` adds the gradient.
    family: ClassVar[str]
    #: The estimators of its gradient that it has.
    gradients: ClassVar[tuple[str, ...]] = ("pathwise", "stl", "dreg", "score", "vimco")

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = vars(cls)
        if ("reduce" in own or "reduce_for_guide" in own) and "curvature" not in own:
            cls.curvature = Objective.curvature  # type: ignore[method-assign]  # a parent's closed form is of another bound

    def __init__(
        self,
        num_particles: int = 1,
        gradient: str = "pathwise",
        *,
        vectorize_particles: bool = True,
        max_plate_nesting: int | None = None,
        chunk_size: int | None = None,
    ) -> None:
        Particles(num_particles, vectorize_particles, max_plate_nesting, chunk_size)  # refuses what can't be run
        super().__init__(num_particles=num_particles, vectorize_particles=vectorize_particles)
        if gradient not in self.gradients:
            raise PyroVAEError(f"expected gradient to be one of {', '.join(self.gradients)}, got {gradient!r}.")
        if gradient == "vimco" and self.num_samples == 1:
            raise PyroVAEError(
                "gradient='vimco' compares each particle with the others: expected num_particles to be at least 2, got "
                "1. Take more, or gradient='score'."
            )
        self.gradient = gradient
        self.max_plate_nesting = max_plate_nesting
        self.chunk_size = chunk_size
        self.step = 0  #: how many differentiable losses it has given, which is what a schedule is a function of
        self._found_nesting: tuple[Program, Program, int] | None = None

    @property
    def num_samples(self) -> int:
        """How many samples are drawn from the guide for each datum in all."""
        return self.num_particles

    @property
    def name(self) -> str:
        """What tables and legends call it."""
        return self.family + NAMES[self.gradient]

    def __repr__(self) -> str:
        shown = self._settings() | {"gradient": self.gradient}
        words = [f"{name}={value!r}" for name, value in shown.items() if (name, value) != ("gradient", "pathwise")]
        return f"{type(self).__name__}({', '.join(words)})"

    def _settings(self) -> dict[str, Any]:
        """The arguments that say what it is, by name."""
        return {"num_particles": self.num_particles}

    def scheduled(self) -> dict[str, float]:
        """The settings that may change from step to step, by attribute, with their values at this :attr:`step`."""
        return {}

    def bound(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The bound on log p(x_n) for each datum, in nats, of shape (N,); differentiable.

        A scale, such as the N / b of a subsampled plate, is left out: these are nats of one datum. Modules are in the mode that
        they are in, as in training: after it, ``vae.eval()`` turns dropout and batch norm's statistics off.

        Raises:
            ValueError: the program has no bound per datum; see :func:`pyro_vae.log_weights`.
        """
        return self._bound_and_scale(model, guide, args, kwargs)[0]

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the sum over data of scale times bound, in nats, as a scalar tensor to differentiate."""
        loss = self._loss(model, guide, args, kwargs)
        self.step += torch.is_grad_enabled()
        return loss

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The value of :meth:`differentiable_loss`."""
        with torch.no_grad():
            return self._loss(model, guide, args, kwargs).item()

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The value of :meth:`differentiable_loss`, its gradient added to each parameter's ``grad``."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.item()

    @abstractmethod
    def reduce(self, log_weights: Tensor) -> Tensor:
        """Turn log-weights (K, N) into the bound (N,)."""

    def reduce_for_guide(self, log_weights: Tensor) -> Tensor:
        """The bound (N,) whose gradient the guide follows: the model's, but for :class:`PIWAE`."""
        return self.reduce(log_weights)

    def curvature(self, log_weights: Tensor) -> Tensor:
        """The second derivative of :meth:`reduce_for_guide` by each log-weight, (K, N), which DReG takes off the path.

        This serves any reduction, in time that goes as the square of K; a subclass may know a closed form.
        """
        return gradients.curvature(self.reduce_for_guide, log_weights)

    def _loss(self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        bound, scale = self._bound_and_scale(model, guide, args, kwargs)
        return -(scale * bound).sum()

    def _bound_and_scale(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | float]:
        parts = Densities.joined(self._runs(model, guide, args, kwargs, in_plate=True, read=self._read))
        return self._estimate(parts), parts.scale

    def _model_terms(self, run: Run) -> Terms:
        """The summands of log p(x, z)."""
        return terms(run.model)

    def _guide_terms(self, run: Run, guide: dict[str, Any]) -> Terms:
        """The summands of log q(z | x), with `guide` the run's guide sites or its stopped ones."""
        return terms(guide)

    def _read(self, run: Run) -> Densities:
        scale = datum_scale(run)
        stopped = None if run.stopped is None else log_density(run, self._guide_terms(run, run.stopped))
        return Densities(
            log_density(run, self._model_terms(run)),
            log_density(run, self._guide_terms(run, run.guide)),
            stopped,
            log_density(run, terms({name: run.guide[name] for name in run.scored})),
            scale,
            [run.path_scale],
        )

    def _flow(self) -> Flow:
        """Where gradients flow in its runs."""
        one_reduction = type(self).reduce_for_guide is Objective.reduce_for_guide
        return Flow(
            path="some" if self.gradient in ("score", "vimco") else "all",
            stopped=self.gradient in ("stl", "dreg"),
            scaled=self.gradient == "dreg" or not one_reduction,
        )

    def _estimate(self, parts: Densities) -> Tensor:
        """The bound (N,), whose derivative is the gradient's estimate: the table of :mod:`.gradients`, row by row."""
        log_weights = parts.log_p - parts.log_q
        bound, flow = self.reduce(log_weights), self._flow()
        if not torch.is_grad_enabled() or (self.gradient == "pathwise" and not flow.scaled):
            return bound
        fixed = log_weights.detach()
        model = gradients.slope(self.reduce, fixed)
        path = gradients.slope(self.reduce_for_guide, fixed) if flow.scaled else model
        if self.gradient == "dreg":
            path = path - self.curvature(fixed)
        if flow.scaled:
            # What reaches the samples has the model's factor: it may be tiny, but not zero, where the path's is not.
            model = torch.where(model.abs() < SMALLEST, SMALLEST, model)
            ratios = (path / model).split([scale.num_particles for scale in parts.paths])
            for scale, ratio in zip(parts.paths, ratios, strict=True):
                scale.value = ratio
        surrogate = weighted(model, parts.log_p) - weighted(path, parts.log_q)
        if parts.stopped is not None:
            surrogate = surrogate + weighted(path, parts.stopped)
        if flow.path != "all":
            surrogate = surrogate + weighted(self._signal(fixed), parts.score)
        return with_gradient(bound, surrogate)

    def _signal(self, log_weights: Tensor) -> Tensor:
        """The factor on the score of each sample that is not reparameterised, (K, N)."""
        mean = gradients.mean_of_other_data if self.gradient == "score" else gradients.mean_of_other_particles
        return gradients.learning_signal(self.reduce_for_guide, log_weights, mean(log_weights))

    # Abstract in pyro.infer.ELBO, and used by its own machinery alone.
    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        raise TypeError("a pyro_vae objective has no single trace: use pyro_vae.log_weights for its parts.")

    def _runs(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        in_plate: bool,
        read: Callable[[Run], T],
    ) -> list[T]:
        nesting = self.max_plate_nesting
        if nesting is None and self.num_samples > 1 and self.vectorize_particles:
            # A bound method compares equal to itself, so vae.model, which is made anew at each use, is found here.
            if self._found_nesting is None or self._found_nesting[:2] != (model, guide):
                nesting = find_max_plate_nesting(model, guide, args, kwargs, in_plate=in_plate)
                self._found_nesting = (model, guide, nesting)
            nesting = self._found_nesting[2]
        particles = Particles(self.num_samples, self.vectorize_particles, nesting, self.chunk_size)
        return run_particles(model, guide, args, kwargs, particles, self._flow(), in_plate=in_plate, read=read)


def with_gradient(value: Tensor, surrogate: Tensor) -> Tensor:
    """The value, with the derivative of the surrogate."""
    return value.detach() + surrogate - surrogate.detach()


def weighted(factor: Tensor, density: Tensor) -> Tensor:
    """The sum over particles; one of no weight has no derivative, so its density of zero does no harm."""
    return torch.where(density.isfinite(), factor * density, 0.0).sum(0)
