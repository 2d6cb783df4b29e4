"""The data x of an evaluation: accepted types (tensors, no DataLoader), checks, and pieces that fit in memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae.engine.batch_plate import check_rows, find_batch_plate
from pyro_vae.engine.minibatches import Minibatches
from pyro_vae.engine.modules import eval_mode
from pyro_vae.engine.program import Program, sample_sites
from pyro_vae.engine.sites import Sites, labelled
from pyro_vae.engine.supports import check_covers
from pyro_vae.errors import PyroVAEError

ELEMENTS_AT_ONCE = 2**21  # data elements times particles in one run: 8 MB of float32; fewer cost more of Python's time

Args = tuple[Tensor, ...]  # the program's arguments; the rows of every tensor are the data


def arguments(x: Any) -> Args:
    """The program's arguments as tensors: at least 2 data, since their spread is the error bar, and all finite."""
    data = Minibatches(x, None, "x")
    if data.size is None:
        raise PyroVAEError("expected x to be tensors, got a DataLoader. Pass a split of pv.data, or its tensors.")
    if data.size < 2:
        raise PyroVAEError(
            f"expected at least 2 data, since their spread is the error bar, got {data.size}. Pass more rows. "
            "pv.log_weights takes a single one."
        )
    (args,) = Minibatches(x, data.size, "x").in_order()
    return args


def check_count(name: str, value: Any, at_least: int, why: str = "") -> None:
    """Raise an error unless the argument `name` is an integer of `at_least` or more."""
    if not isinstance(value, int) or value < at_least:
        raise PyroVAEError(f"expected {name} to be an integer, at least {at_least}{why}, got {value!r}.")


def progress_bar(total: int, unit: str, what: str, progress: bool) -> Any:
    """The bar of an evaluation, which goes at its end."""
    return tqdm(total=total, leave=False, disable=None if progress else True, unit=unit, desc=what)


def rows_at_once(args: Args) -> int:
    """How many rows, which are data times particles, one run of the program should have."""
    return max(1, ELEMENTS_AT_ONCE // max(1, args[0][0].numel()))


@dataclass(frozen=True)
class Pieces:
    """Checked data, a program's arguments, that may be split into minibatches."""

    args: Args
    divisible: bool  # whether the program gives a datum the same densities in every minibatch
    same_supports: bool = True  # whether model and guide have the same support at every latent site

    def minibatches(self, size: int) -> list[Args]:
        """Minibatches of `size` data; one with all data where the program is not divisible."""
        if not self.divisible:
            return [self.args]
        return list(zip(*(column.split(max(1, size)) for column in self.args), strict=True))


@contextmanager
def checked(program: Program) -> Iterator[Pieces]:
    """Check the program by one run on all data with Pyro's validation, then yield its data for an evaluation.

    Inside the context modules are in evaluation mode, no gradients are recorded, and Pyro's validation is off.
    Validation checks every density and would take a third of the time.
    """
    # Freeing this tensor makes glibc's malloc keep up to 62 MiB. Otherwise each run returns its memory to the system
    # and fetches it again page by page, which takes a third of the time.
    torch.empty(31 * 2**20, dtype=torch.uint8)
    with eval_mode(program.modules()), torch.no_grad():
        pieces = Pieces(program.args, is_divisible(program))
        for piece in pieces.minibatches(rows_at_once(program.args)):
            with pyro.validation_enabled():
                model, guide = (sample_sites(trace) for trace in program.on(piece).trace())
                check_plate(model, guide, len(piece[0]))
                same = same_supports(model, guide)
        # Where the guide's support exceeds the model's, Pyro must check every sample.
        with pyro.validation_enabled(not same):
            yield replace(pieces, same_supports=same)


def is_divisible(program: Program) -> bool:
    """Whether a datum has the same densities in every minibatch, unlike with a guide with parameters for each datum."""
    half = min(len(program.args[0]) // 2, 4)
    first, second = (tuple(column[start : 2 * half] for column in program.args) for start in (0, half))
    try:
        whole = [sample_sites(trace) for trace in program.on(first).trace()]
        plate = find_batch_plate(labelled(*whole))
        guide = whole[1].items()
        values = {n: s["value"].narrow(plate.dim - s["fn"].event_dim, half, half) for n, s in guide}
        part = [sample_sites(trace) for trace in program.on(second).trace(values)]
        pairs = (
            (site["unscaled_log_prob"].narrow(plate.dim, half, half), other[name]["unscaled_log_prob"])
            for sites, other in zip(whole, part, strict=True)
            for name, site in sites.items()
        )
        return all(torch.allclose(*pair, rtol=1e-4, atol=1e-3, equal_nan=True) for pair in pairs)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError, KeyError):
        return False  # a program that fails on any data fails again on all data, with its own message


def same_supports(model: Sites, guide: Sites) -> bool:
    """Whether model and guide have the same supports; an error where the guide misses a part of the model's."""
    same = [check_covers(name, model[name]["fn"], guide[name]["fn"]) for name in guide if name in model]
    return all(same)


def check_plate(model: Sites, guide: Sites, number: int) -> None:
    """Raise an error unless the batch plate has one row for each of `number` rows of x."""
    check_rows(find_batch_plate(labelled(model, guide)), number)
