"""The folder of a run: its options in config.json, its checkpoint, and the data and networks that they stand for.

config.json holds every option of ``train``, checkpoint.pt the state of training, history.csv a row for each epoch,
figures/ the plots. All commands rebuild data and networks from config.json, by the same function.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import pyro
from typer import Argument

import pyro_vae as pv
from pyro_vae.data import Dataset
from pyro_vae.errors import PyroVAEError

RunArgument = Annotated[
    Path, Argument(metavar="RUN", help="The folder that train wrote, as runs/digits.", show_default=False)
]

OPTIONS = (  # of train, in config.json
    "data",
    "root",
    "binarize",
    "validation",
    "network",
    "hidden_dims",
    "channels",
    "latent_dim",
    "likelihood",
    "scale",
    "objective",
    "gradient",
    "particles",
    "warm_up",
    "free_bits",
    "epochs",
    "batch_size",
    "lr",
    "patience",
    "compile",
    "seed",
)
# What a run may go on with a new value of, as no epoch depends on it; what runs were before there was a choice.
MAY_CHANGE = {"pyro_vae", "root", "epochs"}
BEFORE = {"compile": False, "warm_up": 0, "free_bits": 0.0, "patience": None}
OF_PARAMETERS = (  # what compare and evaluate write, stale once training goes on
    "compare.csv",
    "evaluation.json",
    "evaluation.nc",
    "figures/bounds.png",
    "figures/bounds_and_log_likelihood.png",
    "figures/pareto_k.png",
    "figures/active_units.png",
)


@dataclass(frozen=True)
class RunFolder:
    """The folder that ``pyro-vae train`` writes, and the other commands read."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        """The file of the state of training."""
        return self.path / "checkpoint.pt"

    @property
    def figures(self) -> Path:
        """The folder of the figures."""
        return self.path / "figures"

    def read_config(self) -> dict[str, Any]:
        """The options of the run."""
        path = self.path / "config.json"
        if not path.is_file():
            found = "it has no config.json" if self.path.is_dir() else "there is no such folder"
            raise PyroVAEError(
                f"{self.path} is not a run: {found}. Pass a folder that 'pyro-vae train' wrote; to train, a new or empty one."
            )
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise PyroVAEError(f"can't read {path}: {error}. Restore it, or pass another folder.") from error
        if isinstance(config, dict):
            config = BEFORE | config
        if not isinstance(config, dict) or config.keys() != {"pyro_vae", *OPTIONS}:
            raise PyroVAEError(
                f"expected {path} to hold the options of 'pyro-vae train' (version {version('pyro_vae')}), got something "
                "else. Pass another folder."
            )
        return config

    def write_config(self, config: dict[str, Any]) -> None:
        """Write the options, and make the folder if need be."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def check_free_for(self, config: dict[str, Any]) -> None:
        """Refuse to train into a folder that holds another run, or something else."""
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        earlier = self.read_config()
        if [path.name for path in self.path.iterdir()] == ["config.json"]:
            return  # a run that failed in its first epoch, and should not bar its name to the next try
        for name in config.keys() - MAY_CHANGE:
            both = config[name], earlier[name]
            if both[0] != both[1] and not (
                name == "patience" and None not in both
            ):  # another number goes on, as in fit
                raise PyroVAEError(
                    f"{self.path} holds a run with {name}={earlier[name]!r}, and {name}={config[name]!r} is asked for. Ask for "
                    "the same to go on with that run, or pass another --out."
                )

    def delete_stale(self) -> None:
        """Delete what compare and evaluate wrote."""
        for name in OF_PARAMETERS:
            (self.path / name).unlink(missing_ok=True)

    def load(self) -> tuple[Dataset, pv.VAE]:
        """The data and the trained VAE of the run."""
        dataset, vae = build(self.read_config())
        pv.load_parameters(self.checkpoint, vae.model, vae.guide, dataset.test.x[:1])
        return dataset, vae


def build(config: dict[str, Any]) -> tuple[Dataset, pv.VAE]:
    """The data and the untrained VAE that a run's options stand for."""
    shared = {"latent_dim": config["latent_dim"], "likelihood": config["likelihood"]}
    if config["likelihood"] == "gaussian":
        shared["scale"] = _scale(config["scale"])
    names = ("root", "binarize", "validation")
    dataset = pv.data.load(config["data"], **{name: config[name] for name in names})
    pyro.set_rng_seed(config["seed"])
    if config["network"] == "mlp":
        widths = _integers("--hidden-dims", config["hidden_dims"])
        vae = pv.mlp_vae(dataset.event_shape, hidden_dims=widths, **shared)
    else:
        widths = _integers("--channels", config["channels"])
        vae = pv.conv_vae(dataset.event_shape, channels=widths, **shared)
    vae.likelihood.check(dataset.test.x)
    return dataset, vae


def _integers(option: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise PyroVAEError(f"expected {option} to be integers, such as 400,200, got {text!r}.") from None


def _scale(text: str) -> Any:
    try:
        return text if text in ("learned", "per_pixel") else float(text)
    except ValueError:
        raise PyroVAEError(f"expected --scale to be a number, learned or per_pixel, got {text!r}.") from None
