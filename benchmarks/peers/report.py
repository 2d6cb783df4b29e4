"""The results for people: tables and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import floor
import matplotlib
from matplotlib.ticker import FuncFormatter, NullLocator
from measure import Spread
from ours import COMPILED, PORTIONS
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")

# The Okabe-Ito palette, which colour-blind readers can tell apart.
STYLES = {
    COMPILED: ("#D55E00", "o", "-"),
    PORTIONS: ("#D55E00", "*", ":"),
    "pyro_vae eager": ("#E69F00", "s", "-"),
    "Pyro SVI": ("#0072B2", "^", "-"),
    "PyTorch compiled": ("#009E73", "D", "-"),
    "PyTorch eager": ("#56B4E9", "v", "-"),
    "NumPyro jitted": ("#CC79A7", "P", "-"),
    "pythae VAE": ("#888888", "X", "-"),
    floor.NAME: ("#000000", "", "--"),
}


def shown(spread: dict[str, float], factor: float = 1.0) -> str:
    return str(Spread(*(factor * value for value in spread.values())))


def print_training(console: Console, result: dict[str, Any]) -> None:
    table = Table(title=f"A training step: {result['title']} ({result['rounds']} rounds)", title_justify="left")
    table.add_column("contestant", no_wrap=True)
    for column in (
        "ms a step",
        "over the floor",
        "compiled / it",
        "loss at first",
        "z",
        f"after {result['steps']} steps",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in sorted(result["contestants"].items(), key=lambda item: item[1]["seconds"]["median"]):
        loss = [f"{row['first']:.2f}", f"{row['z']:+.1f}", f"{row['reached']:.2f}"] if "first" in row else []
        table.add_row(
            name, shown(row["seconds"], 1e3), shown(row["over_floor"]), shown(row["ours_over_it"]), *loss,
            style="bold" if name == COMPILED else None,
        )  # fmt: skip
    console.print(table)


def print_likelihood(console: Console, result: dict[str, Any]) -> None:
    title = f"log p(x) at {result['num_samples']:,} samples: {result['title']} ({result['rounds']} rounds)"
    table = Table(title=title, title_justify="left")
    table.add_column("contestant", no_wrap=True)
    for column in ("microseconds a sample", "over the floor", "compiled / it", "estimate", "z"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in sorted(result["contestants"].items(), key=lambda item: item[1]["seconds"]["median"]):
        estimate = [f"{row['first']:.3f}", f"{row['z']:+.1f}"] if "first" in row else []
        table.add_row(
            name, shown(row["seconds"], 1e6), shown(row["over_floor"]), shown(row["ours_over_it"]), *estimate,
            style="bold" if name == COMPILED else None,
        )  # fmt: skip
    console.print(table)


def print_claims(console: Console, claims: list[dict[str, Any]]) -> None:
    table = Table(title="What it shows: ratios of times, medians over rounds with quartiles", title_justify="left")
    for column in ("ratio", "where"):
        table.add_column(column, no_wrap=True)
    for column in ("value", "aim", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for claim in claims:
        value, aim = claim["ratio"], claim["at_most"]
        verdict = "met" if value["median"] <= aim else "within the spread" if value["lower"] <= aim else "above"
        table.add_row(claim["what"], claim["where"], shown(value), f"{aim:g}", verdict)
    console.print(table)


def print_growth(console: Console, growth: dict[str, Any]) -> None:
    whole, portions, products = (growth[name] for name in ("at once", "in portions", "products"))
    table = Table(title="The compiled step as K grows (batch 20, hidden 200, latent 50)", title_justify="left")
    for column in ("K", "ms a step", "share outside the products", "ms in portions", "share outside the products"):
        table.add_column(column, justify="right")
    for row, part in zip(whole["points"], portions["points"], strict=True):
        cells = [
            text for point in (row, part) for text in (shown(point["seconds"], 1e3), shown(point["share_outside"]))
        ]
        table.add_row(str(row["particles"]), *cells)
    console.print(table)
    first, last = (whole["points"][i]["particles"] for i in (0, -1))
    console.print(
        f"From K = {first} to {last} it grows as K to the power of {shown(whole['exponent'])}, in portions "
        f"{shown(portions['exponent'])}, the products alone {shown(products['exponent'])}.\n"
    )


def draw(lines: dict[str, list[tuple[int, dict[str, float]]]], label: str, title: str, path: Path) -> None:
    """Milliseconds against a size, both logarithmic, each line with its name at its end."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(8, 5.5), layout="constrained")
    ends = []
    for name, points in lines.items():
        colour, marker, style = STYLES[name]
        sizes, spreads = zip(*points, strict=True)
        lower, median, upper = ([1e3 * spread[key] for spread in spreads] for key in ("lower", "median", "upper"))
        ax.plot(sizes, median, color=colour, marker=marker, linestyle=style, markersize=5, linewidth=1.5)
        ax.fill_between(sizes, lower, upper, color=colour, alpha=0.15, linewidth=0)
        ends.append((median[-1], name, colour, sizes[-1]))
    ax.set(xscale="log", yscale="log", xlabel=label, ylabel="time of a training step (ms of one thread)")
    ax.set_title(title, loc="left")
    ticks = sorted({size for points in lines.values() for size, _ in points})
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    _name_ends(ax, ends)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _name_ends(ax: Any, ends: list[tuple[float, str, str, int]]) -> None:
    """Write each line's name at its right end, one above another in their order, as far apart as letters are high."""
    bottom, top = ax.get_ylim()
    apart = (top / bottom) ** 0.042
    ends = sorted(ends, reverse=True)
    right = max(size for *_, size in ends)
    # Downward from the top, and where that leaves the lowest below its line's end, upward again by half of it.
    heights = [min(end[0] for end in ends[: i + 1]) for i in range(len(ends))]
    for i in range(1, len(ends)):
        heights[i] = min(heights[i], heights[i - 1] / apart)
    shift = min((top / heights[0]) ** 0.9, (ends[-1][0] / heights[-1]) ** 0.5)
    line = {"arrowstyle": "-", "linewidth": 0.6, "shrinkA": 2, "shrinkB": 4, "relpos": (0, 0.5)}
    for (height, name, colour, size), at in zip(ends, heights, strict=True):
        ax.annotate(
            name,
            (size, height),
            xytext=(right * 1.15, at * shift),
            textcoords="data",
            color=colour,
            va="center",
            fontsize=9,
            arrowprops=line | {"color": colour},
            annotation_clip=False,
        )
