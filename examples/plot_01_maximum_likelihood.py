r"""
What does maximum likelihood choose?
====================================

Maximum likelihood chooses the parameter under which the observed data are most probable (Fisher, 1922, *On
the Mathematical Foundations of Theoretical Statistics*, https://doi.org/10.1098/rsta.1922.0009). Six tosses
of a coin show how it works: what is maximised, why its logarithm is maximised instead, and what more data
change. They also show that maximum likelihood brings the model near to the distribution of the data. A VAE is
trained by the same rule. Its parameters are the weights of networks, and its likelihood contains an integral.
The other scripts are about that integral.
"""

# %%
# Six tosses, one parameter
# -------------------------
# A coin shows heads with probability :math:`\theta`. We toss it six times, observe H T H T H H, and write 1 for
# heads. The tosses are independent, so their probabilities multiply:
#
# .. math:: L(\theta) = \prod_{n=1}^6 p_\theta(x_n) = \theta^4 (1 - \theta)^2 , \qquad
#     \log L(\theta) = 4 \log \theta + 2 \log(1 - \theta)
#
# The derivative of the logarithm is :math:`4/\theta - 2/(1 - \theta)`. It is zero at :math:`\hat\theta = 4/6`,
# the proportion of heads.
#
# With the data fixed, :math:`L` is a function of :math:`\theta`. It is not a density: its integral is not 1.
# With :math:`\theta` fixed, :math:`L` is the probability of the data, and its sum over all 64 outcomes is 1.

from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from scipy import integrate, stats

import pyro_vae as pv

tosses = np.array([1, 0, 1, 0, 1, 1])


def likelihood(theta, x):
    return np.prod(stats.bernoulli.pmf(x, theta))


best = tosses.mean()
area = integrate.quad(likelihood, 0, 1, args=(tosses,))[0]
total = sum(likelihood(best, outcome) for outcome in product([0, 1], repeat=6))
print(f"maximum of the likelihood:  L({best:.4f}) = {likelihood(best, tosses):.5f}")
print(f"its integral over theta:    {area:.5f} = 1 / {1 / area:.0f}")
print(f"its sum over all outcomes:  {total:.5f}, at theta = {best:.4f}")

# %%
# The same maximum by gradient ascent
# -----------------------------------
# Networks have no closed form for the maximum, but they have a gradient. Here is the coin as a Pyro program,
# fitted in the same way as a VAE. It has no latent variable yet. So the guide is empty, and
# :class:`pyro_vae.ELBO` equals the log-likelihood.


def coin(x):
    theta = pyro.param("theta", torch.tensor(0.3), constraint=dist.constraints.unit_interval)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Bernoulli(theta), obs=x)


def nothing_latent(x):
    pass


pyro.clear_param_store()
x = torch.tensor(tosses, dtype=torch.float32)
history = pv.fit(coin, nothing_latent, x, pv.ELBO(), epochs=300, lr=0.05, seed=0, progress=False)
climbed = pyro.param("theta").item()
print(f"start   theta = 0.3000   mean log-likelihood {history.train_bound.iloc[0]:.4f} nats per toss")
print(f"end     theta = {climbed:.4f}   mean log-likelihood {history.train_bound.iloc[-1]:.4f} nats per toss")

grid = np.linspace(0.005, 0.995, 397)
curve = np.array([likelihood(theta, tosses) for theta in grid])
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
figure.suptitle("The likelihood of H T H T H H, and its logarithm: one maximum, at 4/6")
for ax, values, label in ((left, curve, "likelihood"), (right, np.log(curve), "log-likelihood (nats)")):
    ax.plot(grid, values, color=pv.plots.BLUE)
    ax.axvline(best, color=pv.plots.BLACK, linestyle="--", linewidth=1)
    ax.set(xlabel="theta, the probability of heads", ylabel=label)
right.set_ylim(-20, 0)

# %%
# Why the logarithm?
# ------------------
# The product of many probabilities is too small for a floating-point number. With 64 bits, a number far below
# :math:`10^{-323}` is rounded to zero, and zero has no gradient to follow. The logarithm is an increasing
# function, so the sum of the logarithms has the same maximum, and it stays in range. This is not a rare case: a
# minibatch of small images has thousands of pixels.

rng = np.random.default_rng(0)
many = rng.binomial(1, 2 / 3, size=2000)
logs = stats.bernoulli.logpmf(many, 2 / 3)
print(f"2000 tosses: product {likelihood(2 / 3, many)}, sum of logs {logs.sum():.1f} nats")

