"""Plots of bounds, training, images and latent spaces: arrays in, Axes or Figure out.

No function here trains, calls a model or shows a window. Arrays may be torch tensors, on any device and
with or without gradients, or numpy arrays. Where `ax` or `figure` is not given, pyplot makes a new one:
show it with `matplotlib.pyplot.show()`, or save it with `ax.figure.savefig("plot.png")`.
"""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, TypeAlias
from zlib import crc32

import numpy as np
import torch

from pyro_vae.errors import PyroVAEError

if TYPE_CHECKING:  # matplotlib and pandas are slow to import, and no plot is drawn at import
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array: TypeAlias = torch.Tensor | np.ndarray

# The Okabe-Ito palette, which colour-blind readers can tell apart.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"

_FAMILIES = {
    "ELBO, closed-form KL": BLUE,
    "ELBO": VERMILLION,
    "IWAE": GREEN,
    "Renyi": PURPLE,
    "MIWAE": SKY,
    "PIWAE": "#332288",
    "CIWAE": ORANGE,
    "TVO": "#882255",
    "JVI": "#999933",
    "RWS": "#666666",
}
_OTHERS = (BLACK, "#661100", "#999999")  # no yellow: a thin yellow line is lost on white
# Ten classes need two colours more than the palette has; grey and wine stay distinct from the eight.
_CLASSES = np.array([BLUE, ORANGE, GREEN, VERMILLION, SKY, PURPLE, YELLOW, BLACK, "#999999", "#882255"])
_MARKERS = "o^"


def objective_colour(objective: str) -> str:
    """Colour that stands for an objective in every plot, as a hex string.

    It depends on the name alone, never on what else is drawn. A name that starts like one of the known
    estimators has that estimator's colour; any other name gets one of the three colours that remain.

    >>> objective_colour("IWAE")
    '#009E73'
    """
    for family, colour in _FAMILIES.items():
        if objective.startswith(family):
            return colour
    return _OTHERS[crc32(objective.encode()) % len(_OTHERS)]  # hash() differs between processes


def bounds(table: pd.DataFrame, *, log_likelihood: tuple[float, float] | None = None, ax: Axes | None = None) -> Axes:
    """Bound on log p(x) against the number of particles, one line and error band per objective.

    Args:
        table: what `compare` returns: rows ("objective", "particles"), and columns `bound` and `bound_se`
            in nats per datum.
        log_likelihood: a lower and an upper estimate of log p(x) of the same data, in nats per datum, between which a
            grey band is drawn.
        ax: where to draw; a new figure by default.

    The bands are plus and minus one standard error over the data. Every row averages over the same data, so
    the bands move up and down together: two bounds can differ clearly although their bands overlap.
    An objective with a single number of particles is a marker with an error bar, and a dashed line across.

    Returns the Axes. Raises ValueError if `table` is empty or lacks those rows or columns.

    >>> import pandas as pd
    >>> rows = pd.MultiIndex.from_tuples([("IWAE", 1), ("IWAE", 16)], names=["objective", "particles"])
    >>> ax = bounds(pd.DataFrame({"bound": [-98.0, -95.5], "bound_se": [0.6, 0.6]}, index=rows))
    >>> [label.get_text() for label in ax.get_xticklabels()]
    ['1', '16']
    """
    _check_table(table, ["objective", "particles"], ["bound", "bound_se"], "compare")
    ax = ax or _figure().add_subplot()
    if log_likelihood is not None:
        lower, upper = log_likelihood
        label = f"log p(x), between {lower:.2f} and {upper:.2f}"
        ax.axhspan(lower, upper, color="0.6", alpha=0.5, linewidth=0, label=label)
        for edge in (lower, upper):  # so that a narrow band is seen
            ax.axhline(edge, color="0.4", linewidth=0.8)
    for marker, (name, rows) in zip(cycle("osD^v"), table.groupby(level="objective", sort=False)):
        rows = rows.sort_index(level="particles")
        k = rows.index.get_level_values("particles").to_numpy()
        bound, se = rows["bound"].to_numpy(float), rows["bound_se"].to_numpy(float)
        colour = objective_colour(str(name))
        # Hollow markers, because bounds coincide: at one particle, IWAE is the ELBO.
        ax.plot(k, bound, color=colour, marker=marker, markersize=7, markerfacecolor="none", label=name)
        if len(k) == 1:
            ax.axhline(bound[0], color=colour, linewidth=0.8, linestyle="--")
            ax.errorbar(k, bound, yerr=se, color=colour, linestyle="", capsize=3)
        else:
            ax.fill_between(k, bound - se, bound + se, color=colour, alpha=0.15, linewidth=0)
    particles = sorted(set(table.index.get_level_values("particles")))
    ax.set_xscale("log", base=2)
    ax.set_xticks(particles, labels=[str(int(k)) for k in particles])
    ax.minorticks_off()
    ax.set(xlabel="number of particles", ylabel="bound on log p(x) (nats per datum)")
    _legend_below(ax)
    return ax


