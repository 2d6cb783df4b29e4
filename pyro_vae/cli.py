"""The command line: ``pyro-vae train digits``, then ``compare`` and ``sample`` on the run that it leaves.

A run is a folder: config.json holds every option, checkpoint.pt the training's state, history.csv a row for each
epoch, figures/ the plots. Each command rebuilds data and networks from config.json, by the same function.
"""

from __future__ import annotations

import inspect
import json
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:  # --help should not wait for torch, so each command imports what it needs
    import pandas as pd
    from matplotlib.figure import Figure

    from pyro_vae import VAE
    from pyro_vae.data import Dataset, Split

DATA = "digits (comes along), mnist, fashion_mnist, kmnist, emnist, omniglot or binarized_mnist"
MAY_CHANGE = ("pyro_vae", "root", "epochs")  # a run goes on where these differ: they don't change what an epoch does

UsageError: Any = typer.BadParameter.__base__  # click's own, which typer has kept in different places

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False, no_args_is_help=True)
Run = Annotated[Path, typer.Argument(help="The folder that train wrote, such as runs/digits.", show_default=False)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: what a user can mend takes one line and exit status 2; a bug keeps its traceback."""
    try:
        status = app(arguments, standalone_mode=False)
    except UsageError as error:
        print("error:", " ".join(error.format_message().split()), file=sys.stderr)
        status = 2
    sys.exit(status)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"pyro-vae {version('pyro_vae')}")
        raise typer.Exit


@app.callback()
def _pyro_vae(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Variational autoencoders in Pyro: train one, compare bounds on log p(x), draw samples."""


@app.command()
def train(
    context: typer.Context,
    data: Annotated[str, typer.Argument(help=f"The data set: {DATA}.", show_default=False)],
    root: Annotated[
        Path, typer.Option(help="Folder of the files, laid out as torchvision does; what is absent is downloaded.")
    ] = Path("data"),
    binarize: Annotated[
        Literal["none", "threshold", "fixed", "dynamic"] | None,
        typer.Option(
            help="Make pixels 0 or 1: at a threshold of 0.5, by one draw, or by a new draw in each epoch.",
            show_default="dynamic for Bernoulli, none for Gaussian or binarized_mnist",
        ),
    ] = None,
    validation: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Images held out of training, to measure the bound on after each epoch.",
            show_default="250 for digits, else a sixth",
        ),
    ] = None,
    network: Annotated[Literal["mlp", "conv"], typer.Option(help="Fully connected or convolutional.")] = "mlp",
    hidden_dims: Annotated[str, typer.Option(help="The mlp's layer widths; the decoder reverses them.")] = "400,200",
    channels: Annotated[str, typer.Option(help="The conv's channels after each halving of the image.")] = "32,64",
    latent_dim: Annotated[int, typer.Option(min=1, help="Dimensions of z; 2 can be drawn.")] = 2,
    likelihood: Annotated[Literal["bernoulli", "gaussian"], typer.Option(help="p(x|z) of a pixel.")] = "bernoulli",
    scale: Annotated[
        str, typer.Option(help="The Gaussian's sigma: a number, learned (one for all) or per_pixel.")
    ] = "learned",
    objective: Annotated[
        Literal["elbo", "elbo-monte-carlo", "iwae"],
        typer.Option(help="The bound to raise: elbo has its KL in closed form."),
    ] = "elbo",
    particles: Annotated[int, typer.Option(min=1, help="Samples of z for each image in the bound.")] = 1,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data in all; a longer run goes on.")] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a gradient step.")] = 64,
    lr: Annotated[float, typer.Option(help="Adam's step size.")] = 1e-3,
    seed: Annotated[int, typer.Option(min=0, help="Of the initial weights, the minibatches and the samples.")] = 0,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder of the run.", show_default="runs/DATA")
    ] = None,
) -> None:
    """Train a VAE on DATA, into a folder with its figures. The same command again goes on where it stopped."""
    _check_unused(context)
    if not 0 < lr < math.inf:
        raise UsageError(f"expected a positive --lr, got {lr}. Try 1e-3.")
    if binarize is None:
        binarize = "dynamic" if likelihood == "bernoulli" and data != "binarized_mnist" else "none"
    config = {"pyro_vae": version("pyro_vae"), **context.params, "root": str(root.resolve()), "binarize": binarize}
    run = config.pop("out") or Path("runs", data)
    _check_folder(run, config)
    dataset, vae = _build(config)

    import pyro_vae as pv
    from pyro_vae.checkpoint import load_parameters

    bound = {
        "elbo": pv.ELBO(particles),
        "elbo-monte-carlo": pv.ELBO(particles, "monte_carlo"),
        "iwae": pv.IWAE(particles),
    }[objective]
    checkpoint = run / "checkpoint.pt"
    if not checkpoint.exists():
        _write_config(run, config)
    with _explained(), warnings.catch_warnings():
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
            checkpoint=checkpoint,
            seed=seed,
        )
    _write_config(run, config)  # only now where there was a checkpoint, which may have been refused
    if history.empty:
        print("\nstopped by Ctrl-C before the end of the first epoch: nothing was kept.", file=sys.stderr)
        raise typer.Exit(130)
    stopped = len(history) < epochs
    if stopped:  # within an epoch: go back to the end of the last whole one
        load_parameters(checkpoint, vae.model, vae.guide, dataset.test.x[:1])

    history.to_csv(run / "history.csv")
    figures = _draw_run(run, vae, dataset, history, seed)
    last = history.iloc[-1]
    held_out = "" if math.isnan(last.validation_bound) else f", validation {last.validation_bound:.2f}"
    print(f"epoch {len(history)}: {bound.name}, K = {particles}: train {last.train_bound:.2f}{held_out} nats per image")
    print(*figures, sep="\n")
    if stopped:
        print(
            f"stopped by Ctrl-C: {run} is as it was after epoch {len(history)} of {epochs}. "
            "Give the same command again to go on.",
            file=sys.stderr,
        )
        raise typer.Exit(130)


