"""How often the stated 95% intervals contain the exact value.

    python benchmarks/coverage.py                (about a minute)

The model is linear-Gaussian with one latent and one observed dimension. So log p(x) has a closed form. The
expectations of the bounds are integrals over one or two samples, which Gauss-Hermite quadrature computes. Every
repeat draws new x from the model. The guide is 1.3 times wider than the posterior, and its mean is off by 0.3 of the
posterior's standard deviation.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from rich import box
from rich.console import Console
from rich.table import Table

import pyro_vae as pv

W, SIGMA = 1.3, 0.7
VARIANCE = 1 / (1 + W**2 / SIGMA**2)
SLOPE, SPREAD = VARIANCE * W / SIGMA**2, 1.3 * math.sqrt(VARIANCE)
OFF = 0.3 * math.sqrt(VARIANCE)

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--repeats", type=int, default=2000)
parser.add_argument("--num-data", type=int, default=500)
parser.add_argument("--num-samples", type=int, default=400)
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
pyro.set_rng_seed(options.seed)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(W * z, SIGMA), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(SLOPE * x + OFF, SPREAD))


def nodes(number=60):
    """Gauss-Hermite nodes and weights for a standard normal."""
    z, weights = map(torch.tensor, np.polynomial.hermite_e.hermegauss(number))
    return z, weights / weights.sum()


marginal = dist.Normal(0.0, math.hypot(W, SIGMA))
points, weights = nodes()
x = marginal.scale * points
z = SLOPE * x + OFF + SPREAD * points[:, None]  # (nodes of z, nodes of x)
log_w = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(W * z, SIGMA).log_prob(x)
log_w = log_w - dist.Normal(SLOPE * x + OFF, SPREAD).log_prob(z)
pairs = torch.logaddexp(log_w[:, None], log_w[None]) - math.log(2)
targets = {
    "ELBO": weights @ (log_w * weights[:, None]).sum(0),
    "IWAE": weights @ (pairs * weights[:, None, None] * weights[:, None]).sum((0, 1)),
    "log p(x)": -marginal.entropy(),
}

repeats, number = options.repeats, options.num_data
data = marginal.sample((repeats * number,))
table = Table("estimate", "interval over", "target", "repeats", "inside 95%", box=box.SIMPLE_HEAD)


def count(name, over, what, inside):
    share, total = inside.double().mean().item(), len(inside)
    table.add_row(name, over, what, str(total), f"{share:.1%} ± {math.sqrt(share * (1 - share) / total):.1%}")


def over_data(values, target):
    intervals = (pv.Estimate.of(row).interval(0.95) for row in values.reshape(repeats, number))
    return torch.tensor([low <= target <= high for low, high in intervals])


result = pv.log_likelihood(model, guide, data[: 10 * repeats], options.num_samples)
low, high = (pv.Estimate(0.0, 1.0).interval(0.95)[i] * result.per_datum_error + result.per_datum for i in (0, 1))
exact = marginal.log_prob(data[: 10 * repeats])
bias = (result.per_datum - exact).mean() / result.per_datum_error.mean()
count("log_likelihood", "samples", "log p(x) of each datum", (low <= exact) & (exact <= high))
estimates = pv.log_likelihood(
    model, guide, data, 20
).per_datum  # the bias of 20 samples is far below the error over data
count("log_likelihood", "data", "E log p(x)", over_data(estimates, targets["log p(x)"]))
for objective, target in (
    (pv.ELBO(1, "analytic"), "ELBO"),
    (pv.ELBO(1, "monte_carlo"), "ELBO"),
    (pv.ELBO(4, "monte_carlo"), "ELBO"),
    (pv.IWAE(2), "IWAE"),
    (pv.IWAE(2, vectorize_particles=False), "IWAE"),  # one run for each particle
):
    with torch.no_grad():
        bounds = objective.bound(model, guide, data)
    runs = "" if objective.vectorize_particles else ", in 2 runs"
    count(
        f"{objective.name}, K = {objective.num_particles}{runs}",
        "data",
        f"E {target}",
        over_data(bounds, targets[target]),
    )
Console(width=130).print(table)
print(f"On average, log_likelihood with K = {options.num_samples} is off by {bias.item():.3f} standard errors.")
