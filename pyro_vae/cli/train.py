"""The command ``pyro-vae train``: its options, the training, and the result that it prints."""

import math
import os
import signal
import sys
import warnings
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import torch
import typer
from typer import Argument, Option

import pyro_vae as pv
from pyro_vae.checks import MAX_SEED
from pyro_vae.cli import figures, processes
from pyro_vae.cli.memory import check_memory
from pyro_vae.cli.run_folder import FIT, OPTIONS, RunFolder, build
from pyro_vae.data import Dataset
from pyro_vae.errors import PyroVAEError
from pyro_vae.files import one_writer
from pyro_vae.signals import name_of
from pyro_vae.training import checkpoint as checkpoints
from pyro_vae.training.optimizers import check_clip
from pyro_vae.training.surroundings import device_of

MAX_FLOAT32 = torch.finfo(torch.float32).max
DATA_HELP = "The data set: digits (no download), mnist, fashion_mnist, kmnist, emnist, omniglot or binarized_mnist."


def train(
    context: typer.Context,
    data: Annotated[str, Argument(metavar="DATA", help=DATA_HELP, show_default=False)],
    root: Annotated[Path, Option(help="Folder of the data sets. torchvision downloads missing files.")] = Path("data"),
    binarize: Annotated[
        Literal["none", "threshold", "fixed", "dynamic"] | None,
        Option(
            help="How pixels become 0 or 1: at a threshold of 0.5, by one fixed random draw, or by a new random draw "
            "for each training minibatch.",
            show_default="dynamic; none for gaussian and binarized_mnist",
        ),
    ] = None,
    validation: Annotated[
        int | None,
        Option(
            min=0,
            help="Number of training images to hold out for the validation bound.",
            show_default="250 for digits, a sixth for others",
        ),
    ] = None,
    network: Annotated[Literal["mlp", "conv"], Option(help="Networks: fully connected or convolutional.")] = "mlp",
    hidden_dims: Annotated[
        str, Option(help="Hidden layer widths of the mlp encoder. The decoder has the reverse order.")
    ] = "400,200",
    channels: Annotated[str, Option(help="Channels of the conv layers. Each layer halves height and width.")] = "32,64",
    latent_dim: Annotated[int, Option(min=1, help="Latent dimensions. With 2, the latent space is drawn too.")] = 2,
    likelihood: Annotated[
        Literal["bernoulli", "gaussian"], Option(help="Distribution of each pixel given z.")
    ] = "bernoulli",
    scale: Annotated[
        str,
        Option(
            help="Standard deviation of the Gaussian: a number, learned (one value), per_column (one for each pixel) "
            "or per_pixel (decoder)."
        ),
    ] = "learned",
    objective: Annotated[
        Literal["elbo", "elbo-monte-carlo", "iwae"],
        Option(help="Bound on log p(x) to maximise. elbo computes its KL in closed form."),
    ] = "elbo",
    gradient: Annotated[
        Literal["pathwise", "stl", "dreg"], Option(help="Gradient estimator. elbo allows only pathwise.")
    ] = "pathwise",
    particles: Annotated[int, Option(min=1, help="Number of samples of z for each image (K).")] = 1,
    warm_up: Annotated[int, Option(min=0, help="Epochs in which the factor on the ELBO's KL rises from 0 to 1.")] = 0,
    free_bits: Annotated[float, Option(min=0, help="Nats of KL in each latent dimension that cost nothing.")] = 0.0,
    epochs: Annotated[int, Option(min=1, help="Total number of epochs, including those already in the run.")] = 200,
    batch_size: Annotated[int, Option(min=1, help="Number of images in a minibatch.")] = 64,
    lr: Annotated[float, Option(help="Learning rate of Adam.")] = 1e-3,
    clip_norm: Annotated[
        float | None,
        Option(min=0, help="Scale each step's gradient to at most this norm.", show_default="never"),
    ] = None,
    patience: Annotated[
        int | None,
        Option(
            min=1,
            help="Stop when the validation bound has not risen for this many epochs, and keep the best epoch.",
            show_default="never",
        ),
    ] = None,
    device: Annotated[str | None, Option(help="Where to train, such as cuda or mps.", show_default="the CPU")] = None,
    precision: Annotated[
        Literal["bf16"] | None,
        Option(help="bf16 runs the networks in bfloat16, and all else in float32.", show_default="float32"),
    ] = None,
    number: Annotated[
        int,
        Option("--processes", min=1, help="Number of processes, each of which trains on a part of every minibatch."),
    ] = 1,
    compile: Annotated[
        bool,
        Option("--compile", help="Compile the training step. This takes up to half a minute; steps are then faster."),
    ] = False,
    seed: Annotated[int, Option(min=0, max=MAX_SEED, help="Seed of initial weights, minibatches and samples.")] = 0,
    out: Annotated[Path | None, Option(file_okay=False, help="Folder of the run.", show_default="runs/DATA")] = None,
) -> None:
    """Train a VAE and write its run folder. The same command continues a run that was stopped."""
    if device is not None:
        device_of(device)  # before the data are read
    check_clip(clip_norm)
    _check_unused(context)
    if not 0 < lr < math.inf:
        raise PyroVAEError(f"expected --lr to be a positive, finite number, got {lr:g}. Try 1e-3.")
    for option, value in (("--warm-up", warm_up), ("--free-bits", free_bits)):
        if MAX_FLOAT32 < value < math.inf:
            raise PyroVAEError(f"expected {option} to be at most {MAX_FLOAT32:.1e}, got a larger number. Pass less.")
    if binarize is None:
        binarize = "dynamic" if likelihood == "bernoulli" and data != "binarized_mnist" else "none"
    config = {"pyro_vae": version("pyro_vae")} | {name: context.params[name] for name in OPTIONS}
    config |= {"root": os.path.realpath(root), "binarize": binarize}
    folder = RunFolder(out or Path("runs", data))
    folder.check_available(config)
    dataset, vae = build(config)
    if patience is not None and not len(dataset.validation):
        raise PyroVAEError(
            "expected validation images with --patience, got none. Drop --patience, or pass, say, --validation 100."
        )
    rows = min(batch_size, len(dataset.train))
    check_memory("--particles and --batch-size", particles * rows * math.prod(dataset.event_shape))
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


def _check_unused(context: typer.Context) -> None:
    """Refuse an option that would have no effect next to the others."""
    for name, other, *values in (
        ("hidden_dims", "network", "mlp"),
        ("channels", "network", "conv"),
        ("scale", "likelihood", "gaussian"),
        ("warm_up", "objective", "elbo", "elbo-monte-carlo"),
        ("free_bits", "objective", "elbo", "elbo-monte-carlo"),
    ):
        value, source = context.params[other], context.get_parameter_source(name)
        if value not in values and source is not None and source.name == "COMMANDLINE":
            option = name.replace("_", "-")
            raise PyroVAEError(
                f"expected --{other} {' or '.join(values)} with --{option}, got --{other} {value}. Change one of them."
            )


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
