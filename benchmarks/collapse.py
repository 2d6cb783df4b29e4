"""Posterior collapse by construction: a guide that does not depend on x, next to one that does.

    python benchmarks/collapse.py                (under a minute; the figure is runs/collapse.png)

Both VAEs have the same decoder with the same initial weights, binarised digits, bound, Adam and epochs. One guide is
pv.Unconditional, q(z|x) = q(z) for every x. Its z carries no information about x, so the decoder learns to ignore z
and to draw the mean image.

Its mutual information of x and z is exactly 0. Every term of the estimate, log q(z|x_n) - log q(z), is 0 too: q(z) is
a mixture of equal components, so it equals q(z|x_n). The estimate has no sampling error, only rounding. So the
tolerance for zero is 3 standard errors plus the rounding of log q in float32. Other errors ± are over test images.
Those of the mutual information are over samples, and those of spreads over ten groups of draws of the prior.
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
parser.add_argument("--num-samples", type=int, default=100, help="Samples of each q(z|x), for the mutual information.")
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
    """The root mean square of the decoder's output minus the mean image, over draws of the prior and pixels."""
    return (outputs[name] - mean_image).square().mean().sqrt().item()


def small(estimate):
    return f"{estimate.value:.3g} ± {estimate.standard_error:.1g}"


table = Table("", "guide q(z|x)", "guide q(z)", box=box.SIMPLE_HEAD)
for label, show in {
    "ELBO, nats": lambda name: str(pv.Estimate.of(elbo[name])),
    "mutual information of x and z, nats": lambda name: small(parts[name].mutual_information),
    "KL(q(z) || p(z)), nats": lambda name: small(parts[name].marginal_kl),
    "standard deviation of a pixel of the decoder's output over z ~ p(z)": lambda name: str(spread[name]),
    "RMS of these outputs minus the mean image": lambda name: f"{off(name):.4f}",
}.items():
    table.add_row(label, show("q(z|x)"), show("q(z)"))
Console(width=120).print(table)

options.out.mkdir(parents=True, exist_ok=True)
figure, axes = plt.subplots(3, 1, figsize=(8, 3.4), layout="constrained")
titles = {
    "q(z|x)": "guide q(z|x): decoder at 10 draws of z ~ p(z)",
    "q(z)": "guide q(z), which does not depend on x: decoder at 10 draws of z ~ p(z)",
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
    raise SystemExit(f"expected zero mutual information with a guide that does not depend on x, got {small(lazy)} nats")
if not looking.value > 10 * looking.standard_error:
    raise SystemExit(f"expected the amortised guide's mutual information above 10 errors, got {small(looking)} nats")
gain = pv.Estimate.of(elbo["q(z|x)"] - elbo["q(z)"])
if not gain.value > 5 * gain.standard_error:
    raise SystemExit(f"expected the amortised guide's ELBO above the other's by 5 errors, got {gain} nats")
ratio = spread["q(z)"].value / spread["q(z|x)"].value
if not ratio < 0.1:
    raise SystemExit(f"expected the lazy decoder's spread over z below 10% of the other's, got {ratio:.0%}")
known = (mean_image * (1 - mean_image)).mean().div(len(digits.train)).sqrt().item()
if not off("q(z)") < known:
    raise SystemExit(
        f"expected the lazy decoder within {known:.4f} of the mean image, its standard error, got {off('q(z)'):.4f}"
    )
print(f"A guide that depends on x gains {gain} nats a digit. Without x, z carries {small(lazy)} nats of x, and")
print(f"the decoder draws the mean of the training images. It differs from the mean by {off('q(z)'):.4f}; the mean of")
print(f"{len(digits.train)} binary images has a standard error of {known:.4f}.")
