r"""
Why can't p(x) be averaged over the prior?
==========================================

In one dimension it can. A model with a latent variable z has p(x) as an integral over all z. The average of
p(x|z) over samples of the prior is unbiased for it. But only the z that explain x contribute, and in many
dimensions no sample of the prior is among them. The number of samples needed is about the exponential of
KL(p(z|x) || p(z)) (Chatterjee and Diaconis, 2018, *The Sample Size Required in Importance Sampling*,
https://arxiv.org/abs/1511.01437). This KL grows with the number of dimensions. A guide q(z|x) that samples
near the posterior needs few samples. A VAE learns such a guide together with its model (Kingma and Welling,
2014, *Auto-Encoding Variational Bayes*, https://arxiv.org/abs/1312.6114).
"""

# %%
# A latent variable
# -----------------
# Each datum x has a latent variable z of its own. The model generates x in three steps: draw z from the prior
# :math:`p(z)`, pass it through a decoder f, and add noise. We observe x alone. Any z may have generated it, so
# all z count, each with its prior probability:
#
# .. math:: p(x) = \int p(x \mid z) \, p(z) \, dz , \qquad
#     z \sim \mathcal N(0, 1), \quad x \mid z \sim \mathcal N(f(z), \sigma^2)
#
# This is a mixture of Gaussians, one for each z. A nonlinear decoder gives :math:`p(x)` shapes that no single
# Gaussian has. The left figure shows the decoder and 300 draws. The right figure shows :math:`p(x)` by
# quadrature over z, many draws of x, and a Gaussian with the same mean and variance.

import math
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from scipy import integrate, stats

import pyro_vae as pv


def bend(z):
    return 2 * np.tanh(2 * z) + 0.3 * z


rng = np.random.default_rng(0)
noise = 0.4
z_draws = rng.standard_normal(20_000)
x_draws = bend(z_draws) + noise * rng.standard_normal(20_000)
z_grid, x_grid = np.linspace(-6, 6, 1001), np.linspace(-5, 5, 401)
joint = stats.norm.pdf(z_grid) * stats.norm.pdf(x_grid[:, None], bend(z_grid), noise)
density = integrate.trapezoid(joint, z_grid)
print(f"integral of p(x) over x: {integrate.trapezoid(density, x_grid):.4f}")

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained")
figure.suptitle("A decoder bends a Gaussian z into a p(x) with two peaks")
left.plot(z_draws[:300], x_draws[:300], ".", color=pv.plots.SKY, label="draws of z and x")
left.plot(z_grid, bend(z_grid), color=pv.plots.BLACK, label="decoder f(z)")
left.set(xlabel="z", ylabel="x", xlim=(-3.5, 3.5), ylim=(-5, 5))
right.hist(x_draws, 80, density=True, color=pv.plots.SKY, alpha=0.5, label="draws of x")
right.plot(x_grid, density, color=pv.plots.BLACK, label="p(x), by quadrature")
gaussian = stats.norm.pdf(x_grid, x_draws.mean(), x_draws.std())
right.plot(x_grid, gaussian, color=pv.plots.VERMILLION, linestyle="--", label="one Gaussian")
right.set(xlabel="x", ylabel="density", xlim=(-5, 5))
for ax in (left, right):
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, columnspacing=1)

# %%
# A model with a known p(x)
# -------------------------
# A grid of 10 points on each axis has :math:`10^d` points in d dimensions. Quadrature soon costs too much.
# To test sampling, we take a model whose :math:`p(x)` has a closed form for every d. Its decoder is linear,
# with orthonormal columns W:
#
# .. math:: z \sim \mathcal N(0, I_d), \quad x \mid z \sim \mathcal N(W z, \sigma^2 I_{2d})
#     \quad \Rightarrow \quad x \sim \mathcal N(0, W W^\top + \sigma^2 I_{2d}), \quad
#     z \mid x \sim \mathcal N\left(\frac{W^\top x}{1 + \sigma^2}, \frac{\sigma^2}{1 + \sigma^2} I_d\right)
#
# The average over the prior is importance sampling with the prior as guide: the weight :math:`p(x \mid z) p(z)
# / q(z \mid x)` is then :math:`p(x \mid z)`. The second guide is near the posterior but not equal to it, like
# the guide of a VAE: its standard deviations are 20% too wide. Each guide draws 10,000 samples for each of 100
# data, which are simulated from the model.

sigma, data, samples = 0.5, 100, 10_000


def linear_gaussian(d, seed=0):
    pyro.set_rng_seed(100 * seed + d)
    loadings = torch.linalg.qr(torch.randn(2 * d, d)).Q
    width = sigma / math.sqrt(1 + sigma**2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(d), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ loadings.T, sigma).to_event(1), obs=x)

    def prior(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(d), 1.0).to_event(1))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ loadings / (1 + sigma**2), 1.2 * width).to_event(1))

    x = torch.randn(data, d) @ loadings.T + sigma * torch.randn(data, 2 * d)
    marginal = dist.LowRankMultivariateNormal(torch.zeros(2 * d), loadings, torch.full((2 * d,), sigma**2))
    exact = marginal.log_prob(x)
    return model, prior, guide, x, exact


# %%
# The same number of samples, more dimensions
# -------------------------------------------
# ``error`` is :math:`\log \hat p(x) - \log p(x)` in nats, as mean ± standard error over the data. ``own error``
# is the standard error that the estimate of one datum reports for itself (median). ``ESS`` is the effective
# sample size of the weights (median). ``k-hat > 0.7`` is the proportion of data whose weights can't be trusted.
# :func:`pyro_vae.log_likelihood` warns about them; we silence the warning and print the proportion.
#
# In 32 dimensions the prior's average is about 20 nats too low. Its mean over all possible samples is correct,
# but this mean depends on samples that occur about once in :math:`10^{11}` draws. None of them was drawn, so
# the estimate reports a standard error of less than one nat. Pareto k-hat reveals the failure.

