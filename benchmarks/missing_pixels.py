"""Missing pixels, imputed by importance weights, by the VAE's reconstruction and by each pixel's mean.

    python benchmarks/missing_pixels.py          (a minute; the figure is runs/missing_pixels.png)
    python benchmarks/missing_pixels.py --data mnist --root data       (3 minutes)

Half of the pixels are missing completely at random, in training and in test images. The mask of an image never
changes, so no image is ever complete. The VAE is trained on (x, mask) with the IWAE bound on log p(x_obs), as by
Mattei and Frellsen (2019). The likelihood is a Gaussian with a learned scale, whose loss is the squared error
measured here. A continuous Bernoulli imputed the digits no better (error 0.185 against 0.184) and took twice the
epochs.

The error of an image is the root mean square over its missing pixels, in units of grey between 0 and 1. Errors ± are
standard errors over images, and differences are paired by image.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import pyro
import torch
from rich import box
from rich.console import Console
from rich.table import Table

import pyro_vae as pv

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SETTINGS = {
    "digits": {"latent_dim": 10, "hidden_dims": (200,), "epochs": 300, "batch_size": 64, "number": None},
    "mnist": {"latent_dim": 20, "hidden_dims": (200,), "epochs": 12, "batch_size": 128, "number": 10000},
}

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data", choices=SETTINGS, default="digits")
parser.add_argument("--root", default="data", help="Folder of MNIST, as torchvision lays it out.")
parser.add_argument("--num-samples", type=int, default=1000)
parser.add_argument("--num-test", type=int, default=500, help="Largest number of test images.")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("runs"), help="Folder for the figure.")
options = parser.parse_args()
torch.set_num_threads(1)
pyro.set_rng_seed(options.seed)

data, settings = pv.data.load(options.data, root=options.root), SETTINGS[options.data]
train, validation = data.train.x[: settings["number"]], data.validation.x[:1000]
x = data.test.x[: options.num_test]
seen, seen_validation, mask = (torch.rand_like(part) < 0.5 for part in (train, validation, x))

vae = pv.mlp_vae(
    data.event_shape,
    latent_dim=settings["latent_dim"],
    hidden_dims=settings["hidden_dims"],
    likelihood="gaussian",
    scale="learned",
)
history = pv.fit(
    vae, (train, seen), pv.IWAE(20, "dreg"), epochs=settings["epochs"], batch_size=settings["batch_size"],
    validation=(validation, seen_validation), patience=20, seed=options.seed,
)  # fmt: skip
print(f"trained in {history.seconds.sum():.0f} s, {len(history)} epochs; held-out bound", end=" ")
print(f"{history.validation_bound.max():.2f} nats")

pixel_means = torch.where(seen, train, 0.0).sum(0) / seen.sum(0).clamp(min=1)
with torch.no_grad():
    over_guide = vae.decode(vae.posterior(torch.where(mask, x, 0.0)).sample((200,))).mean(0)
filled = {
    "mean of each pixel": pixel_means.expand_as(x),
    "vae.reconstruct, once": vae.reconstruct(x, mask),
    "mean over q(z|x), no weights": over_guide,
    f"vae.impute, {options.num_samples} samples": vae.impute(x, mask, num_samples=options.num_samples),
}
filled = {name: torch.where(mask, x, by) for name, by in filled.items()}
*others, ours = filled


def error(by):
    """The root mean squared error over each image's missing pixels, (N,)."""
    return ((by - x).square().flatten(1).sum(1) / (~mask).flatten(1).sum(1)).sqrt()


table = Table("missing pixels imputed by", "error", "minus impute's error", "standard errors", box=box.SIMPLE_HEAD)
scores = {}
for name, by in filled.items():
    more = pv.Estimate.of(error(by) - error(filled[ours]))
    if name != ours:
        scores[name] = more.value / more.standard_error
    row = (str(more), f"{scores[name]:.1f}") if name != ours else ("", "")
    table.add_row(name, str(pv.Estimate.of(error(by))), *row)
Console(width=110).print(table)

options.out.mkdir(parents=True, exist_ok=True)
hidden = torch.where(mask, x, 0.5)  # grey: neither ink nor paper
rows = {"original": x, "half missing (grey)": hidden} | {
    name: filled[name] for name in filled if name != "mean over q(z|x), no weights"
}
figure, axes = plt.subplots(len(rows), 1, figsize=(8, 1.05 * len(rows)), layout="constrained")
for ax, (title, images) in zip(axes, rows.items(), strict=True):
    pv.plots.images(images[:10], columns=10, title=title, ax=ax)
figure.savefig(options.out / "missing_pixels.png", dpi=120)

for name in others:
    if not scores[name] > 3:
        raise SystemExit(f"expected impute's error below that of '{name}' by 3 standard errors, got {scores[name]:.1f}")
print(f"impute's error is the lowest, by at least {min(scores.values()):.1f} standard errors")
print(f"the figure is {options.out / 'missing_pixels.png'}")
