"""Counts the data of a minibatch: the rows of the plate around what the model observes."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyro_vae.engine.program import Program
from pyro_vae.engine.sites import Plate, Sites, is_factor, plates
from pyro_vae.engine.traces import sample_sites

Place = tuple[int, int]  # an argument's position, and one of its dimensions


@dataclass
class Rows:
    """How many data a minibatch has, and how many its loss stands for."""

    program: Program
    plate: Plate | None  # whose rows are the data; None without a plate around observed sites
    number: int  # of the first minibatch's data
    places: list[Place]  # a minibatch has as many data as these dimensions; without any, a run of the model counts them
    full: int | None = None  # of a subsampled plate, all data, to which the loss is scaled

    def __call__(self, batch: Sequence[Any]) -> int:
        """How many data the loss stands for."""
        return self.full or self.count(batch)

    def share(self, batch: Sequence[Any]) -> float:
        """The minibatch as a part of the data that its loss stands for."""
        return self.count(batch) / self(batch)

    def count(self, batch: Sequence[Any]) -> int:
        """How many data the minibatch has."""
        if self.full and not self.places:
            return self.number
        shapes = list(map(_shape, batch))
        sizes = {(i, dim): shapes[i][dim] for i, dim in self.places if i < len(shapes) and dim < len(shapes[i])}
        if len(set(sizes.values())) == 1:
            return next(iter(sizes.values()))
        # Such as a last minibatch of sequences (time, datum) with fewer data, or the entries x[present] as data.
        sites = sample_sites(self.program.on(tuple(batch)).trace()[0], latent=False)
        size = next((size for plate, size in _sizes(sites).items() if plate.name == getattr(self.plate, "name", "")), 0)
        self.places = [place for place in self.places if sizes.get(place, size) == size]
        return size


def find_rows(program: Program, model: Sites, cut: int | None) -> Rows:
    """The rows of the plate around the most observed sites, and then the most sites, of a model.

    Of several, it is the plate of size `cut`, if minibatches are cut from the data as so many rows; and then the
    outermost one. Without any, the data are the rows of the first argument.
    """
    observed = _sizes(model)
    if not observed:
        return Rows(program, None, len(program.args[0]), [(0, 0)])
    counts = Counter(plate for site in _observed(model).values() for plate in plates(site))
    others = Counter(plate for site in model.values() for plate in plates(site))
    plate = max(observed, key=lambda each: (counts[each], others[each], observed[each] == cut))
    number, shapes = observed[plate], map(_shape, program.args)
    places = [(i, dim) for i, shape in enumerate(shapes) for dim, length in enumerate(shape) if length == number]
    return Rows(program, plate, number, places, plate.full_size if plate.full_size != plate.size else None)


def _observed(model: Sites) -> Sites:
    return {name: site for name, site in model.items() if site["is_observed"] and not is_factor(site)}


def _sizes(model: Sites) -> dict[Plate, int]:
    """The plates around observed sites, outermost first, with their sizes."""
    found: dict[Plate, int] = {}
    for site in _observed(model).values():
        for plate in plates(site):
            # pyro.plate("data") has the size of its sites
            shape = site["fn"].batch_shape
            own = plate.size if plate.size >= 0 else shape[plate.dim] if len(shape) >= -plate.dim else 1
            found[plate] = max(own, found.get(plate, 1))
    return found


def _shape(argument: Any) -> tuple[int, ...]:
    return tuple(getattr(argument, "shape", ()))
