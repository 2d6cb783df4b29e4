"""PyTorch without a library: what one writes who knows the arithmetic, eager and with torch.compile."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from configurations import LEARNING_RATE, Configuration, Contestant, Estimator
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

PORTION = 1250  # samples at once in an estimate of log p(x), which leaves them in the cache


class VAE(nn.Module):
    def __init__(self, configuration: Configuration) -> None:
        super().__init__()
        self.encoder, self.decoder = configuration.networks()

    def elbo_loss(self, x: Tensor) -> Tensor:
        """Minus the ELBO, its KL in closed form."""
        loc, log_scale = self.encoder(x).chunk(2, -1)
        z = loc + log_scale.exp() * torch.randn_like(loc)
        kl = 0.5 * (loc.square() + (2 * log_scale).exp() - 1 - 2 * log_scale).sum()
        return kl + binary_cross_entropy_with_logits(self.decoder(z).reshape(x.shape), x, reduction="sum")

    def log_weights(self, x: Tensor, particles: int) -> Tensor:
        """Log p(x, z) - log q(z | x), (particles, N); the normalising constants of prior and guide cancel."""
        loc, log_scale = self.encoder(x).chunk(2, -1)
        noise = torch.randn(particles, *loc.shape)
        z = loc + log_scale.exp() * noise
        logits = self.decoder(z.flatten(0, 1)).reshape(particles, len(x), -1)
        target = x.flatten(1).expand_as(logits)
        log_likelihood = -binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)
        return log_likelihood + (0.5 * (noise.square() - z.square()) + log_scale).sum(-1)

    def iwae_loss(self, x: Tensor, particles: int) -> Tensor:
        return (math.log(particles) - self.log_weights(x, particles).logsumexp(0)).sum()


def contestants(configuration: Configuration) -> list[Contestant]:
    return [contestant(configuration, compile) for compile in (False, True)]


def contestant(configuration: Configuration, compile: bool) -> Contestant:
    vae, x, particles = VAE(configuration), configuration.data(), configuration.particles
    optimizer = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE, fused=True)

    def loss() -> Tensor:
        return vae.elbo_loss(x) if particles == 1 else vae.iwae_loss(x, particles)

    differentiable: Callable[[], Tensor] = torch.compile(loss, dynamic=False) if compile else loss

    def step() -> None:
        optimizer.zero_grad()
        differentiable().backward()
        optimizer.step()

    name = "PyTorch compiled" if compile else "PyTorch eager"
    return Contestant(name, step, lambda: differentiable().item(), line=name)


def estimators(configuration: Configuration, num_samples: int) -> list[Estimator]:
    vae = VAE(configuration)

    @torch.no_grad()
    def estimate(x: Tensor, log_weights: Callable[[Tensor, int], Tensor]) -> list[float]:
        per_datum = []
        for datum in x.split(1):
            portions = [log_weights(datum, PORTION) for _ in range(num_samples // PORTION)]
            per_datum.append(torch.cat(portions).logsumexp(0).item() - math.log(num_samples))
        return per_datum

    compiled = torch.compile(vae.log_weights, dynamic=False)
    return [
        Estimator("PyTorch eager", lambda x: estimate(x, vae.log_weights)),
        Estimator("PyTorch compiled", lambda x: estimate(x, compiled)),
    ]
