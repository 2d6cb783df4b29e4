"""As many samples of each datum as its estimate needs, from the guide or from a proposal that is fitted to the datum.

A pilot shows the variance of a datum's weights, which says how many samples a stated error takes. The pilot's draws are
not counted: samples that decide their own number would bias the estimate.
"""

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyro_vae.engine.program import Program
from pyro_vae.evaluation.diagnostics import HIGH_K, relative_variance
from pyro_vae.evaluation.draws import WEIGHTS_AT_ONCE, draw_weights
from pyro_vae.evaluation.evidence import LogLikelihood
from pyro_vae.evaluation.pieces import Pieces, on_rows, progress_bar, rows_at_once
from pyro_vae.evaluation.proposals.guide import Mixture
from pyro_vae.evaluation.proposals.search import Search, Settings
from pyro_vae.evaluation.sharing import Sharing

PILOT = 1000  # samples that show the variance of a datum's weights
FEWEST = 100  # samples of a datum
MOST = 20  # how many times `num_samples` a datum may have
SAFETY = 1.1  # how many more samples than the pilot says
ORDERING, COUNTED = 1, 2  # uses of random numbers beside the pilots
ROWS_AT_ONCE = 64  # data of a pilot of the guide
NAMED = 10  # rows that a warning names


class _Piloted(NamedTuple):
    program: Program
    mixture: Mixture | None  # the proposals; None are the guide's own
    variance: Tensor  # of one weight, relative to the squared mean, (N,)


