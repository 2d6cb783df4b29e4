"""The table of compare: objectives on one model and guide by bound, noise, gradient, time and gap to log p(x)."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from pyro import poutine

from pyro_vae.checks import Seed, shown
from pyro_vae.compiled.step import check_compiled
from pyro_vae.defaults import COMPARE_REPEATS, COMPARE_SAMPLES
from pyro_vae.engine import rng
from pyro_vae.engine.arguments import takes_program
from pyro_vae.engine.first_run import placed
from pyro_vae.engine.modules import PyroFunction, eval_mode
from pyro_vae.engine.parameters import find_parameters
from pyro_vae.engine.program import Program
from pyro_vae.engine.sites import Sites, is_factor
from pyro_vae.errors import PyroVAEError, require_count
from pyro_vae.evaluation.estimate import Estimate
from pyro_vae.evaluation.evidence import Evidence, LogLikelihood, check_same_data
from pyro_vae.evaluation.likelihood import Draw, estimate_evidence
from pyro_vae.evaluation.measured import Measured
from pyro_vae.evaluation.parts import Parts
from pyro_vae.evaluation.pieces import (
    Pieces,
    checked_sites,
    is_divisible,
    memory_of,
    progress_bar,
    same_supports,
    warn_of_missed,
)
from pyro_vae.evaluation.sharing import Sharing, sharing
from pyro_vae.objectives import ELBO, IWAE, NoClosedFormError, Objective
from pyro_vae.objectives.base import Options


@takes_program
def compare(
    model: PyroFunction,
    guide: PyroFunction,
    x: Any,
    objectives: Objective | Sequence[Objective] | Mapping[str, Objective] | None = None,
    *,
    repeats: int = COMPARE_REPEATS,
    log_likelihood: Evidence | None = None,
    compile: bool = False,
    vectorize_particles: bool = True,
    seed: Seed | None = None,
    distributed: bool | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    r"""Compare objectives on the same data: a table with rows by objective and number of particles.

    :math:`L_{rn}` is the bound of datum n in repeat r, and :math:`g_r` the gradient of the mean bound over x. The
    columns:

    - ``bound``: :math:`\frac1N \sum_n \bar L_n` with :math:`\bar L_n = \frac1R \sum_r L_{rn}`, in nats per datum.
    - ``bound_se``: its standard error over data, :math:`\operatorname{std}_n(\bar L_n) / \sqrt N`. All rows share the
      data, so the difference between two rows has a much smaller standard error.
    - ``estimator_std``: the standard deviation of one datum's estimate over repeats,
      :math:`\sqrt{\frac1N \sum_n \operatorname{var}_r L_{rn}}`, in nats.
    - ``grad_snr_model``, ``grad_snr_guide``: the signal-to-noise ratio of the gradient as a vector,
      :math:`\|\mathbb E g\| / \sqrt{\operatorname{tr Cov} g}`, over the model's and over the guide's parameters.
      :math:`\|\bar g\|^2` overstates the signal by :math:`\operatorname{tr Cov} g / R`, which is subtracted. 0 means
      that R repeats show no signal. With 10 repeats the column is rough.
    - ``grad_bias_z``: whether the gradient along paths is that of the bound, in standard errors:
      :math:`(\bar g - \bar s) \cdot d \,/\, \sqrt{\operatorname{var}((g - s) \cdot d) / R}`. Here s is the unbiased
      gradient by the score function, of independent samples, and d a fixed random direction over the guide's
      parameters. Beyond 4, the row's gradient is biased: the log-weight jumps as z moves (a threshold, a rounding, an
      ``if``), or STL is used for a bound other than the ELBO. NaN where the row has no gradient along paths, or the
      guide no score, and with fewer than 5 repeats.
    - ``milliseconds``: the median wall-clock time of the loss and its gradients on all of x.
    - ``gap``, ``gap_se``: :math:`\frac1N \sum_n \log \hat p(x_n) - \bar L_n`, the best estimate of log p(x) minus the
      bound, and the standard error of this paired difference over data, in nats. The best estimate is IWAE with 1000
      particles, or `log_likelihood` where that is higher. The mean of either is at most log p(x).
    - ``pareto_k``: the median over data of :func:`pyro_vae.pareto_k` of the guide's weights, the same in all rows.
      Above 0.7, the bounds with many particles are probably too low, by more than their standard errors.
    - ``is_bound``: whether the row's mean is a lower bound on log p(x). It is not for an ELBO with beta below 1, a
      Renyi bound with alpha below 0, a jackknife estimate, or where the guide has a ``pyro.factor``.

    ``table.attrs["num_data"]`` is N.

    Arguments:
        model, guide, x: see :func:`pyro_vae.log_likelihood`.
        objectives: one objective, a list, or a dictionary from names to objectives. None stands for the ELBO with
            closed-form KL, the ELBO with Monte Carlo KL and 1 and 16 particles, and IWAE with 1, 4, 16, 64 and 256.
        repeats: R, at least 2.
        log_likelihood: an estimate of log p(x) of the same data in the same order, for example by
            :func:`pyro_vae.ais`.
        compile: whether to compute the gradients by compiled code, see :func:`pyro_vae.compile_step`. `milliseconds` is
            then its time. Compiling the default rows takes minutes.
        vectorize_particles: see :func:`pyro_vae.log_weights`, for the default rows and the estimate of log p(x). False
            is slow. An objective that you pass has a setting of its own.
        seed: the seed of each objective's random numbers; None draws one from the generators. Repeats have numbers of
            their own, and objectives have the same ones.
        distributed: see :func:`pyro_vae.log_likelihood`. Processes share out the repeats of all objectives. The table
            is the same for any number of them, but for the times.
        progress: whether to show the current row, in a terminal; and of data that are read, how many were.

    Raises:
        ValueError: fewer than 2 repeats or data, two objectives with the same name and number of particles, or a
            program without a bound per datum (see :func:`pyro_vae.log_weights`).

    Warns:
        UserWarning: `objectives` is None, and the program has no closed-form KL, so that its row is left out.

    Example:
        >>> import torch, pyro, pyro_vae as pv
        >>> pyro.set_rng_seed(0)
        >>> vae = pv.mlp_vae((5,), latent_dim=2, hidden_dims=(16,), likelihood="gaussian")
        >>> table = pv.compare(vae, torch.randn(64, 5), [pv.ELBO(), pv.IWAE(64)], seed=0)
        >>> bool(table.bound["IWAE", 64] > table.bound["ELBO, closed-form KL", 1])
        True

    References:
        Rainforth et al. (2018), *Tighter Variational Bounds are Not Necessarily Better*, ICML.
    """
    settings = {"objectives": objectives, "repeats": repeats, "log_likelihood": log_likelihood, "compile": compile}
    settings["vectorize_particles"] = vectorize_particles
    with sharing(distributed, "pv.compare", seed, settings, progress) as share:
        require_count("repeats", repeats, least=2, why=", whose spread is the estimator's")
        parts, table = Parts(model, guide, x), None
        check_same_data(log_likelihood, parts.sure_number)
        with memory_of(parts.number), eval_mode(parts.modules()), parts.bar(share.progress) as bar:
            for program in share.parts(parts):
                program, sites = placed(program, checked_sites)
                divisible = is_divisible(program) if parts.divisible is None else parts.divisible
                data = Pieces(program, divisible, same_supports(*sites))
                if table is None:
                    named = _named(program, objectives, compile, vectorize_particles, share.speaks)
                    table = _Table(data, sites[1], named, repeats, compile, vectorize_particles, share)
                table.add(data, sites)
                bar.update(len(program.args[0]))
        check_same_data(log_likelihood, parts.seen)
        if table is None:
            raise RuntimeError("expected a part of the data.")
        return table.rows(log_likelihood)


class _Table:
    """The table of some objectives, from the parts of the data."""

    def __init__(
        self,
        data: Pieces,
        guide_sites: Sites,
        named: list[tuple[str, Objective]],
        repeats: int,
        compile: bool,
        vectorize: bool,
        share: Sharing,
    ) -> None:
        self.keys = [(name, objective.num_particles) for name, objective in named]
        if len(set(self.keys)) < len(self.keys):
            raise PyroVAEError(
                f"expected objectives with different names or particles, got {self.keys}. Pass a dictionary."
            )
        parameters = find_parameters(data.program)
        if not any(parameters):
            raise PyroVAEError(
                "expected a program with parameters, whose gradients can be measured, got none: neither model nor "
                "guide has a pyro.param or pyro.module statement. Add one."
            )
        self.named, self.said = named, set[str]()
        self.factors = [name for name, site in guide_sites.items() if is_factor(site)]
        vectorize = vectorize and all(objective.vectorize_particles for _, objective in named)
        self.draw = Draw(COMPARE_SAMPLES, vectorize, compile and vectorize)
        self.evidence: list[LogLikelihood] = []
        self.share = share
        self.measured = [
            Measured(each, parameters, repeats, compile, share, place) for place, (_, each) in enumerate(named)
        ]

    def add(self, data: Pieces, sites: tuple[Sites, Sites]) -> None:
        """Measure the objectives on a part of the data."""
        with torch.no_grad():
            whole = data
            if self.factors:
                whole = replace(data, program=_without(self.factors, data.program))
            warn_of_missed(whole.program, *sites, self.said)
            self.evidence.append(estimate_evidence(whole, self.draw, self.share))
        with progress_bar(len(self.named), "objective", "", self.share.progress) as bar:
            for (name, objective), measured in zip(self.named, self.measured, strict=True):
                bar.set_description(f"{name}, K = {objective.num_particles}")
                measured.add(data)
                bar.update()

    def rows(self, log_likelihood: Evidence | None) -> pd.DataFrame:
        """The table."""
        evidence, rows = LogLikelihood.together(self.evidence), []
        best = max((each for each in (evidence, log_likelihood) if each is not None), key=lambda each: each.mean)
        for (_, objective), measured in zip(self.named, self.measured, strict=True):
            row, per_datum = measured.row()
            gap = Estimate.of(best.per_datum - per_datum)
            k_hat = evidence.pareto_k.nanmedian().item()
            row |= {"gap": gap.value, "gap_se": gap.standard_error, "pareto_k": k_hat}
            rows.append(row | {"is_bound": objective.is_bound and not self.factors})
        table = pd.DataFrame(rows, index=pd.MultiIndex.from_tuples(self.keys, names=["objective", "particles"]))
        table.attrs["num_data"] = len(best.per_datum)
        return table


def _without(factors: list[str], program: Program) -> Program:
    """The program with a guide whose factors are hidden, since they are terms of a loss and not of log p(x)."""
    return replace(program, guide=poutine.block(program.guide_or_prior, hide=factors))


def _named(
    program: Program, objectives: Any, compile: bool, vectorize: bool, speaks: bool
) -> list[tuple[str, Objective]]:
    """The objectives with their names, the default ones for None; an error if one of them can't be measured."""
    if objectives is None:
        objectives = _defaults(program, vectorize, speaks)
    elif isinstance(objectives, Objective):
        objectives = [objectives]
    if isinstance(objectives, str) or not isinstance(objectives, Sequence | Mapping) or not objectives:
        raise PyroVAEError(f"expected a list of objectives, got {shown(objectives)}. Pass [pv.ELBO(), pv.IWAE(16)].")
    for objective in objectives.values() if isinstance(objectives, Mapping) else objectives:
        if not isinstance(objective, Objective):
            raise PyroVAEError(
                f"expected objectives of pyro_vae, which have a bound per datum, got {objective!r}. Pass pv.ELBO(), "
                "for example."
            )
        if compile:
            check_compiled(objective)
    return list(objectives.items()) if isinstance(objectives, Mapping) else [(o.name, o) for o in objectives]


def _defaults(program: Program, vectorize: bool, speaks: bool) -> list[Objective]:
    options: Options = {"vectorize_particles": vectorize}
    sampled = (ELBO(k, "monte_carlo", **options) for k in (1, 16))
    closed_form, others = ELBO(), [*sampled, *(IWAE(k, **options) for k in (1, 4, 16, 64, 256))]
    try:
        with torch.no_grad(), rng.preserved():
            closed_form.bound(program.model, program.guide, *program.args)
    except NoClosedFormError as error:
        if speaks:
            warnings.warn(f"the table has no row '{closed_form.name}': {error}", stacklevel=5)
        return others
    return [closed_form, *others]
