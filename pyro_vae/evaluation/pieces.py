"""The data x of an evaluation: all of it as tensors, checks, and pieces that fit in memory."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_vae.checks import how_to_make_dense, is_dense, shown
from pyro_vae.devices import OtherDeviceError, memory_for
from pyro_vae.engine import bars, rng
from pyro_vae.engine.batch_plate import check_order, check_rows, find_batch_plate
from pyro_vae.engine.columns import check_finite
from pyro_vae.engine.coverage import check_covers, missed
from pyro_vae.engine.first_run import placed, refusal
from pyro_vae.engine.minibatches import Minibatches
from pyro_vae.engine.mixing import check_apart
from pyro_vae.engine.modules import PyroFunction, eval_mode
from pyro_vae.engine.program import Program
from pyro_vae.engine.sites import Sites, labelled
from pyro_vae.engine.traces import sample_sites
from pyro_vae.engine.weights import log_density, terms
from pyro_vae.errors import PyroVAEError

ELEMENTS_AT_ONCE = 2**21  # data elements times particles in one run: 8 MB of float32; fewer cost more of Python's time

PART_OF_P = -20.0  # in nats beside the guide's draw: less than 1e-8 of p(x) is no matter

Args = tuple[Tensor, ...]  # the program's arguments; the rows of every tensor are the data


def arguments(x: Any, least: int = 2, model: Any = None, guide: Any = None) -> Args:
    """The program's arguments as tensors, with at least so many data, all finite; what a DataLoader reads, joined."""
    data = Minibatches(x, None, "x", model, guide)
    if data.size is None:
        batches = [dense(batch, "minibatches") for batch in data.in_order()]
        args = tuple(map(torch.cat, zip(*batches, strict=True)))
        require_data(len(args[0]) if args else 0, least)
        for column in args:
            check_finite(column, "x")
        return args
    require_data(data.size, least)
    (args,) = Minibatches(x, data.size, "x", model, guide).in_order()
    return dense(args, "x")


def require_data(number: int, least: int) -> None:
    """Refuse too few data."""
    if number < least:
        wanted = "a datum" if least == 1 else f"at least {least} data, since their spread is the error bar"
        raise PyroVAEError(f"expected {wanted}, got {number}. Pass more rows.")


def dense(args: tuple[Any, ...], name: str) -> Args:
    """The arguments, which must be dense tensors with one number of rows."""
    for each in args:
        if not is_dense(each):
            raise PyroVAEError(
                f"expected {name} to be a dense tensor, or a tuple of them, got {shown(each)}. "
                f"{how_to_make_dense(each)}"
            )
        if each.dim() == 0 or len(each) != len(args[0]):
            raise PyroVAEError(
                f"expected {name} to be tensors with a row for each datum, got {shown(each)} beside "
                f"{shown(args[0])}. Set the DataLoader's collate_fn."
            )
    return args


def program_on(model: PyroFunction, guide: PyroFunction | None, x: Any, least: int = 1) -> Program:
    """The program on checked data.

    A program that is conditioned on its data may have numbers as its arguments, or none. Its rows are then those of
    its batch plate, and zeros stand for them.
    """
    given, without_tensors = x if isinstance(x, tuple) else (x,), has_no_tensors(x)
    if not without_tensors:
        given = arguments(x, least, model, guide)
    for name, function in (("model", model), *([] if guide is None else [("guide", guide)])):
        error = refusal(function, given)
        if error is not None:
            raise PyroVAEError(
                "expected x to be the arguments of model and guide, a tensor or a tuple, got "
                f"{len(given)} of them, which the {name} does not take: {error}. Pass one for each argument that has "
                "no default."
            ) from error
    if not without_tensors:
        return Program(model, guide, given)
    whole = Program(model, guide, given)
    model_sites, guide_sites = map(sample_sites, whole.trace())
    plate = find_batch_plate(labelled(model_sites, guide_sites))
    if plate.full_size != plate.size:
        raise PyroVAEError(
            f"the batch plate '{plate.name}' is subsampled ({plate.size} of {plate.full_size}), so that each run would "
            "have other data: expected a plate of all data. Pass no subsample_size."
        )
    data = [site["value"] for site in model_sites.values() if site["is_observed"]]
    elements = sum(value.numel() for value in data) // max(1, plate.size)

    def without_rows(function: PyroFunction) -> PyroFunction:
        def run(_: Tensor) -> Any:
            return function(*given)

        run.__wrapped__ = function  # type: ignore[attr-defined]  # by which its modules are found
        return run

    like = data[0] if data else torch.empty(())
    rows = arguments(like.new_zeros(()).expand(plate.size, elements), least)  # as many elements as fit in memory
    return Program(without_rows(model), None if guide is None else without_rows(whole.guide_or_prior), rows)


