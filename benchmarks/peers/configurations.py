"""What is measured: the network, its batch, and what each contestant is, so that all of them do the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyro_vae.networks import conv_decoder, conv_encoder, mlp

LEARNING_RATE = 1e-3
CHANNELS = (32, 64)


@dataclass(frozen=True)
class Configuration:
    """A VAE of 28 x 28 binary pixels and a training batch.

    One particle trains the ELBO with its KL in closed form, more train the IWAE bound.
    """

    batch: int
    hidden: int
    latent: int
    particles: int = 1
    conv: bool = False

    @property
    def key(self) -> str:
        sizes = (
            (self.batch, self.latent, self.particles)
            if self.conv
            else (self.batch, self.hidden, self.latent, self.particles)
        )
        return "-".join(map(str, ("conv" if self.conv else "mlp", *sizes)))

    @property
    def title(self) -> str:
        network = f"convolutions {CHANNELS}" if self.conv else f"MLP 784-{self.hidden}-{self.latent}"
        return f"{network}, batch {self.batch}, latent {self.latent}, K = {self.particles}"

    @property
    def event_shape(self) -> tuple[int, ...]:
        return (1, 28, 28) if self.conv else (784,)

    def networks(self) -> tuple[nn.Sequential, nn.Sequential]:
        """The encoder, to means and log-scales, and the decoder, to logits; with the same weights at every call."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if self.conv:
                encoder = conv_encoder(self.event_shape, CHANNELS, 2 * self.latent)
                return encoder, conv_decoder(self.latent, CHANNELS[::-1], 1, self.event_shape)
            return mlp(784, [self.hidden], 2 * self.latent), mlp(self.latent, [self.hidden], 784)

    def data(self, number: int | None = None) -> Tensor:
        """Binary pixels, which are on more often in the middle; the same at every call."""
        generator = torch.Generator().manual_seed(1)
        distance = torch.linspace(-1, 1, 28).square()
        on = torch.exp(-4 * (distance[:, None] + distance))
        x = torch.bernoulli(on.expand(number or self.batch, 28, 28), generator=generator)
        return x.reshape(-1, *self.event_shape)


@dataclass(frozen=True)
class Contestant:
    """One way to train.

    Attributes:
        name: what tables call it.
        step: takes a training step on the batch.
        loss: an estimate of the loss, summed over the batch, with new noise at each call; it changes no parameter.
        line: what figures call it; None where it is not drawn.
        noisier: whether it samples the KL, so that it trains a little worse than with the closed form.
    """

    name: str
    step: Callable[[], object]
    loss: Callable[[], float]
    line: str | None = None
    noisier: bool = False


@dataclass(frozen=True)
class Estimator:
    """One way to estimate log p(x).

    Attributes:
        name: what tables call it.
        estimate: from data (N, ...) to log p(x) of each.
        compiles_in_call: whether each call compiles anew, which is then left out of its time.
    """

    name: str
    estimate: Callable[[Tensor], list[float]]
    compiles_in_call: bool = False
