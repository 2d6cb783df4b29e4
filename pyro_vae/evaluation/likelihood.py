r"""The marginal likelihood log p(x) by importance sampling from the guide, over minibatches of the data."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_vae.checks import Seed
from pyro_vae.compiled.function import CompiledFunction
from pyro_vae.defaults import NUM_SAMPLES
from pyro_vae.devices import wide
from pyro_vae.engine.arguments import takes_program
from pyro_vae.engine.modules import PyroFunction
from pyro_vae.engine.program import Program
from pyro_vae.engine.weights import log_weights_of
from pyro_vae.errors import PyroVAEError, require_count
from pyro_vae.evaluation.allocation import Goal, sample_as_needed, warn_of_larger_errors
from pyro_vae.evaluation.diagnostics import warn_of_high_k, warn_of_zero_weights
from pyro_vae.evaluation.draws import WEIGHTS_AT_ONCE, draw_weights, even_chunks
from pyro_vae.evaluation.evidence import LogLikelihood
from pyro_vae.evaluation.parts import checked_parts
from pyro_vae.evaluation.pieces import Args, Pieces, progress_bar, require_vectorized, rows_at_once
from pyro_vae.evaluation.proposals.refine import refined_guide
from pyro_vae.evaluation.proposals.search import Settings
from pyro_vae.evaluation.sharing import Sharing, sharing

ADVICE = (
    "Pass refine=True, which fits a proposal to each datum, take more samples, or check the number with pv.ais, which "
    "needs no guide."
)
REFINED_ADVICE = "Anneal from the refined guide: pv.ais(model, pv.refine(model, guide, x), x, start='guide')."


@takes_program
def log_likelihood(
    model: PyroFunction,
    guide: PyroFunction,
    x: Any,
    num_samples: int = NUM_SAMPLES,
    *,
    refine: bool = False,
    error: float | None = None,
    error_of: Literal["datum", "mean"] = "datum",
    seed: Seed | None = None,
    vectorize_particles: bool = True,
    compile: bool = False,
    distributed: bool | None = None,
    progress: bool = True,
) -> LogLikelihood:
    r"""Estimate log p(x) of each datum by importance sampling from the guide.

    .. math:: \log \hat p(x_n) = \log \frac1K \sum_{k=1}^K w_{kn}, \qquad
        w_{kn} = \frac{p(x_n, z_{kn})}{q(z_{kn} \mid x_n)}, \quad z_{kn} \sim q(z \mid x_n)

    The mean of the weights is unbiased for p(x). Its logarithm is too low by about half of its squared standard error;
    it is the IWAE bound with K particles. K-hat and the effective sample size show whether K samples are enough.
    Minibatches and particles are run in pieces of one size, so memory use depends on neither N nor K. ``print`` gives
    one line that can be quoted.

    Arguments:
        model: a Pyro model with a batch plate; or a model/guide pair, or a tuple `(model, guide)`, in place of both.
        guide: its guide.
        x: data of the kinds that :func:`pyro_vae.fit` takes. A ``DataLoader`` and arrays in files are read in one pass,
            of which as many rows are in memory as a run takes. Results are in the order of reading, so a loader that
            shuffles serves for means. The program's modules are in evaluation mode. Minibatches are moved to the device
            of the parameters, where the results are too; on Apple's MPS, which has no float64, these are on the CPU.
        num_samples: K, at least 2. With `error`, a datum gets at most 20 times as many.
        refine: whether to fit a proposal to each datum first, as :func:`pyro_vae.refine` does with its defaults, and to
            sample from it in place of the guide. It takes two to three times as long, and most k-hats become low.
        error: a standard error in nats, such as 0.02, to reach for each datum with as many samples as it needs, at
            least 100 and at most 20 times `num_samples`. A pilot of 1,000 samples says how many. It is no part of the
            estimate, which it would bias. The result's `drawn` has the numbers.
        error_of: "datum" for an `error` of each datum, or "mean" for one of the mean over these data, the result's
            `monte_carlo_error`. That takes far fewer samples, and most of them where weights vary most.
        seed: the seed of the random numbers; None draws one from the generators. Each minibatch has numbers of its own.
        vectorize_particles: see :func:`pyro_vae.log_weights`; False is slow.
        compile: whether to run the program as compiled code, see :func:`pyro_vae.compile_step`. Each call compiles
            anew, which pays off where the call takes minutes. The random numbers are drawn in portions of other sizes,
            so the estimate differs. With `refine`, all proposals are in memory at once; their fit is compiled too.
        distributed: None shares out the data over the process group, if there is one, or if the variables of
            ``torchrun`` start one: each process works on some minibatches, and all of them get the whole result. It is
            the same to the last digit for any number of processes, and without a group, on machines of one kind with
            equal numbers of threads. All processes make the call, with the same program, data and settings; others are
            refused. False keeps the call to this process. True refuses to run without a group.
        progress: whether to show a progress bar, in a terminal; of several processes, rank 0 shows one.

    Raises:
        ValueError: fewer than 2 samples, no data, NaN or infinity in the data, data outside the support of the
            likelihood, or a program without a log-weight per datum (see :func:`pyro_vae.log_weights`); with `compile`,
            a program that can't be traced, with the line at fault; processes of a group with different programs, data,
            or settings.
        FloatingPointError: a log-weight is NaN or plus infinity.
        RuntimeError: another process of the group has failed, or does not make the call.

    Warns:
        UserWarning: some data have a k-hat above 0.7, or only weights of zero, or `error` is not reached.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_vae as pv
        >>> pyro.set_rng_seed(0)
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.8))
        >>> x = torch.randn(64)
        >>> ll = pv.log_likelihood(model, guide, x, num_samples=1000)
        >>> exact = dist.Normal(0.0, 2**0.5).log_prob(x)
        >>> bool(abs(ll.mean - exact.mean()) < 4 * ll.monte_carlo_error)
        True

    References:
        Burda, Grosse and Salakhutdinov (2016), *Importance Weighted Autoencoders*, ICLR.
    """
    settings = {"num_samples": num_samples, "refine": refine, "error": error, "error_of": error_of}
    settings |= {"vectorize_particles": vectorize_particles, "compile": compile}
    with sharing(distributed, "pv.log_likelihood", seed, settings, progress) as share:
        _check(num_samples, error, error_of, vectorize_particles, compile)
        results = []
        with checked_parts(model, guide, x, None, progress=share.progress) as parts:
            goal = None if error is None else _goal(error, error_of, parts.number)
            draw = Draw(num_samples, vectorize_particles, compile and not refine)
            for data in share.parts(parts):
                if refine and compile:  # the proposals are of this part, and so is the compiled code
                    refined = refined_guide(data, Settings(compile=True), share.progress, share)
                    data = replace(data, program=replace(data.program, guide=refined))
                    results.append(estimate_evidence(data, Draw(num_samples, vectorize_particles, compile), share))
                elif refine or goal is not None:
                    results.append(sample_as_needed(data, num_samples, goal, refine, vectorize_particles, share))
                else:
                    results.append(estimate_evidence(data, draw, share))
        result = LogLikelihood.together(results)
        advice = REFINED_ADVICE if refine else ADVICE
        if share.speaks:
            warn_of_zero_weights(result.zero_weights, result.drawn, advice)
            warn_of_high_k(result.pareto_k, advice)
            if error is not None:
                warn_of_larger_errors(result, error, error_of, num_samples, refine)
    return result


def _check(num_samples: int, error: float | None, error_of: str, vectorize: bool, compile: bool) -> None:
    require_count("num_samples", num_samples, least=2, why=", to have an error bar")
    require_vectorized(compile, vectorize)
    if compile and error is not None:
        raise PyroVAEError(
            "samples to a stated error are drawn by uncompiled code: expected compile=False with error=..., got True. "
            "Drop it."
        )
    if error_of not in ("datum", "mean") or (error is None and error_of == "mean"):
        raise PyroVAEError(
            f"expected error_of to be 'datum', or 'mean' beside an error, got {error_of!r} and error={error!r}. Pass "
            "error=0.002, error_of='mean', for example."
        )
    if error is not None and not 0 < error < math.inf:
        raise PyroVAEError(f"expected error to be a positive number of nats, got {error!r}. Try 0.02.")


def _goal(error: float, of: Literal["datum", "mean"], number: int | None) -> Goal:
    if of == "mean" and number is None:
        raise PyroVAEError(
            "an error of the mean is shared out over all data: expected x whose number of data is known before it is "
            "read, got a DataLoader that does not say. Pass error_of='datum', or tensors."
        )
    return Goal(error, of, number or 0)


class Draw:
    """Draws the log-weights (K, N) of minibatches, by compiled code if it is asked for, which all of them share."""

    def __init__(self, num_samples: int, vectorize: bool, compile: bool) -> None:
        self.num_samples, self.vectorize, self.compile = num_samples, vectorize, compile
        self.compiled: Callable[[Args], Tensor] | None = None

    def of(self, program: Program, data: Pieces) -> Tensor:
        """The log-weights of a minibatch of some data."""
        if not self.compile:
            return draw_weights(program, self.num_samples, self.vectorize)
        if self.compiled is None:
            self.compiled = _compiled_draw(program, data, self.num_samples)
        return self.compiled(program.args)


def estimate_evidence(data: Pieces, draw: Draw, share: Sharing) -> LogLikelihood:
    """Estimate log p(x) of all data, one minibatch after another; see :func:`pyro_vae.log_likelihood`."""
    args, num_samples = data.program.args, draw.num_samples
    size = None if draw.vectorize else min(rows_at_once(args), WEIGHTS_AT_ONCE // num_samples)
    programs = data.programs(num_samples, draw.vectorize, size)
    with progress_bar(len(args[0]), "datum", "log p(x)", share.progress) as bar:

        def estimates() -> Iterator[LogLikelihood]:
            for i in share.own(len(programs)):
                share.seed(i)
                yield LogLikelihood.from_weights(draw.of(programs[i], data))
                bar.update(len(programs.batches[i][0]) * share.size)

        return share.records(programs, estimates(), data.device)


def _compiled_draw(program: Program, data: Pieces, num_samples: int) -> Callable[[Args], Tensor]:
    """A function that draws log-weights (K, N) of a minibatch by compiled code."""
    if not data.same_supports:
        raise PyroVAEError(
            "compiled code does not check samples: expected a guide on the support of the model's latents, got a guide "
            "whose support exceeds it, so that each sample must be checked. Use a guide on that support, or "
            "compile=False."
        )

    def weigh(number: int, *batch: Tensor) -> Tensor:
        return wide(log_weights_of(program.on(batch).run(number)))

    compiled = CompiledFunction(weigh, program.modules())

    def draw(batch: Args) -> Tensor:
        # Half the rows of an uncompiled run: compiled code has little overhead to spread, and fewer rows fit the cache.
        # All portions have one size, so that the code is compiled once; surplus samples of the last one are dropped.
        portion = even_chunks(num_samples, max(1, rows_at_once(batch) // (2 * len(batch[0]))))
        portions = [compiled(portion, *batch) for _ in range(-(-num_samples // portion))]
        return torch.cat(portions)[:num_samples]

    return draw