def has_no_tensors(x: Any) -> bool:
    """Whether it is numbers or words alone, as the arguments of a program that is conditioned on its data may be."""
    return all(isinstance(each, int | float | str | None) for each in (x if isinstance(x, tuple) else (x,)))


def progress_bar(total: int | None, unit: str, what: str, progress: bool) -> Any:
    """The bar of an evaluation, which goes at its end."""
    return bars.progress_bar(progress, total=total, leave=False, unit=unit, desc=what)


def rows_at_once(args: Args, elements: int = 1) -> int:
    """How many rows, data times particles, one run of the program should have, where each makes so many elements."""
    return max(1, ELEMENTS_AT_ONCE // max(1, elements, args[0][0].numel()))


def on_rows(program: Program, rows: Tensor) -> Program:
    """The program on some of its data."""
    return program.on(tuple(argument[rows.to(argument.device)] for argument in program.args))


def memory_of(rows: int | None) -> AbstractContextManager[None]:
    """Around an evaluation of so many rows: says beside an error of memory what to make smaller."""
    now = "" if rows is None else f" (now {rows})"
    return memory_for(
        "an evaluation",
        f"Pass fewer rows of x{now}, or set pyro_vae.evaluation.pieces.ELEMENTS_AT_ONCE, the data "
        f"elements times particles of a run, to less than {ELEMENTS_AT_ONCE}.",
    )


def require_vectorized(compile: bool, vectorize: bool) -> None:
    """Refuse compiled code that would run one particle after another."""
    if compile and not vectorize:
        raise PyroVAEError(
            "compiled code runs many particles at once: expected vectorize_particles=True with compile=True, got "
            "False. Drop one of the two."
        )


@dataclass(frozen=True)
class Pieces:
    """A program whose arguments are checked data, that may be split into minibatches."""

    program: Program
    divisible: bool  # whether the program gives a datum the same densities in every minibatch
    same_supports: bool = True  # whether model and guide have the same support at every latent site

    @property
    def device(self) -> torch.device:
        """Where the results are."""
        return self.program.device or self.program.args[0].device

    def minibatches(self, size: int) -> list[Args]:
        """Minibatches of `size` data; one with all data where the program is not divisible."""
        if not self.divisible:
            return [self.program.args]
        return list(zip(*(column.split(max(1, size)) for column in self.program.args), strict=True))

    def programs(self, num_particles: int, vectorize: bool = True, size: int | None = None) -> "Programs":
        """The program on minibatches of `size` data; by default, of as many as fit in memory with so many particles."""
        batches = self.minibatches(rows_at_once(self.program.args) // num_particles if size is None else size)
        program = self.program.on(batches[0]).with_nesting()
        check_apart(program, together=vectorize)
        return Programs(program, batches)


@dataclass(frozen=True)
class Programs(Sequence[Program]):
    """A program on minibatches, each of which is on the program's device while it is used."""

    program: Program
    batches: list[Args]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: Any) -> Any:
        return self.program.on(self.batches[i])


@contextmanager
def checked(
    model: PyroFunction, guide: PyroFunction | None, x: Any, seed: int | None, least: int = 1
) -> Iterator[Pieces]:
    """Check data and program by one run on all data with Pyro's validation, then yield them for an evaluation.

    Inside, the random numbers have the seed, modules are in evaluation mode, and no gradients are recorded. Pyro's
    validation is off: it checks every density and would take a third of the time.
    """
    with checked_program(program_on(model, guide, x, least), seed) as pieces:
        yield pieces


@contextmanager
def checked_program(program: Program, seed: int | None) -> Iterator[Pieces]:
    """The same of a program on its data."""
    # Freeing this tensor makes glibc's malloc keep up to 62 MiB. Otherwise each run returns its memory to the system
    # and fetches it again page by page, which takes a third of the time.
    torch.empty(31 * 2**20, dtype=torch.uint8)
    with memory_of(len(program.args[0])), eval_mode(program.modules()), torch.no_grad():
        pieces = with_checks(Pieces(*placed(program, is_divisible, whole=False)), set())
        # Where the guide's support exceeds the model's, Pyro must check every sample.
        with pyro.validation_enabled(not pieces.same_supports), rng.seeded(seed):
            yield pieces


def with_checks(pieces: Pieces, said: set[str]) -> Pieces:
    """The same after a run on all its data with Pyro's validation, which tells whether the supports are the same.

    A site in `said` gets no warning again.
    """
    same = True
    with pyro.validation_enabled():
        for part in map(pieces.program.on, pieces.minibatches(rows_at_once(pieces.program.args))):
            sites = checked_sites(part)
            same = same_supports(*sites) and same
            warn_of_missed(part, *sites, said)
    return replace(pieces, same_supports=same)


def is_divisible(program: Program) -> bool:
    """Whether a datum has the same densities in every minibatch, unlike with a guide with parameters for each datum."""
    half = min(len(program.args[0]) // 2, 4)
    if not half:
        return False
    # The first run makes what parameters there are, some of them with a value for each row of the data.
    size = max(2 * half, rows_at_once(program.args))
    first, second = (tuple(column[rows] for column in program.args) for rows in (slice(size), slice(half, 2 * half)))
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
        # A program that ignores its rows has densities for all data each time.
        return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-3, equal_nan=True) for a, b in pairs)
    except (torch.OutOfMemoryError, OtherDeviceError):
        raise
    except (RuntimeError, ValueError, IndexError, KeyError):
        return False  # a program that fails on any data fails again on all data, with its own message


