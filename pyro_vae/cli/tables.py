"""Formats the tables that compare and evaluate print, for a terminal of 80 columns."""

import math

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from pyro_vae.cli.report import Report


def print_table(table: Table) -> None:
    """Print a table by Python's own print, whose errors are those of all output: Rich ends the program at some."""
    console = Console()
    with console.capture() as captured:
        console.print(table)
    print(captured.get(), end="")


def format_comparison(table: pd.DataFrame, num_images: int, repeats: int) -> Table:
    """Format the table that :func:`pyro_vae.compare` returns."""
    caption = (
        "K: number of particles.\n"
        f"bound ± SE: mean bound on log p(x) of {num_images} test images in nats per datum, and its standard "
        "error. All rows share the images, so differences between rows have much smaller errors.\n"
        "gap: best estimate of log p(x) minus the bound. The importance weights of that estimate have a median k-hat "
        f"of {table['pareto_k'].iloc[0]:.2f}; above 0.7, don't trust the gap.\n"
        f"std: standard deviation of the estimate for one image over {repeats} repeats, in nats.\n"
        "SNR: signal-to-noise ratio of the gradient for the parameters of the model and of the guide. Few repeats make "
        "it imprecise; 0 means that no signal was found.\n"
        "ms: milliseconds for the bound and its gradient on all the images."
    )
    formatted = _table("objective", caption, ["K", "bound ± SE", "gap", "std", "SNR\nmodel", "SNR\nguide", "ms"])
    for row in table.reset_index().to_dict("records"):
        bound = f"{row['bound']:.2f} ± {row['bound_se']:.2f}"
        others = [
            f"{row[name]:.{2 if abs(row[name]) < 100 else 0}f}"
            for name in ("gap", "estimator_std", "grad_snr_model", "grad_snr_guide")
        ]
        name = row["objective"] if row.get("is_bound", True) else f"{row['objective']} (no bound)"
        formatted.add_row(name, str(row["particles"]), bound, *others, f"{row['milliseconds']:.0f}")
    return formatted


def format_report(report: Report) -> Table:
    """Format the report of ``pyro-vae evaluate``."""
    formatted = _table("", _report_caption(report), ["nats ± SE", "images", "minutes"])
    shown: set[str] = set()
    previous = "all"
    for row in report.rows():
        if row.data != previous:
            formatted.add_section()
        minutes = "" if row.part in shown else f"{report.minutes[row.part]:.1f}"
        kind = {"all": "", "first": "first ", "simulated": "sim. "}[row.data]
        formatted.add_row(row.label, str(row.estimate), f"{kind}{row.num_data}", minutes)
        shown.add(row.part)
        previous = row.data
    return formatted


def _report_caption(report: Report) -> str:
    likelihood, active = report.log_likelihood, report.active["active"]
    weights = f"k-hat is above 0.7 for {likelihood.share_high_k:.1%} of the images"
    if likelihood.share_no_k:
        weights += f" and can't be computed for {likelihood.share_no_k:.1%}"
    zeros = int((likelihood.zero_weights > 0).sum())
    if zeros:
        weights += f"; {zeros} have weights of zero"
    return (
        "nats ± SE: per image, with the standard error over images. For the parts of the ELBO the standard error is "
        "over samples of z.\n"
        "images: first, the first test images; sim., images simulated from the model.\n"
        f"Refined: from samples of a proposal that is fitted to each image. {weights}. The median ESS is "
        f"{likelihood.ess.median():.0f} of {likelihood.num_samples} samples. The mean log p(x) has a Monte Carlo error "
        f"of {likelihood.monte_carlo_error:.2g}, an underestimate where k-hat is high.\n"
        f"Annealed importance sampling (AIS): {report.annealed.acceptance.mean():.0%} of the proposals were accepted.\n"
        f"The encoder, on simulated images: its 95% intervals hold {_coverage(report):.0%} of the true latents; "
        f"{_verdicts(report)}.\n"
        f"Mutual information: at most log N = {math.log(report.decomposition.num_data):.2f}. Near this limit, more "
        "images are needed to separate it from the KL of the aggregate.\n"
        "Gaps: their sum is the higher of the AIS and refined estimates minus the ELBO.\n"
        f"Active units: {active.sum()} of {len(active)} latent dimensions."
    )


def _coverage(report: Report) -> float:
    return float(report.calibration.coverage((0.95,)).guide.iloc[0])


def _verdicts(report: Report) -> str:
    counts = report.calibration.dimensions.verdict.value_counts()
    return "; ".join(f"{count} of {counts.sum()} dimensions are {word}" for word, count in counts.items())


def _table(first_column: str, caption: str, columns: list[str]) -> Table:
    """Make a table without rows, with the columns after the first aligned to the right."""
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", collapse_padding=True)
    table.add_column(first_column, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table
