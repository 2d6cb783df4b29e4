"""Charts of bounds, training curves, Pareto k-hat, active units, calibration and models."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyro_vae.checks import checked, shown
from pyro_vae.errors import PyroVAEError
from pyro_vae.plots.shared import BLACK, BLUE, CLASSES, SKY, VERMILLION, Array, new_figure, objective_colour, to_numpy

APART = 0.12  # how far objectives are from each other, as powers of two of the number of particles
FEW_HIGH = 0.01  # share of high k-hats that leaves a model's mean as it is

if TYPE_CHECKING:  # matplotlib is slow to import, and importing this package draws nothing
    from matplotlib.axes import Axes


@checked
def bounds(table: pd.DataFrame, *, log_likelihood: tuple[float, float] | None = None, ax: Axes | None = None) -> Axes:
    """Plot bounds on log p(x) against the number of particles, one line per objective, with a line at log p(x).

    The band of a line is plus and minus 1.96 standard errors of the paired difference to log p(x) over the same data.
    How much the data themselves differ is in none of the bands: all rows have the same data. A whisker is the noise of
    one evaluation, plus and minus the standard deviation over repeats of the mean over data. An objective with a single
    number of particles is a marker, and a dashed line across the plot. Objectives are a little apart on the x axis, so
    that they do not hide each other.

    Arguments:
        table: the return value of :func:`pyro_vae.compare`, with index levels "objective" and "particles", and columns
            `bound`, `gap` and `gap_se` in nats per datum. The line at log p(x) is at the highest ``bound + gap``.
            Optional are `is_bound`, whose False the legend shows; and `estimator_std` with ``attrs["num_data"]``, for
            the whiskers.
        log_likelihood: a lower and an upper estimate of log p(x) of the same data, in nats per datum. A grey band is
            drawn between them, in place of the line.

    Raises:
        ValueError: `table` is empty, or lacks those levels or columns; or the estimates of log p(x) are not finite, or
            cross.

    Example:
        >>> import pandas as pd, pyro_vae as pv
        >>> rows = pd.MultiIndex.from_tuples([("IWAE", 1), ("IWAE", 16)], names=["objective", "particles"])
        >>> table = pd.DataFrame({"bound": [-98.0, -95.5], "gap": [3.0, 0.5], "gap_se": [0.2, 0.1]}, index=rows)
        >>> ax = pv.plots.bounds(table)
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['log p(x), best estimate: -95.00', 'IWAE']
    """
    _check_table(table, ["objective", "particles"], ["bound", "gap", "gap_se"], "pv.compare")
    ax = ax or new_figure().add_subplot()
    if log_likelihood is not None:
        lower, upper = log_likelihood
        if not -np.inf < lower <= upper < np.inf:
            raise PyroVAEError(
                f"expected log_likelihood=(lower, upper) with finite lower <= upper, got {log_likelihood}."
            )
        label = f"log p(x), between {lower:.2f} and {upper:.2f}"
        ax.axhspan(lower, upper, color="0.6", alpha=0.5, linewidth=0, label=label)
        for edge in (lower, upper):  # a narrow band would be invisible without its edges
            ax.axhline(edge, color="0.4", linewidth=0.8)
    elif np.isfinite(best := (table["bound"] + table["gap"]).max()):
        ax.axhline(best, color=BLACK, linewidth=1, label=f"log p(x), best estimate: {best:.2f}")
    objectives = list(table.groupby(level="objective", sort=False))
    for place, (marker, (name, rows)) in enumerate(zip(cycle("osD^v"), objectives)):
        rows = rows.sort_index(level="particles")
        k = rows.index.get_level_values("particles").to_numpy() * 2 ** (APART * (place - (len(objectives) - 1) / 2))
        bound, error = rows["bound"].to_numpy(float), 1.96 * rows["gap_se"].to_numpy(float)
        colour = objective_colour(str(name))
        label = str(name) if rows.get("is_bound", default=pd.Series([True])).all() else f"{name} (no bound)"
        if len(k) == 1:
            ax.axhline(bound[0], color=colour, linewidth=0.8, linestyle="--")
            ax.fill_between(k[0] * np.array([0.9, 1.1]), *(bound + error * [[-1], [1]]), **_band(colour))
        else:
            ax.fill_between(k, bound - error, bound + error, **_band(colour))
        ax.plot(k, bound, color=colour, marker=marker, markersize=5, label=label)
        if "estimator_std" in rows and "num_data" in table.attrs:
            noise = rows["estimator_std"] / np.sqrt(table.attrs["num_data"])
            ax.errorbar(k, bound, noise, color=colour, linestyle="", linewidth=1, capsize=3)
    particles = sorted({int(k) for k in table.index.get_level_values("particles")})
    ax.set_xscale("log", base=2)
    ax.set_xticks(particles, labels=map(str, particles))
    ax.minorticks_off()
    return _finished(ax, "number of particles", "bound on log p(x) (nats per datum)")


def _band(colour: str) -> dict[str, Any]:
    return {"color": colour, "alpha": 0.2, "linewidth": 0}


@checked
def training_curve(history: pd.DataFrame | Mapping[str, pd.DataFrame], *, ax: Axes | None = None) -> Axes:
    """Plot the bound on the training and the validation data against the epoch, of one training or of several.

    Of several trainings, each has a colour, and validation data have a dashed line. The first bounds are often so low
    that they would flatten the rest of the curve. The y axis therefore starts at Q1 - 1.5 (Q3 - Q1) if that at least
    halves its length, with Q1 and Q3 the quartiles of all values. A note in the plot then gives the number of epochs
    below the axis and their lowest value. The lines still hold every value.

    Arguments:
        history: the return value of :func:`pyro_vae.fit`, with index "epoch", the column `train_bound` and
            optionally `validation_bound`, in nats per datum; or a dictionary from names to these. NaN and infinite
            values leave gaps. The y label is ``history.attrs["quantity"]``: a weighted objective, such as a beta-VAE's,
            is no bound on log p(x).

    Raises:
        ValueError: a history is empty, lacks that index or `train_bound`, or has no finite value; or there are several
            with another `quantity`, or none.

    Example:
        >>> import pandas as pd, pyro_vae as pv
        >>> epochs = pd.RangeIndex(1, 4, name="epoch")
        >>> history = pd.DataFrame({"train_bound": [-150.0, -110.0, -104.0]}, index=epochs)
        >>> pv.plots.training_curve(history).get_ylabel()
        'bound on log p(x) (nats per datum)'
        >>> ax = pv.plots.training_curve({"one layer": history, "two layers": history + 3})
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['one layer', 'two layers']
    """
    histories = history if isinstance(history, Mapping) else {"": history}
    alone = histories is not history
    curves: list[tuple[str, pd.Series, dict[str, Any]]] = []
    for (name, each), colour in zip(histories.items(), cycle(CLASSES), strict=False):
        for part, values in _finite_bounds(each, f" of {name!r}" * (not alone)).items():
            valid = part == "validation"
            label = str(part) if alone else f"{name}, validation" if valid else name
            alone_colour = BLACK if valid else SKY
            style = {"color": alone_colour if alone else colour, "linestyle": "--" if valid and not alone else "-"}
            curves.append((label, values, style))
    quantities = {str(each.attrs.get("quantity", "bound on log p(x)")) for each in histories.values()}
    if len(quantities) != 1:
        raise PyroVAEError(
            f"expected one history or more of one quantity, got {sorted(quantities) or 'none'}. Draw those of another "
            "quantity apart."
        )
    ax = ax or new_figure().add_subplot()
    for label, values, style in curves:
        ax.plot(values.index, values, marker=".", label=label, **style)
    found = np.concatenate([values.to_numpy() for _, values, _ in curves])
    low, high = np.nanmin(found), np.nanmax(found)
    lower, upper = np.nanpercentile(found, [25, 75])
    fence = lower - 1.5 * (upper - lower)
    if high - low > 2 * (high - fence) > 0:
        ax.set_ylim(fence, high + 0.05 * (high - fence))
        hidden = len({epoch for _, values, _ in curves for epoch in values.index[values < fence]})
        note = f"{hidden} epoch{'s' * (hidden > 1)} below the axis, down to {low:.0f} nats"
        ax.text(0.98, 0.03, note, transform=ax.transAxes, ha="right", color="0.35", fontsize="small")
    ax.locator_params(axis="x", integer=True, min_n_ticks=1)
    return _finished(ax, "epoch", f"{quantities.pop()} (nats per datum)")


def _finite_bounds(history: pd.DataFrame, whose: str) -> pd.DataFrame:
    """The columns train and validation of a history, without what is not finite."""
    _check_table(history, ["epoch"], ["train_bound"], "pv.fit")
    columns = history.reindex(columns=["train_bound", "validation_bound"]).astype(float)
    columns = columns.where(np.isfinite(columns)).dropna(axis="columns", how="all")
    if columns.empty:
        raise PyroVAEError(
            f"expected at least one finite bound in history{whose}, got {len(history)} epochs of NaN or infinity. "
            "Train with a lower learning rate."
        )
    return columns.rename(columns=lambda name: name.removesuffix("_bound"))


@checked
def pareto_k(shapes: Array, *, ax: Axes | None = None) -> Axes:
    """Plot a histogram of Pareto k-hat over the data, with its limit of 0.7.

    Above 0.7, the importance weights of a datum are too heavy-tailed to trust the estimate of its log p(x).

    Arguments:
        shapes: k-hat of each datum, (N,), from :func:`pyro_vae.pareto_k` or ``pyro_vae.log_likelihood(...).pareto_k``.
            NaN and infinity count in the legend's shares and are not in the histogram.

    Raises:
        ValueError: no element of `shapes` is finite.

    Example:
        >>> import torch, pyro_vae as pv
        >>> pv.plots.pareto_k(torch.tensor([0.1, 0.5, 0.9])).get_xlabel()
        'Pareto k-hat of the importance weights'
    """
    values = to_numpy(shapes).ravel()
    finite = values[np.isfinite(values)]
    if not len(finite):
        raise PyroVAEError(
            f"expected at least one finite k-hat, got {len(values)} values of NaN or infinity. "
            "Compute k-hat from 30 samples or more for each datum."
        )
    ax = ax or new_figure().add_subplot()
    edges = list(np.arange(np.floor(min(finite.min(), 0) / 0.05), np.ceil(max(finite.max(), 1) / 0.05) + 1) * 0.05)
    for part, colour, sign in ((values <= 0.7, BLUE, "at most"), (values > 0.7, VERMILLION, "above")):
        counted = values[part & np.isfinite(values)]
        ax.hist(counted, edges, color=colour, label=f"{sign} 0.7: {part.mean():.1%} of {len(values)} data")
    ax.axvline(0.7, color=BLACK, linewidth=0.8, linestyle="--")
    return _finished(ax, "Pareto k-hat of the importance weights", "number of data")


@checked
def active_units(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Plot the KL divergence of each latent dimension from the prior, largest first, and mark inactive dimensions.

    Arguments:
        table: the return value of :func:`pyro_vae.active_units`, with index levels "site" and "dimension", and
            columns `kl` and `kl_se` in nats per datum, and `active`.

    Raises:
        ValueError: `table` is empty, or lacks those levels or columns.

    Example:
        >>> import pandas as pd, pyro_vae as pv
        >>> rows = pd.MultiIndex.from_tuples([("z", 0), ("z", 1)], names=["site", "dimension"])
        >>> table = pd.DataFrame({"kl": [0.0, 1.2], "kl_se": [0.0, 0.1], "active": [False, True]}, index=rows)
        >>> [label.get_text() for label in pv.plots.active_units(table).get_xticklabels()]
        ['1', '0']
    """
    _check_table(table, ["site", "dimension"], ["kl", "kl_se", "active"], "pv.active_units")
    table = table.sort_values("kl", ascending=False)
    ax = ax or new_figure().add_subplot()
    places, active = np.arange(len(table)), table["active"].to_numpy(bool)
    for part, colour, word in ((active, BLUE, "active"), (~active, VERMILLION, "inactive")):
        rows = table[part]
        if len(rows):
            label = f"{word}: {len(rows)} of {len(table)}"
            ax.bar(places[part], rows["kl"], yerr=rows["kl_se"], color=colour, label=label, error_kw={"linewidth": 0.8})
    if not active.all():  # a bar of zero height shows no colour
        ax.plot(places[~active], np.zeros((~active).sum()), "x", color=VERMILLION, clip_on=False)
    sites = table.index.get_level_values("site").unique()
    labels = [str(d) if len(sites) == 1 else f"{s}[{d}]" for s, d in table.index]
    size, rotation = "small" if len(places) <= 30 else 5, 0 if len(sites) == 1 else 90
    ax.set_xticks(places, labels=labels, fontsize=size, rotation=rotation)
    return _finished(ax, f"dimension of {', '.join(map(str, sites))}", "KL to the prior (nats per datum)")


