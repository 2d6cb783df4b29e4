"""NumPyro: SVI.update under jax.jit, its state donated, so that parameters are updated in place."""

from __future__ import annotations

from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from configurations import LEARNING_RATE, Configuration, Contestant, Estimator
from numpyro.infer import SVI, RenyiELBO, TraceMeanField_ELBO
from torch import Tensor, nn


class Network:
    """The same layers in JAX, their weights in JAX's layout, as parameters of NumPyro."""

    def __init__(self, name: str, network: nn.Sequential) -> None:
        self.layers = list(network)
        self.parameters: dict[str, jax.Array] = {}
        for i, layer in enumerate(self.layers):
            if hasattr(layer, "weight"):
                self.parameters[f"{name}.{i}.bias"] = to_jax(layer.bias)
                self.parameters[f"{name}.{i}.weight"] = to_jax(turned(layer))

    def __call__(self, x: jax.Array) -> jax.Array:
        """From (..., features) or (N, H, W, C), JAX's order."""
        values = iter([numpyro.param(name, value) for name, value in self.parameters.items()])
        for layer in self.layers:
            match layer:
                case nn.Linear():
                    bias, weight = next(values), next(values)
                    x = x @ weight + bias
                case nn.Conv2d():
                    bias, weight = next(values), next(values)
                    x = jax.lax.conv_general_dilated(x, weight, (2, 2), [(1, 1)] * 2, dimension_numbers=NHWC) + bias
                case nn.ConvTranspose2d():
                    # torch pads the output by a pixel on the left, and by one more on the right where the size is even
                    bias, weight = next(values), next(values)
                    padding = [(1, 1 + extra) for extra in layer.output_padding]
                    x = jax.lax.conv_general_dilated(
                        x, weight, (1, 1), padding, lhs_dilation=(2, 2), dimension_numbers=NHWC
                    )
                    x = x + bias
                case nn.Tanh():
                    x = jnp.tanh(x)
                case nn.SiLU():
                    x = jax.nn.silu(x)
                case nn.Flatten():
                    x = x if x.ndim < 4 else x.transpose(0, 3, 1, 2).reshape(len(x), -1)
                case nn.Unflatten():
                    x = x.reshape(len(x), *layer.unflattened_size).transpose(0, 2, 3, 1)
        return x


NHWC = ("NHWC", "HWIO", "NHWC")


def turned(layer: nn.Module) -> Tensor:
    """The weight in the order of JAX's dimensions; a transposed convolution's filter is mirrored too."""
    match layer:
        case nn.Linear():
            return layer.weight.T
        case nn.Conv2d():
            return layer.weight.permute(2, 3, 1, 0)
        case _:
            return layer.weight.flip(2, 3).permute(2, 3, 0, 1)


def to_jax(tensor: Tensor) -> jax.Array:
    return jnp.array(tensor.detach().contiguous().numpy())


class VAE:
    def __init__(self, configuration: Configuration) -> None:
        encoder, decoder = configuration.networks()
        self.encoder, self.decoder = Network("encoder", encoder), Network("decoder", decoder)
        self.latent, self.conv = configuration.latent, configuration.conv

    def model(self, x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(self.latent), jnp.ones(self.latent)).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(x.ndim - 1), obs=x)

    def guide(self, x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            loc, log_scale = jnp.split(self.encoder(x), 2, -1)
            numpyro.sample("z", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))


def contestants(configuration: Configuration) -> list[Contestant]:
    vae, x = VAE(configuration), pixels(configuration, configuration.data())
    particles = configuration.particles
    # NumPyro's RenyiELBO takes the plate's bound for each datum, as IWAE is.
    objective = RenyiELBO(alpha=0, num_particles=particles) if particles > 1 else TraceMeanField_ELBO()
    svi = SVI(vae.model, vae.guide, numpyro.optim.Adam(LEARNING_RATE), objective)
    update = jax.jit(svi.update, donate_argnums=0)
    held: dict[str, Any] = {"state": svi.init(jax.random.key(0), x)}
    seeds = count(1)

    def step() -> None:
        held["state"], loss = update(held["state"], x)
        jax.block_until_ready(loss)

    def loss() -> float:
        copied = jax.tree.map(jnp.copy, held["state"])  # since update destroys what it is given
        return float(update(copied._replace(rng_key=jax.random.key(next(seeds))), x)[1])

    return [Contestant("NumPyro jitted", step, loss, line="NumPyro jitted")]


def estimators(configuration: Configuration, num_samples: int) -> list[Estimator]:
    vae, bound = VAE(configuration), RenyiELBO(alpha=0, num_particles=num_samples)
    seeds = count(1)

    @jax.jit
    def estimate(key: jax.Array, x: jax.Array) -> jax.Array:
        def one(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
            return -bound.loss(pair[0], {}, vae.model, vae.guide, pair[1][None])

        return jax.lax.map(one, (jax.random.split(key, len(x)), x))  # a datum after another, for the memory

    return [
        Estimator(
            "NumPyro's RenyiELBO jitted",
            lambda x: estimate(jax.random.key(next(seeds)), pixels(configuration, x)).tolist(),
        )
    ]


def pixels(configuration: Configuration, x: Tensor) -> jax.Array:
    return to_jax(x.permute(0, 2, 3, 1) if configuration.conv else x)
