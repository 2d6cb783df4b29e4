"""``pyro-vae sample``."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from pyro_vae.cli import figures
from pyro_vae.cli.run_folder import RunArgument, RunFolder


def sample(
    path: RunArgument,
    num_samples: Annotated[int, Option(min=1, help="How many images.")] = 64,
    seed: Annotated[int, Option(min=0, help="Of the draws of z.")] = 0,
) -> None:
    """Draw images from the VAE in RUN: the means of p(x|z) at draws of z from the prior."""
    folder = RunFolder(path)
    _, vae = folder.load()
    print(figures.draw_samples(folder, vae, num_samples, seed))
