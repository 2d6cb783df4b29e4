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
    number: int  # of the first minibatch's data
    places: list[Place]  # a minibatch has as many data as these dimensions; without any, it has `number`
    full: int | None = None  # of a subsampled plate, all data, to which the loss is scaled

    def __call__(self, batch: Sequence[Any]) -> int:
        """How many data the loss stands for."""
        return self.full or self.count(batch)

    def share(self, batch: Sequence[Any]) -> float:
        """The minibatch as a part of the data that its loss stands for."""
        return self.count(batch) / self(batch)

    def count(self, batch: Sequence[Any]) -> int:
        """How many data the minibatch has."""
        if not self.places:
            return self.number
        shapes = list(map(_shape, batch))
        sizes = {(i, dim): shapes[i][dim] for i, dim in self.places if i < len(shapes) and dim < len(shapes[i])}
        if len(set(sizes.values())) != 1:  # such as a last minibatch of sequences (time, datum), with fewer data
            model, _ = self.program.on(tuple(batch)).trace()
            size = _data(sample_sites(model, latent=False), batch)[1]
            self.places = [place for place in self.places if sizes.get(place, size) == size]
            return size
        return next(iter(sizes.values()))


def find_rows(program: Program, model: Sites) -> Rows:
    """The rows of the data's plate; without a plate around observed sites, the data are those of the first argument."""
    plate, number = _data(model, program.args)
    if plate is None:
        return Rows(program, number, [(0, 0)])
    shapes = map(_shape, program.args)
    places = [(i, dim) for i, shape in enumerate(shapes) for dim, length in enumerate(shape) if length == number]
    return Rows(program, number, places, plate.full_size if plate.full_size != plate.size else None)


def _shape(argument: Any) -> tuple[int, ...]:
    return tuple(getattr(argument, "shape", ()))


def _data(sites: Sites, batch: Sequence[Any]) -> tuple[Plate | None, int]:
    """The plate around the most observed sites, and then the most sites, of a model; and its size."""
    observed = [site for site in sites.values() if site["is_observed"] and not is_factor(site)]
    counts = Counter(plate for site in observed for plate in plates(site))
    if not counts:
        return None, len(batch[0])
    others = Counter(plate for site in sites.values() for plate in plates(site))
    plate = max(counts, key=lambda plate: (counts[plate], others[plate]))  # of several, the first, which is outermost
    if plate.size >= 0:
        return plate, plate.size
    # pyro.plate("data") has the size of its sites
    batches = (site["fn"].batch_shape for site in observed if plate in plates(site))
    return plate, max((shape[plate.dim] for shape in batches if len(shape) >= -plate.dim), default=1)
