"""Pyro programs with exact answers, and the z-test that estimates are held to."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

MODELS = [  # of log p(x): data dimensions, latent dimensions, number of data
    (1, 1, 30),
    (2, 1, 30),
    (1, 2, 30),
    (3, 2, 30),
    (2, 3, 30),
    (5, 2, 30),
    (4, 4, 30),
    (8, 3, 30),
    (10, 5, 30),
    (20, 6, 30),
]
SIZES = [(1, 1, 3), (5, 2, 4), (3, 4, 6)]  # data dimensions, latent dimensions, number of data


def z_score(estimates: Tensor, exact: Tensor | float) -> Tensor:
    """Distance of the mean over the first dimension from the exact value, in the mean's own standard errors."""
    standard_error = estimates.std(0) / math.sqrt(len(estimates))
    return (estimates.mean(0) - exact).abs() / standard_error


def draw_bounds(objective, program: LinearGaussian, repeats: int) -> Tensor:
    """Independent estimates of each datum's bound, (repeats, N): data repeated, so that one run draws them all."""
    x = program.x.repeat(repeats, 1)
    with torch.no_grad():
        return objective.bound(program.model, program.guide, x).reshape(repeats, -1)


class LinearGaussian:
    """z ~ N(0, I), x ~ N(W z + b, sigma^2 I), in float64: log p(x), the posterior and the ELBO are known.

    The guide is N(A x + c, L L'), the exact posterior unless `wrong` is set.
    """

    def __init__(self, data_dim: int, latent_dim: int, num_data: int, *, wrong: bool = False, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.sigma = 0.7
        self.W, self.b = normal(data_dim, latent_dim), normal(data_dim)
        eye = torch.eye(latent_dim, dtype=torch.float64)
        covariance = torch.linalg.inv(eye + self.W.T @ self.W / self.sigma**2)
        self.A = covariance @ self.W.T / self.sigma**2
        self.c = -self.A @ self.b
        self.L = torch.linalg.cholesky(covariance)
        if wrong:
            self.A = self.A + 0.2 * normal(*self.A.shape)
            self.c = self.c + 0.2 * normal(*self.c.shape)
            self.L = 0.8 * self.L + 0.1 * eye
        self.prior = dist.MultivariateNormal(torch.zeros(latent_dim, dtype=torch.float64), scale_tril=eye)
        noise = self.sigma * normal(num_data, data_dim)
        self.x = normal(num_data, latent_dim) @ self.W.T + self.b + noise
        self.parameters = [self.W, self.b, self.A, self.c, self.L]

    def model(self, x: Tensor, **subsampling: Any) -> None:
        with pyro.plate("data", len(x), **subsampling):
            x = pyro.subsample(x, event_dim=1)
            z = pyro.sample("z", self.prior)
            pyro.sample("x", dist.Normal(z @ self.W.T + self.b, self.sigma).to_event(1), obs=x)

    def guide(self, x: Tensor, **subsampling: Any) -> None:
        with pyro.plate("data", len(x), **subsampling):
            x = pyro.subsample(x, event_dim=1)
            pyro.sample("z", dist.MultivariateNormal(x @ self.A.T + self.c, scale_tril=self.L.tril()))

    def log_evidence(self) -> Tensor:
        """Exact log p(x_n)."""
        eye = torch.eye(len(self.b), dtype=torch.float64)
        marginal = torch.distributions.MultivariateNormal(self.b, self.W @ self.W.T + self.sigma**2 * eye)
        return marginal.log_prob(self.x)

    def exact_elbo(self) -> Tensor:
        """E_q log p(x|z) - KL(q || p) for each datum, by the moments of q; differentiable."""
        loc, scale_tril = self.x @ self.A.T + self.c, self.L.tril()
        residual = self.x - loc @ self.W.T - self.b
        spread = (self.W @ scale_tril).square().sum()
        reconstruction = -(residual.square().sum(-1) + spread) / (2 * self.sigma**2)
        reconstruction = reconstruction - len(self.b) * (math.log(self.sigma) + 0.5 * math.log(2 * math.pi))
        kl = 0.5 * (scale_tril.square().sum() + loc.square().sum(-1) - loc.shape[1])
        return reconstruction - kl + scale_tril.diagonal().log().sum()


def wide(size, seed=0, factor=1.2):
    """A program whose guide is slightly shifted and wider than the posterior, so that the weights are bounded."""
    program = LinearGaussian(*size, seed=seed)
    program.L = factor * program.L
    program.c = program.c + 0.1 * program.L.diagonal()
    return program


def gamma_poisson(number):
    """A program with a positive latent, counts, and their exact log p(x)."""

    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.LogNormal((0.8 * x + 1).log(), 0.3))

    x = torch.arange(float(number))
    return model, guide, x, dist.NegativeBinomial(2.0, probs=torch.tensor(0.5)).log_prob(x)
