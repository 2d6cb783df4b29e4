"""The command ``pyro-vae train``: its options, and which of them go together; ``training.py`` does the work."""

import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

from pyro_vae import __version__
from pyro_vae.cli.options import OPTIONS
from pyro_vae.defaults import MAX_SEED
from pyro_vae.errors import PyroVAEError

MAX_FLOAT32 = (2 - 2**-23) * 2.0**127  # torch.finfo(torch.float32).max, without torch
DATA_HELP = (
    "The data set: digits or shapes (no download), mnist, fashion_mnist, kmnist, emnist, omniglot or binarized_mnist."
)
# Colour images of 64 x 64 need other defaults. A fixed scale keeps q(z|x) near the prior, so that samples are good.
FOR_SHAPES: dict[str, Any] = {
    "network": "conv",
    "channels": "16,32,64,64",
    "latent_dim": 8,
    "likelihood": "gaussian",
    "scale": "0.2",
    "epochs": 20,
}


def train(
    context: typer.Context,
    data: Annotated[str, Argument(metavar="DATA", help=DATA_HELP, show_default=False)],
    root: Annotated[Path, Option(help="Folder of the data sets. torchvision downloads missing files.")] = Path("data"),
    binarize: Annotated[
        Literal["none", "threshold", "fixed", "dynamic"] | None,
        Option(
            help="How pixels become 0 or 1: at a threshold of 0.5, by one fixed random draw, or by a new random draw "
            "for each training minibatch.",
            show_default="dynamic; none for gaussian, shapes and binarized_mnist",
        ),
    ] = None,
    validation: Annotated[
        int | None,
        Option(
            min=0,
            help="Number of training images to hold out for the validation bound.",
            show_default="250 for digits, 1000 for shapes, a sixth for others",
        ),
    ] = None,
    network: Annotated[
        Literal["mlp", "conv"],
        Option(help="Networks: fully connected or convolutional.", show_default="mlp; conv for shapes"),
    ] = "mlp",
    hidden_dims: Annotated[
        str, Option(help="Hidden layer widths of the mlp encoder. The decoder has the reverse order.")
    ] = "400,200",
    channels: Annotated[
        str,
        Option(
            help="Channels of the conv layers. Each layer halves height and width.",
            show_default="32,64; 16,32,64,64 for shapes",
        ),
    ] = "32,64",
    latent_dim: Annotated[
        int,
        Option(min=1, help="Latent dimensions. With 2, the latent space is drawn too.", show_default="2; 8 for shapes"),
    ] = 2,
    likelihood: Annotated[
        Literal["bernoulli", "gaussian"],
        Option(help="Distribution of each pixel given z.", show_default="bernoulli; gaussian for shapes"),
    ] = "bernoulli",
    scale: Annotated[
        str,
        Option(
            help="Standard deviation of the Gaussian: a number, learned (one value), per_column (one for each pixel) "
            "or per_pixel (decoder).",
            show_default="learned; 0.2 for shapes",
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
    epochs: Annotated[
        int,
        Option(
            min=1,
            help="Total number of epochs, including those already in the run.",
            show_default="200; 20 for shapes",
        ),
    ] = 200,
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
    if data == "shapes":
        _take_defaults(context, FOR_SHAPES)
        likelihood = context.params["likelihood"]
    _check_unused(context)
    if not 0 < lr < math.inf:
        raise PyroVAEError(f"expected --lr to be a positive, finite number, got {lr:g}. Try 1e-3.")
    for option, value in (("--warm-up", warm_up), ("--free-bits", free_bits)):
        if MAX_FLOAT32 < value < math.inf:
            raise PyroVAEError(f"expected {option} to be at most {MAX_FLOAT32:.1e}, got a larger number. Pass less.")
    if binarize is None:
        binarize = "dynamic" if likelihood == "bernoulli" and data not in ("binarized_mnist", "shapes") else "none"
    config: dict[str, Any] = {"pyro_vae": __version__} | {name: context.params[name] for name in OPTIONS}
    config |= {"root": os.path.realpath(root), "binarize": binarize}
    from pyro_vae.cli.training import train_run  # only here: --help and usage errors do not wait for torch

    train_run(context, config, out or Path("runs", data), device, number)


def _take_defaults(context: typer.Context, defaults: dict[str, Any]) -> None:
    """Replace the values of options that the command line leaves out."""
    for name, value in defaults.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "DEFAULT":
            context.params[name] = value


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
