"""The command ``pyro-vae sample``: a figure of images from the model."""

import math
from typing import Annotated

from typer import Option

from pyro_vae.cli.memory import check_memory
from pyro_vae.cli.options import RunArgument
from pyro_vae.defaults import MAX_SEED


def sample(
    path: RunArgument,
    num_samples: Annotated[int, Option(min=1, help="Number of images.")] = 64,
    seed: Annotated[int, Option(min=0, max=MAX_SEED, help="Seed of the draws of z.")] = 0,
) -> None:
    """Draw images from the trained model. Each is the mean of p(x|z) for a z drawn from the prior."""
    from pyro_vae.cli import figures  # only here: --help and usage errors do not wait for torch
    from pyro_vae.cli.run_folder import RunFolder

    figures.prepare()
    folder = RunFolder(path)
    dataset, vae = folder.load()
    check_memory("--num-samples", num_samples * math.prod(dataset.event_shape))
    print(figures.draw_samples(folder, vae, num_samples, seed))
