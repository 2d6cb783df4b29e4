"""What biased estimators of a gradient converge to, exactly; refusals; which estimators have no noise, or less.

That unbiased ones have the exact mean is in test_bounds.py.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.programs import LinearGaussian, z_score
from helpers.quick import slow_but
from helpers.toys import CONTINUOUS, DISCRETE, Discrete, Mixed, MixturePrior, OneSite, SharedPrior, TwoSites, X
from pyro.distributions.testing.rejection_gamma import RejectionGamma

import pyro_vae as pv
from pyro_vae.testing.programs import Outcomes

COPIES, CALLS = 400, 60
NODES = {OneSite: 40, SharedPrior: 40, MixturePrior: 60, TwoSites: 12, Discrete: 1, Mixed: 16}

BOUNDS = {
    "ELBO": lambda gradient: pv.ELBO(2, "monte_carlo", gradient),
    "IWAE": lambda gradient: pv.IWAE(2, gradient),
    "Renyi 0.5": lambda gradient: pv.Renyi(0.5, 2, gradient),
    "Renyi 3": lambda gradient: pv.Renyi(3.0, 2, gradient),
    "Renyi -1": lambda gradient: pv.Renyi(-1.0, 2, gradient),
    "CIWAE": lambda gradient: pv.CIWAE(0.3, 2, gradient),
    "TVO": lambda gradient: pv.TVO(2, [0.0, 0.3, 1.0], gradient),
    "JVI": lambda gradient: pv.JVI(2, 1, gradient),
}


def name(value):
    return value.__name__ if isinstance(value, type) else None


def estimates(objective, toy, copies=COPIES):
    """Independent estimates of the gradient of the loss on X, (CALLS, parameters), each of many copies of the data."""
    x = X.repeat(copies)
    losses = (objective.differentiable_loss(toy.model, toy.guide, x) / copies for _ in range(CALLS))
    return torch.stack([gradient(loss, toy) for loss in losses])


def gradient(value, toy):
    return torch.stack(torch.autograd.grad(value, toy.parameters(), allow_unused=True, materialize_grads=True))


def distance(estimates, exact):
    """The largest z-score over parameters; those without noise must agree outright."""
    moving = estimates.std(0) > 1e-9
    torch.testing.assert_close(estimates.mean(0)[~moving], exact[~moving], rtol=0, atol=1e-8)
    return z_score(estimates[:, moving], exact[moving]).max()


@pytest.mark.parametrize("toy", DISCRETE, ids=name)
@pytest.mark.parametrize("kind", ["pathwise", "dreg"])
@pytest.mark.parametrize("bound", BOUNDS)
def test_a_discrete_guide_has_no_path(bound, kind, toy):
    objective, program = BOUNDS[bound](kind), toy()
    with pytest.raises(
        ValueError, match=f"guide site '{program.latents[0]}' can't be reparameterised.*'score'.*'vimco'"
    ):
        objective.differentiable_loss(program.model, program.guide, X)


def score_left_out(grid, objective):
    """The mean of sum_k g_k grad log q(z_k), which sticking the landing leaves out: a value with that gradient."""
    log_w = grid.log_w.detach()

    def left_out(log_weights, log_q):
        log_weights = log_weights.detach().requires_grad_()
        (slope,) = torch.autograd.grad(objective.reduce(log_weights).sum(), log_weights)
        return (slope * log_q).sum(0)

    grid.probability = grid.probability.detach()
    return grid.mean(left_out, 2, log_w, grid.fixed[2])


@pytest.mark.parametrize("toy", CONTINUOUS, ids=name)
@pytest.mark.parametrize("bound", BOUNDS)
def test_sticking_the_landing_is_biased_by_the_score_it_leaves_out(bound, toy):
    objective, program = BOUNDS[bound]("stl"), toy()
    grid = Outcomes(program, NODES[toy])
    unbiased = gradient(-grid.mean(objective.reduce, 2).sum(), program)
    left_out = gradient(score_left_out(Outcomes(program, NODES[toy]), objective).sum(), program)
    found = estimates(objective, program)
    assert distance(found, unbiased - left_out) < 4
    if bound == "ELBO":
        assert left_out.abs().max() < 1e-8
    else:
        assert z_score(found, unbiased).max() > 10


TOYS = [OneSite, SharedPrior, TwoSites, Discrete, Mixed]


@pytest.mark.parametrize("toy", slow_but([OneSite, Discrete], TOYS), ids=name)
def test_reweighted_wake_sleep_is_unbiased_for_theta_and_self_normalised_for_phi(toy):
    program = toy()
    grid = Outcomes(program, NODES[toy])
    grid.probability = grid.probability.detach()
    log_p, log_q = grid.fixed[0] + grid.fixed[1], grid.fixed[2]

    def step(log_p, log_q):
        weights = (log_p - log_q).detach().softmax(0)
        return (weights * (log_p + log_q)).sum(0)

    exact = gradient(-grid.mean(step, 2, log_p, log_q).sum(), program)
    assert distance(estimates(pv.RWS(2), program), exact) < 4
    # As K grows, phi's step becomes the gradient of -KL(p(z|x) || q(z|x)).
    grid = Outcomes(program, NODES[toy])
    log_p, log_q = grid.fixed[0] + grid.fixed[1], grid.fixed[2]
    posterior = (grid.probability * (log_p - log_q).exp()).detach()
    limit = gradient(-(posterior / posterior.sum(0) * (log_p + log_q)).sum(), program)
    distances = [(estimates(pv.RWS(k), program, 100).mean(0) - limit).norm() for k in (2, 64)]
    assert distances[1] < 0.2 * distances[0]


@pytest.mark.slow
def test_the_sleep_phase_follows_log_q_of_dreams():
    program = OneSite()
    z = program.p["mean"].detach() + torch.randn(400_000, dtype=torch.float64)
    x = program.p["slope"].detach() * z + program.p["offset"].detach() + 0.7 * torch.randn_like(z)
    log_q = program.posterior(program.p, "z", {}, x).log_prob(z)
    dreamt = gradient(-log_q.mean() * len(X), program)
    for share in (0.0, 0.3, 1.0):
        wake = gradient(-_wake_phase(program, 1 - share), program)
        found = estimates(pv.RWS(2, sleep=share), program)
        torch.testing.assert_close(found.mean(0), wake + share * dreamt, rtol=0, atol=0.02)


def test_dreams_of_an_event_that_broadcasts_to_its_data():
    """A density takes three values beside an event of one, and a dream has three. At the posterior the step is zero."""
    slope, log_scale = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.75, math.log(0.5)))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x.mean(-1), log_scale.exp()))

    objective, x = pv.RWS(2, sleep=1.0, max_plate_nesting=1), torch.zeros(500, 3, dtype=torch.float64)
    losses = (objective.differentiable_loss(model, guide, x) for _ in range(50))
    found = torch.stack([torch.stack(torch.autograd.grad(loss, [slope, log_scale])) for loss in losses])
    assert z_score(found, torch.zeros(2)).max() < 4


def _wake_phase(program, share):
    grid = Outcomes(program, 40)
    grid.probability = grid.probability.detach()

    def step(log_p, log_q):
        weights = (log_p - log_q).detach().softmax(0)
        return (weights * (log_p + share * log_q)).sum(0)

    return grid.mean(step, 2, grid.fixed[0] + grid.fixed[1], grid.fixed[2]).sum()


@pytest.mark.parametrize("toy", [OneSite, SharedPrior, TwoSites, Discrete, Mixed], ids=name)
def test_the_covariance_gradient_is_the_papers(toy):
    """Masrani et al. (2019), equation 11, self-normalised, written down from there."""
    program, points = toy(), [0.0, 0.3, 1.0]
    grid = Outcomes(program, NODES[toy])
    grid.probability = grid.probability.detach()

    def papers(log_p, log_q):
        total = 0.0
        for low, high in pairwise(points):
            log_w = log_p - log_q
            weights = (low * log_w).detach().softmax(0)
            instrumental = low * log_p + (1 - low) * log_q  # log pi_beta but for its constant
            centred = (log_w - (weights * log_w).sum(0)).detach()
            total = total + (high - low) * (weights * (log_w + centred * instrumental)).sum(0)
        return total

    exact = gradient(-grid.mean(papers, 2, grid.fixed[0] + grid.fixed[1], grid.fixed[2]).sum(), program)
    found = estimates(pv.TVO(2, points, "covariance"), program)
    assert distance(found, exact) < 4
    unbiased = gradient(-Outcomes(program, NODES[toy]).mean(pv.TVO(2, points).reduce, 2).sum(), program)
    assert z_score(found, unbiased).max() > 5  # biased at two particles, as the docstring says


def guide_gradients(objective, program, repeats=20):
    """Gradients by the guide's parameters, (repeats, P)."""
    guide = [program.A, program.c, program.L]
    for parameter in guide:
        parameter.requires_grad_()
    losses = (objective.differentiable_loss(program.model, program.guide, program.x) for _ in range(repeats))
    return torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(loss, guide)]) for loss in losses])


