"""Pictures of images, reconstructions and two-dimensional latent spaces."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pyro_vae.checks import Count, checked
from pyro_vae.errors import PyroVAEError
from pyro_vae.plots.shared import CLASSES, Array, new_figure, to_numpy

if TYPE_CHECKING:  # matplotlib is slow to import, and importing this package draws nothing
    from matplotlib.axes import Axes

_MARKERS = "o^"


@checked
def images(x: Array, *, columns: Count = 10, title: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw images side by side in rows, in reading order.

    Arguments:
        x: the images, (N, C, H, W) with C 1 or 3, or (N, H, W). Values outside [0, 1], as a Gaussian's mean may have,
            are clipped.
        columns: the largest number of images in a row.
        title: the title above the images.

    Raises:
        ValueError: `x` does not have one of these shapes or holds integers above 1, or `columns` is below 1.

    Example:
        >>> import torch, pyro_vae as pv
        >>> pv.plots.images(torch.rand(20, 1, 28, 28), title="samples from the model").get_title()
        'samples from the model'
    """
    tiles = tiles_of(x, "x")
    canvas = mosaic(tiles, columns, gap_of(tiles.shape[1]))
    ax = ax or new_figure(canvas, top=0.3 if title else 0).add_subplot()
    draw_mosaic(canvas, ax)
    if title is not None:
        ax.set_title(title)
    return ax


@checked
def reconstructions(x: Array, x_mean: Array, *, columns: Count = 10, ax: Axes | None = None) -> Axes:
    """Draw originals in rows, and the reconstructions of each row below it.

    Arguments:
        x: the originals, (N, C, H, W) with C 1 or 3, or (N, H, W). Values outside [0, 1] are clipped.
        x_mean: the reconstructions, in the shape and order of `x`.
        columns: the largest number of originals in a row.

    Raises:
        ValueError: the two shapes differ, an array does not have one of these shapes or holds integers above 1, or
            `columns` is below 1.

    Example:
        >>> import torch, pyro_vae as pv
        >>> ax = pv.plots.reconstructions(torch.zeros(4, 1, 28, 28), torch.rand(4, 1, 28, 28))
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['original', 'reconstruction']
    """
    x, x_mean = to_numpy(x), to_numpy(x_mean)
    if x.shape != x_mean.shape:
        raise PyroVAEError(
            f"expected x and x_mean of one shape, got {x.shape} and {x_mean.shape}. "
            "Pass the reconstruction of each original, in the same order."
        )
    originals, means = tiles_of(x, "x"), tiles_of(x_mean, "x_mean")
    count, height, width, channels = originals.shape
    # The gap between pairs of rows is wider than the line between the two rows of a pair, so that pairs are told apart.
    line, gap = np.ones((count, 1, width, channels)), 1 + gap_of(height)
    canvas = mosaic(np.concatenate([originals, line, means], axis=1), columns, gap)
    ax = ax or new_figure(canvas, left=1.2).add_subplot()
    draw_mosaic(canvas, ax)
    ax.set_anchor("W")  # constrained layout can cut off the row labels of a centred image
    tops = np.arange(0, len(canvas), 2 * height + 1 + gap)
    centres = tops[:, None] + (height - 1) / 2 + [0, height + 1]
    ax.set_yticks(centres.ravel(), labels=["original", "reconstruction"] * len(tops))
    return ax


