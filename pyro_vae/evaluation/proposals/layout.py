"""All latents of a datum as one vector of unconstrained numbers."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_vae.engine.program import Run
from pyro_vae.engine.supports import support_of


@dataclass(frozen=True)
class Part:
    """The place of a site's latents in the vector."""

    name: str
    start: int
    rest: tuple[int, ...]  # the dimensions of the unconstrained latents besides particles and data
    event_dim: int
    dtype: torch.dtype

    @property
    def stop(self) -> int:
        """Where the next site's latents start."""
        return self.start + prod(self.rest)


@dataclass(frozen=True)
class Layout:
    """The sites of a program in order; the dimensions of particles and data are counted from the left of the events."""

    parts: tuple[Part, ...]
    particle_dim: int
    batch_dim: int

    @classmethod
    def of(cls, run: Run, names: Iterable[str]) -> Self:
        """That of these sites of the model, by a run of several particles; each is on a flat space."""
        parts: list[Part] = []
        for name in names:
            site = run.model[name]
            fn = site["fn"]
            free = biject_to(support_of(fn)).inv(site["value"])
            outer = free.dim() - fn.event_dim
            columns = free.movedim((outer + run.particle_dim, outer + run.batch_plate.dim), (0, 1))
            start = parts[-1].stop if parts else 0
            parts.append(Part(name, start, tuple(columns.shape[2:]), fn.event_dim, free.dtype))
        return cls(tuple(parts), run.particle_dim, run.batch_plate.dim)

    @property
    def size(self) -> int:
        """D, the number of latents of a datum."""
        return self.parts[-1].stop

    def columns(self, tensor: Tensor, event_dim: int) -> Tensor:
        """A tensor beside a site's plates, with so many dimensions of an event, as (K, N, numbers)."""
        missing = -self.particle_dim - (tensor.dim() - event_dim)  # one particle may have no dimension
        tensor = tensor.reshape((1,) * missing + tuple(tensor.shape))
        outer = tensor.dim() - event_dim
        moved = tensor.movedim((outer + self.particle_dim, outer + self.batch_dim), (0, 1))
        return moved.reshape(*moved.shape[:2], -1)

    def unflattened(self, columns: Tensor, part: Part) -> Tensor:
        """The inverse of :meth:`columns`, for a site's unconstrained latents."""
        outer = 2 + len(part.rest) - part.event_dim
        shaped = columns.to(part.dtype).reshape(*columns.shape[:2], *part.rest)
        return shaped.movedim((0, 1), (outer + self.particle_dim, outer + self.batch_dim))

    def free(self, part: Part, transform: Any, value: Tensor) -> tuple[Tensor, Tensor]:
        """A site's unconstrained latents (K, N, d), and log |dy / dz| there, (K, N)."""
        y = transform.inv(value)
        slope = transform.log_abs_det_jacobian(y, value)
        left = slope.dim() - (value.dim() - part.event_dim)  # dimensions of the event that the slope still has
        return self.columns(y, part.event_dim), -self.columns(slope, left).sum(-1)

    def vector(self, transforms: dict[str, Any], values: dict[str, Tensor]) -> Tensor:
        """The vectors (K, N, D) of the sites' values."""
        return torch.cat([self.free(part, transforms[part.name], values[part.name])[0] for part in self.parts], -1)

    def values(self, transforms: dict[str, Any], y: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The sites' values at vectors (K, N, D), and log |dz / dy|, (K, N)."""
        found, volume = {}, y.new_zeros(y.shape[:2])
        for part in self.parts:
            there = self.unflattened(y[..., part.start : part.stop], part)
            found[part.name] = value = transforms[part.name](there)
            slope = transforms[part.name].log_abs_det_jacobian(there, value)
            left = slope.dim() - (value.dim() - part.event_dim)
            volume = volume + self.columns(slope, left).sum(-1)
        return found, volume