LANDING = [
    pv.ELBO(1, gradient="stl"),
    pv.ELBO(5, gradient="dreg"),
    *(pv.IWAE(k, gradient) for k in (1, 8) for gradient in ("stl", "dreg")),
    pv.Renyi(0.5, 8, "dreg"),
    pv.MIWAE(2, 4, "dreg"),
    pv.PIWAE(2, 4, "dreg"),
    pv.CIWAE(0.5, 8, "dreg"),
    pv.TVO(8, 5, "dreg"),
    pv.JVI(6, 2, "dreg"),
]


@pytest.mark.parametrize("objective", LANDING, ids=repr)
def test_no_noise_is_left_at_the_exact_posterior(objective):
    assert guide_gradients(objective, LinearGaussian(4, 2, 3)).abs().max() < 1e-9


@pytest.mark.parametrize("objective", [pv.IWAE(8), pv.ELBO(1, "monte_carlo")], ids=repr)
def test_the_pathwise_gradient_keeps_its_noise_there(objective):
    assert guide_gradients(objective, LinearGaussian(4, 2, 3)).std(0).max() > 0.1


def test_pyros_trace_elbo_does_not_stick_the_landing():
    """It detaches nothing for reparameterised guides: the score stays in, whose mean alone is zero."""
    found = guide_gradients(pyro.infer.Trace_ELBO(), LinearGaussian(4, 2, 3))
    assert found.std(0).max() > 0.5


