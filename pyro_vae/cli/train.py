"""``pyro-vae train``."""

from __future__ import annotations

import math
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

import pyro_vae as pv
from pyro_vae.cli import figures
from pyro_vae.cli.run_folder import OPTIONS, RunFolder, build
from pyro_vae.errors import PyroVAEError
from pyro_vae.training import checkpoint as checkpoints

DATA_HELP = "digits (comes along), mnist, fashion_mnist, kmnist, emnist, omniglot or binarized_mnist."


def train(
    context: typer.Context,
    data: Annotated[str, Argument(metavar="DATA", help=f"The data set: {DATA_HELP}", show_default=False)],
    root: Annotated[
        Path, Option(help="Folder of the data sets, as torchvision lays them out; it downloads what is absent.")
    ] = Path("data"),
    binarize: Annotated[
        Literal["none", "threshold", "fixed", "dynamic"] | None,
        Option(
            help="Make pixels 0 or 1: at a threshold of 0.5, by one fixed draw, or, in training, by a new draw each time.",
            show_default="dynamic; none for a Gaussian or binarized_mnist",
        ),
    ] = None,
    validation: Annotated[
        int | None,
        Option(min=0, help="Images held out to measure the bound.", show_default="250 of digits, a sixth of others"),
    ] = None,
    network: Annotated[Literal["mlp", "conv"], Option(help="Fully connected or convolutional.")] = "mlp",
    hidden_dims: Annotated[str, Option(help="Widths of the mlp's encoder; the decoder reverses them.")] = "400,200",
    channels: Annotated[str, Option(help="Channels of the conv's encoder; each halves the image.")] = "32,64",
    latent_dim: Annotated[int, Option(min=1, help="Dimensions of z; 2 can be drawn.")] = 2,
    likelihood: Annotated[Literal["bernoulli", "gaussian"], Option(help="p(x|z) of each pixel.")] = "bernoulli",
    scale: Annotated[str, Option(help="The Gaussian's sigma: a number, learned or per_pixel.")] = "learned",
    objective: Annotated[
        Literal["elbo", "elbo-monte-carlo", "iwae"], Option(help="The bound; elbo has its KL in closed form.")
    ] = "elbo",
    gradient: Annotated[
        Literal["pathwise", "stl", "dreg"], Option(help="How the bound is differentiated; elbo has the first alone.")
    ] = "pathwise",
    particles: Annotated[int, Option(min=1, help="Samples of z for each image, in the bound.")] = 1,
    warm_up: Annotated[int, Option(min=0, help="The factor on elbo's KL rises from 0 to 1 in so many epochs.")] = 0,
    free_bits: Annotated[float, Option(min=0, help="Nats of KL that each dimension of z has for free, in elbo.")] = 0.0,
    epochs: Annotated[int, Option(min=1, help="Passes over the data in all, earlier ones of the run included.")] = 200,
    batch_size: Annotated[int, Option(min=1, help="Images in a gradient step.")] = 64,
    lr: Annotated[float, Option(help="Step size of Adam.")] = 1e-3,
    patience: Annotated[
        int | None,
        Option(
            min=1,
            help="Stop when the validation bound has not risen for so many epochs, and keep the best.",
            show_default="never",
        ),
    ] = None,
    compile: Annotated[
        bool,
        Option("--compile", help="Run steps as compiled code: up to half a minute of compiling at first, then faster."),
    ] = False,
    seed: Annotated[int, Option(min=0, help="Of initial weights, minibatches and samples.")] = 0,
    out: Annotated[Path | None, Option(file_okay=False, help="Folder of the run.", show_default="runs/DATA")] = None,
) -> None:
    """Train a VAE on DATA, into a folder with its figures. The same command again goes on where it stopped."""
    _check_unused(context)
    if not 0 < lr < math.inf:
        raise PyroVAEError(f"expected a positive --lr, got {lr:g}. Try 1e-3.")
    if binarize is None:
        binarize = "dynamic" if likelihood == "bernoulli" and data != "binarized_mnist" else "none"
    config = {"pyro_vae": version("pyro_vae")} | {name: context.params[name] for name in OPTIONS}
    config |= {"root": str(root.resolve()), "binarize": binarize}
    folder = RunFolder(out or Path("runs", data))
    folder.check_free_for(config)
    dataset, vae = build(config)
    if patience is not None and not len(dataset.validation):
        raise PyroVAEError("--patience needs images for validation, got none. Pass --validation 100, say, or drop it.")

    bound = _objective(config, len(dataset.train))
    if not folder.checkpoint.exists():
        folder.write_config(config)
    state = checkpoints.load(folder.checkpoint) if folder.checkpoint.exists() else {"history": []}
    earlier = len(state["history"])
    if 0 < earlier <= epochs:
        over = earlier == epochs or checkpoints.stalled(earlier, state.get("best"), patience)
        print(
            f"{folder.path} has {earlier} epoch{'s' * (earlier > 1)}: "
            + ("nothing left to train." if over else "going on.")
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "training stopped by Ctrl-C")  # said below, with how to go on
        history = pv.fit(
            vae.model,
            vae.guide,
            dataset.train,
            bound,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            validation=dataset.validation,
            patience=patience,
            compile=compile,
            checkpoint=folder.checkpoint,
            seed=seed,
        )
    if history.empty:
        print("stopped by Ctrl-C within the first epoch: there is nothing to keep.", file=sys.stderr)
        raise typer.Exit(130)
    if len(history) > earlier:  # what compare wrote is about the parameters of before
        folder.delete_stale()
    folder.write_config(config)  # only now that fit has accepted the checkpoint, if there was one
    history.to_csv(folder.path / "history.csv")
    pv.load_parameters(
        folder.checkpoint, vae.model, vae.guide, dataset.test.x[:1]
    )  # Ctrl-C leaves those within an epoch
    drawn = figures.draw_training(folder, vae, dataset, history, seed)

    best = checkpoints.load(folder.checkpoint).get("best")
    kept = history.iloc[best["epoch"] - 1 if best else -1]
    held_out = "" if math.isnan(kept.validation_bound) else f", {kept.validation_bound:.2f} (validation)"
    done = f"{len(history)} epoch{'s' * (len(history) > 1)}"
    at = f", the best {best['epoch']}" if best else ""
    print(f"{done}{at}: {bound.name}, K = {particles}: {kept.train_bound:.2f} (train){held_out} nats per datum")
    print(*drawn, sep="\n")
    if len(history) < epochs and not checkpoints.stalled(len(history), best, patience):
        print(f"stopped by Ctrl-C: {folder.path} holds {done} of {epochs}. The same command goes on.", file=sys.stderr)
        raise typer.Exit(130)


