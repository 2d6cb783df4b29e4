"""Compare priors, posteriors and layers on MNIST: log p(x), the gap to the ELBO, and active units of eight pairs.

    python benchmarks/pairs_on_mnist.py --root data
    python benchmarks/pairs_on_mnist.py --root data --warm-up 10

All pairs have the same encoder and decoder: one hidden layer of 300 and 40 latent dimensions (40 and 20 with two
layers). Adam, the number of epochs, the seed and the warm-up of beta are the same too. Importance sampling estimates
log p(x), on test images drawn at random. Differences to the first row are paired by image.
"""

from __future__ import annotations

import argparse
import time

import pyro
import torch
from rich.console import Console
from rich.table import Table

import pyro_vae as pv
from pyro_vae.networks import mlp

HIDDEN, LATENT = 300, 40

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--root", default="data", help="Folder of MNIST, as torchvision lays it out.")
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--warm-up", type=int, default=0, help="Epochs in which beta rises from 0 to 1.")
parser.add_argument("--num-test", type=int, default=1000, help="Test images, drawn at random with a fixed seed.")
parser.add_argument("--num-samples", type=int, default=5000)
parser.add_argument("--only", action="append", help="Name of a row to compute; can be repeated.")
options = parser.parse_args()

torch.set_num_threads(1)
mnist = pv.data.load("mnist", root=options.root, binarize="dynamic")
shape = mnist.event_shape
chosen = torch.randperm(len(mnist.test.x), generator=torch.Generator().manual_seed(0))[: options.num_test]
test = mnist.test.x[chosen]


def vae(prior=None, posterior=pv.DiagonalNormal, **settings) -> pv.VAE:
    return pv.mlp_vae(shape, latent_dim=LATENT, hidden_dims=(HIDDEN,), prior=prior, posterior=posterior, **settings)


def vamp() -> pv.VAE:
    pair = vae()
    pair.prior = pv.VampPrior(pair.posterior, mnist.train.x[:500])
    return pair


def flow(kind: str) -> pv.VAE:
    pair = vae()
    encoder = mlp(784, (HIDDEN,), pv.FlowPosterior.features_for(LATENT))
    pair.posterior = pv.FlowPosterior(encoder, shape, LATENT, kind, hidden_dims=(128,))
    return pair


def layers(guide: str) -> pv.HierarchicalVAE:
    return pv.mlp_hierarchical_vae(shape, latent_dims=(LATENT, 20), hidden_dims=(HIDDEN, 100), guide=guide)


ROWS = {
    "standard normal": vae,
    "mixture prior, 100": lambda: vae(pv.MixturePrior(LATENT, 100)),
    "VampPrior, 500": vamp,
    "flow prior": lambda: vae(pv.FlowPrior(LATENT, hidden_dims=(128,))),
    "full covariance": lambda: vae(posterior=pv.FullNormal),
    "flow posterior, IAF": lambda: flow("iaf"),
    "two layers, ladder": lambda: layers("ladder"),
    "two layers, bottom-up": lambda: layers("bottom_up"),
}

table = Table(
    title=f"MNIST, {options.epochs} epochs, {options.warm_up} of warm-up, {len(test)} test images; nats per datum"
)
for column in (
    "pair",
    "minutes",
    "ELBO",
    "log p(x)",
    "minus the first row",
    "log p(x) - ELBO",
    "k-hat > 0.7",
    "active",
):
    table.add_column(column, justify="left" if column == "pair" else "right", no_wrap=True)
warm_up = pv.schedules.warm_up(options.warm_up * -(-len(mnist.train.x) // 128)) if options.warm_up else 1.0
first = None
for name, build in ROWS.items():
    if options.only and name not in options.only:
        continue
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    pair = build()
    started = time.perf_counter()
    objective = pv.ELBO(kl="monte_carlo", beta=warm_up)
    pv.fit(
        pair, mnist.train, objective, epochs=options.epochs, batch_size=128, compile=True, seed=0
    )  # fmt: skip
    minutes = (time.perf_counter() - started) / 60
    found = pv.log_likelihood(pair, test, options.num_samples, compile=True, seed=0)
    first = found.per_datum if first is None else first
    active = pv.active_units(pair, test, seed=0)
    table.add_row(
        name, f"{minutes:.1f}", str(pv.Estimate.of(found.elbo)), str(found.estimate),
        str(pv.Estimate.of(found.per_datum - first)), str(found.kl_to_posterior), f"{found.share_high_k:.1%}",
        f"{int(active.active.sum())} of {len(active)}",
    )  # fmt: skip
    Console(width=160).print(table)
