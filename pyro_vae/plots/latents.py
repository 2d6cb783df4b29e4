"""Pictures of what latents mean: traversals of each dimension, and paths between data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_vae.checks import Count, Whole, checked, shown
from pyro_vae.errors import PyroVAEError
from pyro_vae.plots.pictures import draw_mosaic, gap_of, mosaic, tiles_of
from pyro_vae.plots.shared import new_figure

if TYPE_CHECKING:  # matplotlib is slow to import, and importing this package draws nothing
    from matplotlib.axes import Axes

    from pyro_vae.pairs import VAE

OUTER = 0.02  # a traversal goes from this quantile of the posterior means to one minus it
AT_ONCE = 500  # images that go through a network at once


@checked
def traversal(
    vae: Any, x: torch.Tensor, *, start: Whole | None = 0, rows: Count = 10, columns: Count = 9, ax: Axes | None = None
) -> Axes:
    r"""Draw what each latent dimension means: in each row, one dimension moves and the others stay.

    .. math:: A_j = \operatorname{var}_n \mathbb E_{q(z \mid x_n)} z_j

    All rows start from the posterior mean of one datum. Row j decodes it with :math:`z_j` at equal steps, from the 2%
    to the 98% quantile of the posterior means over x. The dimensions with the largest :math:`A_j`, which is the
    `variance` of :func:`pyro_vae.active_units`, come first. A row's label has its dimension and :math:`A_j`.

    Arguments:
        vae: a :class:`pyro_vae.VAE`, or an :class:`pyro_vae.Autoencoder`.
        x: the images whose posterior means are taken, (N, C, H, W) or (N, H, W), two or more. Some hundreds tell the
            quantiles.
        start: the number in `x` of the datum that the rows start from; None starts from the mean over x.
        rows: the largest number of dimensions.
        columns: the number of values of each dimension.

    Raises:
        ValueError: `vae` is another program; or `x` has fewer than two data, no datum `start`, or another shape.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.mlp_vae((1, 8, 8), latent_dim=3, hidden_dims=(16,))
        >>> ax = pv.plots.traversal(vae, torch.rand(50, 1, 8, 8).round())
        >>> len(ax.get_yticks())
        3

    References:
        Higgins et al. (2017), *beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework*,
        ICLR.
    """
    z = _embedded(vae, x, "x")
    if len(z) < 2 or (start is not None and start >= len(z)):
        got = f"{len(z)} and start={start}" if len(z) > 1 else f"{len(z)}"
        raise PyroVAEError(f"expected x of two data or more, and start below their number, got {got}. Pass others.")
    variances = z.var(0)
    order = variances.argsort(descending=True, stable=True)[:rows]
    low, high = z.quantile(z.new_tensor([OUTER, 1 - OUTER]), dim=0)
    lines = (z.mean(0) if start is None else z[start]).repeat(len(order), columns, 1)
    steps = torch.linspace(0, 1, columns, dtype=z.dtype, device=z.device) if columns > 1 else z.new_full((1,), 0.5)
    for line, j in zip(lines, order, strict=True):
        line[:, j] = low[j] + steps * (high[j] - low[j])
    tiles = _decoded(vae, lines)
    labels = [f"$z_{{{j}}}$   {variances[j]:.2f}" for j in order.tolist()]
    canvas = mosaic(tiles, columns, gap_of(tiles.shape[1]))
    ax = ax or new_figure(canvas, left=1.6, top=0.5).add_subplot()
    _draw_rows(canvas, tiles.shape[1], labels, ax)
    ax.set_anchor("W")  # constrained layout can cut off the row labels of a centred image
    ax.set(
        xlabel=f"value of the dimension: from the {OUTER:.0%} to the {1 - OUTER:.0%} quantile of posterior means",
        ylabel="dimension of z, and the variance of its posterior mean",
    )
    return ax


@checked
def interpolation(vae: Any, a: torch.Tensor, b: torch.Tensor, *, columns: Count = 8, ax: Axes | None = None) -> Axes:
    r"""Draw the path in latent space between two data, one pair in each row.

    .. math:: z_t = (1 - t)\, \mathbb E_{q(z \mid a)} z + t\, \mathbb E_{q(z \mid b)} z

    The first and the last image of a row are the data, a and b. Between them are the decoded :math:`z_t`, at equal
    steps of t from 0 to 1. The path is a straight line: this needs no origin, so it is right for every prior. Paths on
    a sphere (White 2016) keep the norm of z, which matters for a standard normal prior of many dimensions.

    Arguments:
        vae: a :class:`pyro_vae.VAE`, or an :class:`pyro_vae.Autoencoder`.
        a, b: images, (N, C, H, W) or (N, H, W), a row for each.
        columns: the number of decoded images between a and b, from t = 0 to t = 1; at least 2.

    Raises:
        ValueError: `vae` is another program; or `a` and `b` have other shapes, or `columns` is 1.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.mlp_vae((1, 8, 8), latent_dim=3, hidden_dims=(16,))
        >>> x = torch.rand(8, 1, 8, 8).round()
        >>> ax = pv.plots.interpolation(vae, x[:4], x[4:])
        >>> [label.get_text() for label in ax.get_xticklabels()]
        ['a', 't = 0', 't = 1', 'b']

    References:
        White (2016), *Sampling Generative Networks*.
    """
    ends = [_embedded(vae, each, name) for each, name in ((a, "a"), (b, "b"))]
    if len(a) != len(b) or columns < 2:
        raise PyroVAEError(
            f"expected as many images in a as in b, and two columns or more, got {len(a)}, {len(b)} and "
            f"columns={columns}. Pass pairs of images."
        )
    t = torch.linspace(0, 1, columns, dtype=ends[0].dtype, device=ends[0].device)[:, None]
    tiles = _decoded(vae, torch.lerp(ends[0][:, None], ends[1][:, None], t))
    size, gap = tiles.shape[1], gap_of(tiles.shape[1])
    parts = [mosaic(tiles_of(a, "a"), 1, gap), mosaic(tiles, columns, gap), mosaic(tiles_of(b, "b"), 1, gap)]
    wide = 4 * gap  # between data and what is decoded
    blank = np.ones((len(parts[0]), wide, parts[0].shape[2]))
    canvas = np.concatenate([parts[0], blank, parts[1], blank, parts[2]], axis=1)
    ax = ax or new_figure(canvas, top=0.3).add_subplot()
    _draw_rows(canvas, size, [], ax)
    width = tiles.shape[2]
    first = (width - 1) / 2
    places = [first, width + wide + first, canvas.shape[1] - 1 - width - wide - first, canvas.shape[1] - 1 - first]
    ax.set_xticks(places, labels=["a", "t = 0", "t = 1", "b"])
    return ax


def _embedded(vae: VAE, x: torch.Tensor, name: str) -> torch.Tensor:
    """The posterior means of x, (N, Z)."""
    from pyro_vae.pairs import VAE, Autoencoder

    if not isinstance(vae, VAE | Autoencoder):
        raise PyroVAEError(
            f"expected a pv.VAE or a pv.Autoencoder, which have one latent z and take x alone, got {shown(vae)}. "
            "Decode the values of your program's latents, and pass the images to pv.plots.images."
        )
    tiles_of(x[:1] if x.dim() else x, name)  # only images can be drawn
    return torch.cat([vae.embed(part) for part in x.split(AT_ONCE)])


def _decoded(vae: VAE, z: torch.Tensor) -> np.ndarray:
    """The images at z (rows, columns, Z), in reading order, (N, H, W, C)."""
    return tiles_of(torch.cat([vae.decode(part) for part in z.flatten(0, 1).split(AT_ONCE)]), "decoded images")


def _draw_rows(canvas: np.ndarray, size: int, labels: list[str], ax: Axes) -> None:
    """Draw a mosaic of images of this height, with a label for each of its rows."""
    draw_mosaic(canvas, ax)
    ax.set_yticks(np.arange(len(labels)) * (size + gap_of(size)) + (size - 1) / 2, labels=labels)