def pareto_k(shapes: Array, *, ax: Axes | None = None) -> Axes:
    """How many data have which Pareto k-hat, with the limit of 0.7 above which their weights can't be trusted.

    Args:
        shapes: (N,), what `pyro_vae.pareto_k` or `log_likelihood(...).pareto_k` gives; NaN where none can be computed.
        ax: where to draw; a new figure by default.

    Returns the Axes. Raises ValueError if there is no number to draw.

    >>> pareto_k(torch.tensor([0.1, 0.5, 0.9])).get_xlabel()
    'Pareto k-hat of the importance weights'
    """
    values = _numpy(shapes).ravel()
    finite = values[np.isfinite(values)]
    if not len(finite):
        raise PyroVAEError(
            f"expected at least one finite k-hat, got {len(values)} values of NaN: take 25 samples or more."
        )
    ax = ax or _figure().add_subplot()
    edges = list(np.arange(np.floor(min(finite.min(), 0) / 0.05), np.ceil(max(finite.max(), 1) / 0.05) + 1) * 0.05)
    for part, colour, sign in ((finite <= 0.7, BLUE, "at most"), (finite > 0.7, VERMILLION, "above")):
        share = part.sum() / len(values)
        ax.hist(finite[part], edges, color=colour, label=f"{sign} 0.7: {share:.1%} of {len(values)} data")
    ax.axvline(0.7, color=BLACK, linewidth=0.8, linestyle="--")
    ax.set(xlabel="Pareto k-hat of the importance weights", ylabel="number of data")
    _legend_below(ax)
    return ax


