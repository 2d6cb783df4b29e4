"""Counts the data of a minibatch: the rows of the plate around what the model observes."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pyro_vae.engine.program import Program
from pyro_vae.engine.sites import Plate, Sites, is_factor, plates, size_of
from pyro_vae.engine.traces import sample_sites
from pyro_vae.errors import PyroVAEError

Place = tuple[int, int]  # the position of a tensor among those in the arguments, and one of its dimensions


class Count(NamedTuple):
    """How many data a minibatch has, and how many its loss stands for."""

    own: float  # an integer, or a sum of weights
    whole: float

    @property
    def share(self) -> float:
        """The minibatch as a part of the data that its loss stands for."""
        return self.own / self.whole


@dataclass
class Rows:
    """Counts the data of a minibatch."""

    program: Program
    plate: Plate | None  # whose rows are the data; None without a plate around observed sites
    number: int  # of the first minibatch's data
    places: list[Place]  # a minibatch has as many data as these dimensions; without any, a run of the model counts them
    full: int | None = None  # of a subsampled plate, all data, to which the loss is scaled

    def of(self, batch: Sequence[Any]) -> Count:
        """How many data a minibatch has, and how many its loss stands for."""
        own = self.number if self.full and not self.places else self._count(batch)
        return Count(own, self.full or own)

    def _count(self, batch: Sequence[Any]) -> int:
        shapes = _shapes(batch)
        sizes = {(i, dim): shapes[i][dim] for i, dim in self.places if i < len(shapes) and dim < len(shapes[i])}
        if len(set(sizes.values())) == 1:
            return next(iter(sizes.values()))
        # Such as a last minibatch of sequences (time, datum) with fewer data, or the entries x[present] as data.
        size = self._in_run(batch)
        if size is None and sizes:
            return next(iter(sizes.values()))
        if size is None:
            raise PyroVAEError(
                "the data of a minibatch can't be counted: expected a plate around what the model observes, or an "
                "argument that is a tensor with a row for each datum, got neither. Put the observations into "
                "`with pyro.plate('data', ...):`."
            )
        self.places = [place for place in self.places if sizes.get(place, size) == size]
        return size

    def _in_run(self, batch: Sequence[Any]) -> int | None:
        """The size of the data's plate in a run of the model."""
        sites = sample_sites(self.program.on(tuple(batch)).trace()[0], latent=False)
        named = {plate.name: size for plate, size in _sizes(sites).items()}
        return named.get(self.plate.name) if self.plate else None

    def follows(self, batch: Sequence[Any]) -> bool:
        """Whether the plate has another size in a minibatch of another number of rows."""
        try:
            return self._in_run(batch) not in (None, self.number)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False


def find_rows(program: Program, model: Sites, cut: int | None) -> Rows:
    """The rows of the plate around the most observed sites, and then the most sites, of a model.

    Of several, it is the plate of size `cut`, if minibatches are cut from the data as so many rows; and then the
    outermost one. Without any, the data are the rows of the first argument.
    """
    observed = _sizes(model)
    if not observed:
        has_rows = bool(_shapes(program.args)) and hasattr(program.args[0], "shape")
        return Rows(program, None, len(program.args[0]), [(0, 0)] if has_rows else [])
    counts = Counter(plate for site in _observed(model).values() for plate in plates(site))
    others = Counter(plate for site in model.values() for plate in plates(site))
    plate = max(observed, key=lambda each: (counts[each], others[each], observed[each] == cut))
    number, shapes = observed[plate], _shapes(program.args)
    places = [(i, dim) for i, shape in enumerate(shapes) for dim, length in enumerate(shape) if length == number]
    return Rows(program, plate, number, places, plate.full_size if plate.full_size != plate.size else None)


def _observed(model: Sites) -> Sites:
    return {name: site for name, site in model.items() if site["is_observed"] and not is_factor(site)}


def _sizes(model: Sites) -> dict[Plate, int]:
    """The plates around observed sites, outermost first, with their sizes."""
    found: dict[Plate, int] = {}
    for site in _observed(model).values():
        for plate in plates(site):
            found[plate] = max(size_of(plate, site), found.get(plate, 1))
    return found


def _shapes(batch: Sequence[Any]) -> list[tuple[int, ...]]:
    """The shapes of the tensors among the arguments, also in dictionaries; a list may have one for each datum."""
    shapes: list[tuple[int, ...]] = []
    for each in batch:
        shapes += _shapes(list(each.values())) if isinstance(each, dict) else [tuple(getattr(each, "shape", ()))]
    return shapes
