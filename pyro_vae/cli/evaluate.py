"""The command ``pyro-vae evaluate``: a report with log p(x), its error bars, the gaps and the parts of the ELBO."""

import warnings
from typing import Annotated, Any

from typer import Option

import pyro_vae as pv
from pyro_vae.cli.memory import check_memory
from pyro_vae.cli.options import RunArgument
from pyro_vae.defaults import MAX_SEED, NUM_CHAINS, NUM_SAMPLES, REPORT_ANNEALED, REPORT_STEPS
from pyro_vae.extras import require
from pyro_vae.files import written_whole

ARVIZ_IMAGES, ARVIZ_DRAWS = 20, 200  # evaluation.nc has all draws of x for each image: 25 MB for MNIST


def _size(results: Any) -> int:
    """The bytes of results for ArviZ in a file, and one megabyte for what stands between them."""
    groups = results.groups
    arrays = sum(results[name].nbytes for name in groups()) if callable(groups) else results.nbytes
    return int(arrays) + 2**20


def evaluate(
    path: RunArgument,
    num_images: Annotated[int | None, Option(min=2, help="Number of test images.", show_default="all")] = None,
    num_samples: Annotated[int, Option(min=30, help="Importance samples per image. k-hat needs 30.")] = NUM_SAMPLES,
    ais_images: Annotated[
        int, Option(min=2, help="Number of images for annealed importance sampling (AIS), gaps and simulation.")
    ] = REPORT_ANNEALED,
    ais_steps: Annotated[int, Option(min=2, help="Number of AIS temperatures.")] = REPORT_STEPS,
    ais_chains: Annotated[int, Option(min=2, help="Number of AIS chains for each image.")] = NUM_CHAINS,
    compile: Annotated[bool, Option("--compile", help="Compile importance sampling: faster for many images.")] = False,
    seed: Annotated[int, Option(min=0, max=MAX_SEED, help="Seed of all samples.")] = 0,
) -> None:
    """Estimate log p(x) of test images, with error bars. The report also has the gaps and the parts of the ELBO."""
    from pyro_vae.cli import figures  # only here: --help and usage errors do not wait for torch
    from pyro_vae.cli.report import make_report
    from pyro_vae.cli.run_folder import RunFolder
    from pyro_vae.cli.tables import format_report, print_table

    require("arviz", "xarray", "h5netcdf", by="pyro-vae evaluate")
    figures.prepare()
    folder = RunFolder(path)
    dataset, vae = folder.load()
    x = dataset.test.x[:num_images]
    pixels = x[0].numel()
    sizes = {"--num-samples": num_samples, "--ais-steps": ais_steps, "--ais-chains": ais_chains * pixels}
    for option, numbers in sizes.items():
        check_memory(option, numbers)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Pareto k-hat above")  # the table's caption has this number
        report = make_report(vae, x, num_samples, ais_images, ais_steps, ais_chains, compile=compile, seed=seed)
    print(report.verdict)
    print_table(format_report(report))
    written = folder.write_json("evaluation.json", report.to_dict())
    results = pv.to_arviz(vae, x[:ARVIZ_IMAGES], ARVIZ_DRAWS, seed=seed)
    # An open netCDF file can be replaced, not overwritten. HDF5 crashes on a full disk, so its room is taken before.
    with written_whole(path / "evaluation.nc", room=_size(results)) as unfinished:
        results.to_netcdf(unfinished)
    print(written, path / "evaluation.nc", *figures.draw_report(folder, report), sep="\n")
