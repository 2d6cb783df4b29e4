"""What holds for every program and every draw."""

from __future__ import annotations

import math

import pyro
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import LinearGaussian

import pyro_vae as pv

seeds = st.integers(0, 10_000)
particles = st.integers(1, 12)


def _weights(seed, num_particles, **kwargs):
    program = LinearGaussian(3, 2, 4, wrong=True)
    pyro.set_rng_seed(seed)
    return pv.log_weights(program.model, program.guide, program.x, num_particles=num_particles, **kwargs)


def _bound(objective, seed):
    program = LinearGaussian(3, 2, 4, wrong=True)
    pyro.set_rng_seed(seed)
    return objective.bound(program.model, program.guide, program.x)


@settings(deadline=None, max_examples=25)
@given(seeds, particles)
def test_bounds_are_reductions_of_the_weights(seed, num_particles):
    log_w = _weights(seed, num_particles)
    assert log_w.shape == (num_particles, 4)
    torch.testing.assert_close(_bound(pv.ELBO(num_particles, "monte_carlo"), seed), log_w.mean(0))
    torch.testing.assert_close(_bound(pv.IWAE(num_particles), seed), log_w.exp().mean(0).log())


@settings(deadline=None, max_examples=25)
@given(seeds)
def test_one_particle_of_iwae_is_the_elbo(seed):
    torch.testing.assert_close(_bound(pv.IWAE(1), seed), _bound(pv.ELBO(1, "monte_carlo"), seed))


@settings(deadline=None, max_examples=25)
@given(seeds, particles)
def test_iwae_is_above_the_elbo_of_the_same_particles(seed, num_particles):
    iwae, elbo = _bound(pv.IWAE(num_particles), seed), _bound(pv.ELBO(num_particles, "monte_carlo"), seed)
    assert (iwae >= elbo - 1e-12).all()
    assert (iwae <= _weights(seed, num_particles).max(0).values + 1e-12).all()


@settings(deadline=None, max_examples=25)
@given(seeds, st.permutations(range(6)))
def test_permuting_particles_changes_nothing(seed, order):
    log_w = _weights(seed, 6)
    for objective in (pv.ELBO(6, "monte_carlo"), pv.IWAE(6)):
        torch.testing.assert_close(objective.reduce(log_w[list(order)]), objective.reduce(log_w))


@settings(deadline=None, max_examples=25)
@given(seeds, st.integers(2, 6))
def test_particles_one_after_another_draw_the_same_values(seed, num_particles):
    together = _weights(seed, num_particles)
    after = torch.rand(1)
    apart = _weights(seed, num_particles, vectorize_particles=False)
    torch.testing.assert_close(together, apart)
    assert torch.equal(after, torch.rand(1))


def test_weights_far_apart_stay_finite():
    log_w = torch.tensor([[0.0, -1e4], [-1e4, 3e4], [5e3, 0.0]])
    bound = pv.IWAE(3).reduce(log_w)
    torch.testing.assert_close(bound, torch.tensor([5e3, 3e4]) - math.log(3))
