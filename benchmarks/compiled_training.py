"""Train a VAE on MNIST uncompiled and compiled, and compare the bounds and the times.

    python benchmarks/compiled_training.py --root data

Both trainings start from one seed and draw the same random numbers, so they differ by rounding alone. Times are
wall-clock times on one thread, including the compilation.
"""

from __future__ import annotations

import argparse

import pyro
import torch

import pyro_vae as pv

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--root", default="data", help="Folder of MNIST, as torchvision lays it out.")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--batch-size", type=int, default=128)
options = parser.parse_args()

torch.set_num_threads(1)
mnist = pv.data.load("mnist", root=options.root, binarize="dynamic", validation=0)
elapsed = {}
for compile in (False, True):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    vae = pv.mlp_vae(mnist.event_shape, latent_dim=20, hidden_dims=(400,))
    history = pv.fit(
        vae,
        mnist.train,
        pv.ELBO(),
        epochs=options.epochs,
        batch_size=options.batch_size,
        compile=compile,
        seed=0,
    )
    elapsed[compile] = history.seconds.cumsum()
    pyro.set_rng_seed(0)
    with torch.no_grad():
        elbo = torch.cat([pv.ELBO().bound(vae, x) for x in mnist.test.x.split(1000)])
        iwae = torch.cat([pv.IWAE(64).bound(vae, x) for x in mnist.test.x.split(100)])
    name = "compiled" if compile else "uncompiled"
    print(f"{name:10s}  {elapsed[compile].iloc[-1]:6.1f} s for {options.epochs} epochs, ", end="")
    print(f"{history.seconds.iloc[1:].median():.2f} s an epoch after the first; on all test images, nats per datum:")
    print(f"            ELBO {pv.Estimate.of(elbo)}, IWAE-64 {pv.Estimate.of(iwae)}")
ahead = [epoch for epoch in elapsed[True].index if elapsed[True][epoch] < elapsed[False][epoch]]
print(
    f"compiled training, compilation included, is ahead from epoch {ahead[0]} on"
    if ahead
    else f"compiled training is not ahead within {options.epochs} epochs"
)