class ExactChain:
    """z1 -> z2 -> x, all Gaussian, with the guide q(z1|x) q(z2|z1, x) that is the posterior."""

    def __init__(self):
        self.p = torch.tensor([0.5, -0.4, 0.3, 0.5, 0.7], dtype=torch.float64)
        a, s, b, t = 0.8, 0.6, 1.1, 0.7  # z2 ~ N(a z1, s^2), x ~ N(b z2, t^2)
        self.constants = a, s, b, t
        precision = 1 / s**2 + b**2 / t**2
        variance = (b * s) ** 2 + t**2  # of x given z1
        slope = a * b
        precision1 = 1 + slope**2 / variance
        gain, scale1 = slope / variance / precision1, precision1**-0.5
        exact = [gain, scale1, b / t**2 / precision, a / s**2 / precision, precision**-0.5]
        self.p = torch.tensor(exact, dtype=torch.float64, requires_grad=True)

    def model(self, x):
        a, s, b, t = self.constants
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x.new_zeros(()), 1.0))
            z2 = pyro.sample("z2", dist.Normal(a * z1, s))
            pyro.sample("x", dist.Normal(b * z2, t), obs=x)

    def guide(self, x):
        gain, scale1, direct, through, scale2 = self.p
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(gain * x, scale1))
            pyro.sample("z2", dist.Normal(direct * x + through * z1, scale2))


@pytest.mark.parametrize("objective", LANDING, ids=repr)
def test_no_noise_is_left_at_the_exact_posterior_of_two_dependent_sites(objective):
    program = ExactChain()
    for _ in range(5):
        loss = objective.differentiable_loss(program.model, program.guide, X)
        assert torch.autograd.grad(loss, program.p)[0].abs().max() < 1e-9
    noisy = pyro.infer.Trace_ELBO().differentiable_loss(program.model, program.guide, X)
    assert torch.autograd.grad(noisy, program.p)[0].abs().max() > 1e-3


@pytest.mark.slow
def test_the_score_function_is_noisier_and_a_baseline_of_other_particles_helps():
    """On the same bound, the order of the gradients that the docstrings state."""
    program = TwoSites()
    spread = {
        kind: estimates(pv.ELBO(8, "monte_carlo", kind), program).std(0).norm()
        for kind in ("stl", "pathwise", "vimco", "score")
    }
    assert spread["stl"] < spread["pathwise"]
    assert spread["vimco"] < 1.05 * spread["score"]
    assert math.isfinite(spread["score"])


@pytest.mark.slow
def test_a_site_that_draws_by_rejection_has_no_path_in_a_mixed_guide():
    """Its rsample has half a gradient: the score function takes all of such a guide."""
    values = torch.tensor([0.4, 1.7, 0.9], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([0.4, 2.3], dtype=torch.float64).repeat(500)

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(torch.full_like(x, 0.5)))
            z = pyro.sample("z", dist.Gamma(torch.full_like(x, 2.0), torch.ones_like(x)))
            w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(y + z + w, 1.0), obs=x)

    def gradients(family):
        def guide(x):
            logit, shape, rate = values
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Bernoulli(logits=logit.expand(len(x))))
                pyro.sample("z", family(shape.expand(len(x)), rate.expand(len(x))))
                pyro.sample("w", dist.Normal(0 * x, 0.8))

        losses = (pv.ELBO(2, "monte_carlo", "vimco").differentiable_loss(model, guide, x) for _ in range(60))
        return torch.stack([torch.autograd.grad(loss / len(x), values)[0] for loss in losses])

    first, second = gradients(RejectionGamma), gradients(dist.Gamma)
    error = torch.hypot(first.std(0), second.std(0)) / math.sqrt(60)
    assert ((first.mean(0) - second.mean(0)).abs() < 4 * error).all()


@pytest.mark.parametrize("kind", ["pathwise", "stl", "dreg", "score", "vimco"])
def test_a_group_of_zero_weights_has_no_gradient_for_the_guide(kind):
    """In PIWAE the bound of the group is minus infinity: any finite number would be silently wrong."""
    loc = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x = torch.zeros(20, dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0 * x, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("positive", torch.where(z < 0, -math.inf, 0.0))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", loc).expand(len(x)), 1.0))

    pyro.clear_param_store()
    with torch.no_grad():
        pyro.set_rng_seed(0)
        groups = pv.log_weights(model, guide, x, num_particles=6).unflatten(0, (3, 2))
        assert not groups.isfinite().any(1).all() and groups.isfinite().any(1).any(0).all()
        pyro.set_rng_seed(0)
        assert pv.PIWAE(3, 2, kind).loss(model, guide, x) < math.inf  # the model's bound is finite
    with pytest.raises(pv.NotFiniteError):
        pv.fit(model, guide, x, pv.PIWAE(3, 2, kind), epochs=1, seed=0, progress=False)
