"""Every bound and each of its gradients against exact means, and every reduction against NumPy in float64."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import numpy as np
import pyro
import pytest
import torch
from helpers.programs import LinearGaussian, draw_bounds
from helpers.quick import slow_but
from helpers.toys import CONTINUOUS, DISCRETE, Discrete, Mixed, MixturePrior, OneSite, TwoSites, X
from scipy.special import logsumexp

import pyro_vae as pv
from pyro_vae.testing.programs import Outcomes

POINTS = [0.0, 0.1, 0.5, 1.0]
NODES = {OneSite: 40, MixturePrior: 60, TwoSites: 14, Discrete: 1, Mixed: 20}
BOUNDS = [
    pv.ELBO(2, "monte_carlo"),
    pv.IWAE(2),
    pv.Renyi(0.5, 2),
    pv.Renyi(3.0, 2),
    pv.Renyi(-1.0, 2),
    pv.MIWAE(2, 1),
    pv.PIWAE(2, 1),
    pv.CIWAE(0.3, 2),
    pv.TVO(2, POINTS),
    pv.JVI(2, 1),
    pv.RWS(2),
]


def lme(log_w, axis=0):
    return logsumexp(log_w, axis) - math.log(log_w.shape[axis])


def tvo(log_w):
    total = 0.0
    for low, high in pairwise(POINTS):
        weights = np.exp(low * log_w - logsumexp(low * log_w, 0))
        total = total + (high - low) * (weights * log_w).sum(0)
    return total


def leaving_out(log_w, count):
    return np.mean([lme(np.delete(log_w, list(out), 0)) for out in combinations(range(len(log_w)), count)], 0)


REDUCTIONS = {  # of six particles, by NumPy and SciPy
    pv.ELBO(6, "monte_carlo"): lambda w: w.mean(0),
    pv.IWAE(6): lme,
    pv.Renyi(0.5, 6): lambda w: 2 * lme(0.5 * w),
    pv.Renyi(-1.0, 6): lambda w: 0.5 * lme(2 * w),
    pv.Renyi(3.0, 6): lambda w: -0.5 * lme(-2 * w),
    pv.MIWAE(2, 3): lambda w: (lme(w[:3]) + lme(w[3:])) / 2,
    pv.PIWAE(2, 3): lme,
    pv.CIWAE(0.3, 6): lambda w: 0.3 * w.mean(0) + 0.7 * lme(w),
    pv.TVO(6, POINTS): tvo,
    pv.JVI(6, 0): lme,
    pv.JVI(6, 1): lambda w: 6 * lme(w) - 5 * leaving_out(w, 1),
    pv.JVI(6, 2): lambda w: 18 * lme(w) - 25 * leaving_out(w, 1) + 8 * leaving_out(w, 2),
    pv.RWS(6): lme,
}


@pytest.mark.parametrize("spread", [1.0, 1e4])
@pytest.mark.parametrize("objective", REDUCTIONS, ids=repr)
def test_reduction_is_numpys(objective, spread):
    """In float64, and in float32 as far as its rounding allows, however far the weights are apart."""
    log_w = spread * torch.randn(6, 50, dtype=torch.float64) - 100
    expected = REDUCTIONS[objective](log_w.numpy())
    np.testing.assert_allclose(objective.reduce(log_w).numpy(), expected, rtol=1e-11)
    np.testing.assert_allclose(objective.reduce(log_w.float()).numpy(), expected, rtol=2e-5, atol=1e-4)
    np.testing.assert_allclose(objective.reduce(log_w[:, 0]).numpy(), expected[0], rtol=1e-11)


LINEAR = [pv.ELBO(2, "analytic"), pv.ELBO(2, "analytic", beta=3.0), pv.ELBO(2, "monte_carlo", beta=3.0)]


@pytest.mark.parametrize("objective", slow_but([BOUNDS[1], LINEAR[0]], BOUNDS + LINEAR), ids=repr)
def test_two_particles_have_the_exact_mean_and_its_gradients(objective):
    pv.testing.check_objective(objective, programs=[toy() for toy in CONTINUOUS + DISCRETE])


@pytest.mark.slow
@pytest.mark.parametrize("objective", [pv.MIWAE(2, 2), pv.PIWAE(2, 2), pv.JVI(4, 2), pv.RWS(3, sleep=0.5)], ids=repr)
def test_more_particles_have_the_exact_mean_and_its_gradients(objective):
    pv.testing.check_objective(objective)


@pytest.mark.parametrize("toy", NODES, ids=lambda toy: toy.__name__)
def test_what_each_bound_bounds(toy):
    """Exact means at two particles against the exact log p(x): the order that the docstrings state."""
    program = toy()
    grid = Outcomes(program, NODES[toy])
    evidence = grid.log_evidence()
    elbo, iwae, half, three, minus, _, _, ciwae, tvo, *_ = (grid.mean(o.reduce, 2) for o in BOUNDS)
    ordered = [three, elbo, half, iwae, evidence]
    assert all((low < high).all() for low, high in pairwise(ordered))
    assert ((elbo < ciwae) & (ciwae < iwae) & (elbo < tvo) & (tvo < iwae) & (iwae < minus)).all()


def test_the_thermodynamic_sum_becomes_iwae_as_intervals_grow():
    program = LinearGaussian(3, 2, 4, wrong=True)
    with torch.no_grad():
        log_w = pv.log_weights(program.model, program.guide, program.x, num_particles=20_000)
    tvo = [pv.TVO(20_000, np.linspace(0, 1, t + 1)).reduce(log_w) for t in (1, 4, 16, 256)]
    assert all((low < high).all() for low, high in pairwise(tvo))
    torch.testing.assert_close(tvo[0], log_w.mean(0))
    torch.testing.assert_close(tvo[-1], pv.IWAE(20_000).reduce(log_w), rtol=0, atol=0.03)


def test_renyi_at_negative_alpha_is_above_log_evidence_once_particles_are_many():
    program = LinearGaussian(3, 2, 4, wrong=True)
    few, many = (draw_bounds(pv.Renyi(-1.0, k), program, 2000).mean(0) for k in (1, 200))
    assert (few < program.log_evidence()).all()
    assert (many > program.log_evidence()).all()


def test_the_jackknife_takes_the_bias_out():
    """Each order leaves less of it, of whatever sign."""
    program = OneSite()
    with torch.no_grad():
        grid = Outcomes(program, 16)
        bias = [(grid.mean(pv.JVI(4, order).reduce, 4) - grid.log_evidence()).abs() for order in (0, 1, 2)]
    assert (bias[0] > 2 * bias[1]).all()
    assert (bias[1] > 1.2 * bias[2]).all()


ZERO_VARIANCE = [
    pv.Renyi(0.5, 7),
    pv.Renyi(-2.0, 7),
    pv.Renyi(3.0, 7),
    pv.MIWAE(3, 4),
    pv.PIWAE(3, 4),
    pv.CIWAE(0.4, 7),
    pv.TVO(7),
    pv.TVO(7, gradient="covariance"),
    pv.JVI(7, 2),
    pv.RWS(7, sleep=0.5),
    pv.ELBO(3, gradient="stl"),
    pv.IWAE(7, "stl"),
    pv.IWAE(7, "dreg"),
    pv.IWAE(7, "score"),
    pv.IWAE(7, "vimco"),
    pv.IWAE(7, "dreg", chunk_size=3),
    pv.IWAE(7, "vimco", vectorize_particles=False),
]


@pytest.mark.parametrize("objective", ZERO_VARIANCE, ids=repr)
def test_exact_posterior_gives_log_evidence_with_zero_variance(objective):
    program = LinearGaussian(5, 2, 4)
    for parameter in program.parameters:
        parameter.requires_grad_()
    for _ in range(3):
        bound = objective.bound(program.model, program.guide, program.x)
        torch.testing.assert_close(bound.detach(), program.log_evidence().detach(), rtol=0, atol=1e-9)
        loss = objective.differentiable_loss(program.model, program.guide, program.x)
        assert loss.item() == pytest.approx(-program.log_evidence().sum().item(), abs=1e-8)


def test_free_bits_are_a_floor_under_each_dimension():
    """Dimension 1 is near the prior and held at lambda, without gradient; dimension 0 is above and free."""
    loc = torch.tensor([1.5, 0.05], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.5, 1.0], dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pyro.distributions.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", pyro.distributions.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", pyro.distributions.Normal(loc + 0 * x[:, None], scale).to_event(1))

    kl = torch.distributions.kl_divergence(torch.distributions.Normal(loc, scale), torch.distributions.Normal(0.0, 1.0))
    assert kl[1] < 0.1 < kl[0]
    x = X.repeat(20_000)
    for form in ("analytic", "monte_carlo"):
        for beta in (1.0, 2.0):
            pyro.set_rng_seed(0)
            free = pv.ELBO(3, form, beta=beta, free_bits=0.1).bound(model, guide, x)
            pyro.set_rng_seed(0)
            plain = pv.ELBO(3, form, beta=beta).bound(model, guide, x)
            assert (plain - free).mean().item() == pytest.approx(beta * (0.1 - kl[1].item()), abs=0.01)
            lost = torch.autograd.grad(plain.mean() - free.mean(), loc)[0]
            assert lost[0].item() == pytest.approx(0.0, abs=1e-9)
            assert lost[1].item() == pytest.approx(-beta * 0.05, abs=0.02)  # the KL's own slope, which free bits drop


def test_a_schedule_is_followed_step_by_step_and_in_both_forms():
    program = LinearGaussian(3, 2, 4, wrong=True)
    for parameter in program.parameters:
        parameter.requires_grad_()
    for form in ("analytic", "monte_carlo"):
        scheduled = pv.ELBO(2, form, beta=lambda step: 0.5 * step)
        for step in range(4):
            fixed = pv.ELBO(2, form, beta=0.5 * step)
            pyro.set_rng_seed(step)
            bound = fixed.bound(program.model, program.guide, program.x).sum().item()
            assert scheduled.step == step
            pyro.set_rng_seed(step)
            assert scheduled.bound(program.model, program.guide, program.x).sum().item() == pytest.approx(bound)
            scheduled.loss(program.model, program.guide, program.x)
            assert scheduled.step == step  # looking is no step
            pyro.set_rng_seed(step)
            assert scheduled.loss_and_grads(program.model, program.guide, program.x) == pytest.approx(-bound)
    with pytest.raises(ValueError, match=r"expected beta to be .* at least 0, or a function that gives one, got -1"):
        pv.ELBO(beta=lambda step: -1).loss(program.model, program.guide, program.x)


def test_a_subclass_of_the_elbo_is_trained_on_its_own_reduction():
    class Best(pv.ELBO):
        def reduce(self, log_weights):
            return log_weights.amax(0)

    class Worst(pv.ELBO):
        def reduce_for_guide(self, log_weights):
            return log_weights.amin(0)

    program = LinearGaussian(3, 2, 4, wrong=True)
    at = program.model, program.guide, program.x
    for make in (Best, Worst):
        losses = []
        for value in (lambda o: -o.bound(*at).sum(), lambda o: o.differentiable_loss(*at)):
            pyro.set_rng_seed(0)
            losses.append(value(make(4, "monte_carlo")).item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    pyro.set_rng_seed(0)
    assert losses[0] == pytest.approx(pv.ELBO(4, "monte_carlo").loss(*at), rel=1e-6)


def test_a_subclass_of_the_elbo_has_the_estimators_of_its_own_reduction():
    class Average(pv.ELBO):
        def reduce(self, log_weights):
            return log_weights.logsumexp(0) - math.log(len(log_weights))

    program = LinearGaussian(3, 2, 4, wrong=True)
    for parameter in program.parameters:
        parameter.requires_grad_()
    gradients = []
    for objective in (pv.IWAE(4, "dreg"), Average(4, "monte_carlo", "dreg")):
        pyro.set_rng_seed(0)
        loss = objective.differentiable_loss(program.model, program.guide, program.x)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, program.parameters)]))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    with pytest.raises(pv.PyroVAEError, match="expected gradient to be one of"):
        Average(2, "monte_carlo", "disarm")


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_a_share_of_zero_or_one_is_one_bound_where_a_weight_is_zero(beta):
    log_weights = torch.tensor([[0.0, -math.inf, -math.inf], [1.0, 2.0, -math.inf]])
    alone = pv.ELBO(2) if beta else pv.IWAE(2)
    torch.testing.assert_close(pv.CIWAE(beta, 2).reduce(log_weights), alone.reduce(log_weights))


@pytest.mark.parametrize("partitions", [1, 3])
def test_tvo_of_a_weight_of_zero_is_minus_infinity(partitions):
    """The first mean has equal weights. The others, and the derivative, are those of the weights above zero."""
    log_w = torch.tensor([[-1.0, -1.0], [-2.0, -2.0], [-math.inf, 0.5], [-1.5, -1.5]], dtype=torch.float64)
    log_w.requires_grad_()
    objective = pv.TVO(4, partitions)
    bound = objective.reduce(log_w)
    assert bound[0] == -math.inf
    (slope,) = torch.autograd.grad(bound.sum(), log_w)
    assert bool(slope.isfinite().all())
    nearly = log_w.detach().masked_fill(log_w == -math.inf, -1e6).requires_grad_()
    (expected,) = torch.autograd.grad(objective.reduce(nearly).sum(), nearly)
    torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("objective", REDUCTIONS, ids=repr)
@pytest.mark.parametrize("method", ["reduce", "reduce_for_guide", "curvature"])
def test_log_weights_of_more_dimensions_are_refused(objective, method):
    """Some reductions took them, and no generic curvature did."""
    with pytest.raises(
        pv.PyroVAEError, match=r"expected log_weights to be a dense tensor \(K, N\) .* shape \(6, 3, 2\)"
    ):
        getattr(objective, method)(torch.zeros(6, 3, 2))
