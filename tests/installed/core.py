"""What the package does without extras: a program of one's own is trained, evaluated and compared."""

import sys

import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyro_vae as pv

assert "site-packages" in pv.__file__, f"expected the installed package, got {pv.__file__}"
pyro.set_rng_seed(0)
encoder, decoder = nn.Linear(6, 4), nn.Linear(2, 6)


def model(x):
    """A linear-Gaussian model."""
    pyro.module("decoder", decoder)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)


def guide(x):
    """A diagonal normal."""
    pyro.module("encoder", encoder)
    with pyro.plate("data", len(x)):
        loc, log_scale = encoder(x).chunk(2, -1)
        pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


x = torch.randn(500, 2) @ torch.randn(2, 6) + 0.5 * torch.randn(500, 6)
history = pv.fit(model, guide, x, pv.ELBO(), epochs=30, batch_size=50, lr=1e-2, seed=0, progress=False)
assert history.train_bound.iloc[-1] > history.train_bound.iloc[0]
result = pv.log_likelihood(model, guide, x, num_samples=1000, seed=0)
print(result)
assert result.pareto_k.isfinite().all()
covariance = decoder.weight @ decoder.weight.T + 0.25 * torch.eye(6)
exact = dist.MultivariateNormal(decoder.bias, covariance).log_prob(x).mean().item()
assert abs(result.mean - exact) < 0.05, (result.mean, exact)
table = pv.compare(model, guide, x, [pv.ELBO(), pv.IWAE(16)], repeats=5, seed=0, progress=False)
print(table.round(2).to_string())
assert table.bound.iloc[1] > table.bound.iloc[0]
loaded = {"arviz", "matplotlib", "rich", "sklearn", "torchvision", "typer", "xarray"} & {*sys.modules}
assert not loaded, loaded
