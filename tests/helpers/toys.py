"""Small Pyro programs whose bounds and gradients quadrature and enumeration give exactly.

A toy says its distributions once; from them come a Pyro model, a Pyro guide, and a grid over one particle: every
state of discrete sites times Gauss-Hermite nodes of normal ones.
"""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

X = torch.tensor([0.4, -1.3], dtype=torch.float64)


class Toy:
    """Model sites `latents`, then "x"; parameters by name, those of `shared` in model and guide."""

    latents: tuple[str, ...]
    model_parameters: dict[str, float]
    guide_parameters: dict[str, float]

    def __init__(self) -> None:
        values = self.model_parameters | self.guide_parameters
        self.p = {name: torch.tensor(v, dtype=torch.float64, requires_grad=True) for name, v in values.items()}

    def prior(self, name: str, z: dict[str, Tensor]):
        raise NotImplementedError

    def likelihood(self, z: dict[str, Tensor]):
        raise NotImplementedError

    def posterior(self, name: str, z: dict[str, Tensor], x: Tensor):
        raise NotImplementedError

    def model(self, x: Tensor) -> None:
        z: dict[str, Tensor] = {}
        with pyro.plate("data", len(x)):
            for name in self.latents:
                z[name] = pyro.sample(name, self.prior(name, z))
            pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x: Tensor) -> None:
        z: dict[str, Tensor] = {}
        with pyro.plate("data", len(x)):
            for name in self.latents:
                z[name] = pyro.sample(name, self.posterior(name, z, x))

    def parameters(self) -> list[Tensor]:
        return list(self.p.values())

    def grid(self, num_nodes: int) -> Grid:
        return Grid(self, X, num_nodes)


class Grid:
    """One particle's outcomes, every matrix (S, N): their probabilities and log-densities.

    `log_likelihood`, `log_prior` and `log_q` differentiate through the samples, those in `fixed` at fixed samples.
    """

    def __init__(self, toy: Toy, x: Tensor, num_nodes: int) -> None:
        nodes, weights = map(torch.tensor, np.polynomial.hermite_e.hermegauss(num_nodes))
        z: dict[str, Tensor] = {}
        probability: Tensor = torch.ones((), dtype=x.dtype)
        for i, name in enumerate(toy.latents):
            q = toy.posterior(name, z, x)
            along = [1] * (len(toy.latents) + 1)
            if isinstance(q, dist.Normal):
                along[i] = num_nodes
                z[name] = q.loc + q.scale * nodes.reshape(along)
                probability = probability * (weights / weights.sum()).reshape(along)
            else:
                along[i] = 2
                z[name] = torch.arange(2.0, dtype=x.dtype).reshape(along)
                probability = probability * q.log_prob(z[name]).exp()
        moving = self._densities(toy, z, x)
        shape = torch.broadcast_shapes(probability.shape, *(value.shape for value in moving))
        self.probability, self.log_likelihood, self.log_prior, self.log_q = (
            value.expand(shape).reshape(-1, len(x)) for value in (probability, *moving)
        )
        at_fixed = self._densities(toy, {name: value.detach() for name, value in z.items()}, x)
        self.fixed = [value.expand(shape).reshape(-1, len(x)) for value in at_fixed]

    @staticmethod
    def _densities(toy: Toy, z: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_prior = sum(toy.prior(name, z).log_prob(z[name]) for name in toy.latents)
        log_q = sum(toy.posterior(name, z, x).log_prob(z[name]) for name in toy.latents)
        return toy.likelihood(z).log_prob(x), log_prior, log_q

    @property
    def log_w(self) -> Tensor:
        return self.log_likelihood + self.log_prior - self.log_q

    def log_evidence(self) -> Tensor:
        """log p(x), (N,): of the mean weight."""
        return (self.probability * self.log_w.exp()).sum(0).log()

    def tuples(self, value: Tensor, count: int) -> Tensor:
        """A matrix (S, N) at each choice of `count` outcomes: (count, S^count, N)."""
        index = torch.cartesian_prod(*[torch.arange(len(value))] * count).reshape(-1, count)
        return value[index.T]

    def mean(self, function, count: int, *matrices: Tensor) -> Tensor:
        """The mean over `count` particles of a function of matrices (count, M), the log-weights unless told: (N,)."""
        inputs = [self.tuples(matrix, count).flatten(1) for matrix in matrices or (self.log_w,)]
        probability = self.tuples(self.probability, count).prod(0)
        return (probability * function(*inputs).reshape(probability.shape)).sum(0)


class OneSite(Toy):
    latents = ("z",)
    model_parameters = {"mean": 0.3, "slope": 1.2, "offset": -0.2}
    guide_parameters = {"gain": 0.4, "bias": 0.2, "log_scale": -0.3}

    def prior(self, name, z):
        return dist.Normal(self.p["mean"], 1.0)

    def likelihood(self, z):
        return dist.Normal(self.p["slope"] * z["z"] + self.p["offset"], 0.7)

    def posterior(self, name, z, x):
        return dist.Normal(self.p["gain"] * x + self.p["bias"], self.p["log_scale"].exp())


class SharedPrior(OneSite):
    """The guide's bias is the prior's mean: one parameter in both."""

    guide_parameters = {"gain": 0.4, "log_scale": -0.3}

    def posterior(self, name, z, x):
        return dist.Normal(self.p["gain"] * x + self.p["mean"], self.p["log_scale"].exp())


class MixturePrior(OneSite):
    """p(z) is a mixture of two Gaussians, so the posterior has two modes."""

    model_parameters = {"logit": 0.4, "distance": 1.5, "slope": 1.0}

    def prior(self, name, z):
        logits = torch.stack([self.p["logit"], torch.zeros_like(self.p["logit"])])
        locs = torch.stack([self.p["distance"], -self.p["distance"]])
        components = dist.Normal(locs, torch.full_like(locs, 0.8))
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), components)

    def likelihood(self, z):
        return dist.Normal(self.p["slope"] * z["z"], 0.9)


