"""The command line: ``pyro-vae train digits``, then ``compare``, ``evaluate`` and ``sample`` on the run that it leaves.

A run is a folder: config.json holds every option, checkpoint.pt the state of training, history.csv a row for each
epoch, figures/ the plots. All commands rebuild data and networks from config.json, by the same function.
"""

from __future__ import annotations

import inspect
import json
import math
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from typer import Argument, Option

from pyro_vae.cli.report import NUM_ANNEALED
from pyro_vae.errors import PyroVAEError
from pyro_vae.evaluation.defaults import NUM_CHAINS, NUM_SAMPLES, NUM_STEPS

if TYPE_CHECKING:  # commands import what they need, so that --help does not wait for it
    import pandas as pd

    from pyro_vae import VAE
    from pyro_vae.cli.report import Report
    from pyro_vae.data import Dataset, Split

# What a run may go on with a new value of, as no epoch depends on it; what runs were before there was a choice.
MAY_CHANGE = {"pyro_vae", "root", "epochs"}
BEFORE = {"compile": False, "warm_up": 0, "free_bits": 0.0, "patience": None}

UsageError: Any = typer.BadParameter.__base__  # click's, which versions of typer keep in different places
OF_PARAMETERS = (  # what compare and evaluate write, stale once training goes on
    "compare.csv",
    "evaluation.json",
    "evaluation.nc",
    "figures/bounds.png",
    "figures/bounds_and_log_likelihood.png",
    "figures/pareto_k.png",
    "figures/active_units.png",
)
ARVIZ_IMAGES, ARVIZ_DRAWS = 20, 200  # in evaluation.nc, with as many draws of x for each image: 25 MB for MNIST

DATA_HELP = "digits (comes along), mnist, fashion_mnist, kmnist, emnist, omniglot or binarized_mnist."
Run = Annotated[Path, Argument(metavar="RUN", help="The folder that train wrote, as runs/digits.", show_default=False)]

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    A usage error, a refusal of this package and an error of the operating system each print one line on stderr, with
    exit status 2. Any other exception is a bug and keeps its traceback.
    """
    try:
        status = app(arguments or sys.argv[1:] or ["--help"], standalone_mode=False)
    except UsageError as error:
        status = _print_error(error.format_message())
    except (PyroVAEError, OSError) as error:
        status = _print_error(str(error))
    sys.exit(status)


def _print_error(message: str) -> int:
    """Print one line on stderr; return the exit status."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    return 2


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"pyro-vae {version('pyro_vae')}")
        raise typer.Exit


