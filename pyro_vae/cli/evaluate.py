"""``pyro-vae evaluate``."""

from __future__ import annotations

import json
import warnings
from typing import Annotated

from rich.console import Console
from typer import Option

import pyro_vae as pv
from pyro_vae.cli import figures
from pyro_vae.cli.report import NUM_ANNEALED, make_report
from pyro_vae.cli.run_folder import RunArgument, RunFolder
from pyro_vae.cli.tables import format_report
from pyro_vae.evaluation.defaults import NUM_CHAINS, NUM_SAMPLES, NUM_STEPS

ARVIZ_IMAGES, ARVIZ_DRAWS = 20, 200  # in evaluation.nc, with as many draws of x for each image: 25 MB for MNIST


def evaluate(
    path: RunArgument,
    num_images: Annotated[int | None, Option(min=2, help="How many test images.", show_default="all of them")] = None,
    num_samples: Annotated[
        int, Option(min=25, help="Importance samples for each image; k-hat needs 25.")
    ] = NUM_SAMPLES,
    ais_images: Annotated[
        int, Option(min=2, help="How many of them to anneal, and to find the gaps of; as many are simulated.")
    ] = NUM_ANNEALED,
    ais_steps: Annotated[int, Option(min=2, help="Temperatures of the annealing.")] = NUM_STEPS,
    ais_chains: Annotated[int, Option(min=2, help="Annealed chains for each image.")] = NUM_CHAINS,
    compile: Annotated[
        bool, Option("--compile", help="Draw the importance samples by compiled code; worth it for many images.")
    ] = False,
    seed: Annotated[int, Option(min=0, help="Of all samples.")] = 0,
) -> None:
    """Say how good the VAE in RUN is, and how far off that number: log p(x), its bounds on both sides, gaps, parts, k-hat."""
    folder = RunFolder(path)
    dataset, vae = folder.load()
    x = dataset.test.x[:num_images]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Pareto k-hat above")  # the report says so
        report = make_report(
            vae,
            x,
            num_samples=num_samples,
            ais_data=ais_images,
            ais_steps=ais_steps,
            ais_chains=ais_chains,
            compile=compile,
            seed=seed,
        )
    Console().print(format_report(report))
    (path / "evaluation.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    unfinished = path / "evaluation.nc.unfinished"  # the old file may be open, and can't be written over then
    pv.to_arviz(vae, x[:ARVIZ_IMAGES], ARVIZ_DRAWS, seed=seed).to_netcdf(unfinished)
    unfinished.replace(path / "evaluation.nc")
    drawn = figures.draw_report(folder, report)
    print(path / "evaluation.json", path / "evaluation.nc", *drawn, sep="\n")
