"""A number with its error, and data in pieces: what every evaluation returns and what it goes through."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.engine.batch_plate import Sites, find_batch_plate
from pyro_vae.engine.minibatches import Minibatches
from pyro_vae.engine.modules import Program, evaluating, find_modules
from pyro_vae.engine.program import labelled, prior, sample_sites, trace_once
from pyro_vae.errors import PyroVAEError
from pyro_vae.evaluation.supports import check_covers

ELEMENTS_AT_ONCE = 2**21  # of data times particles in one run: 8 MB of float32, against Python's share of a run

Args = tuple[Tensor, ...]  # what a program is called with; every tensor's rows are the data


@dataclass(frozen=True)
class Estimate:
    r"""An estimate with its standard error.

    Attributes:
        value: the estimate, in nats unless told.
        standard_error: the standard deviation of what it was estimated by.

    Example:
        >>> import torch, pyro_vae as pv
        >>> print(pv.Estimate.of(torch.tensor([-1.0, -2.0, -3.0])))
        -2.00 ± 0.58
    """

    value: float
    standard_error: float

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        r"""The mean of independent values (N,), with :math:`\operatorname{std} / \sqrt N`.

        Raises:
            ValueError: values are not a vector of two or more.
        """
        if values.dim() != 1 or len(values) < 2:
            raise PyroVAEError(
                f"expected at least 2 values in a vector, to have an error bar, got shape {tuple(values.shape)}. "
                "Pass one value for each datum."
            )
        values = values.double()
        return cls(values.mean().item(), values.std().item() / math.sqrt(len(values)))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The normal confidence interval: the value, plus and minus 1.96 standard errors at level 0.95."""
        if not 0 < level < 1:
            raise PyroVAEError(f"expected a level between 0 and 1, got {level!r}. For 95%, pass 0.95.")
        reach = dist.Normal(0.0, 1.0).icdf(torch.tensor((1 + level) / 2, dtype=torch.float64)).item()
        return self.value - reach * self.standard_error, self.value + reach * self.standard_error

    def __str__(self) -> str:
        return f"{self.value:.{self._digits()}f} ± {self.standard_error:.{self._digits()}f}"

    def _digits(self) -> int:
        """Two, or up to four to show the error."""
        tiny = not 0 < self.standard_error < 0.095 or not math.isfinite(self.standard_error)
        return 2 if tiny else min(4, 1 - math.floor(math.log10(self.standard_error)))


def arguments(x: Any) -> Args:
    """The tensors that a program is called with; at least 2 data, all finite, since an error bar is over data."""
    data = Minibatches(x, None, "x")
    if data.size is None:
        raise PyroVAEError("expected x to be tensors, got a DataLoader. Pass a split of pv.data, or its tensors.")
    if data.size < 2:
        raise PyroVAEError(
            f"expected at least 2 data, whose spread is the error bar, got {data.size}. Pass more rows; pv.log_weights takes one."
        )
    (args,) = Minibatches(x, data.size, "x").in_order()
    return args


def check_count(name: str, value: Any, at_least: int, why: str = "") -> None:
    """Refuse what is not an integer of that size."""
    if not isinstance(value, int) or value < at_least:
        raise PyroVAEError(f"expected {name} to be an integer, at least {at_least}{why}, got {value!r}.")


def rows_at_once(args: Args) -> int:
    """How many data times particles to run a program with at once."""
    return max(1, ELEMENTS_AT_ONCE // max(1, args[0][0].numel()))


@dataclass(frozen=True)
class Pieces:
    """Data that a program may, or may not, be run on in pieces, and whether its guide has the supports of its model's latents."""

    args: Args
    divisible: bool
    alike: bool = True

    def of(self, size: int) -> list[Args]:
        """Minibatches of `size`; all data at once, where the program's rows belong to those data alone."""
        if not self.divisible:
            return [self.args]
        return list(zip(*(column.split(max(1, size)) for column in self.args), strict=True))


@contextmanager
def checked(model: Program, guide: Program | None, args: Args) -> Iterator[Pieces]:
    """Around an evaluation: run the program once on all data, with Pyro's validation; inside, modules evaluate.

    Inside there is no validation, whose passes over every density cost a third of the time, and no gradient unless it is
    asked for.
    """
    guide = prior(model) if guide is None else guide
    # Freeing this teaches glibc's malloc to keep up to 62 MiB instead of handing each run's memory back to the system and
    # fetching it again, page by page: a third of the time.
    torch.empty(31 * 2**20, dtype=torch.uint8)
    with evaluating(find_modules(model, guide)), torch.no_grad():
        pieces = Pieces(args, is_divisible(model, guide, args))
        for piece in pieces.of(rows_at_once(args)):
            with pyro.validation_enabled():
                alike = _check(trace_once(model, guide, *piece), len(piece[0]))
        # A guide that reaches beyond the model's support needs Pyro's eye on every sample.
        with pyro.validation_enabled(not alike):
            yield replace(pieces, alike=alike)


def is_divisible(model: Program, guide: Program, args: Args) -> bool:
    """Whether a datum has the same densities whichever data stand beside it, and so may be run in any piece of the data.

    A guide with parameters of its own for each datum has not: run on other rows it fails, or takes another's parameters.
    """
    half = min(len(args[0]) // 2, 4)
    first, second = (tuple(column[start : 2 * half] for column in args) for start in (0, half))
    try:
        whole = [sample_sites(trace) for trace in trace_once(model, guide, *first)]
        plate = find_batch_plate(labelled(*whole))
        values = {}
        for name, site in whole[1].items():
            values[name] = site["value"].narrow(plate.dim - site["fn"].event_dim, half, half)
        part = [sample_sites(trace) for trace in trace_once(model, guide, *second, values=values)]
        return all(
            torch.allclose(
                site["unscaled_log_prob"].narrow(plate.dim, half, half),
                other[name]["unscaled_log_prob"],
                rtol=1e-4,
                atol=1e-3,
                equal_nan=True,
            )
            for sites, other in zip(whole, part, strict=True)
            for name, site in sites.items()
        )
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError, KeyError):
        return False  # a program that no data would do for fails again, with its message, on all of them


def _check(traces: tuple[Trace, Trace], number: int) -> bool:
    """Refuse data outside their support, a batch plate that is not over them, and a guide that leaves latents out.

    Returns:
        Whether model and guide have the same supports.
    """
    try:
        model, guide = (sample_sites(trace) for trace in traces)
    except ValueError as error:
        error.add_note(
            "pyro_vae checks all data before an evaluation: expected values in the support of the distribution at that "
            "site. Convert those data, drop them, or choose another distribution."
        )
        raise
    check_plate(model, guide, number)
    return supports_alike(model, guide)


def supports_alike(model: Sites, guide: Sites) -> bool:
    """Whether the guide has the supports of the model's latents; refuse one that leaves out a part of them."""
    alike = [check_covers(name, model[name]["fn"], guide[name]["fn"]) for name in guide if name in model]
    return all(alike)


def check_plate(model: Sites, guide: Sites, number: int) -> None:
    """Refuse a program whose data are not the rows of x."""
    plate = find_batch_plate(labelled(model, guide))
    if plate.size != number:
        raise PyroVAEError(
            f"the batch plate '{plate.name}' has {plate.size} rows and x has {number}: expected a plate over the rows of x, "
            "all of them. Pass data in the first dimension of x, and no subsample_size to an evaluation; of two plates "
            "around every site, the outer one is over the data."
        )