@checked
def calibration(ranks: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Plot how far the ranks of the true latents are from uniform, by dimension.

    A line is the share of data whose rank is at most u, less u. All lines of an exact guide stay in the grey band, with
    95% probability for each. A guide that is too narrow rises first and falls below zero later. One that is too wide
    does the reverse. A guide whose draws are too low is below zero everywhere, and one whose draws are too high above.

    Arguments:
        ranks: `ranks` or `weighted_ranks` of :func:`pyro_vae.calibrate`, one row for each datum.

    Raises:
        ValueError: `ranks` is no table of numbers from 0 to 1 with the column levels "site" and "dimension".

    Example:
        >>> import numpy as np, pandas as pd, pyro_vae as pv
        >>> columns = pd.MultiIndex.from_tuples([("z", 0)], names=["site", "dimension"])
        >>> ranks = pd.DataFrame(np.linspace(0.01, 0.99, 50)[:, None], columns=columns)
        >>> pv.plots.calibration(ranks).get_xlabel()
        'rank u of the true latent among the draws'

    References:
        Säilynoja, Bürkner and Vehtari (2022), *Graphical Test for Discrete Uniformity and Its Applications in
        Goodness-of-Fit Evaluation and Multiple Sample Comparison*, Statistics and Computing.
    """
    named = isinstance(ranks, pd.DataFrame) and list(ranks.columns.names) == ["site", "dimension"]
    if not named or ranks.empty or not ((ranks >= 0) & (ranks <= 1)).to_numpy().all():
        raise PyroVAEError(
            f"expected a table of ranks from 0 to 1 by site and dimension, got {shown(ranks)}. Pass the attribute "
            "ranks, or weighted_ranks, of the result of pv.calibrate."
        )
    ax = ax or new_figure().add_subplot()
    number = len(ranks)
    band = 1.358 / np.sqrt(number)  # the 95% point of Kolmogorov's distribution
    ax.axhspan(-band, band, color="0.9", label="95% band of an exact guide")
    places = np.linspace(0, 1, 201)
    sites = ranks.columns.get_level_values("site").unique()
    for site, colour in zip(sites, cycle(CLASSES), strict=False):
        for i, values in enumerate(ranks[site].to_numpy().T):
            share = np.searchsorted(np.sort(values), places, side="right") / number
            ax.plot(places, share - places, color=colour, linewidth=0.9, label=site if i == 0 else None)
    ax.axhline(0, color=BLACK, linewidth=0.8, linestyle="--")
    ax.set_xlim(0, 1)
    return _finished(ax, "rank u of the true latent among the draws", "share of data of at most u, less u")


@checked
def models(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Plot how far models are from the best one, in log p(x) of the same data.

    A bar is plus and minus 1.96 standard errors of the paired difference over data. A hollow marker is of a model with
    a k-hat above 0.7 at more than 1% of the data, whose log p(x) is probably higher than its estimate.

    Arguments:
        table: the return value of :func:`pyro_vae.compare_models`, with index "model" and columns `log_likelihood`,
            `difference`, `difference_se` and `share_high_k`.

    Raises:
        ValueError: `table` is empty, or lacks that index or those columns.

    Example:
        >>> import pandas as pd, pyro_vae as pv
        >>> rows = {"log_likelihood": [-98.2, -99.1], "difference": [0.0, -0.9], "difference_se": [0.0, 0.1]}
        >>> table = pd.DataFrame(rows | {"share_high_k": [0.0, 0.4]}, pd.Index(["A", "B"], name="model"))
        >>> [label.get_text() for label in pv.plots.models(table).get_yticklabels()]
        ['A\\n-98.20', 'B\\n-99.10']
    """
    columns = ["log_likelihood", "difference", "difference_se", "share_high_k"]
    _check_table(table, ["model"], columns, "pv.compare_models")
    ax = ax or new_figure().add_subplot()
    labels = {
        False: "difference ± 1.96 standard errors",
        True: "the same; k-hat > 0.7 at more than 1% of the data: probably too low",
    }
    hollow = table["share_high_k"] > FEW_HIGH
    for which, label in labels.items():
        rows = np.flatnonzero(hollow == which)
        if len(rows):
            found, error = (table[name].to_numpy(float)[rows] for name in ("difference", "difference_se"))
            face = "none" if which else BLUE
            style: dict[str, Any] = {
                "color": BLUE,
                "marker": "o",
                "markerfacecolor": face,
                "linestyle": "",
                "capsize": 3,
            }
            ax.errorbar(found, rows, xerr=1.96 * error, label=label, **style)
    ax.axvline(0, color=BLACK, linewidth=0.8, linestyle="--")
    names = [f"{name}\n{value:.2f}" for name, value in table["log_likelihood"].items()]
    ax.set_yticks(range(len(table)), labels=names)
    ax.set_ylim(len(table) - 0.5, -0.5)
    best = table["log_likelihood"].idxmax()
    return _finished(ax, f"log p(x) less that of '{best}' (nats per datum)", "model, with its log p(x)")


def _check_table(table: pd.DataFrame, index: list[str], columns: list[str], source: str) -> None:
    if not isinstance(table, pd.DataFrame):
        raise PyroVAEError(f"expected a table, got {shown(table)}. Pass the return value of {source}.")
    if table.empty or list(table.index.names) != index or not set(columns) <= set(table.columns):
        raise PyroVAEError(
            f"expected a table of one row or more with index {index} and columns {columns}, got {len(table)} rows with "
            f"index {list(table.index.names)} and columns {list(table.columns)}. Pass the return value of {source}."
        )
    try:
        table[columns].astype(float)
    except (TypeError, ValueError) as error:
        raise PyroVAEError(f"expected numbers in columns {columns}, got others: {error}. Convert them.") from error


def _finished(ax: Axes, xlabel: str, ylabel: str) -> Axes:
    """Label the axes, with the legend below, where it covers no data: in one row if that fits, else in one column."""
    from matplotlib.font_manager import FontProperties

    ax.set(xlabel=xlabel, ylabel=ylabel)
    labels, area = ax.get_legend_handles_labels()[1], ax.get_window_extent()
    row = sum(0.5 + 0.065 * len(label) for label in labels)  # an estimate of its width, in inches
    columns = len(labels) if row < area.width / ax.figure.dpi else 1
    # A pad in font sizes keeps the legend clear of the x label for every size of the axes.
    box = ax.xaxis.get_tightbbox()  # None if the x axis is invisible
    below = 0 if box is None else (area.y0 - box.y0) * 72 / ax.figure.dpi
    size = FontProperties(size="small").get_size_in_points()
    place = {"bbox_to_anchor": (0.5, 0), "borderaxespad": max(5, below / size + 1)}  # rotated tick labels need over 5
    ax.legend(loc="upper center", ncols=columns, frameon=False, fontsize=size, **place)
    return ax