rows, errors = [], {}
for d in (1, 2, 4, 8, 16, 32):
    model, prior, guide, x, exact = linear_gaussian(d)
    for name, q in (("prior", prior), ("guide", guide)):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*k-hat.*")
            ll = pv.log_likelihood(model, q, x, samples, seed=0, progress=False)
        errors[name, d] = ll.per_datum - exact
        own, ess = ll.per_datum_error.median().item(), ll.ess.median().item()
        found = pv.Estimate.of(errors[name, d])
        rows.append((d, name, found, f"{own:.3f}", f"{ess:.0f}", f"{ll.share_high_k:.0%}"))
table = pd.DataFrame(rows, columns=["d", "samples from", "error", "own error", "ESS", "k-hat > 0.7"])
print(table.to_string(index=False))

# %%
# How many samples are needed?
# ----------------------------
# Draw z from the prior until some samples lie where the posterior does. This takes about :math:`\exp
# \mathrm{KL}(p(z \mid x) \,\|\, p(z))` draws, up to a factor that depends on the spread of the log-weights and
# grows more slowly. In this model the mean KL over x is :math:`\tfrac d2 \log(1 + 1/\sigma^2)`, which is 0.8
# nats for each dimension. So each dimension multiplies the number of draws by :math:`\sqrt{1 + 1/\sigma^2} =
# \sqrt 5`.
#
# We measure the smallest power of two, k, at which the average over k samples is less than half a nat too low.
# For each of 50 data, :func:`pyro_vae.log_weights` gives 32,768 weights, which we divide into groups of k. The
# error is the mean over groups and data.

needed = {}
for d in (1, 2, 4, 6, 8):
    model, prior, _, x, exact = linear_gaussian(d)
    log_w = pv.log_weights(model, prior, x[:50], num_particles=2**15, chunk_size=2**12)
    for k in 2 ** np.arange(16):
        averages = torch.logsumexp(log_w.reshape(-1, k, 50), 1) - math.log(k)
        if (averages - exact[:50]).mean() > -0.5:
            needed[d] = k
            break
print("d        " + "".join(f"{d:8d}" for d in needed))
print("samples  " + "".join(f"{k:8d}" for k in needed.values()))

dimensions = np.array([1, 2, 4, 8, 16, 32])
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained")
figure.suptitle("Samples of the prior miss the posterior in many dimensions")
for name, colour, marker in (("prior", pv.plots.SKY, "o"), ("guide", pv.plots.ORANGE, "s")):
    found = [pv.Estimate.of(errors[name, d]) for d in dimensions]
    middle, bar = [e.value for e in found], [e.standard_error for e in found]
    left.errorbar(dimensions, middle, bar, color=colour, marker=marker, capsize=3, label=name)
left.axhline(0, color=pv.plots.BLACK, linewidth=1)
left.set(xlabel="d, latent dimensions", ylabel="error of log p(x), 10,000 samples (nats)")
left.legend(title="samples from", loc="lower left")
reach = np.arange(1, 9)
right.semilogy(reach, 10.0**reach, color=pv.plots.PURPLE, linestyle=":", label="grid of 10 on each axis")
right.semilogy(list(needed), list(needed.values()), "o", color=pv.plots.SKY, label="prior, measured")
right.semilogy(reach, 5 ** (reach / 2), color=pv.plots.BLACK, linestyle="--", label="exp(mean KL)")
right.set(xlabel="d, latent dimensions", ylabel="samples for an error of half a nat")
right.legend(loc="upper left")

# %%
# The claim, checked
# ------------------
# Both averages are unbiased for p(x), so the ratio :math:`\hat p(x) / p(x)` has mean 1. We test this for the
# guide at every d. For the prior we test it up to d = 2, where 10,000 samples are enough to show it. In 32
# dimensions the guide's estimate is above the prior's by more than 4 standard errors, and the guide's error is
# small. The number of samples that the prior needs grows geometrically with d.
#
# Here the guide was given. The ELBO finds a guide without knowing the posterior: :doc:`plot_03_elbo`.

cases = [("prior", d) for d in (1, 2)] + [("guide", d) for d in (1, 2, 4, 8, 16, 32)]
ratios = [pv.Estimate.of(errors[case].exp()) for case in cases]
worst_z = max(abs(ratio.value - 1) / ratio.standard_error for ratio in ratios)
gain = pv.Estimate.of(errors["guide", 32] - errors["prior", 32])
left_over = pv.Estimate.of(errors["guide", 32])
factor = (needed[8] / needed[1]) ** (1 / 7)
assert worst_z < 4, f"the mean of a ratio is {worst_z:.1f} standard errors from 1"
assert gain.value > 4 * gain.standard_error, f"at d = 32 guide minus prior is {gain} nats: not above 4 standard errors"
assert abs(left_over.value) < 0.02, f"at d = 32 the guide's error is {left_over} nats"
assert 1.7 < factor < 3.5, f"each dimension multiplies the number of samples by {factor:.2f}"
print(f"unbiased: largest |z| {worst_z:.1f}; at d = 32, guide minus prior is {gain} nats,")
print(f"and the guide's error is {left_over} nats;")
print(f"each dimension multiplies the number of samples by {factor:.2f}, sqrt(5) = {5**0.5:.2f}")