@checked
def latent_space(z: Array, labels: Array | None = None, *, ax: Axes | None = None) -> Axes:
    """Plot points of a two-dimensional latent space, coloured by class.

    Classes take ten colours in sorted order. From the eleventh class on, the colours repeat, with triangles as markers.

    Arguments:
        z: the points, (N, 2), usually the means of q(z|x).
        labels: the class of each point, (N,), as numbers or strings, with at most 20 classes.

    Raises:
        ValueError: `z` or `labels` has another shape, or `labels` has more than 20 classes.

    Example:
        >>> import torch, pyro_vae as pv
        >>> pv.plots.latent_space(torch.randn(50, 2), torch.arange(50) % 10).get_aspect()
        1.0
    """
    points = to_numpy(z)
    if points.ndim != 2 or points.shape[1] != 2:
        raise PyroVAEError(
            f"expected z of shape (N, 2), got {points.shape}. Train with latent_dim=2, or project z first, "
            "with sklearn.decomposition.PCA(2).fit_transform(z)."
        )
    names, codes = _classes(labels, len(points))
    ax = ax or new_figure().add_subplot()
    size = np.clip(20_000 / max(len(points), 1), 5, 25)
    # With one scatter per class, later classes would hide earlier ones. One per marker keeps the order of z.
    for number, marker in enumerate(_MARKERS):
        here = codes // len(CLASSES) == number
        style = {"c": CLASSES[codes[here] % len(CLASSES)], "linewidths": 0.3, "edgecolors": "white"}
        ax.scatter(points[here, 0], points[here, 1], size, marker=marker, **style)
    if labels is not None:
        for code, name in enumerate(names):
            marker, colour = _MARKERS[code // len(CLASSES)], CLASSES[code % len(CLASSES)]
            ax.plot([], [], color=colour, marker=marker, linestyle="", label=str(name))
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    ax.set(aspect="equal", xlabel="z1", ylabel="z2")
    return ax


@checked
def latent_grid(x: Array, *, extent: tuple[float, float, float, float], ax: Axes | None = None) -> Axes:
    """Draw images decoded from a regular grid of z, each at its place in the latent plane.

    ``latent_space(z, labels, ax=latent_grid(...))`` draws points over the decoded images.

    Arguments:
        x: the images, (rows, columns, C, H, W) with C 1 or 3, or (rows, columns, H, W). Row 0 has the lowest z2, and
            column 0 has the lowest z1. Values outside [0, 1] are clipped.
        extent: the edges of the whole grid, (z1_min, z1_max, z2_min, z2_max). Each image is decoded from the centre
            of its tile, so the edges lie half a tile beyond the outermost z.

    Raises:
        ValueError: `x` does not have one of these shapes or holds integers above 1, or `extent` is empty.

    Example:
        >>> import torch, pyro_vae as pv
        >>> ax = pv.plots.latent_grid(torch.rand(15, 15, 1, 28, 28), extent=(-3, 3, -3, 3))
        >>> tuple(map(float, ax.get_xlim()))
        (-3.0, 3.0)
    """
    grid = to_numpy(x)
    if grid.ndim not in (4, 5):
        raise PyroVAEError(
            f"expected x of shape (rows, columns, C, H, W) or (rows, columns, H, W), got {grid.shape}. "
            "Reshape the decoded images with x.reshape(rows, columns, *x.shape[1:])."
        )
    edges = np.array(extent, float)
    if edges.shape != (4,) or not np.isfinite(edges).all() or not (edges[0] < edges[1] and edges[2] < edges[3]):
        raise PyroVAEError(
            f"expected extent to be (z1_min, z1_max, z2_min, z2_max), finite, each min below its max, got {extent}."
        )
    rows, columns, *image = grid.shape
    tiles = tiles_of(grid[::-1].reshape(rows * columns, *image), "each row of x")  # imshow starts at the top
    ax = ax or new_figure().add_subplot()
    ax.imshow(mosaic(tiles, columns, gap=0), cmap="gray", vmin=0, vmax=1, extent=extent)
    ax.set(aspect="equal", xlabel="z1", ylabel="z2")
    return ax


def _classes(labels: Array | None, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted classes, and the number of each point's class among them."""
    array = np.zeros(count) if labels is None else to_numpy(labels, numbers=False)
    if array.shape != (count,):
        raise PyroVAEError(f"expected labels of shape ({count},), one for each row of z, got {array.shape}.")
    try:
        names, codes = np.unique(array, return_inverse=True)
    except TypeError as error:
        raise PyroVAEError(f"expected labels that can be sorted, got some of several types: {error}.") from error
    most = len(CLASSES) * len(_MARKERS)
    if len(names) > most:
        raise PyroVAEError(
            f"expected labels of at most {most} classes, which a reader can tell apart, got {len(names)} classes. "
            "Merge some classes, or leave labels out."
        )
    return names, codes


def tiles_of(x: Array, name: str) -> np.ndarray:
    """Return images as (N, H, W, C) in [0, 1]."""
    array = to_numpy(x)
    if array.ndim == 3:
        array = array[:, None]
    if array.ndim != 4 or array.shape[1] not in (1, 3) or 0 in array.shape:
        raise PyroVAEError(
            f"expected {name} to hold one image or more, (N, C, H, W) with C 1 or 3, or (N, H, W), got shape "
            f"{tuple(np.shape(x))}. Reshape flat images with x.reshape(-1, 1, 28, 28), and move channels that "
            "come last with x.permute(0, 3, 1, 2)."
        )
    if array.dtype.kind in "iu" and array.max() > 1:
        raise PyroVAEError(
            f"expected {name} in [0, 1], got {array.dtype} up to {array.max()}. Divide 8-bit images by 255."
        )
    return np.clip(array.transpose(0, 2, 3, 1).astype(float), 0, 1)


def gap_of(size: int) -> int:
    """The number of pixels between images of this height."""
    return max(1, size // 14)


def mosaic(tiles: np.ndarray, columns: int, gap: int) -> np.ndarray:
    """Lay tiles (N, H, W, C) out in rows on white, in reading order."""
    count, height, width, channels = tiles.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    canvas = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap, channels))
    for i, tile in enumerate(tiles):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = tile
    return canvas


def draw_mosaic(canvas: np.ndarray, ax: Axes) -> None:
    """Draw a canvas of images without ticks and frame."""
    ax.imshow(canvas, cmap="gray", vmin=0, vmax=1)
    ax.set(xticks=[], yticks=[])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
