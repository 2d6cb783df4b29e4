"""Pyro's own SVI as it comes: validation on, pyro.optim.Adam, and the VAE as Pyro's tutorial writes it."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
from configurations import LEARNING_RATE, Configuration, Contestant, Estimator
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn


class VAE(nn.Module):
    def __init__(self, configuration: Configuration, prefix: str = "") -> None:
        super().__init__()
        self.encoder, self.decoder = configuration.networks()
        self.event_dim, self.latent = len(configuration.event_shape), configuration.latent
        # Pyro's parameter store is one for all contestants.
        self.prefix = prefix

    def model(self, x: Tensor) -> None:
        pyro.module(f"{self.prefix} decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent), x.new_ones(self.latent)).to_event(1))
            # The networks begin with Flatten or a convolution, which know no leading dimension of particles.
            logits = self.decoder(z.reshape(-1, self.latent)).reshape(*z.shape[:-1], *x.shape[1:])
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(self.event_dim), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module(f"{self.prefix} encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def contestants(configuration: Configuration) -> list[Contestant]:
    if configuration.particles == 1:
        return [
            contestant(configuration, Trace_ELBO(), noisier=True),
            contestant(configuration, TraceMeanField_ELBO(), line="Pyro SVI"),
        ]
    return [contestant(configuration, renyi(configuration.particles), line="Pyro SVI")]


def contestant(
    configuration: Configuration, objective: pyro.infer.ELBO, line: str | None = None, noisier: bool = False
) -> Contestant:
    name = type(objective).__name__
    vae, x = VAE(configuration, name), configuration.data()
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": LEARNING_RATE}), loss=objective)
    return Contestant(f"SVI, Pyro's {name}", lambda: svi.step(x), lambda: svi.evaluate_loss(x), line, noisier)


def renyi(particles: int) -> RenyiELBO:
    return RenyiELBO(alpha=0, num_particles=particles, vectorize_particles=True, max_plate_nesting=1)


def estimators(configuration: Configuration, num_samples: int) -> list[Estimator]:
    vae, bound = VAE(configuration), renyi(num_samples)
    return [Estimator("Pyro's RenyiELBO", lambda x: [-bound.loss(vae.model, vae.guide, datum) for datum in x.split(1)])]
