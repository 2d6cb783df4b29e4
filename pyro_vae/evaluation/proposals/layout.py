"""All latents of a datum as one vector of unconstrained numbers, in units of their distributions if these are normal.

A site's normal, given the sites before it, takes its mean and its scale off the latents. So a guide of normals is the
standard normal of these vectors, and a chain of narrow conditionals, z2 -> z1 -> x, is no narrow valley.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    IndependentTransform,
    LogNormal,
    Normal,
    biject_to,
    identity_transform,
)

from pyro_vae.engine.program import Run
from pyro_vae.engine.sites import unwrapped
from pyro_vae.engine.supports import support_of

FARTHEST = 80.0  # e^-80 is a normal number of float32


class Coordinates:
    """The way from the vector's numbers to a site's values, given its distribution."""

    def __init__(self, fn: Any) -> None:
        self.bijection, own = biject_to(support_of(fn)), unwrapped(fn)
        self.units: Any = identity_transform
        if isinstance(own, Normal | LogNormal):
            shape = fn.batch_shape + fn.event_shape
            self.units = AffineTransform(own.loc.expand(shape), own.scale.expand(shape))
        self.both = ComposeTransform([self.units, self.bijection])

    def value(self, y: Tensor) -> Tensor:
        """The value at these numbers, as far from zero as float32 tells their exponentials from 0 and infinity."""
        free, bijection = self.units(y), self.bijection
        while isinstance(bijection, IndependentTransform):
            bijection = bijection.base_transform
        value: Tensor = self.bijection(free if bijection == identity_transform else free.clamp(-FARTHEST, FARTHEST))
        return value

    def inverse(self, value: Tensor) -> Tensor:
        """The numbers at a value."""
        y: Tensor = self.units.inv(self.bijection.inv(value))
        return y

    def log_slope(self, y: Tensor, value: Tensor) -> Tensor:
        """The logarithm of |dz / dy|, for each element or for each event."""
        slope: Tensor = self.both.log_abs_det_jacobian(y, value)
        return slope


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

    def free(self, part: Part, fn: Any, value: Tensor) -> tuple[Tensor, Tensor]:
        """A site's unconstrained latents (K, N, d), given its distribution, and log |dz / dy| there, (K, N)."""
        coordinates = Coordinates(fn)
        y = coordinates.inverse(value)
        return self.columns(y, part.event_dim), self.log_slope(part, coordinates.log_slope(y, value), value)

    def log_slope(self, part: Part, slope: Tensor, value: Tensor) -> Tensor:
        """The sum over a datum of log |dz / dy|, (K, N)."""
        left = slope.dim() - (value.dim() - part.event_dim)  # dimensions of the event that the slope still has
        return self.columns(slope, left).sum(-1)


class Placing(Messenger):
    """A handler that gives a program's latent sites the values at vectors (K, N, D), and adds up log |dz / dy|."""

    def __init__(self, layout: Layout, y: Tensor) -> None:
        super().__init__()
        self.layout, self.y = layout, y

    def __enter__(self) -> Any:
        self.volume = self.y.new_zeros(self.y.shape[:2])
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        part = next((part for part in self.layout.parts if part.name == msg["name"]), None)
        if part is None or msg["is_observed"]:
            return
        coordinates, y = Coordinates(msg["fn"]), self.layout.unflattened(self.y[..., part.start : part.stop], part)
        value = coordinates.value(y)
        self.volume = self.volume + self.layout.log_slope(part, coordinates.log_slope(y, value), value)
        msg["value"], msg["done"] = value, True