@app.command()
def compare(
    run: Run,
    data: Annotated[int, typer.Option(min=2, help="How many test images, all of them if there are fewer.")] = 500,
    repeats: Annotated[int, typer.Option(min=2, help="How often each estimator is run.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Of the estimators' samples.")] = 0,
) -> None:
    """Compare bounds on log p(x) of test images under the VAE in RUN: values, noise, gradients, time."""
    dataset, vae = _load(run)

    import pyro_vae as pv

    x = dataset.test.x[:data]
    with Console(stderr=True).status(f"running each bound {repeats} times on {len(x)} images"):
        table = pv.compare(vae.model, vae.guide, x, repeats=repeats, seed=seed)
    csv = run / "compare.csv"
    table.to_csv(csv)
    _save(pv.plots.bounds(table), run / "figures" / "bounds.png")
    Console().print(_rich_table(table, len(x), repeats))
    print(csv, *sorted((run / "figures").glob("*.png")), sep="\n")


@app.command()
def sample(
    run: Run,
    num_samples: Annotated[int, typer.Option(min=1, help="How many images.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws of z.")] = 0,
) -> None:
    """Draw images from the VAE in RUN: the means of p(x|z) at draws of z from the prior."""
    _, vae = _load(run)
    print(_draw_samples(run, vae, num_samples, seed))


@contextmanager
def _explained() -> Iterator[None]:
    """Around calls of pyro_vae that refuse a user's options or files: their message is what the user reads."""
    try:
        yield
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        raise UsageError(str(error)) from error


def _check_unused(context: typer.Context) -> None:
    """Refuse options that would be ignored."""
    for option, switch, needed in (
        ("hidden_dims", "network", "mlp"),
        ("channels", "network", "conv"),
        ("scale", "likelihood", "gaussian"),
    ):
        source = context.get_parameter_source(option)
        if context.params[switch] != needed and source is not None and source.name == "COMMANDLINE":
            name = option.replace("_", "-")
            raise UsageError(f"--{name} is of --{switch} {needed}, got --{switch} {context.params[switch]}: drop one.")


def _check_folder(run: Path, config: dict[str, Any]) -> None:
    """Refuse to train into a folder that holds another run, or something else."""
    if not run.exists() or not any(run.iterdir()):
        return
    earlier = _read_config(run)
    for name in config.keys() - MAY_CHANGE:
        # A config.json alone is what a run leaves that failed in its first epoch: it holds nothing to lose.
        if config[name] != earlier[name] and [path.name for path in run.iterdir()] != ["config.json"]:
            raise UsageError(
                f"{run} holds a run with {name}={earlier[name]!r}, and {name}={config[name]!r} is asked for. Ask for "
                "the same to go on with it, or pass another --out."
            )


def _read_config(run: Path) -> dict[str, Any]:
    path = run / "config.json"
    if not path.is_file():
        raise UsageError(
            f"expected a run in {run}, with the config.json that 'pyro-vae train' writes, found "
            f"{'none in that folder' if run.is_dir() else 'no such folder'}. Check the path."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"can't read {path}: {error}. Restore it, or pass another folder.") from error
    expected = {"pyro_vae", *inspect.signature(train).parameters} - {"context", "out"}
    if not isinstance(config, dict) or config.keys() != expected:
        raise UsageError(
            f"expected {path} to hold the options of 'pyro-vae train' in version {version('pyro_vae')}, got something "
            "else. Pass another folder."
        )
    return config


