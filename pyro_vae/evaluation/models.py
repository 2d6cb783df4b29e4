"""The table of compare_models: several models on one set of data, by log p(x) and paired differences."""

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from pyro_vae.checks import Seed, checked, shown
from pyro_vae.defaults import MAX_SEED, NUM_SAMPLES
from pyro_vae.engine.arguments import takes_program
from pyro_vae.engine.columns import ArrayRows, column_of, tensor_of
from pyro_vae.engine.modules import PyroFunction
from pyro_vae.engine.program import Program
from pyro_vae.engine.sites import element_weights, is_deterministic, is_factor
from pyro_vae.errors import PyroVAEError
from pyro_vae.evaluation.estimate import Estimate
from pyro_vae.evaluation.evidence import LogLikelihood
from pyro_vae.evaluation.likelihood import log_likelihood
from pyro_vae.evaluation.pieces import ELEMENTS_AT_ONCE, has_no_tensors, require_data, rows_at_once
from pyro_vae.evaluation.pieces import checked as checked_program
from pyro_vae.evaluation.runs import laid_out
from pyro_vae.evaluation.simulation import copies_of, places_in

SURE = 2.0  # standard errors of a difference that is claimed
PART_OF_CLAIM = 0.1  # the Monte Carlo error of a difference, as a part of the difference that is claimed


@checked
def compare_models(
    models: Any,
    x: Any,
    num_samples: int = NUM_SAMPLES,
    *,
    refine: bool = True,
    error: float | None = None,
    claim: float | None = None,
    seed: Seed | None = None,
    vectorize_particles: bool = True,
    progress: bool = True,
) -> pd.DataFrame:
    r"""Compare models by log p(x) of the same data: a table with one row for each, the best one first.

    .. math:: \hat\Delta = \frac1N \sum_n \bigl(\log \hat p_A(x_n) - \log \hat p_B(x_n)\bigr), \qquad
        \operatorname{se} = \frac{1}{\sqrt N} \operatorname{std}_n \bigl(\log \hat p_A(x_n) - \log \hat p_B(x_n)\bigr)

    Data are hard or easy for all models alike. So a difference has a smaller error than either mean.

    - ``log_likelihood``, ``log_likelihood_se``: the mean over data, and its standard error over data, in nats.
    - ``difference``, ``difference_se``: the row minus the first row, and the standard error of this paired difference
      over data. It includes the Monte Carlo error.
    - ``difference_mc``: the Monte Carlo error of the difference for these data, which more samples reduce.
    - ``share_high_k``: the share of data with k-hat above 0.7, whose estimates are probably too low.
    - ``ess``: the median effective sample size.
    - ``seconds``: the time of the row's estimate, with the fit of proposals.
    - ``data_needed``, with `claim`: the number of data with which two ``difference_se`` are `claim`.
    - ``samples_needed``, with `claim`: the number of samples of a datum with which ``difference_mc`` is a tenth of it.

    Arguments:
        models: model/guide pairs, or tuples (model, guide), by name.
        x, num_samples, vectorize_particles, progress: see :func:`pyro_vae.log_likelihood`. What may be other data at
            each reading is read once, and is then in memory: a ``DataLoader``, and a split that is drawn anew.
        seed: the seed of the first model's random numbers; each later model has the next one.
        refine: whether to sample from proposals that are fitted to each datum, see :func:`pyro_vae.refine`. False
            serves discrete latents, and models whose k-hat is low without it.
        error: the ``difference_mc`` to reach, in nats, with as many samples as it takes; see
            :func:`pyro_vae.log_likelihood`.
        claim: a difference in nats, such as 0.1.

    Raises:
        ValueError: there are fewer than two models; they observe other elements of the data, or other functions of
            them; one has densities where another has probabilities; or an error of :func:`pyro_vae.log_likelihood`.

    Warns:
        UserWarning: as :func:`pyro_vae.log_likelihood`, with the model's name.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_vae as pv
        >>> def program(scale):
        ...     def model(x):
        ...         with pyro.plate("data", len(x)):
        ...             z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...             pyro.sample("x", dist.Normal(z, scale), obs=x)
        ...     def guide(x):
        ...         with pyro.plate("data", len(x)):
        ...             pyro.sample("z", dist.Normal(x / (1 + scale**2), 0.7))
        ...     return model, guide
        >>> x = 2**0.5 * torch.randn(500, generator=torch.Generator().manual_seed(0))
        >>> table = pv.compare_models({"narrow": program(0.3), "true": program(1.0)}, x, 500, seed=0, progress=False)
        >>> table.index.tolist(), bool(table.difference["narrow"] < -3 * table.difference_se["narrow"])
        (['true', 'narrow'], True)

    References:
        Vehtari, Gelman and Gabry (2017), *Practical Bayesian Model Evaluation Using Leave-One-Out Cross-Validation and
        WAIC*, Statistics and Computing (paired differences).
    """
    if not isinstance(models, Mapping) or len(models) < 2:
        got = f"{len(models)} of them" if isinstance(models, Mapping) else shown(models)
        raise PyroVAEError(
            f"expected models to be a dictionary of at least two models by name, got {got}. Pass {{'A': a, 'B': b}}, "
            "where a and b are pairs, or tuples (model, guide)."
        )
    x = _kept(x)
    for what, value in (("error", error), ("claim", claim)):
        if value is not None and not 0 < value < math.inf:
            raise PyroVAEError(f"expected {what} to be a positive number of nats, got {value!r}. Try 0.1.")
    for part in _parts(x):
        _check_observations(models, part)
    found, seconds = dict[str, LogLikelihood](), dict[str, float]()
    options: dict[str, Any] = {"vectorize_particles": vectorize_particles, "progress": progress}
    if error is not None:  # of the two estimates whose difference it is
        options |= {"error": error / 2**0.5, "error_of": "mean"}
    for place, (name, program) in enumerate(models.items()):
        started = time.perf_counter()
        own = None if seed is None else (seed + place) % (MAX_SEED + 1)  # or the errors of two would be alike
        with _said_of(name, refine=refine):
            found[name] = log_likelihood(program, x, num_samples, refine=refine, seed=own, distributed=False, **options)
        seconds[name] = time.perf_counter() - started
    order = sorted(found, key=lambda name: found[name].mean, reverse=True)
    best = found[order[0]]
    rows = {name: _row(found[name], best, claim) | {"seconds": seconds[name]} for name in order}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")


