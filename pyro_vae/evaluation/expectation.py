"""Posterior expectations E[f(z) | x] of each datum, by self-normalised importance sampling."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_vae.checks import Seed, shown
from pyro_vae.defaults import NUM_SAMPLES
from pyro_vae.devices import wide
from pyro_vae.engine.arguments import takes_program
from pyro_vae.engine.batch_plate import find_batch_plate
from pyro_vae.engine.drawing import deterministic_shapes
from pyro_vae.engine.modules import PyroFunction
from pyro_vae.engine.program import Program, Run
from pyro_vae.engine.sites import family, is_deterministic, is_factor, labelled
from pyro_vae.engine.traces import sample_sites
from pyro_vae.engine.weights import log_weights_of
from pyro_vae.errors import NotFiniteError, PyroVAEError, require_count
from pyro_vae.evaluation.diagnostics import HIGH_K, pareto_k, warn_of_high_k
from pyro_vae.evaluation.draws import in_portions
from pyro_vae.evaluation.evidence import check_finite
from pyro_vae.evaluation.families import refuse_masks, require_latents
from pyro_vae.evaluation.parts import checked_parts
from pyro_vae.evaluation.pieces import Pieces, progress_bar, rows_at_once
from pyro_vae.evaluation.proposals.search import Search, Settings
from pyro_vae.evaluation.runs import laid_out
from pyro_vae.printed import Printed

ADVICE = "Pass refine=True, which fits a proposal to each datum, or take more samples."
REFINED_ADVICE = "Take more samples, or a function with lighter tails."
OF_MEAN = "a few draws dominate their expectation, so that neither it nor its error bar can be trusted"

Function = Callable[..., Tensor] | str


@dataclass(frozen=True, repr=False)
class Expectation(Printed):
    r"""The result of :func:`pyro_vae.expect`, for N data and K draws.

    Attributes:
        value: :math:`\hat\mu_n = \sum_k \bar w_{kn} f(z_{kn})` with weights that sum to one, of shape (N, \*shape).
        standard_error: by the delta method,
            :math:`\sqrt{\frac{K}{K-1} \sum_k \bar w_{kn}^2 (f(z_{kn}) - \hat\mu_n)^2}`, of the same shape.
        ess: the effective sample size :math:`1 / \sum_k \bar w_{kn}^2`, (N,).
        pareto_k: the larger of two k-hats, of the weights w, and of w times the distance of f from its median, (N,).
            Above 0.7, the value and its error can't be trusted. NaN of fewer than 30 draws.
        num_samples: K.
    """

    value: Tensor
    standard_error: Tensor
    ess: Tensor
    pareto_k: Tensor
    num_samples: int

    @property
    def share_high_k(self) -> float:
        """The share of data whose k-hat is above 0.7."""
        return wide(self.pareto_k > HIGH_K).mean().item()

    def _high_k(self) -> str:
        none = wide(self.pareto_k.isnan()).mean().item()
        return f"{self.share_high_k:.1%}{f', {none:.1%} without' * (none > 0)}"

    def _statement(self) -> str:
        return (
            f"E[f(z) | x] of shape {tuple(self.value.shape)} (self-normalised importance sampling, K = "
            f"{self.num_samples}; median standard error {self.standard_error.median():.2g}, median ESS "
            f"{self.ess.median():.0f}, k-hat > {HIGH_K}: {self._high_k()})"
        )

    def _rows(self) -> dict[str, object]:
        return {
            "shape of E[f(z) | x]": tuple(self.value.shape),
            "median standard error": f"{self.standard_error.median():.2g}",
            "samples K of a datum": self.num_samples,
            "median ESS": f"{self.ess.median():.0f}",
            f"data with k-hat > {HIGH_K}": self._high_k(),
        }


@takes_program
def expect(
    model: PyroFunction,
    guide: PyroFunction,
    x: Any,
    function: Function,
    num_samples: int = NUM_SAMPLES,
    *,
    refine: bool = False,
    seed: Seed | None = None,
    vectorize_particles: bool = True,
    progress: bool = True,
) -> Expectation:
    r"""Estimate a posterior expectation of each datum, by weighted draws of the guide.

    .. math:: \mathbb E[f(z) \mid x_n] \approx \frac{\sum_k w_{kn} f(z_{kn})}{\sum_k w_{kn}}, \qquad
        w_{kn} = \frac{p(x_n, z_{kn})}{q(z_{kn} \mid x_n)}, \quad z_{kn} \sim q(z \mid x_n)

    The guide's own mean is an average under q(z|x); this one is under the posterior p(z|x). It is consistent, with a
    bias of order 1 / K. The function f gets one tensor if the model has one latent site, and a dictionary of tensors by
    name if it has more.

    =========================  ===========================================================================
    posterior means            ``pv.expect(program, x, "z")``
    posterior variances        ``pv.expect(program, x, lambda z: z.square())``, minus the squared means
    posterior probabilities    ``pv.expect(program, x, lambda z: z > 0)``
    classes, p(y = c | x)      ``pv.expect(program, x, lambda y: F.one_hot(y, 10))``, F is ``torch.nn.functional``
    predictive means           ``pv.expect(program, x, "x")``, the mean of x given z, over the posterior of z
    missing elements           the same of ``(x, mask)``, in the program that masks them: see ``vae.impute``
    =========================  ===========================================================================

    Arguments:
        model, guide, x, seed, vectorize_particles, progress: see :func:`pyro_vae.log_likelihood`.
        function: f, or the name of a site. f gets the values of the latent sites, each of shape
            (K, N, \*nested plates, \*event). It returns numbers or booleans of shape (K, N, \*shape). A name stands for
            the value of a latent or ``pyro.deterministic`` site, or for the mean of an observed site's distribution.
        num_samples: K, the number of draws for each datum, at least 2.
        refine: whether to draw from proposals that are fitted to each datum, see :func:`pyro_vae.refine`.

    Raises:
        ValueError: `function` returns another shape, or names no site; all weights of a datum are zero; or an error of
            :func:`pyro_vae.log_likelihood`.
        FloatingPointError: `function` is NaN or infinite at a draw that has a weight; or an error of
            :func:`pyro_vae.log_likelihood`.

    Warns:
        UserWarning: k-hat is above 0.7 for some data.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_vae as pv
        >>> pyro.set_rng_seed(0)
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        >>> x = torch.tensor([-1.0, 0.0, 2.0])
        >>> found = pv.expect(model, guide, x, "z", seed=0)
        >>> bool(((found.value - x / 2).abs() < 4 * found.standard_error).all())
        True

    References:
        Owen (2013), *Monte Carlo Theory, Methods and Examples*, chapter 9 (the standard error).
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), *Pareto Smoothed Importance Sampling*, JMLR (k-hat of f).
    """
    require_count("num_samples", num_samples, least=2, why=", to have an error bar")
    found = []
    with checked_parts(model, guide, x, seed, progress=progress) as parts:
        for data in parts:
            found += _expectations(data, function, num_samples, refine, vectorize_particles, progress)
    value, error, ess, shapes = (torch.cat(column) for column in zip(*found, strict=True))
    result = Expectation(value, error, ess, shapes, num_samples)
    warn_of_high_k(result.pareto_k, REFINED_ADVICE if refine else ADVICE, OF_MEAN)
    return result


def _expectations(
    data: Pieces, function: Function, num_samples: int, refine: bool, vectorize: bool, progress: bool
) -> list[tuple[Tensor, ...]]:
    """The fields of an :class:`Expectation` for each minibatch of some data."""
    found: list[tuple[Tensor, ...]] = []
    search = Search(data, Settings(vectorize=vectorize)) if refine else None
    programs = data.programs(num_samples, vectorize) if search is None else search.programs
    read = _Reader(programs[0], function)
    rows = rows_at_once(data.program.args) // num_samples
    steps = search.settings.num_steps if search else 1
    with progress_bar(len(programs) * steps, "step", "E[f(z) | x]", progress) as bar:
        for program in programs:
            on_parts = iter([program])
            if search is not None:
                on_parts = search.parts(program, search.proposals(program, bar).mixture, rows)
            found += [_expectation(each, read, num_samples, vectorize) for each in on_parts]
            if search is None:
                bar.update()
    return found


def _showing(program: Program) -> Program:
    """The program with its ``pyro.deterministic`` sites."""
    traces = program.trace()
    plate = find_batch_plate(labelled(*map(sample_sites, traces)))
    return replace(program, deterministic=deterministic_shapes(traces[0], plate))


class _Reader:
    """Gives f(z), (K, N, *shape), of a run; it is tried once, before any work."""

    def __init__(self, program: Program, function: Any) -> None:
        self.function, self.of_name = function, isinstance(function, str)
        once = (_showing(program) if self.of_name else program).run()
        require_latents(once)
        refuse_masks(once)
        named = [name for name, site in once.model.items() if not is_factor(site)]
        if self.of_name and function not in named:
            raise PyroVAEError(f"expected the name of a site of the model, one of {named}, got {function!r}. Pass one.")
        if not self.of_name and not callable(function):
            raise PyroVAEError(
                f"expected function to be a function of latents, or the name of a site, got {shown(function)}. Pass "
                "lambda z: z, for example."
            )
        self.latent = [name for name in named if not once.model[name]["is_observed"]]
        self.elements = self.read(once)[0, 0].numel()

    def weighted(self, run: Run) -> tuple[Tensor, Tensor]:
        """The log-weights of a run, (K, N), and f."""
        return log_weights_of(run), self.read(run)

    def read(self, run: Run) -> Tensor:
        """The value of f."""
        if self.of_name:
            return _of_site(run, self.function)
        values = {name: laid_out(run, run.model[name])[0] for name in self.latent}
        given = values if len(values) > 1 else next(iter(values.values()))
        number, size = run.num_particles, run.batch_plate.size
        try:
            found = self.function(given)
        except Exception as error:
            what = f"a dictionary of {', '.join(map(repr, values))}" if len(values) > 1 else shown(given)
            error.add_note(f"pyro_vae.expect called function with one argument, {what}: {number} draws of {size} data.")
            raise
        if not isinstance(found, Tensor) or found.is_complex():
            raise PyroVAEError(f"expected function to return a tensor of real numbers, got {shown(found)}. Return one.")
        if tuple(found.shape[:2]) != (number, size) or not found.numel():
            raise PyroVAEError(
                f"expected function to return numbers of shape (K, N, ...), for {number} draws of {size} data, got "
                f"{shown(found)}. Keep the first two dimensions, as z.sum(-1) does: the mean over draws is taken "
                "afterwards."
            )
        return found


def _of_site(run: Run, name: str) -> Tensor:
    site = run.model[name]
    if not site["is_observed"] or is_deterministic(site):
        return laid_out(run, site)[0]
    try:
        mean = site["fn"].mean
    except NotImplementedError:
        mean = torch.full((), math.nan)
    if not bool(mean.isfinite().all()):
        raise PyroVAEError(
            f"site '{name}' ({family(site['fn'])}) has no finite mean: expected a distribution with one. Pass a "
            "function of the latents that gives what you need, such as the probabilities of categories."
        )
    return laid_out(run, site | {"value": mean})[0]


def _expectation(program: Program, read: _Reader, num_samples: int, vectorize: bool) -> tuple[Tensor, ...]:
    """The fields of an :class:`Expectation` for a minibatch, from sums over portions of the draws."""
    if read.of_name:
        program = _showing(program)
    sums: _Sums | None = None
    for runs in in_portions(program, num_samples, vectorize, read.weighted, read.elements):
        log_w, f = (wide(torch.cat(each)) for each in zip(*runs, strict=True))
        sums = sums or _Sums(log_w, f)
        sums.add(log_w, f)
    if sums is None:
        raise RuntimeError("expected a portion of draws, got none.")
    return sums.result()


class _Sums:
    """Sums over draws of one minibatch, with weights relative to the largest one so far, and f in units of its spread.

    The middle is the median of the first portion, and the unit is the median distance from there. A few draws far out
    would make a standard deviation of the same size, and hide themselves.
    """

    def __init__(self, log_w: Tensor, f: Tensor) -> None:
        self.shape, self.log_w, self.log_distance = f.shape[2:], list[Tensor](), list[Tensor]()
        counted = torch.where((log_w > -math.inf)[..., None], _columns(f), math.nan)
        self.middle = counted.nanmedian(0).values.nan_to_num(0.0, 0.0, 0.0)
        distance = (counted - self.middle).abs()
        self.unit = distance.nanmedian(0).values
        for other in (distance.nanmean(0), torch.ones_like(self.unit)):  # of values that are mostly equal
            self.unit = torch.where((self.unit > 0) & self.unit.isfinite(), self.unit, other)
        self.highest = torch.full_like(log_w[0], -math.inf)
        self.first = f.new_zeros(2, *self.unit.shape)
        self.second = f.new_zeros(3, *self.unit.shape)

    def add(self, log_w: Tensor, f: Tensor) -> None:
        """Add draws with log-weights (K, N) and values (K, N, *shape)."""
        check_finite(log_w)
        f, counted = _columns(f), (log_w > -math.inf)[..., None]
        if bool((counted & ~f.isfinite()).any()):
            raise NotFiniteError(
                "expected function to be finite at every draw that has a weight, got NaN or infinity. Look for "
                "logarithms of zero, or for overflow."
            )
        f = torch.where(counted, f - self.middle, 0.0) / self.unit
        before, self.highest = self.highest, torch.maximum(self.highest, log_w.amax(0))
        shift = self.highest.nan_to_num(neginf=0.0)
        kept, w = (before - shift).exp()[:, None], (log_w - shift).exp()[..., None]
        powers = torch.stack([torch.ones_like(f), f, f.square()])  # (3, K, N, E)
        self.first = self.first * kept + (w * powers[:2]).sum(1)
        self.second = self.second * kept.square() + (w.square() * powers).sum(1)
        self.log_w.append(log_w)
        self.log_distance.append(f.abs().amax(-1).log())

    def result(self) -> tuple[Tensor, ...]:
        """The fields of an :class:`Expectation`."""
        log_w = torch.cat(self.log_w)
        lost = (self.highest == -math.inf).nonzero()[:, 0].tolist()
        if lost:
            raise PyroVAEError(
                f"expected weights above zero for each datum, got {len(log_w)} weights of zero for {len(lost)} of "
                f"{log_w.shape[1]} data, such as row {lost[0]} of a minibatch. Pass refine=True, take more samples, or "
                "train the guide for longer."
            )
        total, number = self.first[0], len(log_w)
        mean = self.first[1] / total
        square = (self.second[2] - 2 * mean * self.second[1] + mean.square() * self.second[0]).clamp(min=0)
        error = (number / (number - 1) * square).sqrt() / total
        shapes = torch.fmax(pareto_k(log_w), pareto_k(log_w + torch.cat(self.log_distance)))
        size = (len(mean), *self.shape)
        ess = (total.square() / self.second[0])[:, 0]
        return (self.middle + self.unit * mean).reshape(size), (self.unit * error).reshape(size), ess, shapes


def _columns(f: Tensor) -> Tensor:
    """Values (K, N, *shape) as (K, N, E)."""
    return f.flatten(2) if f.dim() > 2 else f[..., None]
