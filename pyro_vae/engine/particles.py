"""Runs particles one after another with the random numbers of a vectorised run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.distributions import Delta, MaskedDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import (
    Cauchy,
    Independent,
    Laplace,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
    Uniform,
)

from pyro_vae.engine import rng


class DrawAsOneOf(Messenger):
    """Makes the k-th of K runs draw what the k-th of K vectorised particles would draw from the same seed.

    Each site draws for all K particles, from the state of the generators that it had in the first run, and keeps
    row k: K times as many draws as needed are the price of equal values. That takes noise that depends on no
    parameter, at sites that are those of the first run; everything else (a rejection sampler, dropout, the sites after
    a branch that the first run did not take) draws on from a seed of its own, which no two runs share.
    """

    def __init__(self, num_particles: int) -> None:
        super().__init__()
        self.num_particles = num_particles
        self.states = [rng.get_state()]
        self.first: list[tuple[Any, ...]] = []  # what the first run drew: name, family and shape
        self.subsamples: dict[str, Tensor] = {}
        self.particle = self.next_site = 0
        self.as_first = True
        pyro.set_rng_seed(int(torch.randint(2**31, ())))

    def finish(self) -> None:
        """Leave the generators as the vectorised run would; where no site drew from them, with new numbers all the same."""
        if not torch.equal(self.states[0]["torch"], self.states[-1]["torch"]):
            rng.set_state(self.states[-1])

    def of(self, particle: int) -> DrawAsOneOf:
        """Around the run of one particle."""
        self.particle, self.next_site = particle, 0
        self.as_first = True
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
        noise = _noise(fn)
        if not isinstance(noise, _FIXED_NOISE):
            return
        site = (name, type(noise), noise.batch_shape, noise.event_shape)
        if self.particle == 0:
            self.first.append(site)
        # Other sites would need other stretches of the generators' numbers, and so would all that follow.
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
        if isinstance(fn, TransformedDistribution):
            value = self._draw(fn.base_dist)
            for transform in fn.transforms:  # after the choice of row k: some transforms remember what they gave
                value = transform(value)
            return value
        return fn.expand((self.num_particles, *fn.batch_shape)).rsample()[self.particle]


_WRAPPERS = (Independent, MaskedDistribution)
_FIXED_NOISE = (Normal, MultivariateNormal, LowRankMultivariateNormal, Laplace, Cauchy, Uniform, Delta)


def _noise(fn: Any) -> Any:
    """The distribution that draws, inside those that only transform what it drew."""
    while isinstance(fn, (*_WRAPPERS, TransformedDistribution)):
        fn = fn.base_dist
    return fn


def _drawn_from(state: rng.State, draw: Callable[[], Tensor]) -> tuple[Tensor, rng.State]:
    """What is drawn from that state of the generators, and their state after; they themselves are left as they were."""
    with rng.preserved():
        rng.set_state(state)
        return draw(), rng.get_state()