def _row(own: LogLikelihood, best: LogLikelihood, claim: float | None) -> dict[str, float]:
    apart = torch.zeros_like(own.per_datum) if own is best else own.per_datum - best.per_datum
    mean, paired = own.estimate, Estimate.of(apart)
    noise = 0.0 if own is best else math.hypot(own.monte_carlo_error, best.monte_carlo_error)
    row = {
        "log_likelihood": mean.value,
        "log_likelihood_se": mean.standard_error,
        "difference": paired.value,
        "difference_se": paired.standard_error,
        "difference_mc": noise,
        "share_high_k": own.share_high_k,
        "ess": own.ess.median().item(),
    }
    if claim is not None:
        samples = own.drawn.double().mean().item()
        of_first = math.nan if own is best else 1.0  # which has no difference
        row["data_needed"] = of_first * len(own.per_datum) * (SURE * paired.standard_error / claim) ** 2
        row["samples_needed"] = of_first * samples * (noise / (PART_OF_CLAIM * claim)) ** 2
    return row


def _kept(x: Any) -> Any:
    """What gives the same rows in the same order at each reading: of a DataLoader, its minibatches joined."""
    if has_no_tensors(x):
        return x
    if isinstance(x, DataLoader):
        batches = list(x)
        require_data(len(batches), 1)
        if isinstance(batches[0], Mapping):
            return {key: _joined([batch[key] for batch in batches]) for key in batches[0]}
        columns = zip(*(each if isinstance(each, tuple | list) else (each,) for each in batches), strict=True)
        return tuple(map(_joined, columns))
    if isinstance(x, Mapping):
        return {key: _kept(value) for key, value in x.items()}
    if isinstance(x, tuple | list):
        return tuple(map(_kept, x))
    column = column_of(x, "x")
    return x if isinstance(column, Tensor | ArrayRows) else column[:]


def _joined(values: Sequence[Any]) -> Any:
    values = [tensor_of(value) for value in values]
    return torch.cat(values) if all(isinstance(value, Tensor) for value in values) else values


