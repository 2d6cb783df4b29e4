"""The command ``pyro-vae compare``: a table and a figure of different bounds on log p(x)."""

from typing import Annotated

from typer import Option

import pyro_vae as pv
from pyro_vae.cli.memory import check_memory
from pyro_vae.cli.options import RunArgument
from pyro_vae.defaults import MAX_SEED


def compare(
    path: RunArgument,
    num_images: Annotated[int, Option(min=2, help="Number of test images, or all if there are fewer.")] = 500,
    repeats: Annotated[int, Option(min=2, help="Number of times that each bound is estimated.")] = 10,
    compile: Annotated[bool, Option("--compile", help="Compile the estimators first. This takes minutes.")] = False,
    seed: Annotated[int, Option(min=0, max=MAX_SEED, help="Seed of all samples.")] = 0,
) -> None:
    """Compare bounds on log p(x) on test images. The table has their values, noise, gradients and cost."""
    from pyro_vae.cli import figures  # only here: --help and usage errors do not wait for torch
    from pyro_vae.cli.run_folder import RunFolder
    from pyro_vae.cli.tables import format_comparison, print_table

    figures.prepare()
    folder = RunFolder(path)
    dataset, vae = folder.load()
    x = dataset.test.x[:num_images]
    check_memory("--repeats", repeats * sum(each.numel() for each in vae.parameters()))  # a gradient each
    table = pv.compare(vae, x, repeats=repeats, compile=compile, seed=seed)
    written = folder.write_csv("compare.csv", table)
    figures.save(folder, "bounds", pv.plots.bounds(table))
    print_table(format_comparison(table, len(x), repeats))
    print(written, *sorted(folder.figures.glob("*.png")), sep="\n")
