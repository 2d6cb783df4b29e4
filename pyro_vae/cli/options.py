"""Options that several commands have, and the groups of train's options; it is read before torch is imported."""

from pathlib import Path
from typing import Annotated

from typer import Argument

RUN_HELP = "Folder that 'pyro-vae train' wrote, such as runs/digits."
RunArgument = Annotated[Path, Argument(metavar="RUN", help=RUN_HELP, show_default=False)]

READ = ("root", "binarize", "validation")  # arguments of pv.data.load
NETWORKS = ("network", "hidden_dims", "channels", "latent_dim", "likelihood", "scale")
BOUND = ("objective", "gradient", "particles", "warm_up", "free_bits")
FIT = (
    "epochs",
    "batch_size",
    "lr",
    "clip_norm",
    "patience",
    "precision",
    "compile",
    "seed",
)  # keyword arguments of pv.fit
OPTIONS = ("data", *READ, *NETWORKS, *BOUND, *FIT)  # those that config.json holds