def _parts(x: Any) -> Iterator[Any]:
    """All of x if it is in memory, else parts that fit there."""
    columns = [*x.values()] if isinstance(x, Mapping) else x if isinstance(x, tuple) else (x,)
    if all(isinstance(each, Tensor | int | float | str | None | list) or type(each) is np.ndarray for each in columns):
        yield x
        return
    size = max(2, ELEMENTS_AT_ONCE // max(1, *(math.prod(column.shape[1:]) for column in columns)))
    for start in range(0, columns[0].shape[0], size):
        yield _rows(x, slice(start, start + size))


def _rows(x: Any, rows: slice) -> Any:
    if isinstance(x, Mapping):
        return {key: tensor_of(value[rows]) for key, value in x.items()}
    return tuple(tensor_of(value[rows]) for value in x) if isinstance(x, tuple) else tensor_of(x[rows])


def _check_observations(models: Mapping[str, Any], x: Any) -> None:
    """Refuse models whose log p(x) are not of the same thing."""
    first: _Observed | None = None
    for name, program in models.items():
        with _said_of(name, refine=False):
            other = _observations(program, x)
        first = first or other
        pair, sizes = f"models '{next(iter(models))}' and '{name}'", [each.values.shape[1] for each in (first, other)]
        known = first.places.isfinite().any() and other.places.isfinite().any()
        if sizes[0] != sizes[1] or (known and not torch.equal(first.places, other.places)):
            raise PyroVAEError(
                f"{pair} observe different things: expected the same elements of x in both, with the same mask, got "
                f"{sizes[0]} and {sizes[1]} numbers of a datum{', others of them' * (sizes[0] == sizes[1])}. Compare "
                "log p of the same thing."
            )
        if not torch.equal(first.values, other.values):
            raise PyroVAEError(
                f"{pair} observe different things: expected the elements of x as they are, or one function of them in "
                "both, got other numbers. A density of x / 255, say, is another number than that of x."
            )
        if not torch.equal(first.discrete, other.discrete):
            counts = [int(each.discrete[0].isfinite().sum()) for each in (first, other)]
            raise PyroVAEError(
                f"{pair} have densities where the other has probabilities: expected the same of both, since a density "
                f"is no probability, got probabilities of {counts[0]} and {counts[1]} of {sizes[0]} numbers of a datum."
                " Compare discrete likelihoods with each other, and continuous ones with each other."
            )


@contextmanager
def _said_of(name: str, *, refine: bool) -> Iterator[None]:
    """Around what is done with a model: errors and warnings name it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except PyroVAEError as error:
            instead = " Or pass refine=False." if refine and "discrete" in str(error) else ""
            said = str(error).replace("Pass the guide after the model.", "Pass a pair, or a tuple (model, guide).")
            raise type(error)(f"model '{name}': {said}{instead}") from error
    for warning in caught:
        warnings.warn(f"model '{name}': {warning.message}", warning.category, stacklevel=5)


class _Observed(NamedTuple):
    """What is observed of each datum, (N, E), each in order, with infinity for what a mask leaves out."""

    values: Tensor
    discrete: Tensor  # the values at discrete sites; infinity for the others
    places: Tensor  # the places of the values among the arguments' elements; all infinite where they are not known

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """That of consecutive minibatches, without columns that a mask leaves out for all data."""
        most = max(part.values.shape[1] for part in parts)
        columns = [
            torch.cat([functional.pad(each, (0, most - each.shape[1]), value=math.inf) for each in column])
            for column in zip(*parts, strict=True)
        ]
        return cls(*(column[:, columns[0].isfinite().any(0)] for column in columns))


@takes_program
def _observations(model: PyroFunction, guide: PyroFunction, x: Any) -> _Observed:
    parts = []
    with checked_program(model, guide, x, seed=0) as data:
        for program in data.programs(1, size=rows_at_once(data.program.args)):
            parts.append(_observed(program))
    return _Observed.joined(parts)


def _observed(program: Program) -> _Observed:
    apart = copies_of(program.args)
    run = program.on(apart).run()
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for name, site in run.model.items():
        if is_factor(site):
            raise PyroVAEError(
                f"model site '{name}' is a factor: expected a density of x and of the latents, got a model with a term "
                "that may be anything. Observe data by obs=, or compare pv.log_likelihood of each yourself."
            )
        if not site["is_observed"] or is_deterministic(site):
            continue
        value = site["value"].float()
        counts = element_weights(site | {"value": value, "scale": 1.0}) > 0

        def columns(each: Tensor, site: Any = site, counts: Tensor = counts) -> Tensor:
            kept = torch.where(counts, each, math.inf)
            return laid_out(run, site | {"value": kept})[0].reshape(run.batch_plate.size, -1)

        kind = columns(value) if _is_discrete(site["fn"]) else torch.full_like(columns(value), math.inf)
        place = places_in(program.model, apart, name, site["value"])
        known = torch.full_like(value, math.inf) if place is None else place.to(value)
        found.append((columns(value), kind, columns(known)))
    values, discrete, places = (torch.cat(each, 1).sort(1).values for each in zip(*found, strict=True))
    if not bool((places.isfinite() == values.isfinite()).all()):  # of some sites only
        places = torch.full_like(places, math.inf)
    return _Observed(values, discrete, places)


def _is_discrete(fn: Any) -> bool:
    try:
        return bool(fn.support.is_discrete)
    except NotImplementedError as error:
        raise PyroVAEError(
            f"expected observed sites whose distributions have a support, got {shown(fn)}. Give it one, which says "
            "whether its values are discrete."
        ) from error