@app.callback()
def _pyro_vae(
    version: Annotated[
        bool, Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Variational autoencoders in Pyro: train one, compare bounds on log p(x), evaluate it, draw samples."""


@app.command()
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
    run = out or Path("runs", data)
    _check_folder(run, config)
    dataset, vae = _build(config)
    if patience is not None and not len(dataset.validation):
        raise PyroVAEError("--patience needs images for validation, got none. Pass --validation 100, say, or drop it.")

    import pyro_vae as pv
    from pyro_vae.training import checkpoint as checkpoints

    bound: pv.Objective
    if objective == "iwae":
        bound = pv.IWAE(particles, gradient)
    else:
        beta = pv.schedules.warm_up(warm_up * math.ceil(len(dataset.train) / batch_size)) if warm_up else 1.0
        kl: Literal["analytic", "monte_carlo"] = "analytic" if objective == "elbo" else "monte_carlo"
        bound = pv.ELBO(particles, kl, gradient, beta, free_bits)
    checkpoint = run / "checkpoint.pt"
    if not checkpoint.exists():
        _write_config(run, config)
    state = checkpoints.load(checkpoint) if checkpoint.exists() else {"history": []}
    earlier = len(state["history"])
    if 0 < earlier <= epochs:
        over = earlier == epochs or checkpoints.stalled(earlier, state.get("best"), patience)
        print(f"{run} has {earlier} epoch{'s' * (earlier > 1)}: " + ("nothing left to train." if over else "going on."))
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
            checkpoint=checkpoint,
            seed=seed,
        )
    if history.empty:
        print("stopped by Ctrl-C within the first epoch: there is nothing to keep.", file=sys.stderr)
        raise typer.Exit(130)
    if len(history) > earlier:  # what compare wrote is about the parameters of before
        for stale in OF_PARAMETERS:
            (run / stale).unlink(missing_ok=True)
    _write_config(run, config)  # only now that fit has accepted the checkpoint, if there was one
    history.to_csv(run / "history.csv")
    pv.load_parameters(checkpoint, vae.model, vae.guide, dataset.test.x[:1])  # Ctrl-C leaves those within an epoch
    figures = _draw_run(run, vae, dataset, history, seed)

    best = checkpoints.load(checkpoint).get("best")
    kept = history.iloc[best["epoch"] - 1 if best else -1]
    held_out = "" if math.isnan(kept.validation_bound) else f", {kept.validation_bound:.2f} (validation)"
    done = f"{len(history)} epoch{'s' * (len(history) > 1)}"
    at = f", the best {best['epoch']}" if best else ""
    print(f"{done}{at}: {bound.name}, K = {particles}: {kept.train_bound:.2f} (train){held_out} nats per datum")
    print(*figures, sep="\n")
    if len(history) < epochs and not checkpoints.stalled(len(history), best, patience):
        print(f"stopped by Ctrl-C: {run} holds {done} of {epochs}. The same command goes on.", file=sys.stderr)
        raise typer.Exit(130)


OPTIONS = [name for name in inspect.signature(train).parameters if name not in ("context", "out")]


@app.command()
def compare(
    run: Run,
    num_images: Annotated[int, Option(min=2, help="How many test images; all of them if there are fewer.")] = 500,
    repeats: Annotated[int, Option(min=2, help="How often to run each estimator.")] = 10,
    compile: Annotated[
        bool, Option("--compile", help="Measure them as compiled code; compiling takes minutes.")
    ] = False,
    seed: Annotated[int, Option(min=0, help="Of the estimators' samples.")] = 0,
) -> None:
    """Compare bounds on log p(x) for the VAE in RUN, on test images: their values, noise, gradients and cost."""
    dataset, vae = _load(run)

    import pyro_vae as pv

    x = dataset.test.x[:num_images]
    table = pv.compare(vae.model, vae.guide, x, repeats=repeats, compile=compile, seed=seed)
    table.to_csv(run / "compare.csv")
    _save(pv.plots.bounds(table).get_figure(), run / "figures" / "bounds.png")
    Console().print(_format(table, len(x), repeats))
    print(run / "compare.csv", *sorted((run / "figures").glob("*.png")), sep="\n")


@app.command()
def evaluate(
    run: Run,
    num_images: Annotated[int | None, Option(min=2, help="How many test images.", show_default="all of them")] = None,
    num_samples: Annotated[
        int, Option(min=25, help="Importance samples for each image; k-hat needs 25.")
    ] = NUM_SAMPLES,
    ais_images: Annotated[
        int, Option(min=2, help="How many of them to anneal, and to find the gaps of; as many are simulated.")
    ] = NUM_ANNEALED,
    ais_steps: Annotated[int, Option(min=2, help="Temperatures of the annealing.")] = NUM_STEPS,
    ais_chains: Annotated[int, Option(min=2, help="Annealed chains for each image.")] = NUM_CHAINS,
    compile: Annotated[
        bool, Option("--compile", help="Draw the importance samples by compiled code; worth it for many images.")
    ] = False,
    seed: Annotated[int, Option(min=0, help="Of all samples.")] = 0,
) -> None:
    """Say how good the VAE in RUN is, and how far off that number: log p(x), its bounds on both sides, gaps, parts, k-hat."""
    dataset, vae = _load(run)

    import pyro_vae as pv
    from pyro_vae.cli import report as reports

    x = dataset.test.x[:num_images]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Pareto k-hat above")  # the report says so
        report = reports.evaluate(
            vae,
            x,
            num_samples=num_samples,
            ais_data=ais_images,
            ais_steps=ais_steps,
            ais_chains=ais_chains,
            compile=compile,
            seed=seed,
        )
    Console().print(_format_report(report))
    (run / "evaluation.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    unfinished = run / "evaluation.nc.unfinished"  # the old file may be open, and can't be written over then
    pv.to_arviz(vae, x[:ARVIZ_IMAGES], ARVIZ_DRAWS, seed=seed).to_netcdf(unfinished)
    unfinished.replace(run / "evaluation.nc")
    bounds = pv.plots.bounds(report.table, log_likelihood=report.between)
    title = f"{len(report.annealed.per_datum)} test images; log p(x): AIS, and AIS + gap + 2 SE of simulated images"
    bounds.set_title(title, fontsize="medium")
    figures = [_save(bounds.get_figure(), run / "figures" / "bounds_and_log_likelihood.png")]
    if report.log_likelihood.share_no_k < 1:
        axes = pv.plots.pareto_k(report.log_likelihood.pareto_k)
        figures.append(_save(axes.get_figure(), run / "figures" / "pareto_k.png"))
    figures.append(_save(pv.plots.active_units(report.active).get_figure(), run / "figures" / "active_units.png"))
    print(run / "evaluation.json", run / "evaluation.nc", *figures, sep="\n")


@app.command()
def sample(
    run: Run,
    num_samples: Annotated[int, Option(min=1, help="How many images.")] = 64,
    seed: Annotated[int, Option(min=0, help="Of the draws of z.")] = 0,
) -> None:
    """Draw images from the VAE in RUN: the means of p(x|z) at draws of z from the prior."""
    _, vae = _load(run)
    print(_draw_samples(run, vae, num_samples, seed))


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


def _check_folder(run: Path, config: dict[str, Any]) -> None:
    """Refuse to train into a folder that holds another run, or something else."""
    if not run.exists() or not any(run.iterdir()):
        return
    earlier = _read_config(run)
    if [path.name for path in run.iterdir()] == ["config.json"]:
        return  # a run that failed in its first epoch, and should not bar its name to the next try
    for name in config.keys() - MAY_CHANGE:
        both = config[name], earlier[name]
        if both[0] != both[1] and not (name == "patience" and None not in both):  # another number goes on, as in fit
            raise PyroVAEError(
                f"{run} holds a run with {name}={earlier[name]!r}, and {name}={config[name]!r} is asked for. Ask for "
                "the same to go on with that run, or pass another --out."
            )


def _read_config(run: Path) -> dict[str, Any]:
    path = run / "config.json"
    if not path.is_file():
        found = "it has no config.json" if run.is_dir() else "there is no such folder"
        raise PyroVAEError(
            f"{run} is not a run: {found}. Pass a folder that 'pyro-vae train' wrote; to train, a new or empty one."
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


def _write_config(run: Path, config: dict[str, Any]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _build(config: dict[str, Any]) -> tuple[Dataset, VAE]:
    """The data and the untrained VAE that a run's options stand for."""
    import matplotlib
    import pyro

    import pyro_vae as pv

    matplotlib.use("Agg")  # figures go to files, on machines without a screen too
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


def _load(run: Path) -> tuple[Dataset, VAE]:
    """The data and the trained VAE of a run."""
    import pyro_vae as pv

    dataset, vae = _build(_read_config(run))
    pv.load_parameters(run / "checkpoint.pt", vae.model, vae.guide, dataset.test.x[:1])
    return dataset, vae


def _draw_run(run: Path, vae: VAE, dataset: Dataset, history: pd.DataFrame, seed: int) -> list[Path]:
    """Draw what training led to; return the paths of the figures."""
    from pyro_vae import plots

    x = dataset.test.x[:20]
    return [
        _save(plots.training_curve(history).get_figure(), run / "figures" / "training.png"),
        _save(plots.reconstructions(x, vae.reconstruct(x)), run / "figures" / "reconstructions.png"),
        _draw_samples(run, vae, 64, seed),
        *([_draw_latent_space(run, vae, dataset.test)] if vae.embed(x).shape[1] == 2 else []),
    ]


def _draw_samples(run: Path, vae: VAE, n: int, seed: int) -> Path:
    import pyro

    from pyro_vae import plots

    pyro.set_rng_seed(seed)
    title = "means of p(x|z) at draws of z from the prior"
    ax = plots.images(vae.generate(n), columns=math.isqrt(n - 1) + 1, title=title)
    return _save(ax.get_figure(), run / "figures" / "samples.png")


def _draw_latent_space(run: Path, vae: VAE, test: Split) -> Path:
    """Where the encoder puts the test data, beside what the decoder makes of the same plane."""
    import matplotlib.pyplot as plt
    import torch

    from pyro_vae import plots

    z = vae.embed(test.x[:2000])
    labels = test.labels[:2000] if test.labels is not None and len(test.labels.unique()) <= 20 else None
    reach = max(3.0, z.abs().max().item())
    centres = torch.linspace(-reach, reach, 2 * 15 + 1)[1::2]
    z2, z1 = torch.meshgrid(centres, centres, indexing="ij")
    tiles = torch.nn.functional.pad(vae.decode(torch.stack([z1, z2], -1)), (0, 1, 0, 1), value=1)  # a line between
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.4), layout="constrained")
    plots.latent_space(z, labels, ax=left)
    left.set(title="means of q(z|x) of test data", xlim=(-reach, reach), ylim=(-reach, reach))
    plots.latent_grid(tiles, extent=(-reach, reach, -reach, reach), ax=right)
    right.set_title("means of p(x|z) across the plane")
    return _save(figure, run / "figures" / "latent_space.png")


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _format_report(report: Report) -> Table:
    """The report, for a terminal of 80 columns."""
    likelihood, active = report.log_likelihood, report.active["active"]
    k = f"k-hat above 0.7 at {likelihood.share_high_k:.1%} of the images"
    if likelihood.share_no_k:
        k += f", none at {likelihood.share_no_k:.1%}"
    zeros = int((likelihood.zero_weights > 0).sum())
    if zeros:
        k += f", weights of zero at {zeros} of them"
    log_n = math.log(report.decomposition.num_data)
    caption = (
        f"Nats per image, ± standard error over images (of samples, for the parts of the ELBO). Importance weights: {k}; "
        f"median ESS {likelihood.ess.median():.0f} of {likelihood.num_samples}; Monte Carlo error of the mean "
        f"{likelihood.monte_carlo_error:.2g}, which a high k-hat makes too small. Mutual information is at most log N = {log_n:.2f}; "
        "near that, there are too few images to tell it from the KL of the aggregate. Active units: "
        f"{active.sum()} of {len(active)} latent dimensions. AIS accepted {report.annealed.acceptance.mean():.0%} of its "
        "proposals. Gaps are to the higher of AIS and IS, of the first images; sim.: images simulated from the model."
    )
    formatted = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", collapse_padding=True)
    formatted.add_column("", no_wrap=True)
    for name in ("nats ± SE", "images", "minutes"):
        formatted.add_column(name, justify="right", no_wrap=True)
    shown: set[str] = set()
    previous = "all"
    for row in report.rows():
        if row.data != previous:
            formatted.add_section()
        minutes = "" if row.part in shown else f"{report.minutes[row.part]:.1f}"
        kind = {"all": "", "first": "first ", "simulated": "sim. "}[row.data]
        formatted.add_row(row.words, str(row.estimate), f"{kind}{row.num_data}", minutes)
        shown.add(row.part)
        previous = row.data
    return formatted


