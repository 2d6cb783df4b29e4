"""Runs a program for K particles: all at once, in chunks, or one by one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import pyro
import torch
from pyro.distributions import Delta, MaskedDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch import distributions as td
from torch.utils.checkpoint import checkpoint

from pyro_vae.engine import rng
from pyro_vae.engine.program import Program, Run
from pyro_vae.engine.traces import at_once
from pyro_vae.errors import PyroVAEError, require_count

T = TypeVar("T")


@dataclass(frozen=True)
class Particles:
    """How many particles, and how the program runs for them."""

    number: int  # K, how many samples are drawn from the guide for each datum
    vectorize: bool = True  # whether the program runs once for all of them
    chunk_size: int | None = None  # for how many the model runs at a time; None is all

    def __post_init__(self) -> None:
        require_count("num_particles", self.number)
        if self.chunk_size is None:
            return
        require_count("chunk_size", self.chunk_size)
        if not self.vectorize:
            raise PyroVAEError(
                "chunk_size splits the particles of a vectorised run: expected vectorize_particles=True with it, got "
                "False, which runs them one at a time. Drop one of the two."
            )

    def read(self, program: Program, read: Callable[[Run], T]) -> list[T]:
        """The result of `read` for each run: one with all K particles, or K with one, or one for each chunk.

        Where gradients are recorded, a chunk's run is read inside its own checkpoint and runs again in the backward
        pass, so that memory never holds more than one.
        """
        if self.number == 1:
            return [read(program.run_model(program.run_guide()))]
        if not self.vectorize:
            draws, results = DrawAsOneOf(self.number), []
            for particle in range(self.number):
                with draws.of(particle):
                    results.append(read(program.run()))
            draws.finish()
            return results
        program = program.with_nesting()
        with at_once(self.number):
            drawn = program.run_guide(self.number)
            if self.chunk_size is None or self.chunk_size >= self.number:
                return [read(program.run_model(drawn))]

            def read_chunk(start: int, size: int) -> T:
                return read(program.run_model(drawn.rows(start, size)))

            chunks = [(i, min(self.chunk_size, self.number - i)) for i in range(0, self.number, self.chunk_size)]
            if not torch.is_grad_enabled():
                return [read_chunk(*chunk) for chunk in chunks]
            return [checkpoint(read_chunk, *chunk, use_reentrant=False) for chunk in chunks]


class DrawAsOneOf(Messenger):
    """Makes the k-th of K runs draw the values that the k-th of K vectorised particles draws from the same seed.

    Each site draws for all K particles, from the generators' state in the first run, and keeps row k. The price of
    equal values is K times as many draws. It needs noise that depends on no parameter, at the sites of the first run.
    Everything else (a rejection sampler, dropout, the sites after a branch that the first run did not take) draws from
    a seed of its own, which no two runs share.
    """

    def __init__(self, num_particles: int) -> None:
        super().__init__()
        self.num_particles = num_particles
        self.states = [rng.get_state()]
        self.first: list[tuple[Any, ...]] = []  # the sites of the first run: name, family and shape
        self.subsamples: dict[str, Tensor] = {}
        pyro.set_rng_seed(int(torch.randint(2**31, ())))

    def finish(self) -> None:
        """Leave the generators as the vectorised run does, if any site drew from them; else their state is new."""
        if not torch.equal(self.states[0]["torch"], self.states[-1]["torch"]):
            rng.set_state(self.states[-1])

    def of(self, particle: int) -> Self:
        """The handler for the run of one particle."""
        self.particle, self.next_site, self.as_first = particle, 0, True
        return self

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or msg["is_observed"] or msg["value"] is not None:
            return
        name, fn = msg["name"], msg["fn"]
        if site_is_subsample(msg):
            if name not in self.subsamples:
                self.subsamples[name], self.states[-1] = _drawn_from(self.states[-1], fn)
            msg["value"], msg["done"] = self.subsamples[name], True
            return
        noise = fn
        while isinstance(noise, (*_WRAPPERS, td.TransformedDistribution)):
            noise = noise.base_dist
        if not isinstance(noise, _FIXED_NOISE):
            return
        site = (name, type(noise), noise.batch_shape, noise.event_shape)
        if self.particle == 0:
            self.first.append(site)
        # Another site needs another number of draws, and so the states of all later sites are unknown.
        self.as_first = self.as_first and self.first[self.next_site : self.next_site + 1] == [site]
        if not self.as_first:
            return
        msg["value"], after = _drawn_from(self.states[self.next_site], lambda: self._draw(fn))
        msg["done"] = True
        self.next_site += 1
        if self.next_site == len(self.states):
            self.states.append(after)

    def _draw(self, fn: Any) -> Tensor:
        if isinstance(fn, _WRAPPERS):
            return self._draw(fn.base_dist)
        if isinstance(fn, td.TransformedDistribution):
            value = self._draw(fn.base_dist)
            for transform in fn.transforms:  # after the choice of row k: some transforms cache their last value
                value = transform(value)
            return value
        return fn.expand((self.num_particles, *fn.batch_shape)).rsample()[self.particle]


_WRAPPERS = (td.Independent, MaskedDistribution)
_NORMAL = (td.Normal, td.MultivariateNormal, td.LowRankMultivariateNormal)
_FIXED_NOISE = (*_NORMAL, td.Laplace, td.Cauchy, td.Uniform, Delta)


def _drawn_from(state: rng.State, draw: Callable[[], Tensor]) -> tuple[Tensor, rng.State]:
    """A draw from that state of the generators, and the state after it; the generators keep their own state."""
    with rng.preserved():
        rng.set_state(state)
        return draw(), rng.get_state()
