"""Traced and compiled steps against uncompiled ones, on the same random numbers; and what can't be traced, refused."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from toys import Discrete, Mixed, MixturePrior, OneSite, TwoSites, X
from torch import nn

import pyro_vae as pv

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}  # relative, of the loss and of the gradient's length


class Flow(nn.Module):
    """A guide that is an autoregressive flow, whose density at a sample rests on the sample's own history."""

    def __init__(self) -> None:
        super().__init__()
        self.vae = pv.mlp_vae((6,), latent_dim=4, hidden_dims=(8,), likelihood="gaussian", scale="learned")
        self.transform = pyro.distributions.transforms.affine_autoregressive(4, hidden_dims=[8])

    def model(self, x):
        self.vae.model(x)

    def guide(self, x):
        pyro.module("flow", self)
        with pyro.plate("data", len(x)):
            base = self.vae.posterior(x)
            pyro.sample("z", dist.TransformedDistribution(base, [self.transform]))


class TwoLayers(nn.Module):
    """z2 -> z1 -> x, with a guide from the bottom up, in networks."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.up2, self.down, self.down2 = (nn.Linear(a, b) for a, b in ((6, 4), (2, 4), (2, 2), (2, 6)))

    def model(self, x):
        pyro.module("layers", self)
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(self.down(z2), 0.7).to_event(1))
            pyro.sample("x", dist.Normal(self.down2(z1).tanh(), 0.5).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("layers", self)
        with pyro.plate("data", len(x)):
            h = self.up(x).tanh()
            z1 = pyro.sample("z1", dist.Normal(h[..., :2], h[..., 2:].exp()).to_event(1))
            h2 = self.up2(z1).tanh()
            pyro.sample("z2", dist.Normal(h2[..., :2], h2[..., 2:].exp()).to_event(1))


def mlp(dtype):
    return pv.mlp_vae((6,), latent_dim=3, hidden_dims=(8,)).to(dtype), (torch.rand(5, 6) > 0.5).to(dtype)


def conv(dtype):
    vae = pv.conv_vae((1, 8, 8), latent_dim=3, channels=(4, 4), likelihood="gaussian", scale="per_pixel")
    return vae.to(dtype), torch.randn(5, 1, 8, 8, dtype=dtype)


def flow(dtype):
    return Flow().to(dtype), torch.randn(5, 6, dtype=dtype)


def two_sites(dtype):
    return TwoLayers().to(dtype), torch.randn(5, 6, dtype=dtype)


PROGRAMS = [mlp, conv, flow, two_sites]
OBJECTIVES = {
    **{f"ELBO {kl} {k}": lambda kl=kl, k=k: pv.ELBO(k, kl) for kl in ("analytic", "monte_carlo") for k in (1, 3)},
    **{f"ELBO {g}": lambda g=g: pv.ELBO(3, "monte_carlo", g) for g in ("stl", "dreg", "score", "vimco")},
    "ELBO beta": lambda: pv.ELBO(beta=0.3),
    "ELBO schedule": lambda: pv.ELBO(beta=lambda step: 0.1 + 0.2 * step),
    "ELBO free bits": lambda: pv.ELBO(free_bits=0.2),
    **{f"IWAE {g}": lambda g=g: pv.IWAE(4, g) for g in pv.IWAE.gradients},
    **{f"Renyi {g}": lambda g=g: pv.Renyi(0.5, 4, g) for g in pv.Renyi.gradients},
    **{f"MIWAE {g}": lambda g=g: pv.MIWAE(2, 2, g) for g in pv.MIWAE.gradients},
    **{f"PIWAE {g}": lambda g=g: pv.PIWAE(2, 2, g) for g in pv.PIWAE.gradients},
    **{f"CIWAE {g}": lambda g=g: pv.CIWAE(0.3, 4, g) for g in pv.CIWAE.gradients},
    **{f"TVO {g}": lambda g=g: pv.TVO(4, 3, g) for g in pv.TVO.gradients},
    **{f"JVI {g}": lambda g=g: pv.JVI(4, 1, g) for g in pv.JVI.gradients},
    "RWS": lambda: pv.RWS(4),
    "RWS sleep": lambda: pv.RWS(4, sleep=0.5),
}


def compile_sgd(program, objective):
    """A compiled step of a module that has a model and a guide."""
    optimizer = torch.optim.SGD(list(program.parameters()), 1e-2)
    return pv.compile_step(program.model, program.guide, objective, optimizer)


def agree(program, objective, *args, steps=2):
    """Whether compiled steps give the loss and the gradients of uncompiled ones, from the same seeds."""
    parameters = list(program.parameters())
    step = compile_sgd(program, objective)
    for seed in range(steps):
        pyro.set_rng_seed(seed)
        loss = step.compute(*args)
        found = [None if p.grad is None else p.grad.clone() for p in parameters]
        pyro.set_rng_seed(seed)
        objective.step -= 1
        expected = objective.differentiable_loss(program.model, program.guide, *args)
        exact = torch.autograd.grad(expected, parameters, allow_unused=True)
        tolerance = TOLERANCE[loss.dtype]
        torch.testing.assert_close(loss, expected.detach(), rtol=tolerance, atol=tolerance)
        assert [g is None for g in found] == [g is None for g in exact]
        found, exact = (torch.cat([g.flatten() for g in group if g is not None]) for group in (found, exact))
        assert (found - exact).norm() <= tolerance * exact.norm()
        step.optimizer.step()


@pytest.fixture
def default_dtype(dtype):
    torch.set_default_dtype(dtype)  # Pyro's flows make tensors of that type alone
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def without_inductor(monkeypatch):
    """Runs the traced graph as it is: all that this package does to a program, and no compiler's work."""
    monkeypatch.setattr("pyro_vae.compilation._inductor", lambda graph, inputs: graph)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_traced_steps_agree_with_uncompiled_ones(objective, program, dtype, default_dtype, without_inductor):
    made, x = program(dtype)
    chosen = OBJECTIVES[objective]()
    if isinstance(chosen, pv.ELBO) and chosen.kl == "analytic" and program in (flow, two_sites):
        with pytest.raises(ValueError, match=r"kl='monte_carlo'|free_bits=0"):
            compile_sgd(made, chosen)(x)
        return
    agree(made, chosen, x)