def sample_as_needed(
    data: Pieces, num_samples: int, goal: "Goal | None", refine: bool, vectorize: bool, share: Sharing
) -> LogLikelihood:
    """The estimates of log p(x), with `num_samples` for each datum, or as many as a stated error takes."""
    order = None
    if goal is not None and goal.of_mean and data.divisible:  # so that the pilots so far stand for all of them
        share.seed(0, ORDERING)
        order = torch.randperm(len(data.program.args[0]))
        args = tuple(column[order.to(column.device)] for column in data.program.args)
        data = replace(data, program=replace(data.program, args=args))
    search = Search(data, Settings(vectorize=vectorize)) if refine else None
    rows = min(ROWS_AT_ONCE, rows_at_once(data.program.args))
    programs = data.programs(1, vectorize, rows) if search is None else search.programs
    steps = search.settings.num_steps if search else 1

    def piloted(program: Program) -> _Piloted:
        if search is not None:
            found = search.proposals(program, bar)
            return _Piloted(program, found.mixture, found.variance)
        bar.update()
        return _Piloted(program, None, relative_variance(draw_weights(program, PILOT, vectorize)))

    def numbers_for(pilot: _Piloted | None) -> Tensor | None:
        """How many samples each datum of a pilot gets; every process makes the same calls."""
        if goal is None:
            return None if pilot is None else torch.full_like(pilot.variance, num_samples, dtype=torch.long)
        own = None if pilot is None else pilot.variance
        # What the mean needs of a pilot depends on those before it, also on those of other processes.
        each = share.all(own, None if own is None else own.device) if goal.of_mean else [own]
        found = [
            None if v is None else goal.numbers(SAFETY * v, MOST * num_samples, together=not data.divisible)
            for v in each
        ]
        return found[share.rank if goal.of_mean else 0]

    def estimates() -> Iterator[LogLikelihood]:
        for first in range(0, len(programs), share.size):  # a minibatch for each process
            i, pilot = first + share.rank, None
            if i < len(programs):
                share.seed(i)
                pilot = piloted(programs[i])
            numbers = numbers_for(pilot)
            if pilot is None or numbers is None:
                continue
            share.seed(i, COUNTED)
            found: LogLikelihood | None = None
            for number in numbers.unique().tolist():
                chosen = (numbers == number).nonzero()[:, 0]
                for part in chosen.split(max(1, WEIGHTS_AT_ONCE // number)) if data.divisible else (chosen,):
                    program = _of(pilot, part, search)
                    log_w = draw_weights(program, number, vectorize)
                    if search is not None and search.has_guide:
                        log_w = _or_of_the_guide(log_w, program, pilot, number, vectorize)
                    found = LogLikelihood.from_weights(log_w).into(found, part, len(numbers))
            if found is not None:
                yield found

    with progress_bar(len(programs) * steps, "step", "log p(x)", share.progress) as bar:
        found = share.records(programs, estimates(), data.device)
    return found if order is None else found.of(order.argsort().to(found.per_datum.device))


def _of(pilot: _Piloted, rows: Tensor, search: Search | None) -> Program:
    """The program on some of the data, with their proposals as its guide."""
    program = pilot.program
    if len(rows) < len(program.args[0]):
        program = on_rows(program, rows)
    if pilot.mixture is None or search is None:
        return program
    return replace(program, guide=search.guide(pilot.mixture.of(rows.to(pilot.mixture.log_shares.device))))


def _or_of_the_guide(log_w: Tensor, program: Program, pilot: _Piloted, number: int, vectorize: bool) -> Tensor:
    """The weights; those of the guide alone for data of which a draw in the proposal's heavy tails has none."""
    without = log_w.isnan().any(0)
    if not bool(without.any()):
        return log_w
    own = replace(program, guide=pilot.program.guide)
    return torch.where(without, draw_weights(own, number, vectorize), log_w)


class Goal:
    """A standard error to reach for each datum, or for the mean over data, and the variance that is left for it."""

    def __init__(self, error: float, of: Literal["datum", "mean"], num_data: int) -> None:
        self.unit, self.of_mean = 2 * math.log2(error), of == "mean"  # the error's square, as a power of two
        self.budget, self.data = float(num_data**2), num_data  # the variance left for the sum over these data
        self.least = 1e-3 * num_data
        self.roots, self.piloted = 0.0, 0

    def numbers(self, variance: Tensor, most: int, *, together: bool) -> Tensor:
        """How many samples each datum of the next minibatch gets, (N,), by the relative variance of its weights.

        They are powers of the root of two times the fewest, so that few numbers differ; `most` for NaN; all alike if
        `together`.
        """
        target = (self._of_mean(variance.sqrt()) if self.of_mean else variance).log2() - self.unit
        steps = (2 * (target - math.log2(FEWEST))).nan_to_num(math.inf, math.inf, 0.0).ceil().clamp(0, 120)
        found = (FEWEST * 2.0 ** (0.5 * steps)).round().clamp(max=max(most, FEWEST)).long()
        if together:
            found = torch.full_like(found, int(found.max()))
        self.budget -= ((variance / found).log2() - self.unit).exp2().nansum().item()
        self.data -= len(found)
        return found

    def _of_mean(self, root: Tensor) -> Tensor:
        """How many samples give the mean an error of one: the fewest in all, by the root of the variance (Neyman 1934).

        The root's mean over all data is taken to be that over the pilots so far.
        """
        self.roots, self.piloted = self.roots + root.nansum().item(), self.piloted + len(root)
        return root * self.data * (self.roots / self.piloted) / max(self.budget, self.least * self.data)


def warn_of_larger_errors(
    result: LogLikelihood, error: float, of: Literal["datum", "mean"], num_samples: int, refine: bool
) -> None:
    """Name the data that did not reach a stated error, by what keeps them from it; or say that the mean did not."""
    high = result.pareto_k > HIGH_K
    if of == "mean":
        if not result.monte_carlo_error <= error:
            most = int((result.drawn >= MOST * num_samples).sum())
            warnings.warn(
                f"the mean has a Monte Carlo error of {result.monte_carlo_error:.2g} nats, above the {error:.2g} that "
                f"was asked for; {most} of {len(high)} data have the most samples, {MOST * num_samples}. "
                + ("Pass a larger num_samples." if refine else "Pass refine=True, or a larger num_samples."),
                stacklevel=4,
            )
        return
    above = (result.per_datum_error > error) & ~high
    capped = above & (result.drawn >= MOST * num_samples)
    for missed, why in (
        (high, f"a k-hat above {HIGH_K}: " + ("anneal from pv.refine(...)" if refine else "pass refine=True")),
        (
            capped,
            f"the limit of {MOST} num_samples, {MOST * num_samples}: pass a larger num_samples, or a larger error",
        ),
        (above & ~capped, "a pilot whose variance was a little too low: pass a smaller error"),
    ):
        rows = missed.nonzero()[:, 0].tolist()
        if rows:
            some = ", ".join(map(str, rows[:NAMED])) + (" ..." if len(rows) > NAMED else "")
            warnings.warn(
                f"{len(rows)} of {len(missed)} data did not reach an error of {error:g} nats, because of {why}. Rows "
                f"{some}.",
                stacklevel=4,
            )
