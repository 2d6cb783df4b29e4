"""How much log p(x) independent pixels lose on images with correlated noise, against a low-rank Gaussian.

    python benchmarks/blur.py                    (2 minutes on one core; the figure is runs/blur.png)

An image is a blob at a random place plus smooth noise: x = t(u) + e. The place u is uniform on a square, and e is
normal with a known covariance between pixels. So the true log p(x) is an integral over a square, which a grid
computes. No model has a higher mean. Two VAEs have the same networks, Adam and epochs, and z of 4 dimensions. A third
has independent pixels and enough dimensions of z for the noise too. The KL has the same warm-up in all three. Without
it, the low-rank factor F learns the blobs before z does, and the means carry no information. Errors are over the test
images, and differences are paired.
"""

from __future__ import annotations

import argparse
import math
import warnings
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

SIDE, WIDTH = 12, 1.8  # in pixels: the image's side, the blob's width
REACH, LOUD, WHITE = 1.5, 0.2, 0.05  # the noise: range in pixels, scale, and scale of its independent part

LATENT, ROOMY = 4, 24  # dimensions of z
WARM_UP, BATCH = 40, 100  # epochs, images

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--rank", type=int, default=40)
parser.add_argument("--epochs", type=int, default=140)
parser.add_argument("--num-samples", type=int, default=1000)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("runs"), help="Folder for the figure.")
options = parser.parse_args()
torch.set_num_threads(1)
warnings.filterwarnings("ignore", ".*Pareto k-hat")  # the printed estimate shows k-hat too
pyro.set_rng_seed(options.seed)

pixels = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).float()
kernel = (-torch.cdist(pixels, pixels).square() / (2 * REACH**2)).exp()
covariance = LOUD**2 * kernel + WHITE**2 * torch.eye(SIDE**2)
noise = torch.distributions.MultivariateNormal(torch.zeros(SIDE**2), covariance)


def template(u):
    """Blobs (..., D) for places u (..., 2) between 0 and 1."""
    centre = 2.5 + (SIDE - 6) * u
    return (-(pixels - centre[..., None, :]).square().sum(-1) / (2 * WIDTH**2)).exp()


def make(number):
    """Images with noise and their blobs without it, (number, 1, SIDE, SIDE) each."""
    clean = template(torch.rand(number, 2))
    return (clean + noise.sample((number,))).reshape(-1, 1, SIDE, SIDE), clean.reshape(-1, 1, SIDE, SIDE)


def exact(x, cells=48):
    """The true log p(x) of images, (N,): the mean density over a grid of places."""
    places = (torch.arange(cells) + 0.5) / cells
    whiten = torch.linalg.cholesky(covariance.double()).inverse().T
    blobs = template(torch.cartesian_prod(places, places)).double() @ whiten
    square = torch.cdist(x.flatten(1).double() @ whiten, blobs).square()
    return (-0.5 * square).logsumexp(1) - math.log(cells**2) + noise.log_prob(torch.zeros(SIDE**2)).double()


def correlation(x):
    """Correlation of pixels with their right and lower neighbours; the jackknife error is over groups of images."""
    x = x.double() - x.double().mean(0)
    sides = (x[..., :, :-1], x[..., :, 1:]), (x[..., :-1, :], x[..., 1:, :])
    sums = [
        sum(part(a, b).sum((1, 2, 3)) for a, b in sides)
        for part in (lambda a, b: a * b, lambda a, b: (a**2 + b**2) / 2)
    ]
    whole = sums[0].sum() / sums[1].sum()
    groups = [part.reshape(50, -1).sum(1) for part in sums]
    without = (groups[0].sum() - groups[0]) / (groups[1].sum() - groups[1])
    return pv.Estimate(whole.item(), math.sqrt(49 / 50 * (without - without.mean()).square().sum()))


