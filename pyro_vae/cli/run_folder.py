"""The run folder: its files, its options in config.json, and the data and networks that they describe.

``config.json`` has every option of ``train``, ``checkpoint.pt`` the state of training, ``history.csv`` a row for each
epoch, and ``figures/`` the plots. All commands build data and networks from ``config.json`` with :func:`build`.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pandas as pd
import pyro

import pyro_vae as pv
from pyro_vae.cli.memory import check_memory, fewest_weights
from pyro_vae.cli.options import OPTIONS, READ
from pyro_vae.cli.train import train
from pyro_vae.data import Dataset
from pyro_vae.errors import PyroVAEError
from pyro_vae.files import written_whole
from pyro_vae.training import contents

MAY_CHANGE = {"pyro_vae", "root", "epochs"}  # a run may continue with other values, since no epoch depends on them
# Older runs lack these options; they were trained with these values.
OLD_VALUES = {
    "compile": False,
    "warm_up": 0,
    "free_bits": 0.0,
    "patience": None,
    "clip_norm": None,
    "precision": None,
}
# Files of compare and evaluate, which further training makes out of date.
EVALUATED_FIGURES = ("bounds", "bounds_and_log_likelihood", "pareto_k", "active_units")
EVALUATIONS = ("compare.csv", "evaluation.json", "evaluation.nc", *(f"figures/{n}.png" for n in EVALUATED_FIGURES))


@dataclass(frozen=True)
class RunFolder:
    """A folder that ``pyro-vae train`` writes and the other commands read."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def checkpoint(self) -> Path:
        """The path of the checkpoint."""
        return self.path / "checkpoint.pt"

    @property
    def figures(self) -> Path:
        """The path of the folder of figures."""
        return self.path / "figures"

    def read_config(self) -> dict[str, Any]:
        """Read the options from config.json; refuse a folder without it, or a file that holds other content."""
        path = self.path / "config.json"
        if not path.is_file():
            found = "a folder without config.json" if self.path.is_dir() else "no such folder"
            raise PyroVAEError(
                f"expected {self} to be a run folder, got {found}. Pass a folder that 'pyro-vae train' wrote; to "
                "train, pass a new or empty folder."
            )
        try:
            config = json.loads(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise PyroVAEError(
                f"expected {path} to be a file that can be read, got {error}. Remove the cause, or pass another folder."
            ) from error
        except (ValueError, RecursionError) as error:
            raise PyroVAEError(
                f"expected {path} to be JSON, got an error in it: {error}. Restore it, or pass another folder."
            ) from error
        if not isinstance(config, dict) or not config:
            raise PyroVAEError(
                f"expected {path} to hold the options of 'pyro-vae train', got other content: "
                f"{contents.shortened(config)}. Pass another folder."
            )
        config = OLD_VALUES | config
        self._check_config(path, config)
        return config

    def _check_config(self, path: Path, config: dict[str, Any]) -> None:
        """Refuse other options than those of this version's train, and values that it does not take."""
        own, kinds = pv.__version__, {"pyro_vae": str} | _kinds()
        unknown = [name for name in config if name not in kinds]
        found = contents.difference(config, contents.Parts(kinds))
        if found is None and unknown:
            found = f"no other option, got {contents.shortened(unknown[0])}"
        if found is not None:
            wrote = config.get("pyro_vae")
            later = isinstance(wrote, str) and _numbers(wrote) > _numbers(own)
            fix = f"pyro_vae {wrote} wrote it, a later version: update pyro_vae" if later else "Restore it"
            raise PyroVAEError(
                f"expected {path} to hold the options of 'pyro-vae train' (version {own}), got other content: expected "
                f"{found}. {fix}, or pass another folder."
            )

    def write_config(self, config: dict[str, Any]) -> None:
        """Write config.json, and create the folder if it is missing."""
        self.write_json("config.json", config)

    def write_json(self, name: str, content: dict[str, Any]) -> Path:
        """Write a JSON file of the run."""
        with written_whole(self.path / name) as unfinished:
            unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return self.path / name

    def write_csv(self, name: str, table: pd.DataFrame) -> Path:
        """Write a table of the run."""
        with written_whole(self.path / name) as unfinished:
            table.to_csv(unfinished)
        return self.path / name

    def check_available(self, config: dict[str, Any]) -> None:
        """Refuse to train into a folder that holds other files, or a run that can't continue with these options."""
        names = [path.name for path in self.path.iterdir()] if self.path.exists() else []
        names = [name for name in names if not name.startswith(".")]  # what a killed run has left
        if not names:
            return
        earlier = self.read_config()
        if names == ["config.json"]:
            return  # the run failed in its first epoch: another attempt may take the folder
        for name in config.keys() - MAY_CHANGE:
            old, new = earlier[name], config[name]
            another_patience = name == "patience" and None not in (old, new)  # fit continues with another number
            if old != new and not another_patience:
                raise PyroVAEError(
                    f"expected {name}={old!r}, as in the run in {self}, got {name}={new!r}. Pass the same options to "
                    "continue that run, or pass another --out."
                )

    def delete_evaluations(self) -> None:
        """Delete the files that compare and evaluate wrote."""
        for name in EVALUATIONS:
            (self.path / name).unlink(missing_ok=True)

    def load(self) -> tuple[Dataset, pv.VAE]:
        """Load the data, and the VAE with the parameters of the checkpoint."""
        config = self.read_config()
        try:
            dataset, vae = build(config)
        except (ValueError, TypeError, RuntimeError, MemoryError) as error:  # of PyTorch's too, of a layer's size
            why = str(error).splitlines()[0]
            raise PyroVAEError(
                f"the options in {self.path / 'config.json'} can't be taken: {why} Restore the file, or pass another "
                "folder."
            ) from error
        pv.load_parameters(self.checkpoint, vae, dataset.test.x[:1])
        return dataset, vae


def _kinds() -> dict[str, Any]:
    """What config.json may hold for each option: the values that the command line takes."""
    hints, kinds = get_type_hints(train, include_extras=True), {}
    for name in OPTIONS:
        values, option = get_args(hints[name])
        choices = get_args(values) if get_origin(values) in (Union, UnionType) else (values,)
        kinds[name] = tuple(_kind(choice, option.min, option.max) for choice in choices)
    return kinds


def _kind(choice: Any, least: float | None, most: float | None) -> Any:
    if get_origin(choice) is Literal:
        words = get_args(choice)
        return contents.Where(str, " or ".join(map(repr, words)), lambda value: value in words)
    if choice in (int, float) and least is not None:
        what = "an integer" if choice is int else "a number"
        limits = f"at least {least:g}" if most is None else f"from {least:g} to {most:.0f}"
        return contents.Where(choice, f"{what}, {limits}", lambda value: least <= value <= (most or math.inf))
    return {type(None): None, Path: str}.get(choice, choice)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def build(config: dict[str, Any]) -> tuple[Dataset, pv.VAE]:
    """Load the data and build the untrained VAE that the options describe; refuse data outside its likelihood."""
    option, make = ("hidden_dims", pv.mlp_vae) if config["network"] == "mlp" else ("channels", pv.conv_vae)
    settings = {name: config[name] for name in ("latent_dim", "likelihood")}
    settings[option] = _parsed(option, config[option], "integers separated by commas", "400,200")
    if config["likelihood"] == "gaussian":
        settings["scale"] = _parsed("scale", config["scale"], "a number, learned, per_column or per_pixel", "0.1")
    dataset = pv.data.load(config["data"], **{name: config[name] for name in READ})
    first = math.prod(dataset.event_shape) if option == "hidden_dims" else dataset.event_shape[0]
    weights = fewest_weights(first, settings[option], config["latent_dim"])
    check_memory(f"--latent-dim and --{option.replace('_', '-')}", weights)
    pyro.set_rng_seed(config["seed"])
    vae = make(dataset.event_shape, **settings)
    vae.likelihood.check(dataset.test.x)
    return dataset, vae


def _parsed(name: str, text: str, wanted: str, example: str) -> Any:
    """The value of the option --scale, or the integers of --hidden-dims or --channels."""
    try:
        if name == "scale":
            return text if text in ("learned", "per_column", "per_pixel") else float(text)
        return [int(number) for number in text.split(",")]
    except ValueError:
        option = name.replace("_", "-")
        raise PyroVAEError(f"expected --{option} to be {wanted}, got {text!r}. Pass, for example, {example}.") from None
