"""Encoder and decoder networks: fully connected and convolutional maps between tensors, without distributions."""

from collections.abc import Sequence
from itertools import pairwise
from math import ceil, prod

import torch
from torch import Tensor, nn

from pyro_vae.checks import Count, Image, Shape, Whole, checked, is_dense, shown
from pyro_vae.errors import PyroVAEError


def apply_batched(network: nn.Module, x: Tensor, event_dim: int, *given: Tensor) -> Tensor:
    """Apply a network that takes one batch dimension to an x with several; return outputs (*batch, *features).

    Vectorised particles and ``Predictive`` add batch dimensions on the left, and convolutions take exactly one.

    Arguments:
        network: maps (N, *event), and vectors (N, Y) for each of `given`, to (N, *features).
        x: a tensor of shape (*batch, *event).
        event_dim: the number of event dimensions of x.
        given: conditions such as labels, vectors of shape (..., Y). Their batch dimensions and those of x broadcast.
    """
    if not isinstance(event_dim, int) or event_dim < 0:
        raise PyroVAEError(f"expected event_dim to be an integer of at least 0, got {shown(event_dim)}.")
    if not is_dense(x) or x.dim() < event_dim:
        raise PyroVAEError(
            f"expected a dense tensor of shape (*batch, *event), with {event_dim} in event, got {shown(x)}."
        )
    split = x.dim() - event_dim
    try:
        if split == 1 and not given:
            return network(x)
        return _of_one_batch(network, x, split, given)
    except (RuntimeError, TypeError, IndexError) as error:
        _note(error, network, x, *given)
        raise


def _note(error: Exception, network: nn.Module, *inputs: Tensor) -> None:
    error.add_note(f"pyro_vae called the network {type(network).__name__} with {', '.join(map(shown, inputs))}.")


def _of_one_batch(network: nn.Module, x: Tensor, split: int, given: tuple[Tensor, ...]) -> Tensor:
    batch = torch.broadcast_shapes(x.shape[:split], *(y.shape[:-1] for y in given))
    x = x.expand(*batch, *x.shape[split:]).reshape(-1, *x.shape[split:])
    features = network(x, *(y.expand(*batch, y.shape[-1]).reshape(-1, y.shape[-1]) for y in given))
    return features.reshape(*batch, *features.shape[1:])


class Concatenated(nn.Module):
    """A network of several arguments, which flattens and concatenates them for a network of one argument.

    Arguments of shapes (N, *event), (N, Y), ... are together one input (N, D + Y + ...) of `network`.

    Example:
        >>> import torch
        >>> Concatenated(torch.nn.Linear(4 + 2, 3))(torch.zeros(5, 2, 2), torch.zeros(5, 2)).shape
        torch.Size([5, 3])
    """

    @checked
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *tensors: Tensor) -> Tensor:
        """The output of the network for the concatenated tensors."""
        if not all(is_dense(tensor) and tensor.dim() > 1 for tensor in tensors):
            given = ", ".join(map(shown, tensors))
            raise PyroVAEError(f"expected dense tensors with a row for each datum, got {given}.")
        try:
            return self.network(torch.cat([tensor.flatten(1) for tensor in tensors], 1))
        except (RuntimeError, TypeError) as error:
            _note(error, self.network, *tensors)
            raise


@checked
def mlp(in_features: Count, hidden_dims: Sequence[Count], out_features: Count) -> nn.Sequential:
    """A fully connected network with tanh activations, from (N, *event) to (N, out_features).

    Its first layer flattens all dimensions except the first. In your own Pyro model, call the network through
    :func:`apply_batched`, since vectorised particles add a batch dimension.

    Arguments:
        in_features: the number of elements of one datum.
        hidden_dims: the width of each hidden layer.

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
    """A residual block of two convolutions, which maps (N, channels, H, W) to the same shape.

    Example:
        >>> import torch
        >>> ResidualBlock(8)(torch.zeros(5, 8, 14, 14)).shape
        torch.Size([5, 8, 14, 14])

    References:
        He, Zhang, Ren and Sun (2016), *Identity Mappings in Deep Residual Networks*, ECCV.
    """

    @checked
    def __init__(self, channels: Count) -> None:
        super().__init__()
        first, second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.change = nn.Sequential(nn.SiLU(), first, nn.SiLU(), second)

    def forward(self, x: Tensor) -> Tensor:
        """The image plus the output of the convolutions, (N, C, H, W)."""
        channels = self.change[1].in_channels
        if not is_dense(x) or x.dim() != 4 or x.shape[1] != channels:
            raise PyroVAEError(f"expected images of shape (N, {channels}, H, W), got {shown(x)}.")
        return x + self.change(x)


@checked
def conv_encoder(event_shape: Image, channels: Shape, out_features: Count, residual_blocks: Whole = 0) -> nn.Sequential:
    """A convolutional network from images (N, C, H, W) to (N, out_features).

    Each entry of `channels` adds a convolution of stride 2, which halves height and width.

    Arguments:
        event_shape: (C, H, W).
        channels: the number of channels after each halving.
        residual_blocks: the number of :class:`ResidualBlock` after each halving.

    Example:
        >>> import torch
        >>> conv_encoder((1, 28, 28), [8, 16], 10)(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])
    """
    layers: list[nn.Module] = []
    for narrow, wide in pairwise([event_shape[0], *channels]):
        residual = [ResidualBlock(wide) for _ in range(residual_blocks)]
        layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1), *residual, nn.SiLU()]
    small = (channels[-1], *_sizes(event_shape, len(channels))[-1])
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(prod(small), out_features))


@checked
def conv_decoder(
    in_features: Count, channels: Shape, out_channels: Count, event_shape: Image, residual_blocks: Whole = 0
) -> nn.Sequential:
    """A convolutional network from (N, in_features) to images (N, out_channels, H, W), the mirror image of the encoder.

    Each entry of `channels` adds a transposed convolution of stride 2, which doubles height and width.

    Arguments:
        event_shape: (C, H, W), of any height and width.
        channels, residual_blocks: as in :func:`conv_encoder`, before each doubling.

    Example:
        >>> import torch
        >>> conv_decoder(10, [16, 8], 2, (1, 27, 28))(torch.zeros(5, 10)).shape
        torch.Size([5, 2, 27, 28])
    """
    sizes = _sizes(event_shape, len(channels))[::-1]
    small = (channels[0], *sizes[0])
    layers: list[nn.Module] = [nn.Linear(in_features, prod(small)), nn.Unflatten(1, small)]
    for (wide, narrow), (height, width) in zip(pairwise([*channels, out_channels]), sizes[1:], strict=True):
        residual = [ResidualBlock(wide) for _ in range(residual_blocks)]
        # A stride of 2 gives 2 s - 1 rows for s, so an even height or width needs one more.
        extra = (1 - height % 2, 1 - width % 2)
        layers += [*residual, nn.SiLU(), nn.ConvTranspose2d(wide, narrow, 3, stride=2, padding=1, output_padding=extra)]
    return nn.Sequential(*layers)


def _sizes(event_shape: Sequence[int], halvings: int) -> list[tuple[int, int]]:
    """Height and width before the first halving and after each, rounded as a convolution of stride 2 does."""
    height, width = event_shape[1:]
    return [(ceil(height / 2**i), ceil(width / 2**i)) for i in range(halvings + 1)]