train, _ = make(4000)
test, clean = make(1000)
truth = exact(test)
independent, roomy, low_rank = "independent pixels", f"independent, z of {ROOMY}", f"low rank, R = {options.rank}"
choices = {
    independent: {"latent_dim": LATENT, "likelihood": "gaussian", "scale": "learned"},
    roomy: {"latent_dim": ROOMY, "likelihood": "gaussian", "scale": "learned"},
    low_rank: {"latent_dim": LATENT, "likelihood": pv.LowRankGaussian, "rank": options.rank},
}
drawn, means, found = {}, {}, {}
for name, choice in choices.items():
    pyro.clear_param_store()
    pyro.set_rng_seed(options.seed)
    vae = pv.mlp_vae((1, SIDE, SIDE), hidden_dims=(128,), **choice)
    objective = pv.ELBO(beta=pv.schedules.warm_up(WARM_UP * len(train) // BATCH))
    history = pv.fit(
        vae, train, objective, epochs=options.epochs, batch_size=BATCH, lr=3e-3, seed=options.seed,
        lr_scheduler=lambda optimizer: CosineAnnealingLR(optimizer, options.epochs),
    )  # fmt: skip
    print(f"{name}: trained in {history.seconds.sum():.0f} s")
    found[name] = pv.log_likelihood(vae, test, options.num_samples, seed=options.seed)
    print(f"    {found[name]}")
    with torch.no_grad():
        given = vae.likelihood(vae.prior().sample((len(test),)))
        drawn[name], means[name] = given.sample(), given.mean

table = Table(
    "", "log p(x), nats", "truth minus this", "neighbours in x", "neighbours in the noise", box=box.SIMPLE_HEAD
)
table.add_row("test images", str(pv.Estimate.of(truth)), "", str(correlation(test)), str(correlation(test - clean)))
for name, x in drawn.items():
    behind = pv.Estimate.of(truth - found[name].per_datum)
    table.add_row(name, str(found[name].estimate), str(behind), str(correlation(x)), str(correlation(x - means[name])))
print()
print("log p(x) per image. Correlation of neighbouring pixels in images and in samples x ~ p(x|z), z ~ p(z), and in")
print("their noise, x - t(u) or x - E[x|z]:")
Console(width=120).print(table)

options.out.mkdir(parents=True, exist_ok=True)
low, high = test[:200].quantile(torch.tensor([0.005, 0.995])).tolist()
panels = {"test images": test} | {
    f"{name}: {what}": x[name]
    for name in (independent, low_rank)
    for what, x in (("samples x ~ p(x|z)", drawn), ("means E[x|z]", means))
}
figure, axes = plt.subplots(len(panels), 1, figsize=(7, 1.75 * len(panels)), layout="constrained")
for ax, (title, x) in zip(axes, panels.items(), strict=True):
    pv.plots.images((x[:20] - low) / (high - low), columns=10, title=title, ax=ax)
figure.savefig(options.out / "blur.png", dpi=120)

above = pv.Estimate.of(found[low_rank].per_datum - truth)
if above.value > 3 * above.standard_error:
    raise SystemExit(f"expected log p(x) of '{low_rank}' to be at most the true one, got {above} nats above it")
real, smooth = correlation(test), correlation(drawn[low_rank])
for name in (independent, roomy):
    gain = pv.Estimate.of(found[low_rank].per_datum - found[name].per_datum)
    score = gain.value / gain.standard_error
    if not score > 10:
        raise SystemExit(
            f"expected log p(x) of '{low_rank}' above that of '{name}' by 10 errors, got {gain} nats: {score:.1f}"
        )
    grainy = correlation(drawn[name])
    nearer = abs(grainy.value - real.value) - abs(smooth.value - real.value)
    error = math.hypot(grainy.standard_error, smooth.standard_error)
    if not nearer > 3 * error:
        raise SystemExit(
            f"expected '{low_rank}' nearer to the images' correlation than '{name}', got {nearer:.3f} ± {error:.3f}"
        )
    print(f"log p(x) of correlated pixels minus '{name}': {gain} nats an image, {score:.0f} standard errors.")
    print(f"The correlation of neighbours is nearer to that in the images, by {nearer:.3f} ± {error:.3f}.")
