"""What holds for every program and every draw."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import pyro
import torch
from helpers.programs import LinearGaussian
from hypothesis import given, settings
from hypothesis import strategies as st

import pyro_vae as pv
from pyro_vae.objectives import gradients

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


matrices = st.integers(0, 10_000).map(
    lambda seed: 5 * torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 50
)
SIX = [
    pv.ELBO(6, "monte_carlo"),
    pv.IWAE(6),
    pv.Renyi(0.5, 6),
    pv.Renyi(-1.0, 6),
    pv.Renyi(2.0, 6),
    pv.MIWAE(2, 3),
    pv.PIWAE(2, 3),
    pv.CIWAE(0.3, 6),
    pv.TVO(6, 4),
    pv.JVI(6, 2),
    pv.RWS(6),
]


@settings(deadline=None, max_examples=25)
@given(matrices, st.permutations(range(6)), st.permutations(range(3)), st.permutations(range(2)))
def test_permuting_particles_changes_nothing(log_w, order, within, groups):
    """For means over groups: the particles within each, and the groups."""
    for objective in SIX:
        shuffled = log_w[list(order)]
        if isinstance(objective, pv.MIWAE):
            shuffled = log_w.unflatten(0, (2, 3))[list(groups)][:, list(within)].flatten(0, 1)
        for reduce in (objective.reduce, objective.reduce_for_guide):
            torch.testing.assert_close(reduce(shuffled), reduce(log_w))


@settings(deadline=None, max_examples=25)
@given(matrices, st.floats(-20, 20))
def test_a_constant_factor_of_the_weights_comes_out_whole(log_w, constant):
    for objective in SIX:
        torch.testing.assert_close(objective.reduce(log_w + constant), objective.reduce(log_w) + constant)


orders = st.floats(-30, 30).filter(lambda alpha: abs(alpha - 1) > 1e-3)


@settings(deadline=None, max_examples=50)
@given(matrices, orders, orders)
def test_renyi_falls_in_alpha_between_the_largest_and_the_smallest_weight(log_w, first, second):
    low, high = sorted((first, second))
    falls = pv.Renyi(low, 6).reduce(log_w) - pv.Renyi(high, 6).reduce(log_w)
    assert (falls >= -1e-9).all()
    assert (pv.Renyi(low, 6).reduce(log_w) <= log_w.max(0).values + 1e-9).all()
    assert (pv.Renyi(high, 6).reduce(log_w) >= log_w.min(0).values - 1e-9).all()


@settings(deadline=None, max_examples=25)
@given(matrices, st.floats(0, 1), st.integers(1, 20))
def test_the_families_meet_at_their_ends(log_w, beta, partitions):
    elbo, iwae = pv.ELBO(6, "monte_carlo").reduce(log_w), pv.IWAE(6).reduce(log_w)
    close = torch.testing.assert_close
    close(pv.Renyi(0.0, 6).reduce(log_w), iwae)
    for alpha in (1 - 1e-6, 1 + 1e-6):
        close(pv.Renyi(alpha, 6).reduce(log_w), elbo, atol=1e-3, rtol=0)
    close(pv.MIWAE(1, 6).reduce(log_w), iwae)
    close(pv.MIWAE(6, 1).reduce(log_w), elbo)
    close(pv.CIWAE(0.0, 6).reduce(log_w), iwae)
    close(pv.CIWAE(1.0, 6).reduce(log_w), elbo)
    close(pv.TVO(6, 1).reduce(log_w), elbo)
    close(pv.JVI(6, 0).reduce(log_w), iwae)
    for between in (pv.CIWAE(beta, 6), pv.TVO(6, partitions), pv.MIWAE(2, 3), pv.MIWAE(3, 2)):
        assert ((elbo - 1e-9 <= between.reduce(log_w)) & (between.reduce(log_w) <= iwae + 1e-9)).all()


@settings(deadline=None, max_examples=25)
@given(matrices)
def test_iwae_rises_with_particles_over_all_subsets(log_w):
    """Burda et al. (2016): the mean over subsets of K - 1 is below the bound of K, for the very same particles."""
    means = [log_w.mean(0)]
    for size in range(2, 7):
        subsets = torch.tensor(list(combinations(range(6), size)))
        means.append(torch.stack([pv.IWAE(size).reduce(log_w[subset]) for subset in subsets]).mean(0))
    assert all((low <= high + 1e-9).all() for low, high in pairwise(means))


@settings(deadline=None, max_examples=10)
@given(matrices)
def test_slope_and_curvature_are_finite_differences(log_w):
    h = 5e-4  # as small as rounding in the second difference allows
    for objective in SIX:
        slope, curvature = gradients.slope(objective.reduce, log_w), gradients.curvature(objective.reduce, log_w)
        for_guide = gradients.curvature(objective.reduce_for_guide, log_w)
        torch.testing.assert_close(objective.curvature(log_w), for_guide)
        for k in range(6):
            step = torch.zeros_like(log_w)
            step[k] = h
            low, middle, high = (objective.reduce(log_w + d) for d in (-step, 0 * step, step))
            torch.testing.assert_close(slope[k], (high - low) / (2 * h), atol=1e-5, rtol=0)
            torch.testing.assert_close(curvature[k], (high - 2 * middle + low) / h**2, atol=1e-4, rtol=0)


@settings(deadline=None, max_examples=10)
@given(matrices)
def test_blocks_of_particles_are_no_approximation(log_w):
    baseline, reduce = gradients.mean_of_other_particles(log_w), pv.IWAE(6).reduce
    whole = gradients.curvature(reduce, log_w), gradients.learning_signal(reduce, log_w, baseline)
    at_once, gradients.ELEMENTS_AT_ONCE = gradients.ELEMENTS_AT_ONCE, 50
    try:
        parts = gradients.curvature(reduce, log_w), gradients.learning_signal(reduce, log_w, baseline)
    finally:
        gradients.ELEMENTS_AT_ONCE = at_once
    torch.testing.assert_close(parts, whole)
    for k in range(6):
        replaced = torch.cat([log_w[:k], baseline[k : k + 1], log_w[k + 1 :]])
        by_hand = reduce(log_w) - reduce(replaced) + gradients.slope(reduce, replaced)[k]
        torch.testing.assert_close(whole[1][k], by_hand)


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