def active_units(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """KL of each latent dimension to the prior, largest first, with the dimensions that carry nothing marked.

    Args:
        table: what `active_units` returns: rows ("site", "dimension"), columns `kl`, `kl_se` and `active`.
        ax: where to draw; a new figure by default.

    Returns the Axes. Raises ValueError if `table` is empty or lacks those rows or columns.

    >>> import pandas as pd
    >>> rows = pd.MultiIndex.from_tuples([("z", 0), ("z", 1)], names=["site", "dimension"])
    >>> ax = active_units(pd.DataFrame({"kl": [0.0, 1.2], "kl_se": [0.0, 0.1], "active": [False, True]}, index=rows))
    >>> [label.get_text() for label in ax.get_xticklabels()]
    ['1', '0']
    """
    _check_table(table, ["site", "dimension"], ["kl", "kl_se", "active"], "active_units")
    table = table.sort_values("kl", ascending=False)
    ax = ax or _figure().add_subplot()
    places, active = np.arange(len(table)), table["active"].to_numpy(bool)
    for part, colour, word in ((active, BLUE, "active"), (~active, VERMILLION, "inactive")):
        rows = table[part]
        if len(rows):
            label = f"{word}: {len(rows)} of {len(table)}"
            ax.bar(places[part], rows["kl"], yerr=rows["kl_se"], color=colour, label=label, error_kw={"linewidth": 0.8})
    if not active.all():  # a bar of no height shows no colour
        ax.plot(places[~active], np.zeros((~active).sum()), "x", color=VERMILLION, clip_on=False)
    sites = table.index.get_level_values("site").unique()
    labels = [str(d) if len(sites) == 1 else f"{s}[{d}]" for s, d in table.index]
    ax.set_xticks(
        places, labels=labels, fontsize="small" if len(places) <= 30 else 5, rotation=0 if len(sites) == 1 else 90
    )
    ax.set(xlabel=f"dimension of {', '.join(map(str, sites))}", ylabel="KL to the prior (nats per datum)")
    _legend_below(ax)
    return ax


def training_curve(history: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Bound against epoch, on the training data and, where there are any, the validation data.

    Args:
        history: what `fit` returns: index "epoch", column `train_bound` and, optionally,
            `validation_bound`, in nats per datum. NaN and infinite values leave gaps.
        ax: where to draw; a new figure by default.

    The first epochs are often so low that they would flatten the rest. Values below the lower quartile by
    more than 1.5 interquartile ranges then fall below the y axis, if that at least halves its length, and a
    note in the plot says how many epochs do and how low they go. The lines still hold every value.

    Returns the Axes. Raises ValueError if `history` lacks the index or `train_bound`, or has no finite value.

    >>> import pandas as pd
    >>> epochs = pd.RangeIndex(1, 4, name="epoch")
    >>> training_curve(pd.DataFrame({"train_bound": [-150.0, -110.0, -104.0]}, index=epochs)).get_ylabel()
    'bound on log p(x) (nats per datum)'
    """
    _check_table(history, ["epoch"], ["train_bound"], "fit")
    columns = history.reindex(columns=["train_bound", "validation_bound"]).astype(float)
    columns = columns.where(np.isfinite(columns)).dropna(axis="columns", how="all")
    if columns.empty:
        raise PyroVAEError("history has no finite bound to draw: training diverged, try a lower learning rate.")
    ax = ax or _figure().add_subplot()
    for name, colour in {"train": SKY, "validation": BLACK}.items():
        if f"{name}_bound" in columns:
            ax.plot(columns.index, columns[f"{name}_bound"], color=colour, marker=".", label=name)
    values = columns.to_numpy()
    low, high = np.nanmin(values), np.nanmax(values)
    lower, upper = np.nanpercentile(values, [25, 75])
    fence = lower - 1.5 * (upper - lower)
    if high - low > 2 * (high - fence) > 0:
        ax.set_ylim(fence, high + 0.05 * (high - fence))
        hidden = int((values < fence).any(axis=1).sum())
        note = f"{hidden} epoch{'s' * (hidden > 1)} below the axis, down to {low:.0f} nats"
        ax.text(0.98, 0.03, note, transform=ax.transAxes, ha="right", color="0.35", fontsize="small")
    ax.locator_params(axis="x", integer=True, min_n_ticks=1)
    ax.set(xlabel="epoch", ylabel="bound on log p(x) (nats per datum)")
    _legend_below(ax)
    return ax


def reconstructions(x: Array, x_mean: Array, *, columns: int = 10, figure: Figure | None = None) -> Figure:
    """Originals and their reconstructions: below each row of originals, the row of its reconstructions.

    Args:
        x: the originals, (N, C, H, W) with C 1 or 3, or (N, H, W). Values outside [0, 1], which the mean of
            a Gaussian may have, are clipped for display.
        x_mean: their reconstructions, in the same shape.
        columns: the most originals in a row.
        figure: an empty figure to draw in; a new one by default.

    Returns the Figure. Raises ValueError if the shapes differ or are not those of images.

    >>> figure = reconstructions(torch.zeros(4, 1, 28, 28), torch.rand(4, 1, 28, 28))
    >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ['original', 'reconstruction']
    """
    if x.shape != x_mean.shape:
        raise PyroVAEError(
            f"x and x_mean must have one shape, got {tuple(x.shape)} and {tuple(x_mean.shape)}: "
            "pass the reconstruction of each original, in the same order."
        )
    originals, means = _images(x, "x"), _images(x_mean, "x_mean")
    count, height, width, channels = originals.shape
    line, gap = np.ones((count, 1, width, channels)), 1 + _gap(height)  # the gap is wider: it parts the pairs
    canvas = _mosaic(np.concatenate([originals, line, means], axis=1), columns, gap)
    figure = figure or _figure(canvas, left=1.2)
    ax = figure.add_subplot()
    _draw(canvas, ax)
    ax.set_anchor("W")  # in a centred image, constrained layout can cut the row labels off
    tops = np.arange(0, len(canvas), 2 * height + 1 + gap)
    centres = tops[:, None] + (height - 1) / 2 + [0, height + 1]
    ax.set_yticks(centres.ravel(), labels=["original", "reconstruction"] * len(tops))
    return figure


def images(x: Array, *, columns: int = 10, title: str | None = None, ax: Axes | None = None) -> Axes:
    """Images, such as samples from the model, side by side in rows, in reading order.

    Args:
        x: (N, C, H, W) with C 1 or 3, or (N, H, W). Values outside [0, 1], which the mean of a Gaussian may
            have, are clipped for display.
        columns: the most images in a row.
        title: written above the images.
        ax: where to draw; a new figure by default.

    Returns the Axes. Raises ValueError if the shape is not that of images.

    >>> images(torch.rand(20, 1, 28, 28), title="samples from the prior").get_title()
    'samples from the prior'
    """
    tiles = _images(x, "x")
    canvas = _mosaic(tiles, columns, _gap(tiles.shape[1]))
    ax = ax or _figure(canvas, top=0.3 if title else 0).add_subplot()
    _draw(canvas, ax)
    if title is not None:
        ax.set_title(title)
    return ax


def latent_space(z: Array, labels: Array | None = None, *, ax: Axes | None = None) -> Axes:
    """Points of a two-dimensional latent space, coloured by class.

    Args:
        z: (N, 2), usually the means of q(z | x).
        labels: (N,) the class of each point, numbers or strings, at most 20 classes. Classes take colours in
            sorted order; from the eleventh on the colours come again, as triangles.
        ax: where to draw, such as what `latent_grid` returns; a new figure by default.

    Returns the Axes. Raises ValueError if z does not have two columns, or labels do not fit z or are of more
    than 20 classes.

    >>> latent_space(torch.randn(50, 2), torch.arange(50) % 10).get_aspect()
    1.0
    """
    points = _numpy(z)
    if points.ndim != 2 or points.shape[1] != 2:
        raise PyroVAEError(
            f"z must have shape (N, 2), got {points.shape}: train with latent_dim=2, or project z first, "
            "with sklearn.decomposition.PCA(2).fit_transform(z)."
        )
    names, codes = _classes(labels, len(points))
    ax = ax or _figure().add_subplot()
    size = np.clip(20_000 / max(len(points), 1), 5, 25)
    # One scatter per marker, not per class: drawn in the order of z, no class hides the ones before it.
    for number, marker in enumerate(_MARKERS):
        here = codes // len(_CLASSES) == number
        colours = _CLASSES[codes[here] % len(_CLASSES)]
        style = {"c": colours, "marker": marker, "linewidths": 0.3, "edgecolors": "white"}
        ax.scatter(points[here, 0], points[here, 1], s=size, **style)
    if labels is not None:
        for code, name in enumerate(names):
            marker, colour = _MARKERS[code // len(_CLASSES)], _CLASSES[code % len(_CLASSES)]
            ax.plot([], [], color=colour, marker=marker, linestyle="", label=str(name))
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    ax.set(aspect="equal", xlabel="z1", ylabel="z2")
    return ax


def latent_grid(x: Array, *, extent: tuple[float, float, float, float], ax: Axes | None = None) -> Axes:
    """Images decoded from a regular grid of z, each drawn at its place in the latent plane.

    `latent_space(z, labels, ax=latent_grid(...))` draws points over the images decoded there.

    Args:
        x: (rows, columns, C, H, W) with C 1 or 3, or (rows, columns, H, W). Row 0 has the lowest z2, column
            0 the lowest z1. Values outside [0, 1], which the mean of a Gaussian may have, are clipped.
        extent: (z1_min, z1_max, z2_min, z2_max), the edges of the whole grid. An image is decoded from the
            centre of its tile, so the edges lie half a tile beyond the outermost z.
        ax: where to draw; a new figure by default.

    Returns the Axes. Raises ValueError if the shape is not that of a grid of images, or extent is empty.

    >>> ax = latent_grid(torch.rand(15, 15, 1, 28, 28), extent=(-3, 3, -3, 3))
    >>> tuple(map(float, ax.get_xlim()))
    (-3.0, 3.0)
    """
    grid = _numpy(x)
    if grid.ndim not in (4, 5):
        raise PyroVAEError(
            f"x must have shape (rows, columns, C, H, W) or (rows, columns, H, W), got {grid.shape}: "
            "reshape the decoded images with x.reshape(rows, columns, *x.shape[1:])."
        )
    z1_min, z1_max, z2_min, z2_max = extent
    if not (z1_min < z1_max and z2_min < z2_max):
        raise PyroVAEError(f"extent must be (z1_min, z1_max, z2_min, z2_max), each min below its max, got {extent}.")
    rows, columns, *image = grid.shape
    tiles = _images(grid[::-1].reshape(rows * columns, *image), "each row of x")  # imshow starts at the top
    ax = ax or _figure().add_subplot()
    ax.imshow(_mosaic(tiles, columns, gap=0), cmap="gray", vmin=0, vmax=1, extent=extent)
    ax.set(aspect="equal", xlabel="z1", ylabel="z2")
    return ax


def _figure(canvas: np.ndarray | None = None, *, left: float = 0, top: float = 0) -> Figure:
    """Return a new pyplot figure, fitted to a canvas of images with margins (inches) if there is one."""
    import matplotlib.pyplot as plt

    if canvas is None:
        return plt.figure(layout="constrained")
    height, width = canvas.shape[:2]
    return plt.figure(figsize=(7 + left, 7 * height / width + 0.1 + top), layout="constrained")


def _legend_below(ax: Axes) -> None:
    """Put the legend below the x label, where it covers no data: in a row where that fits, else a column."""
    labels = ax.get_legend_handles_labels()[1]
    row = sum(0.5 + 0.065 * len(label) for label in labels)  # roughly, in inches
    columns = len(labels) if row < ax.get_window_extent().width / ax.figure.dpi else 1
    # The pad counts in font sizes, so that it clears the x label whatever the size of the axes.
    style = {"borderaxespad": 5, "frameon": False, "fontsize": "small"}
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=columns, **style)


def _check_table(table: pd.DataFrame, index: list[str], columns: list[str], source: str) -> None:
    if table.empty or list(table.index.names) != index or not set(columns) <= set(table.columns):
        raise PyroVAEError(
            f"expected a table of one row or more with index {index} and columns {columns}, got {len(table)} "
            f"rows with index {list(table.index.names)} and columns {list(table.columns)}: "
            f"pass what {source} returns."
        )


def _numpy(x: Array) -> np.ndarray:
    if not isinstance(x, torch.Tensor):
        return np.asarray(x)
    x = x.detach().cpu()
    return (x.double() if x.is_floating_point() else x).numpy()  # numpy has no bfloat16


def _classes(labels: Array | None, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted classes, and which of them each point is of."""
    array = np.zeros(count) if labels is None else _numpy(labels)
    if array.shape != (count,):
        raise PyroVAEError(f"labels must have shape ({count},), one for each row of z, got {array.shape}.")
    names, codes = np.unique(array, return_inverse=True)
    most = len(_CLASSES) * len(_MARKERS)
    if len(names) > most:
        raise PyroVAEError(
            f"labels have {len(names)} classes, and at most {most} can be told apart: merge some, or leave labels out."
        )
    return names, codes


def _images(x: Array, name: str) -> np.ndarray:
    """Return images as (N, H, W, C) in [0, 1]."""
    array = _numpy(x)
    if array.ndim == 3:
        array = array[:, None]
    if array.ndim != 4 or array.shape[1] not in (1, 3) or 0 in array.shape:
        raise PyroVAEError(
            f"{name} must hold one image or more, (N, C, H, W) with C 1 or 3, or (N, H, W), got shape "
            f"{tuple(x.shape)}: reshape flat images with x.reshape(-1, 1, 28, 28), and move channels that "
            "come last with x.permute(0, 3, 1, 2)."
        )
    if array.dtype.kind in "iu" and array.max() > 1:
        raise PyroVAEError(
            f"{name} must be in [0, 1], got {array.dtype} up to {array.max()}: divide 8-bit images by 255."
        )
    return np.clip(array.transpose(0, 2, 3, 1).astype(float), 0, 1)


def _gap(size: int) -> int:
    return max(1, size // 14)


def _mosaic(tiles: np.ndarray, columns: int, gap: int) -> np.ndarray:
    """Lay tiles (N, H, W, C) out in rows on white, in reading order."""
    if columns < 1:
        raise PyroVAEError(f"columns must be 1 or more, got {columns}.")
    count, height, width, channels = tiles.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    canvas = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap, channels))
    for i, tile in enumerate(tiles):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = tile
    return canvas


def _draw(canvas: np.ndarray, ax: Axes) -> None:
    ax.imshow(canvas, cmap="gray", vmin=0, vmax=1)
    ax.set(xticks=[], yticks=[])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