def _format(table: pd.DataFrame, images: int, repeats: int) -> Table:
    """What compare returns, for a terminal of 80 columns."""
    caption = (
        f"K: particles. Bound on log p(x) in nats per datum, mean of {images} test images ± its standard error; "
        "all rows share the images, so differences between rows are far surer than ±. std: of one datum's estimate over "
        f"{repeats} repeats, in nats. gap: below the best estimate of log p(x); the weights' median k-hat is "
        f"{table['pareto_k'].iloc[0]:.2f} (above 0.7: don't trust it). SNR: signal to noise of the gradient over the parameters of model and guide, rough "
        "at few repeats; 0: no signal shows. ms: the bound with its gradient, on all the images."
    )
    formatted = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", collapse_padding=True)
    formatted.add_column("objective", no_wrap=True)
    for name in ("K", "bound ± SE", "gap", "std", "SNR\nmodel", "SNR\nguide", "ms"):
        formatted.add_column(name, justify="right", no_wrap=True)
    for row in table.reset_index().to_dict("records"):
        bound = f"{row['bound']:.2f} ± {row['bound_se']:.2f}"
        others = [
            f"{row[name]:.{2 if abs(row[name]) < 100 else 0}f}"
            for name in ("gap", "estimator_std", "grad_snr_model", "grad_snr_guide")
        ]
        formatted.add_row(row["objective"], str(row["particles"]), bound, *others, f"{row['milliseconds']:.0f}")
    return formatted
