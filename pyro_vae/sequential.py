"""Runs particles one after another with the random numbers of a vectorised run."""

from __future__ import annotations

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

from pyro_vae import rng


class DrawAsOneOf(Messenger):
    """Makes the k-th of K runs draw what the k-th of K vectorised particles would draw from the same seed.

    Each site draws for all K particles, from the state of the generators that it had in the first run, and keeps
    row k: K times as many draws as needed are the price of equal values. That takes noise that depends on no
    parameter; everything else (a rejection sampler, dropout) draws on from a seed of its own, which no two runs
    share.
    """

    def __init__(self, num_particles: int) -> None:
        super().__init__()
        self.num_particles = num_particles
        self.states = [rng.get_state()]
        self.particle = self.next_site = 0
        pyro.set_rng_seed(int(torch.randint(2**31, ())))

    def finish(self) -> None:
        """Leave the generators as the vectorised run would; where no site drew from them, with new numbers all the same."""
        if not torch.equal(self.states[0]["torch"], self.states[-1]["torch"]):
            rng.set_state(self.states[-1])

    def of(self, particle: int) -> DrawAsOneOf:
        """Around the run of one particle."""
        self.particle, self.next_site = particle, 0
        return self

    def _pyro_sample(self, msg: Any) -> None:
        subsample = site_is_subsample(msg)
        given = msg["done"] or msg["is_observed"] or msg["value"] is not None
        if given or not (subsample or _has_fixed_noise(msg["fn"])):
            return
        elsewhere = rng.get_state()
        rng.set_state(self.states[self.next_site])
        msg["value"] = msg["fn"]() if subsample else self._draw(msg["fn"])
        msg["done"] = True
        self.next_site += 1
        if self.next_site == len(self.states):
            self.states.append(rng.get_state())
        rng.set_state(elsewhere)

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


def _has_fixed_noise(fn: Any) -> bool:
    if isinstance(fn, (*_WRAPPERS, TransformedDistribution)):
        return _has_fixed_noise(fn.base_dist)
    return isinstance(fn, _FIXED_NOISE)
