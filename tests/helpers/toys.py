"""Small Pyro programs beside those of pyro_vae.testing, whose bounds and gradients are exact in the same way."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch

from pyro_vae.testing.programs import NormalProgram, SmallProgram, X

__all__ = ["CONTINUOUS", "DISCRETE", "Discrete", "Mixed", "MixturePrior", "OneSite", "SharedPrior", "TwoSites", "X"]

OneSite = NormalProgram


class SharedPrior(OneSite):
    """The guide's bias is the prior's mean: one parameter in both."""

    guide_parameters = {"gain": 0.4, "log_scale": -0.3}

    def posterior(self, p, name, z, x):
        return dist.Normal(p["gain"] * x + p["mean"], p["log_scale"].exp())


class MixturePrior(OneSite):
    """p(z) is a mixture of two Gaussians, so the posterior has two modes."""

    model_parameters = {"logit": 0.4, "distance": 1.5, "slope": 1.0}

    def prior(self, p, name, z):
        logits = torch.stack([p["logit"], torch.zeros_like(p["logit"])], -1)
        locs = torch.stack([p["distance"], -p["distance"]], -1)
        components = dist.Normal(locs, torch.full_like(locs, 0.8))
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), components)

    def likelihood(self, p, z):
        return dist.Normal(p["slope"] * z["z"], 0.9)


class TwoSites(SmallProgram):
    """z1 -> z2 -> x in the model, z1 -> z2 in the guide too."""

    latents = ("z1", "z2")
    model_parameters = {"mean": 0.2, "first": 0.8, "second": 1.1}
    guide_parameters = {"gain": 0.5, "log_scale": -0.4, "direct": 0.3, "through": 0.6, "log_scale2": -0.6}

    def prior(self, p, name, z):
        return dist.Normal(p["mean"], 1.0) if name == "z1" else dist.Normal(p["first"] * z["z1"], 0.6)

    def likelihood(self, p, z):
        return dist.Normal(p["second"] * z["z2"], 0.8)

    def posterior(self, p, name, z, x):
        if name == "z1":
            return dist.Normal(p["gain"] * x, p["log_scale"].exp())
        loc = p["direct"] * x + p["through"] * z["z1"]
        return dist.Normal(loc, p["log_scale2"].exp())


class Discrete(SmallProgram):
    """Two Bernoulli sites, the second given the first."""

    latents = ("z1", "z2")
    model_parameters = {"logit": 0.3, "given": 0.8, "first": 1.2, "second": -0.9}
    guide_parameters = {"gain": 0.7, "bias": -0.2, "gain2": 0.5, "through": 0.6}

    def prior(self, p, name, z):
        return dist.Bernoulli(logits=p["logit"] if name == "z1" else p["given"] * (z["z1"] - 0.5))

    def likelihood(self, p, z):
        return dist.Normal(p["first"] * z["z1"] + p["second"] * z["z2"], 0.8)

    def posterior(self, p, name, z, x):
        if name == "z1":
            return dist.Bernoulli(logits=p["gain"] * x + p["bias"])
        return dist.Bernoulli(logits=p["gain2"] * x + p["through"] * z["z1"])


class Mixed(SmallProgram):
    """A class and a style, as in a semi-supervised VAE: y is discrete, z given y is normal."""

    latents = ("y", "z")
    model_parameters = {"logit": 0.3, "shift": 1.0, "slope": 0.9}
    guide_parameters = {"gain": 0.7, "bias": -0.2, "direct": 0.5, "through": -0.4, "log_scale": -0.3}

    def prior(self, p, name, z):
        return dist.Bernoulli(logits=p["logit"]) if name == "y" else dist.Normal(torch.zeros_like(p["shift"]), 1.0)

    def likelihood(self, p, z):
        return dist.Normal(p["shift"] * z["y"] + p["slope"] * z["z"], 0.8)

    def posterior(self, p, name, z, x):
        if name == "y":
            return dist.Bernoulli(logits=p["gain"] * x + p["bias"])
        return dist.Normal(p["direct"] * x + p["through"] * z["y"], p["log_scale"].exp())


CONTINUOUS = [OneSite, SharedPrior, MixturePrior, TwoSites]
DISCRETE = [Discrete, Mixed]


def _improper_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def _improper_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 1.0))


IMPROPER = (_improper_model, _improper_guide)  # p(x) is 1, and the guide is the posterior