def _write_config(run: Path, config: dict[str, Any]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _build(config: dict[str, Any]) -> tuple[Dataset, VAE]:
    """The data and the VAE, before training, that a run's options stand for."""
    import matplotlib
    import pyro

    import pyro_vae as pv

    matplotlib.use("Agg")  # figures go to files, on machines without a screen too
    shared = {name: config[name] for name in ("latent_dim", "likelihood")} | {"scale": _scale(config["scale"])}
    with _explained():
        names = ("root", "binarize", "validation")
        dataset = pv.data.load(config["data"], **{name: config[name] for name in names})
        pyro.set_rng_seed(config["seed"])
        if config["network"] == "mlp":
            hidden_dims = _widths("--hidden-dims", config["hidden_dims"])
            vae = pv.mlp_vae(dataset.event_shape, hidden_dims=hidden_dims, **shared)
        else:
            vae = pv.conv_vae(dataset.event_shape, channels=_widths("--channels", config["channels"]), **shared)
        vae.likelihood.check(dataset.test.x)
    return dataset, vae


def _widths(option: str, text: str) -> list[int]:
    try:
        return [int(width) for width in text.split(",")]
    except ValueError:
        raise UsageError(f"expected {option} as whole numbers with commas, such as 400,200, got {text!r}.") from None


def _scale(text: str) -> float | Literal["learned", "per_pixel"]:
    try:
        return text if text in ("learned", "per_pixel") else float(text)
    except ValueError:
        raise UsageError(f"expected --scale to be a number, learned or per_pixel, got {text!r}.") from None


def _load(run: Path) -> tuple[Dataset, VAE]:
    """The data and the trained VAE of a run."""
    from pyro_vae.checkpoint import load_parameters

    dataset, vae = _build(_read_config(run))
    with _explained():
        load_parameters(run / "checkpoint.pt", vae.model, vae.guide, dataset.test.x[:1])
    return dataset, vae


def _draw_run(run: Path, vae: VAE, data: Dataset, history: pd.DataFrame, seed: int) -> list[Path]:
    """Draw what training led to; return the figures' paths."""
    from pyro_vae import plots

    x = data.test.x[:20]
    paths = [
        _save(plots.training_curve(history), run / "figures" / "training.png"),
        _save(plots.reconstructions(x, vae.reconstruct(x)), run / "figures" / "reconstructions.png"),
        _draw_samples(run, vae, 64, seed),
    ]
    if vae.embed(x).shape[1] == 2:
        paths.append(_draw_latent_space(run, vae, data.test))
    return paths


def _draw_samples(run: Path, vae: VAE, n: int, seed: int) -> Path:
    import pyro

    from pyro_vae import plots

    pyro.set_rng_seed(seed)
    title = "means of p(x|z) at draws of z from the prior"
    return _save(
        plots.images(vae.generate(n), columns=math.isqrt(n - 1) + 1, title=title), run / "figures" / "samples.png"
    )


def _draw_latent_space(run: Path, vae: VAE, test: Split) -> Path:
    """Where the encoder puts the test data, beside what the decoder makes of the same plane."""
    import matplotlib.pyplot as plt
    import torch

    from pyro_vae import plots

    z = vae.embed(test.x[:2000])
    few = test.labels is not None and len(test.labels.unique()) <= 20  # as many as can be told apart
    reach = max(3.0, z.abs().max().item())
    edges = torch.linspace(-reach, reach, 2 * 15 + 1)
    z2, z1 = torch.meshgrid(edges[1::2], edges[1::2], indexing="ij")
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.4), layout="constrained")
    plots.latent_space(z, test.labels[:2000] if few else None, ax=left)
    left.set(title="means of q(z|x) of test data", xlim=(-reach, reach), ylim=(-reach, reach))
    tiles = torch.nn.functional.pad(vae.decode(torch.stack([z1, z2], -1)), (0, 1, 0, 1), value=1)  # a line between them
    plots.latent_grid(tiles, extent=(-reach, reach, -reach, reach), ax=right)
    right.set_title("means of p(x|z)")
    return _save(figure, run / "figures" / "latent_space.png")


def _save(figure: Figure, path: Path) -> Path:
    import matplotlib.pyplot as plt

    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _rich_table(table: pd.DataFrame, images: int, repeats: int) -> Table:
    caption = (
        f"Bound: nats per image, mean of {images} test images ± its standard error over them. std: of one image's "
        f"estimate over {repeats} repeats, in nats. Gradient SNR: signal to noise of the gradient, over the parameters "
        "of the model and of the guide. ms: bound and gradient on all the images."
    )
    printed = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", collapse_padding=True)
    printed.add_column("objective", no_wrap=True)
    for name in ("K", "bound ± SE", "std", "SNR\nmodel", "SNR\nguide", "ms"):
        printed.add_column(name, justify="right", no_wrap=True)
    for (objective, particles), row in table.iterrows():
        printed.add_row(
            objective,
            str(particles),
            f"{row.bound:.2f} ± {row.bound_se:.2f}",
            f"{row.estimator_std:.2f}",
            f"{row.grad_snr_model:.2f}",
            f"{row.grad_snr_guide:.2f}",
            f"{row.milliseconds:.0f}",
        )
    return printed
