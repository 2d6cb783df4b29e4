"""What the command ``pyro-vae train`` does: the training, and the result that it prints."""

import math
import signal
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import typer

import pyro_vae as pv
from pyro_vae.cli import figures, processes
from pyro_vae.cli.memory import check_memory
from pyro_vae.cli.options import FIT
from pyro_vae.cli.run_folder import RunFolder, build
from pyro_vae.data import Dataset
from pyro_vae.errors import PyroVAEError
from pyro_vae.files import one_writer
from pyro_vae.signals import name_of
from pyro_vae.training import checkpoint as checkpoints
from pyro_vae.training.optimizers import check_clip
from pyro_vae.training.surroundings import device_of


def train_run(context: typer.Context, config: dict[str, Any], out: Path, device: str | None, number: int) -> None:
    """Train the run of these options, in `number` processes, and write its folder."""
    figures.prepare()
    if device is not None:
        device_of(device)  # before the data are read
    check_clip(config["clip_norm"])
    folder = RunFolder(out)
    folder.check_available(config)
    dataset, vae = build(config)
    if config["patience"] is not None and not len(dataset.validation):
        raise PyroVAEError(
            "expected validation images with --patience, got none. Drop --patience, or pass, say, --validation 100."
        )
    rows = min(config["batch_size"], len(dataset.train))
    drawn = config["particles"] * rows * math.prod(dataset.event_shape)
    check_memory("--particles and --batch-size", drawn)
    check_memory("--latent-dim and the layers", 4 * sum(each.numel() for each in vae.parameters()))  # with Adam's state
    bound = _objective(config, len(dataset.train))
    processes.check(number, rows)
    if processes.are_to_be_started(number):
        raise typer.Exit(processes.run(number, context.meta["arguments"], context.obj))
    # The folder above may be read-only.
    with one_writer(folder.path, "training into", inside=True) if processes.is_first() else nullcontext():
        _train(folder, config, dataset, vae, bound, device, context.obj)


def _train(
    folder: RunFolder,
    config: dict[str, Any],
    dataset: Dataset,
    vae: pv.VAE,
    bound: pv.Objective,
    device: str | None,
    received: list[signal.Signals],
) -> None:
    """Train, or continue, the run of these options, and write its files."""
    epochs, patience, seed = (config[name] for name in ("epochs", "patience", "seed"))
    if not folder.checkpoint.exists() and processes.is_first():
        folder.write_config(config)
    state = checkpoints.load(folder.checkpoint) if folder.checkpoint.exists() else {"history": []}
    earlier = len(state["history"])
    if 0 < earlier <= epochs and processes.is_first():
        done = earlier == epochs or checkpoints.stalled(earlier, state.get("best"), patience)
        print(f"{folder} has {_epochs(earlier)}:", "nothing left to train." if done else "training continues.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "training stopped by")  # this command has a message of its own
        settings = {name: config[name] for name in FIT}
        settings |= {"validation": dataset.validation, "checkpoint": folder.checkpoint, "device": device}
        history = pv.fit(vae, dataset.train, bound, **settings)
    if not processes.is_first():
        return
    vae.cpu()  # where the images to draw are
    if history.empty:
        print(f"stopped by {name_of(received)} in the first epoch: nothing was saved.", file=sys.stderr)
        raise typer.Exit(130)
    if len(history) > earlier:
        folder.delete_evaluations()  # they describe the earlier parameters
    folder.write_config(config)  # not before fit has accepted the checkpoint
    folder.write_csv("history.csv", history)
    # After Ctrl-C the networks have parameters from within an epoch; the checkpoint has those of the epoch's end.
    pv.load_parameters(folder.checkpoint, vae, dataset.test.x[:1])
    drawn = figures.draw_training(folder, vae, dataset, history, seed)

    best = checkpoints.load(folder.checkpoint).get("best")
    _print_result(history, best and best["epoch"], f"{bound.name}, K = {config['particles']}")
    print(*drawn, sep="\n")
    if len(history) < epochs and not checkpoints.stalled(len(history), best, patience):
        print(
            f"stopped by {name_of(received)}: {folder} has {len(history)} of {_epochs(epochs)}. The same command "
            "continues.",
            file=sys.stderr,
        )
        raise typer.Exit(130)


def _objective(config: dict[str, Any], num_data: int) -> pv.Objective:
    """Build the objective from the options."""
    if config["objective"] == "iwae":
        return pv.IWAE(config["particles"], config["gradient"])
    if config["objective"] == "elbo" and config["gradient"] != "pathwise":
        raise PyroVAEError(
            f"--gradient {config['gradient']} needs a sampled KL: expected --objective elbo-monte-carlo or iwae, "
            "got elbo. Pass one of these, or drop --gradient."
        )
    steps = config["warm_up"] * math.ceil(num_data / config["batch_size"])
    beta = pv.schedules.warm_up(steps) if steps else 1.0
    kl: Literal["analytic", "monte_carlo"] = "analytic" if config["objective"] == "elbo" else "monte_carlo"
    return pv.ELBO(config["particles"], kl, config["gradient"], beta, config["free_bits"])


def _print_result(history: pd.DataFrame, best_epoch: int | None, objective: str) -> None:
    """Print the bounds of the epoch whose parameters were kept: the best one, or the last."""
    best = f" (the best is epoch {best_epoch})" if best_epoch else ""
    kept = history.iloc[(best_epoch or 0) - 1]
    validation = "" if math.isnan(kept.validation_bound) else f", {kept.validation_bound:.2f} (validation)"
    print(f"{_epochs(len(history))}{best} with {objective}")
    print(f"mean {history.attrs['quantity']}: {kept.train_bound:.2f} (train){validation} nats per datum")


def _epochs(number: int) -> str:
    return f"{number} epoch{'s' * (number > 1)}"
