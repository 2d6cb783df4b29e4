"""A variational autoencoder on one screen: a Pyro model, a guide, SVI, and a table of bounds.

    python examples/svi_digits.py                (half a minute; --epochs 2 for a quick look)

log p(x) = ELBO + KL(q(z|x) || p(z|x)), so the ELBO is below log p(x). Its KL(q(z|x) || p(z)) has a closed form, and can
also be sampled: the mean is the same, the variance is not. Averaging K weights before the logarithm (IWAE) closes
the gap as K grows.
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyro_vae as pv

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=60, help="passes over the data (default: %(default)s)")
epochs = parser.parse_args().epochs

LATENT = 5
pyro.set_rng_seed(0)
digits = pv.data.load("digits", binarize="dynamic")
encoder = nn.Sequential(nn.Linear(64, 200), nn.Tanh(), nn.Linear(200, 2 * LATENT))
decoder = nn.Sequential(nn.Linear(LATENT, 200), nn.Tanh(), nn.Linear(200, 64))


def model(x):  # p(z) p(x|z)
    pyro.module("decoder", decoder)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)


def guide(x):  # q(z|x)
    pyro.module("encoder", encoder)
    with pyro.plate("data", len(x)):
        loc, log_scale = encoder(x).chunk(2, -1)
        pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 2e-3}), loss=pv.ELBO(kl="analytic"))
for epoch in range(1, epochs + 1):
    order = torch.randperm(len(digits.train)).split(64)
    loss = sum(svi.step(digits.train[index].flatten(1)) for index in order)
    if epoch % 10 == 0 or epoch == epochs:
        print(f"epoch {epoch:3d}   training ELBO {-loss / len(digits.train):7.2f} nats per digit")

objectives = [pv.ELBO(kl="analytic"), pv.ELBO(kl="monte_carlo"), pv.ELBO(16, "monte_carlo"), pv.IWAE(16), pv.IWAE(256)]
table = pv.compare(model, guide, digits.test.x.flatten(1), objectives, repeats=20, seed=0)
print("\nOn test digits, in nats per digit:\n")
print(table[["bound", "bound_se", "estimator_std", "milliseconds"]].round(3).to_string())
gap = table.bound["IWAE", 256] - table.bound["ELBO, closed-form KL", 1]
print(f"\nThe ELBO is at least {gap:.2f} nats below log p(x): the guide is not the exact posterior.")
