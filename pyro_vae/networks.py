"""Plain networks: maps between tensors that know nothing of distributions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn


def apply_batched(network: nn.Module, x: Tensor, event_dim: int, *given: Tensor) -> Tensor:
    """Apply a network that expects one leading dimension to a tensor with any number of them.

    Vectorised particles and ``Predictive`` add dimensions on the left; convolutions take exactly one.

    Arguments:
        network: maps (N, *event) to (N, *features), called with what is given as further arguments.
        x: shape (*batch, *event), with `event_dim` dimensions in `event`.
        event_dim: how many of the dimensions on the right are one datum.
        given: vectors (..., Y) beside each x, such as labels; their leading dimensions and x's broadcast.

    Returns:
        Features of shape (*batch, *features).
    """
    split = x.dim() - event_dim
    if split == 1 and not given:
        return network(x)
    batch = torch.broadcast_shapes(x.shape[:split], *(y.shape[:-1] for y in given))
    x = x.expand(*batch, *x.shape[split:]).reshape(-1, *x.shape[split:])
    features = network(x, *(y.expand(*batch, y.shape[-1]).reshape(-1, y.shape[-1]) for y in given))
    return features.reshape(*batch, *features.shape[1:])


class Concatenated(nn.Module):
    """A network of one tensor, of all that it is given side by side: (N, *event), (N, Y) ... to the network's output.

    Arguments:
        network: maps (N, D + Y + ...).

    Example:
        >>> import torch
        >>> Concatenated(mlp(4 + 2, [8], 3))(torch.zeros(5, 2, 2), torch.zeros(5, 2)).shape
        torch.Size([5, 3])
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *tensors: Tensor) -> Tensor:
        """The network's output."""
        return self.network(torch.cat([tensor.flatten(1) for tensor in tensors], 1))


def mlp(in_features: int, hidden_dims: Sequence[int], out_features: int) -> nn.Sequential:
    """Fully connected layers with tanh between them, from (N, *event) to (N, out_features).

    They begin by flattening all but the first dimension, so in a model of your own, which particles reach with a dimension more,
    call them by :func:`apply_batched`.

    Arguments:
        in_features: the number of elements in an event.
        hidden_dims: the width of each hidden layer.
        out_features: the width of the output.

    Example:
        >>> import torch
        >>> mlp(64, [32], 10)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """
    widths = [in_features, *hidden_dims]
    layers: list[nn.Module] = [nn.Flatten()]
    for narrow, wide in pairwise(widths):
        layers += [nn.Linear(narrow, wide), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], out_features))


class ResidualBlock(nn.Module):
    """An image plus two convolutions of it: (N, C, H, W) to the same.

    Arguments:
        channels: C.

    References:
        He, Zhang, Ren and Sun (2016), *Identity Mappings in Deep Residual Networks*, ECCV.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.change = nn.Sequential(nn.SiLU(), first, nn.SiLU(), second)

    def forward(self, x: Tensor) -> Tensor:
        """The image, changed a little."""
        return x + self.change(x)


def conv_encoder(
    event_shape: Sequence[int], channels: Sequence[int], out_features: int, residual_blocks: int = 0
) -> nn.Sequential:
    """Convolutions that halve an image once for each entry of `channels`: (N, C, H, W) to (N, out_features).

    Arguments:
        event_shape: (C, H, W).
        channels: the number of channels after each halving.
        out_features: the width of the output.
        residual_blocks: how many :class:`ResidualBlock` follow each halving.

    Example:
        >>> import torch
        >>> conv_encoder((1, 28, 28), [8, 16], 10)(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])
    """
    widths = [event_shape[0], *channels]
    layers: list[nn.Module] = []
    for narrow, wide in pairwise(widths):
        residual = [ResidualBlock(wide) for _ in range(residual_blocks)]
        layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1), *residual, nn.SiLU()]
    small = (channels[-1], *(_sizes(event_shape, len(channels))[-1]))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(prod(small), out_features))


def conv_decoder(
    in_features: int,
    channels: Sequence[int],
    out_channels: int,
    event_shape: Sequence[int],
    residual_blocks: int = 0,
) -> nn.Sequential:
    """The encoder's mirror image: (N, in_features) to (N, out_channels, H, W), doubling at each entry.

    Arguments:
        in_features: the width of the input.
        channels: the number of channels before each doubling.
        out_channels: the number of channels of the output.
        event_shape: (C, H, W); any height and width, odd ones too.
        residual_blocks: how many :class:`ResidualBlock` precede each doubling.

    Example:
        >>> import torch
        >>> conv_decoder(10, [16, 8], 2, (1, 27, 28))(torch.zeros(5, 10)).shape
        torch.Size([5, 2, 27, 28])
    """
    sizes = _sizes(event_shape, len(channels))[::-1]
    widths = [*channels, out_channels]
    layers: list[nn.Module] = [
        nn.Linear(in_features, channels[0] * prod(sizes[0])),
        nn.Unflatten(1, (channels[0], *sizes[0])),
    ]
    for i in range(len(channels)):
        # stride 2 turns s into 2 s - 1; the padding makes up for an even target
        (height, width), (target_height, target_width) = sizes[i], sizes[i + 1]
        extra = (target_height - (2 * height - 1), target_width - (2 * width - 1))
        layers += [
            *(ResidualBlock(widths[i]) for _ in range(residual_blocks)),
            nn.SiLU(),
            nn.ConvTranspose2d(widths[i], widths[i + 1], 3, stride=2, padding=1, output_padding=extra),
        ]
    return nn.Sequential(*layers)


def _sizes(event_shape: Sequence[int], halvings: int) -> list[tuple[int, int]]:
    """(H, W) before any halving and after each, as a convolution of stride 2 rounds them."""
    sizes = [(event_shape[1], event_shape[2])]
    for _ in range(halvings):
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    return sizes
