"""Draws the figures of a run folder, as PNG files in its ``figures/``."""

import math
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch

from pyro_vae import VAE, plots
from pyro_vae.cli.report import Report
from pyro_vae.cli.run_folder import RunFolder
from pyro_vae.data import Dataset, Split
from pyro_vae.extras import require
from pyro_vae.files import written_whole


def prepare() -> None:
    """Refuse to begin without matplotlib, and make it draw to files, which needs no screen."""
    require("matplotlib", by="pyro-vae")
    os.environ["MPLBACKEND"] = "agg"  # importing matplotlib refuses unknown ones
    import matplotlib

    matplotlib.use("agg")  # where it was imported before


def draw_training(folder: RunFolder, vae: VAE, dataset: Dataset, history: pd.DataFrame, seed: int) -> list[Path]:
    """Draw the training curve, reconstructions, samples and, with two latent dimensions, the latent space."""
    x = dataset.test.x[:20]
    return [
        save(folder, "training", plots.training_curve(history)),
        save(folder, "reconstructions", plots.reconstructions(x, vae.reconstruct(x))),
        draw_samples(folder, vae, 64, seed),
        *([_draw_latent_space(folder, vae, dataset.test)] if vae.embed(x).shape[1] == 2 else []),
    ]


def draw_samples(folder: RunFolder, vae: VAE, n: int, seed: int) -> Path:
    """Draw n images: means of p(x|z), with z from the prior."""
    pyro.set_rng_seed(seed)
    title = "means of p(x|z), with z from the prior"
    return save(folder, "samples", plots.images(vae.generate(n), columns=math.isqrt(n - 1) + 1, title=title))


def draw_report(folder: RunFolder, report: Report) -> list[Path]:
    """Draw bounds beside log p(x), the k-hats, and the KL of each latent dimension."""
    bounds = plots.bounds(report.table, log_likelihood=report.log_likelihood_range)
    title = f"{len(report.annealed.per_datum)} test images, with log p(x) from refined proposals"
    bounds.set_title(title, fontsize="medium")
    drawn = [save(folder, "bounds_and_log_likelihood", bounds)]
    if report.log_likelihood.share_no_k < 1:  # the plot needs at least one k-hat
        drawn.append(save(folder, "pareto_k", plots.pareto_k(report.log_likelihood.pareto_k)))
    return [*drawn, save(folder, "active_units", plots.active_units(report.active))]


def _draw_latent_space(folder: RunFolder, vae: VAE, test: Split) -> Path:
    """Draw the posterior means of test images beside images decoded on a grid of z."""
    import matplotlib.pyplot as plt

    z = vae.embed(test.x[:2000])
    labels = test.labels[:2000] if test.labels is not None and len(test.labels.unique()) <= 20 else None
    reach = max(3.0, z.abs().max().item())
    centres = torch.linspace(-reach, reach, 2 * 15 + 1)[1::2]
    z2, z1 = torch.meshgrid(centres, centres, indexing="ij")
    tiles = vae.decode(torch.stack([z1, z2], -1))
    tiles = torch.nn.functional.pad(tiles, (0, 1, 0, 1), value=1)  # a white line between tiles
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.4), layout="constrained")
    plots.latent_space(z, labels, ax=left)
    left.set(title="means of q(z|x) of test images", xlim=(-reach, reach), ylim=(-reach, reach))
    plots.latent_grid(tiles, extent=(-reach, reach, -reach, reach), ax=right)
    right.set_title("means of p(x|z) on a grid of z")
    return save(folder, "latent_space", figure)


def save(folder: RunFolder, name: str, drawn: Any) -> Path:
    """Save a figure, or the figure of these axes, and close it."""
    import matplotlib.pyplot as plt

    path, figure = folder.figures / f"{name}.png", drawn.get_figure()
    with written_whole(path) as unfinished:
        figure.savefig(unfinished, dpi=150)
    plt.close(figure)
    return path
