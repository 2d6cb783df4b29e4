"""log p(x) of MNIST's test images by the encoder's samples, by refined proposals, and by annealing.

    python benchmarks/refined.py --root data

trains six models for ten epochs, and prints a table of log p(x) on the first 1,000 test images, its error, the share of
images whose k-hat is above 0.7, the median effective sample size, the mean number of samples of an image, and process
seconds on one thread. Two rows sample to a stated error: of each image, which the share in brackets reaches, and of the
mean. ``--annealed`` images are annealed too. From the prior, the reference, this takes minutes for a few of them:
``--steps 0`` leaves it out. Of a guide with several sites, `pv.blame` splits the gap. A trained model is kept in
``--out``, and serves again.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pyro_vae as pv

Shape = tuple[int, ...]


def mlp(shape: Shape, latent_dim: int = 20, hidden_dims: tuple[int, ...] = (400,), **options: Any) -> pv.VAE:
    """A VAE with fully connected networks."""
    return pv.mlp_vae(shape, latent_dim=latent_dim, hidden_dims=hidden_dims, **options)


def vamp(shape: Shape, images: torch.Tensor) -> pv.VAE:
    """One whose prior is a mixture of the posteriors of 100 trained inputs."""
    vae = mlp(shape)
    vae.prior = pv.VampPrior(vae.posterior, images[:100])
    return vae


SAMPLED = pv.ELBO(kl="monte_carlo")
MODELS: dict[str, tuple[Callable[[Shape, torch.Tensor], Any], pv.Objective]] = {
    "20 latents": (lambda shape, _: mlp(shape), pv.ELBO()),
    "50 latents, IWAE-5": (lambda shape, _: mlp(shape, 50, (200, 200)), pv.IWAE(5)),
    "convolutions": (lambda shape, _: pv.conv_vae(shape, latent_dim=20, channels=(16, 32)), pv.ELBO()),
    "two layers": (
        lambda shape, _: pv.mlp_hierarchical_vae(shape, latent_dims=(20, 10), hidden_dims=(200, 100)),
        SAMPLED,
    ),
    "flow posterior": (lambda shape, _: mlp(shape, posterior=pv.FlowPosterior), SAMPLED),
    "VampPrior": (vamp, SAMPLED),
}


def show(name: str, function: Callable[..., pv.Evidence], *args: Any, before: float = 0.0, **options: Any) -> None:
    """Print a line of the table; `before` are seconds that a call before took for it."""
    start = time.process_time()
    found = function(*args, seed=0, progress=False, **options)
    seconds = before + time.process_time() - start
    high = f"{found.share_high_k:.1%}" if isinstance(found, pv.LogLikelihood) else ""
    drawn = found.drawn.double().mean() if isinstance(found, pv.LogLikelihood) else found.num_samples
    numbers = f"{found.mean:10.3f}{found.monte_carlo_error:9.4f}{high:>9s}{found.ess.median():8.0f}{drawn:9.0f}"
    if options.get("error_of") == "datum":
        name += f" ({(found.per_datum_error <= options['error']).double().mean():.1%})"
    print(f"  {name:36s}{numbers}{seconds:9.1f}", flush=True)


def main() -> None:
    """Train, evaluate and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default="data", help="the folder of MNIST, in torchvision's layout")
    parser.add_argument("--out", default="runs/refined", help="the folder of the trained models")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--images", type=int, default=1_000)
    parser.add_argument("--annealed", type=int, default=100, help="images for annealing from the prior; 0 for none")
    parser.add_argument("--steps", type=int, default=1_000, help="of annealing from the prior; 0 for none")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*Pareto k-hat")
    mnist = pv.data.load("mnist", root=options.root, binarize="fixed")
    x, few = mnist.test.x[: options.images], mnist.test.x[: options.annealed]
    heads = f"{'log p(x)':>10s}{'error':>9s}{'k > 0.7':>9s}{'ESS':>8s}{'samples':>9s}{'seconds':>9s}"
    print(f"{'':38s}{heads}", flush=True)
    for name in options.models:
        torch.manual_seed(0)
        build, objective = MODELS[name]
        vae = build(mnist.event_shape, mnist.train.x)
        training = {"epochs": options.epochs, "batch_size": 64, "compile": True, "seed": 0, "progress": False}
        pv.fit(vae, mnist.train, objective, checkpoint=Path(options.out) / f"{name}.pt", **training)
        print(name)
        show("the encoder's samples", pv.log_likelihood, vae, x, 5_000)
        show("refined", pv.log_likelihood, vae, x, 5_000, refine=True)
        for error, error_of, words in ((0.02, "datum", "each image"), (0.002, "mean", "the mean")):
            goal = {"refine": True, "error": error, "error_of": error_of}
            show(f"refined, {error} of {words}", pv.log_likelihood, vae, x, 5_000, **goal)
        if not len(few):
            continue
        start = time.process_time()
        refined = pv.refine(vae, few, seed=1, progress=False)
        fit = time.process_time() - start
        show(f"refined, {len(few)} images", pv.log_likelihood, vae.model, refined, few, 5_000, before=fit)
        show("AIS from there, 20 steps", pv.ais, vae.model, refined, few, 20, start="guide", before=fit)
        if options.steps:
            show(
                f"AIS from the prior, {options.steps} steps", pv.ais, vae.model, None, few, options.steps, compile=True
            )
        if isinstance(vae, pv.HierarchicalVAE):
            print(pv.blame(vae, few, seed=0, progress=False).round(3))


if __name__ == "__main__":
    main()