def _objective(config: dict[str, Any], num_data: int) -> pv.Objective:
    """The bound that the options name."""
    if config["objective"] == "iwae":
        return pv.IWAE(config["particles"], config["gradient"])
    steps = config["warm_up"] * math.ceil(num_data / config["batch_size"])
    beta = pv.schedules.warm_up(steps) if steps else 1.0
    kl: Literal["analytic", "monte_carlo"] = "analytic" if config["objective"] == "elbo" else "monte_carlo"
    return pv.ELBO(config["particles"], kl, config["gradient"], beta, config["free_bits"])


def _check_unused(context: typer.Context) -> None:
    """Refuse options that nothing would come of."""
    elbo = ("objective", ("elbo", "elbo-monte-carlo"))
    owners: dict[str, tuple[str, tuple[str, ...]]] = {
        "hidden_dims": ("network", ("mlp",)),
        "channels": ("network", ("conv",)),
        "scale": ("likelihood", ("gaussian",)),
        "warm_up": elbo,
        "free_bits": elbo,
    }
    for name, (switch, needed) in owners.items():
        chosen, source = context.params[switch], context.get_parameter_source(name)
        if chosen not in needed and source is not None and source.name == "COMMANDLINE":
            option = name.replace("_", "-")
            raise PyroVAEError(
                f"--{option} needs --{switch} {' or '.join(needed)}, got --{switch} {chosen}. Change one of the two."
            )