class TwoSites(Toy):
    """z1 -> z2 -> x in the model, z1 -> z2 in the guide too."""

    latents = ("z1", "z2")
    model_parameters = {"mean": 0.2, "first": 0.8, "second": 1.1}
    guide_parameters = {"gain": 0.5, "log_scale": -0.4, "direct": 0.3, "through": 0.6, "log_scale2": -0.6}

    def prior(self, name, z):
        return dist.Normal(self.p["mean"], 1.0) if name == "z1" else dist.Normal(self.p["first"] * z["z1"], 0.6)

    def likelihood(self, z):
        return dist.Normal(self.p["second"] * z["z2"], 0.8)

    def posterior(self, name, z, x):
        if name == "z1":
            return dist.Normal(self.p["gain"] * x, self.p["log_scale"].exp())
        loc = self.p["direct"] * x + self.p["through"] * z["z1"]
        return dist.Normal(loc, self.p["log_scale2"].exp())


class Discrete(Toy):
    """Two Bernoulli sites, the second given the first."""

    latents = ("z1", "z2")
    model_parameters = {"logit": 0.3, "given": 0.8, "first": 1.2, "second": -0.9}
    guide_parameters = {"gain": 0.7, "bias": -0.2, "gain2": 0.5, "through": 0.6}

    def prior(self, name, z):
        return dist.Bernoulli(logits=self.p["logit"] if name == "z1" else self.p["given"] * (z["z1"] - 0.5))

    def likelihood(self, z):
        return dist.Normal(self.p["first"] * z["z1"] + self.p["second"] * z["z2"], 0.8)

    def posterior(self, name, z, x):
        if name == "z1":
            return dist.Bernoulli(logits=self.p["gain"] * x + self.p["bias"])
        return dist.Bernoulli(logits=self.p["gain2"] * x + self.p["through"] * z["z1"])


class Mixed(Toy):
    """A class and a style, as in a semi-supervised VAE: y is discrete, z given y is normal."""

    latents = ("y", "z")
    model_parameters = {"logit": 0.3, "shift": 1.0, "slope": 0.9}
    guide_parameters = {"gain": 0.7, "bias": -0.2, "direct": 0.5, "through": -0.4, "log_scale": -0.3}

    def prior(self, name, z):
        return dist.Bernoulli(logits=self.p["logit"]) if name == "y" else dist.Normal(torch.zeros_like(X[0]), 1.0)

    def likelihood(self, z):
        return dist.Normal(self.p["shift"] * z["y"] + self.p["slope"] * z["z"], 0.8)

    def posterior(self, name, z, x):
        if name == "y":
            return dist.Bernoulli(logits=self.p["gain"] * x + self.p["bias"])
        return dist.Normal(self.p["direct"] * x + self.p["through"] * z["y"], self.p["log_scale"].exp())
