"""Posterior collapse by construction: a guide that does not look at x, beside one that does.

    python benchmarks/collapse.py                (under a minute; the figure is runs/collapse.png)

Both VAEs have the same decoder with the same first weights, binarised digits, bound, Adam and epochs. The guide of one is
pv.Unconditional, q(z|x) = q(z) for every x: its decoder has nothing to read off z, and learns to leave z alone and draw the mean image.

Its mutual information of x and z is exactly 0, and so is every term of the estimate, log q(z|x_n) - log q(z), since q(z), a mixture of
equals, is q(z|x_n): there is no sampling error, and what is left is rounding. Zero is therefore held to 3 standard errors and the
rounding of log q in float32. Other errors ± are over test images, for mutual information over samples, and for spreads over ten
groups of the prior's draws.
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
from torch.optim.lr_scheduler import CosineAnnealingLR

import pyro_vae as pv

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LATENT = 2

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=100)
parser.add_argument("--num-samples", type=int, default=100, help="From each q(z|x), for the mutual information.")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("runs"), help="Folder for the figure.")
options = parser.parse_args()
torch.set_num_threads(1)

digits = pv.data.load("digits", binarize="dynamic")
x, mean_image = digits.test.x, digits.train.images.mean(0)
elbo, parts, spread, outputs = {}, {}, {}, {}
for name in ("q(z|x)", "q(z)"):
    pyro.clear_param_store()
    pyro.set_rng_seed(options.seed)
    vae = pv.mlp_vae(digits.event_shape, latent_dim=LATENT, hidden_dims=(200,))
    if name == "q(z)":
        vae.posterior = pv.Unconditional(LATENT, digits.event_shape)
    pv.fit(
        vae, digits.train, pv.ELBO(), epochs=options.epochs, batch_size=64, lr=2e-3, seed=options.seed,
        lr_scheduler=lambda optimizer: CosineAnnealingLR(optimizer, options.epochs),
    )  # fmt: skip
    pyro.set_rng_seed(options.seed)
    with torch.no_grad():
        elbo[name] = pv.ELBO(100).bound(vae, x)
    parts[name] = pv.decompose_elbo(vae, x, options.num_samples, seed=options.seed)
    outputs[name] = vae.decode(vae.prior().sample((500,)))
    spread[name] = pv.Estimate.of(torch.stack([group.std(0).mean() for group in outputs[name].chunk(10)]))


def off(name):
    """The root mean square, over the prior's draws and pixels, of the decoder's output less the mean image."""
    return (outputs[name] - mean_image).square().mean().sqrt().item()


def small(estimate):
    return f"{estimate.value:.3g} ± {estimate.standard_error:.1g}"


table = Table("", "guide q(z|x)", "guide q(z)", box=box.SIMPLE_HEAD)
for label, show in {
    "ELBO, nats": lambda name: str(pv.Estimate.of(elbo[name])),
    "mutual information of x and z, nats": lambda name: small(parts[name].mutual_information),
    "KL(q(z) || p(z)), nats": lambda name: small(parts[name].marginal_kl),
    "standard deviation of a pixel of the decoder's output over z ~ p(z)": lambda name: str(spread[name]),
    "RMS of these outputs less the mean image": lambda name: f"{off(name):.4f}",
}.items():
    table.add_row(label, show("q(z|x)"), show("q(z)"))
Console(width=120).print(table)

options.out.mkdir(parents=True, exist_ok=True)
figure, axes = plt.subplots(3, 1, figsize=(8, 3.4), layout="constrained")
titles = {
    "q(z|x)": "guide q(z|x): decoder at 10 draws of z ~ p(z)",
    "q(z)": "guide q(z), which never sees x: decoder at 10 draws of z ~ p(z)",
}
for ax, (name, title) in zip(axes, titles.items(), strict=False):
    pv.plots.images(outputs[name][:10], columns=10, title=title, ax=ax)
pv.plots.images(
    torch.cat([mean_image[None], torch.ones(9, *mean_image.shape)]),
    columns=10,
    title="mean of the training images",
    ax=axes[2],
)
figure.savefig(options.out / "collapse.png", dpi=120)

lazy, looking = parts["q(z)"].mutual_information, parts["q(z|x)"].mutual_information
rounding = torch.finfo(torch.float32).eps * 10 * LATENT  # log q is a few nats a dimension
if abs(lazy.value) > 3 * lazy.standard_error + rounding:
    raise SystemExit(
        f"a guide that doesn't look at x has a mutual information of {small(lazy)} nats, which should be 0"
    )
if not looking.value > 10 * looking.standard_error:
    raise SystemExit(f"the amortised guide's mutual information is {small(looking)} nats: expected it clearly above 0")
gain = pv.Estimate.of(elbo["q(z|x)"] - elbo["q(z)"])
if not gain.value > 5 * gain.standard_error:
    raise SystemExit(f"the amortised guide's ELBO is above the other's by {gain} nats: not by 5 standard errors")
ratio = spread["q(z)"].value / spread["q(z|x)"].value
if not ratio < 0.1:
    raise SystemExit(f"the lazy decoder's output varies over z by {ratio:.0%} of the other's: expected less than 10%")
known = (mean_image * (1 - mean_image)).mean().div(len(digits.train)).sqrt().item()
if not off("q(z)") < known:
    raise SystemExit(
        f"the lazy decoder is {off('q(z)'):.4f} from the mean image, more than its standard error, {known:.4f}"
    )
print(
    f"Looking at x is worth {gain} nats a digit. Without, z says nothing of x ({small(lazy)} nats), and the decoder draws the mean of"
)
print(
    f"the training images: {off('q(z)'):.4f} off, where that of {len(digits.train)} binary images has a standard error of {known:.4f}."
)