def same_supports(model: Sites, guide: Sites) -> bool:
    """Whether model and guide have the same supports; an error where the guide misses a part of the model's."""
    same = [check_covers(name, model[name]["fn"], guide[name]["fn"]) for name in guide if name in model]
    return all(same)


def warn_of_missed(program: Program, model: Sites, guide: Sites, said: set[str]) -> None:
    """Warn where the guide gives probability 0 to a value of a latent that has a part of p(x), once for each site."""
    values = {name: site["value"] for name, site in guide.items() if name in model}
    plate = find_batch_plate(labelled(model, guide))
    for name, value in values.items():
        if name in said:
            continue
        here = None
        for other, changed in missed(model[name]["fn"], guide[name]["fn"], value, plate):
            here = _log_p(program, values) if here is None else here
            if not bool((_log_p(program, values | {name: other}) - here > PART_OF_P)[..., changed].any()):
                continue
            warnings.warn(
                f"the guide gives probability 0 to a value of site '{name}' that has a part of p(x): the estimate "
                "misses it, and no number of samples shows that. Give each value some probability in the guide, or "
                "sum the site out of the model.",
                stacklevel=4,
            )
            said.add(name)
            break


def _log_p(program: Program, values: dict[str, Tensor]) -> Tensor:
    """log p(x, z) of each datum."""
    run = program.run_at(values)
    return log_density(run, terms(run.model))


def checked_sites(program: Program, *, observing: bool = True) -> tuple[Sites, Sites]:
    """The sites of model and guide in one run; an error unless the batch plate has one row for each row of x.

    With `observing`, a model without data is an error too.
    """
    traces = program.trace()
    model, guide = map(sample_sites, traces)
    if observing and not any(site["is_observed"] for site in model.values()):
        raise PyroVAEError(
            "the model observes nothing: expected a model with data, whose log p(x) there is, got latent sites "
            f"{list(model)} alone. Pass obs= to pyro.sample, or condition the model on data by pyro.condition."
        )
    plate = find_batch_plate(labelled(model, guide))
    check_rows(plate, len(program.args[0]))
    check_order(plate, traces[0])
    return model, guide
