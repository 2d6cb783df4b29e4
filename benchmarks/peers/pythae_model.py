"""pythae: its VAE, around the same networks, and the lines of its trainer that take a step."""

from __future__ import annotations

import torch
from configurations import LEARNING_RATE, Configuration, Contestant, Estimator
from pythae.models import VAE, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from torch import Tensor, nn

LEFT_OUT = "pythae's IWAE is left out: its loss is the weighted mean of log w, which is not the bound's value"


class Encoder(BaseEncoder):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> ModelOutput:
        loc, log_scale = self.network(x).chunk(2, -1)
        return ModelOutput(embedding=loc, log_covariance=2 * log_scale)


class Decoder(BaseDecoder):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=self.network(z).sigmoid())  # pythae takes probabilities, not logits


def build(configuration: Configuration) -> VAE:
    encoder, decoder = configuration.networks()
    settings = VAEConfig(
        input_dim=configuration.event_shape, latent_dim=configuration.latent, reconstruction_loss="bce"
    )
    return VAE(settings, encoder=Encoder(encoder), decoder=Decoder(decoder))


def contestants(configuration: Configuration) -> list[Contestant]:
    if configuration.particles > 1:
        return []
    vae, x = build(configuration), configuration.data()
    optimizer = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE)

    def step() -> float:
        loss = vae({"data": x}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    def loss() -> float:
        with torch.no_grad():
            return len(x) * vae({"data": x}).loss.item()

    return [Contestant("pythae VAE", step, loss, line="pythae VAE")]


def estimators(configuration: Configuration, num_samples: int) -> list[Estimator]:
    vae = build(configuration)

    @torch.no_grad()
    def estimate(x: Tensor) -> list[float]:
        return [float(vae.get_nll(datum, num_samples, batch_size=1250)) for datum in x.split(1)]

    return [Estimator("pythae's get_nll", estimate)]
