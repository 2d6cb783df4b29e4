"""The floor: the matrix products and convolutions of a step or a sample, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from configurations import Configuration
from torch import Tensor, nn

NAME = "matrix products alone"
Calls = list[Callable[[], object]]


def training(configuration: Configuration) -> Callable[[], None]:
    """Those of a step: for each layer the output and the gradients by its weight and its input, except by the data."""
    encoder, decoder = configuration.networks()
    z = torch.randn(configuration.particles * configuration.batch, configuration.latent)
    return in_turn(products(encoder, configuration.data(), data=True) + products(decoder, z))


def sampling(configuration: Configuration, rows: int, samples: int) -> Callable[[], None]:
    """Those of the decoder, forward, for so many samples, `rows` at once."""
    _, decoder = configuration.networks()
    calls = products(decoder, torch.randn(rows, configuration.latent), backward=False)
    return in_turn(calls * -(-samples // rows))


@torch.no_grad()
def products(network: nn.Sequential, x: Tensor, data: bool = False, backward: bool = True) -> Calls:
    calls: Calls = []
    first = data
    for layer in network:
        y = layer(x)
        if isinstance(layer, nn.Linear):
            calls += linear(layer.weight, x, y, not first, backward)
            first = False
        elif isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            calls += convolution(layer, x, y, not first, backward)
            first = False
        x = y
    return calls


def linear(weight: Tensor, x: Tensor, y: Tensor, input_gradient: bool, backward: bool) -> Calls:
    # Into memory that is there already: to fetch it is no part of a product.
    calls: Calls = [partial(torch.mm, x, weight.T, out=torch.empty_like(y))]
    if backward:
        gradient = torch.randn_like(y)
        calls.append(partial(torch.mm, gradient.T, x, out=torch.empty_like(weight)))
        if input_gradient:
            calls.append(partial(torch.mm, gradient, weight, out=torch.empty_like(x)))
    return calls


def convolution(
    layer: nn.Conv2d | nn.ConvTranspose2d, x: Tensor, y: Tensor, input_gradient: bool, backward: bool
) -> Calls:
    transposed = isinstance(layer, nn.ConvTranspose2d)
    settings = (layer.stride, layer.padding, layer.dilation, transposed, layer.output_padding, layer.groups)
    calls: Calls = [partial(torch.ops.aten.convolution, x, layer.weight, None, *settings)]
    if backward:
        wanted = [input_gradient, True, False]
        gradient = torch.randn_like(y)
        calls.append(partial(torch.ops.aten.convolution_backward, gradient, x, layer.weight, None, *settings, wanted))
    return calls


def in_turn(calls: Calls) -> Callable[[], None]:
    @torch.no_grad()
    def run() -> None:
        for call in calls:
            call()

    return run
