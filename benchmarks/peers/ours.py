"""pyro_vae: compiled, uncompiled with a fused Adam, and its objectives in Pyro's SVI."""

from __future__ import annotations

import warnings

import pyro
import pyro_svi
import torch
from configurations import LEARNING_RATE, Configuration, Contestant, Estimator
from torch import Tensor

import pyro_vae as pv

COMPILED = "pyro_vae compiled"
PORTIONS = "pyro_vae compiled, in portions"
ROWS = 1024  # of a portion, data times particles: some megabytes of images, as a processor's cache has


def build(configuration: Configuration) -> pv.VAE:
    encoder, decoder = configuration.networks()
    return pv.VAE(
        prior=pv.StandardNormal(configuration.latent),
        likelihood=pv.Bernoulli(decoder, configuration.event_shape),
        posterior=pv.DiagonalNormal(encoder, configuration.event_shape),
    )


def contestants(configuration: Configuration) -> list[Contestant]:
    if configuration.particles > 1:
        objective = pv.IWAE(configuration.particles)
        mine = [compiled(configuration, objective), *portions(configuration), eager(configuration, objective)]
        return [*mine, svi(configuration, objective)]
    objective = pv.ELBO()
    sampled = pv.ELBO(kl="monte_carlo")
    return [
        compiled(configuration, objective),
        eager(configuration, objective),
        svi(configuration, objective),
        svi(configuration, sampled),
    ]


def compiled(configuration: Configuration, objective: pv.objectives.Objective) -> Contestant:
    vae, x = build(configuration), configuration.data()
    optimizer = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE, fused=True)
    step = pv.compile_step(vae.model, vae.guide, objective, optimizer)
    return Contestant(COMPILED, lambda: step(x), lambda: step.compute(x).item(), line=COMPILED)


def portions(configuration: Configuration) -> list[Contestant]:
    """The same step, a few data at a time, where that is more than one portion."""
    size = max(1, ROWS // configuration.particles)
    if size >= configuration.batch:
        return []
    vae, objective = build(configuration), pv.IWAE(configuration.particles)
    data = configuration.data().split(size)
    optimizer = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE, fused=True)
    gradients = pv.compile_step(vae.model, vae.guide, objective, optimizer)

    def step() -> None:
        optimizer.zero_grad()
        for x in data:
            gradients.accumulate(x)
        optimizer.step()

    return [Contestant(PORTIONS, step, lambda: sum(gradients.compute(x).item() for x in data), line=PORTIONS)]


def eager(configuration: Configuration, objective: pv.objectives.Objective) -> Contestant:
    vae, x = build(configuration), configuration.data()
    optimizer = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE, fused=True)

    def step() -> None:
        # As pv.fit does it; validation it has done before.
        with pyro.validation_enabled(False):
            optimizer.zero_grad()
            objective.differentiable_loss(vae.model, vae.guide, x).backward()
            optimizer.step()

    return Contestant("pyro_vae eager", step, lambda: objective.loss(vae.model, vae.guide, x), line="pyro_vae eager")


def svi(configuration: Configuration, objective: pv.objectives.Objective) -> Contestant:
    vae, x = pyro_svi.VAE(configuration, objective.name), configuration.data()  # the program that Pyro's objectives get
    inference = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": LEARNING_RATE}), loss=objective)
    return Contestant(
        svi_name(objective),
        lambda: inference.step(x),
        lambda: inference.evaluate_loss(x),
        noisier=isinstance(objective, pv.ELBO) and objective.kl == "monte_carlo",
    )


def svi_name(objective: pv.objectives.Objective) -> str:
    return f"SVI, pyro_vae's {objective.name}"


def estimators(configuration: Configuration, num_samples: int) -> list[Estimator]:
    vae = build(configuration)

    def estimate(x: Tensor, compile: bool) -> list[float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # k-hat is high: the networks are untrained
            found = pv.log_likelihood(vae.model, vae.guide, x, num_samples, compile=compile, progress=False)
        return found.per_datum.tolist()

    return [
        Estimator(COMPILED, lambda x: estimate(x, True), compiles_in_call=True),
        Estimator("pyro_vae eager", lambda x: estimate(x, False)),
    ]