# %%
# What more data change
# ---------------------
# The log-likelihood is a sum, so its curvature at the maximum grows with the number of tosses N. A sharp
# maximum leaves little uncertainty. The standard error of the estimate is one over the square root of the
# curvature. In general this holds for large N. For the coin it holds for every N, with the true :math:`\theta`
# in the formula:
#
# .. math:: -\frac{d^2 \log L}{d\theta^2}\bigg|_{\hat\theta} = \frac{N}{\hat\theta (1 - \hat\theta)} , \qquad
#     \operatorname{se}(\hat\theta) = \sqrt{\frac{\hat\theta (1 - \hat\theta)}{N}}
#
# The left figure shows the log-likelihood minus its maximum, for data with two thirds of heads. For the right
# figure we toss a coin with :math:`\theta = 2/3` N times and take the proportion of heads. We repeat this
# 20,000 times. The root mean squared error of the estimates follows the formula: four times the data halve the
# error. The column z is the mean squared error minus its formula, in standard errors.


def log_likelihood(theta):
    return dist.Bernoulli(theta).log_prob(x).sum()


curvature = -torch.autograd.functional.hessian(log_likelihood, torch.tensor(best)).item()
print(f"six tosses: curvature {curvature:.2f}, standard error {curvature**-0.5:.3f}\n")

truth, repeats = 2 / 3, 20_000
sizes = np.array([6, 24, 96, 384, 1536])
rows = {}
for size in sizes:
    estimates = rng.binomial(size, truth, size=repeats) / size
    squares = pv.Estimate.of(torch.tensor((estimates - truth) ** 2))
    exact = truth * (1 - truth) / size
    z = (squares.value - exact) / squares.standard_error
    rows[size] = {"measured error": squares.value**0.5, "formula": exact**0.5, "z": z}
spread = pd.DataFrame(rows).T.rename_axis("N")
print(spread.round(4).to_string())

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
figure.suptitle("More tosses: a sharper log-likelihood, and a smaller error")
colours = (pv.plots.BLUE, pv.plots.VERMILLION, pv.plots.GREEN)
for size, colour, style in zip((6, 24, 96), colours, ("-", "--", ":"), strict=True):
    per_toss = truth * np.log(grid / truth) + (1 - truth) * np.log((1 - grid) / (1 - truth))
    left.plot(grid, size * per_toss, color=colour, linestyle=style, linewidth=2, label=f"N = {size}")
left.set(xlabel="theta, the probability of heads", ylabel="log-likelihood minus its maximum (nats)")
left.set_ylim(-8, 0.3)
left.legend(loc="upper left")
right.loglog(sizes, spread["formula"], color=pv.plots.BLACK, label="formula")
right.loglog(sizes, spread["measured error"], "o", color=pv.plots.ORANGE, label="20,000 data sets")
right.set_xticks(sizes, labels=[str(size) for size in sizes])
right.set_yticks([0.01, 0.02, 0.05, 0.1, 0.2], labels=["0.01", "0.02", "0.05", "0.1", "0.2"])
right.minorticks_off()
right.set(xlabel="N, tosses in a data set", ylabel="error of the estimate of theta")
right.legend()

# %%
# Maximum likelihood minimises a KL
# ---------------------------------
# Let :math:`\hat p` be the distribution of the data: 4/6 heads and 2/6 tails. For every :math:`\theta`,
#
# .. math:: \frac1N \log L(\theta) = \sum_x \hat p(x) \log p_\theta(x)
#     = -\mathrm{H}(\hat p) - \mathrm{KL}(\hat p \,\|\, p_\theta)
#
# (add and subtract :math:`\sum_x \hat p \log \hat p`). The entropy does not depend on :math:`\theta`. So the
# parameter that maximises the likelihood minimises the KL from the data's distribution to the model's. No model
# has a mean log-likelihood above minus the entropy.

thetas = np.array([0.2, 0.5, 4 / 6, 0.9])
shares = np.array([best, 1 - best])
table = pd.DataFrame()
table["mean log-likelihood"] = [stats.bernoulli.logpmf(tosses, theta).mean() for theta in thetas]
table["-entropy"] = -stats.entropy(shares)
table["KL"] = [stats.entropy(shares, [theta, 1 - theta]) for theta in thetas]
table["-entropy - KL"] = table["-entropy"] - table["KL"]
print("in nats per toss:")
print(table.set_index(thetas.round(2)).rename_axis("theta").round(4).to_string())

# %%
# The claim, checked
# ------------------
# Gradient ascent ends at the proportion of heads. At every N, the error over repeated data sets agrees with the
# formula from the curvature. The mean log-likelihood equals minus the entropy minus the KL.
#
# For a VAE, :math:`\theta` stands for the weights of a decoder, and :math:`p_\theta(x)` contains an integral
# over a variable that is not observed. The next script, :doc:`plot_02_latent_variable`, is about that integral.

worst_z = spread["z"].abs().max()
difference = (table["mean log-likelihood"] - table["-entropy - KL"]).abs().max()
assert abs(climbed - best) < 1e-3, f"gradient ascent ended at {climbed:.5f}, not at {best:.5f}"
assert worst_z < 4, f"the mean squared error differs from its formula by z = {worst_z:.1f}"
assert difference < 1e-12, f"the mean log-likelihood and -entropy - KL differ by {difference:.1e} nats"
print(f"theta {climbed:.5f} against {best:.5f}; largest |z| {worst_z:.2f}; identity to {difference:.0e} nats")
