"""The tables of compare and evaluate, for a terminal of 80 columns."""

from __future__ import annotations

import math

import pandas as pd
from rich import box
from rich.table import Table

from pyro_vae.cli.report import Report


def format_report(report: Report) -> Table:
    """The report, for a terminal of 80 columns."""
    likelihood, active = report.log_likelihood, report.active["active"]
    k = f"k-hat above 0.7 at {likelihood.share_high_k:.1%} of the images"
    if likelihood.share_no_k:
        k += f", none at {likelihood.share_no_k:.1%}"
    zeros = int((likelihood.zero_weights > 0).sum())
    if zeros:
        k += f", weights of zero at {zeros} of them"
    log_n = math.log(report.decomposition.num_data)
    caption = (
        f"Nats per image, ± standard error over images (of samples, for the parts of the ELBO). Importance weights: {k}; "
        f"median ESS {likelihood.ess.median():.0f} of {likelihood.num_samples}; Monte Carlo error of the mean "
        f"{likelihood.monte_carlo_error:.2g}, which a high k-hat makes too small. Mutual information is at most log N = {log_n:.2f}; "
        "near that, there are too few images to tell it from the KL of the aggregate. Active units: "
        f"{active.sum()} of {len(active)} latent dimensions. AIS accepted {report.annealed.acceptance.mean():.0%} of its "
        "proposals. Gaps are to the higher of AIS and IS, of the first images; sim.: images simulated from the model."
    )
    formatted = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", collapse_padding=True)
    formatted.add_column("", no_wrap=True)
    for name in ("nats ± SE", "images", "minutes"):
        formatted.add_column(name, justify="right", no_wrap=True)
    shown: set[str] = set()
    previous = "all"
    for row in report.rows():
        if row.data != previous:
            formatted.add_section()
        minutes = "" if row.part in shown else f"{report.minutes[row.part]:.1f}"
        kind = {"all": "", "first": "first ", "simulated": "sim. "}[row.data]
        formatted.add_row(row.words, str(row.estimate), f"{kind}{row.num_data}", minutes)
        shown.add(row.part)
        previous = row.data
    return formatted


def format_comparison(table: pd.DataFrame, images: int, repeats: int) -> Table:
    """What compare returns, for a terminal of 80 columns."""
    caption = (
        f"K: particles. Bound on log p(x) in nats per datum, mean of {images} test images ± its standard error; "
        "all rows share the images, so differences between rows are far surer than ±. std: of one datum's estimate over "
        f"{repeats} repeats, in nats. gap: below the best estimate of log p(x); the weights' median k-hat is "
        f"{table['pareto_k'].iloc[0]:.2f} (above 0.7: don't trust it). SNR: signal to noise of the gradient over the parameters of model and guide, rough "
        "at few repeats; 0: no signal shows. ms: the bound with its gradient, on all the images."
    )
    formatted = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", collapse_padding=True)
    formatted.add_column("objective", no_wrap=True)
    for name in ("K", "bound ± SE", "gap", "std", "SNR\nmodel", "SNR\nguide", "ms"):
        formatted.add_column(name, justify="right", no_wrap=True)
    for row in table.reset_index().to_dict("records"):
        bound = f"{row['bound']:.2f} ± {row['bound_se']:.2f}"
        others = [
            f"{row[name]:.{2 if abs(row[name]) < 100 else 0}f}"
            for name in ("gap", "estimator_std", "grad_snr_model", "grad_snr_guide")
        ]
        formatted.add_row(row["objective"], str(row["particles"]), bound, *others, f"{row['milliseconds']:.0f}")
    return formatted
