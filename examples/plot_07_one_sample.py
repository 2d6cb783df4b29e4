r"""
Why is one sample per datum enough?
===================================

A minibatch averages over data as well as over samples of :math:`z`. Its gradient is noisy for two reasons:
which data it contains, and which :math:`z` were drawn for them. More samples per datum reduce only the second
noise; more data reduce both. So at equal cost, the ELBO's gradient has the lowest variance with one sample
per datum. Kingma and Welling (2014, *Auto-Encoding Variational Bayes*, `arXiv:1312.6114
<https://arxiv.org/abs/1312.6114>`_) found one sample enough if the minibatch is large, for example 100 data.
"""

# %%
# Two sources of noise
# --------------------
# Take M data at random (with replacement) and L samples :math:`z` for each. Let :math:`g(x, z)` be the gradient
# of the ELBO for one datum and one sample. The minibatch's gradient and its variance (the trace of its
# covariance) are
#
# .. math:: \hat g = \frac1M \sum_{i=1}^M \frac1L \sum_{l=1}^L g(x_i, z_{il}), \qquad
#     \operatorname{Var} \hat g = \frac{V_x}{M} + \frac{V_z}{M L},
#
# .. math:: V_x = \operatorname{Var}_x \mathbb E_z\, g(x, z), \qquad
#     V_z = \mathbb E_x \operatorname{Var}_z g(x, z).
#
# This is the law of total variance, for M independent terms. We count M L passes through the decoder as the
# cost. With :math:`C = M L` fixed, the variance is :math:`(L V_x + V_z) / C`: every sample after the first adds
# :math:`V_x / C`.
#
# We measure both variances on a VAE after three epochs, with 300 digits. :math:`V_z / 300` is the variance of
# the gradient of all 300 digits together, with one sample each. Only :math:`z` varies in it, and we draw it 100
# times. For :math:`V_x` we take two gradients :math:`g_n, g'_n` of each digit alone, with 8 samples each. They
# are independent, so :math:`g_n \cdot g'_n` has the mean :math:`\lVert \mathbb E_z g \rVert^2`, without the
# noise that a square would add.
import matplotlib.pyplot as plt
import pandas as pd
import pyro
import torch

import pyro_vae as pv

digits = pv.data.load("digits", binarize="dynamic")


def new_vae():
    pyro.set_rng_seed(0)
    return pv.mlp_vae(digits.event_shape, latent_dim=5, hidden_dims=(100,))


vae = new_vae()
settings = {"batch_size": 100, "lr": 3e-3, "seed": 0, "progress": False}
pv.fit(vae, digits.train, pv.ELBO(), epochs=3, **settings)
pool = digits.train.x[:300]
parameters = list(vae.parameters())


def gradient(x, samples):
    bound = pv.ELBO(samples, max_plate_nesting=1).bound(vae, x).mean()
    return torch.cat([part.flatten() for part in torch.autograd.grad(bound, parameters)]).double()


def variance(draws):
    """Trace of the covariance of the draws, with its standard error."""
    return pv.Estimate.of((draws - draws.mean(0)).square().sum(1) * len(draws) / (len(draws) - 1))


pyro.set_rng_seed(1)
of_all = variance(torch.stack([gradient(pool, 1) for _ in range(100)]))
V_z = pv.Estimate(of_all.value * len(pool), of_all.standard_error * len(pool))
first, second = (torch.stack([gradient(pool[n : n + 1], 8) for n in range(len(pool))]) for _ in range(2))
V_x = pv.Estimate.of((first * second).sum(1) - first.mean(0) @ second.mean(0))
print(f"V_x, from the choice of data:  {V_x}")
print(f"V_z, from the samples of z:    {V_z}")

# %%
# (All variances here are in squared nats per squared unit of the parameters.) For a single datum, :math:`z` is
# the larger source of noise. Even so, a second sample is not worth its cost: another datum brings a new
# :math:`z` and is itself new.
#
# Predicted and measured, at equal cost
# -------------------------------------
# Now we measure the variance of gradients of training minibatches, from 120 minibatches of each kind, all with
# M L = 100. The error of :math:`V_x` is its standard error over digits. It treats the 300 digits as a random
# sample, although the minibatches come from these same digits. So it is too large rather than too small.
rows, measured, predicted = [], {}, {}
for M, L in ((100, 1), (50, 2), (20, 5), (10, 10)):
    minibatches = [pool[torch.randint(len(pool), (M,))] for _ in range(120)]
    measured[L] = variance(torch.stack([gradient(x, L) for x in minibatches]))
    error = ((V_x.standard_error / M) ** 2 + (V_z.standard_error / (M * L)) ** 2) ** 0.5
    predicted[L] = pv.Estimate(V_x.value / M + V_z.value / (M * L), error)
    rows.append([M, L, V_x.value / M, V_z.value / (M * L), predicted[L].value, error])
    rows[-1] += [measured[L].value, measured[L].standard_error]
names = ["M", "L", "V_x / M", "V_z / (M L)", "predicted", "its error", "measured", "its error"]
table = pd.DataFrame(rows, columns=names).set_index(["M", "L"])
print(table.round(2).to_string())

figure, ax = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
labels = [f"M = {M}, L = {L}" for M, L in table.index]
ax.bar(labels, table["V_x / M"], width=0.6, color=pv.plots.SKY, label="predicted: choice of data, V_x / M")
stacked = {"bottom": table["V_x / M"], "color": pv.plots.ORANGE, "hatch": "//", "edgecolor": "white"}
ax.bar(labels, table["V_z / (M L)"], width=0.6, label="predicted: samples of z, V_z / (M L)", **stacked)
values = [estimate.value for estimate in measured.values()]
errors = [estimate.standard_error for estimate in measured.values()]
ax.errorbar(labels, values, errors, color=pv.plots.BLACK, fmt="o", capsize=4, label="measured")
ax.set(ylabel="total variance (nats² per unit² of parameter)")
ax.set(title="ELBO gradient, 100 decoder passes per step")
ax.legend(loc="upper left", frameon=False)

# %%
# The variance due to :math:`z` is the same in all four, since all draw 100 samples of :math:`z`. The variance
# due to the data grows as the data become fewer.
#
# Training at equal cost
# ----------------------
# A gradient with less noise should train faster. We train each VAE for 260 steps of 100 decoder passes. With M
# = 100 it sees the data 20 times, and with M = 10 twice. The best learning rate may differ, so we try three.
runs = []
for M, L, epochs in ((100, 1, 20), (20, 5, 4), (10, 10, 2)):
    for lr in (1e-3, 3e-3, 1e-2):
        trained = new_vae()
        settings = {"epochs": epochs, "batch_size": M, "lr": lr, "seed": 0, "progress": False}
        pv.fit(trained, digits.train, pv.ELBO(L), **settings)
        pyro.set_rng_seed(2)
        with torch.no_grad():
            runs.append([M, L, lr, pv.ELBO(64).bound(trained, digits.test.x)])
best = {L: max((run[3] for run in runs if run[1] == L), key=torch.mean) for L in (1, 5, 10)}
rows = []
for M, L, lr, bound in runs:
    estimate = pv.Estimate.of(bound)
    rows.append([f"M = {M}, L = {L}", lr, estimate.value, estimate.standard_error])
held_out = pd.DataFrame(rows, columns=["minibatch", "lr", "ELBO", "error"])
print("Held-out ELBO, in nats per digit:")
by_minibatch = held_out.groupby(["minibatch", "lr"], sort=False).ELBO.first().unstack()
print(by_minibatch.round(2).to_string())
for L in (5, 10):
    print(f"L = 1 above L = {L}, each at its best learning rate: {pv.Estimate.of(best[1] - best[L])}")

figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
groups = held_out.groupby("minibatch", sort=False)
for (name, rows), style in zip(groups, ("o-", "s--", "^:"), strict=True):
    colour = pv.plots.objective_colour(pv.ELBO().name)
    ax.errorbar(rows.lr, rows.ELBO, rows.error, fmt=style, color=colour, label=name, capsize=3, markersize=8)
ax.set(xscale="log", xlabel="learning rate of Adam", ylabel="held-out ELBO (nats per datum)")
ax.set_xticks([1e-3, 3e-3, 1e-2], labels=["0.001", "0.003", "0.01"])
ax.minorticks_off()
ax.set_title("After 260 steps of 100 decoder passes each")
ax.legend(loc="lower right", frameon=False)

# %%
# The bars are standard errors over digits, which are the same for all results. The printed differences are
# paired, so they are far more precise. Each setting was trained once. One sample per datum ends highest at
# every learning rate: its model has seen five to ten times as many data. (:func:`pyro_vae.fit` draws without
# replacement, so the variance due to the data is a little smaller there.)
#
# Limits of the argument
# ----------------------
# The argument compares steps of equal cost. It does not say how many steps to take: small minibatches with one
# sample each and more steps are another use of the same passes. It holds for the ELBO alone, where more samples
# leave the mean unchanged. In :class:`pyro_vae.IWAE` they raise the bound itself and may be worth their cost:
# :doc:`plot_06_comparing_estimators`. It also leaves out the encoder, which is evaluated once per datum. If
# that costs as much as a decoder pass, a minibatch costs :math:`M (1 + L)`. Its variance times its cost is then
# :math:`(V_x + V_z / L)(1 + L)`, with the minimum at :math:`L = \sqrt{V_z / V_x}`.
product = {L: (V_x.value + V_z.value / L) * (1 + L) for L in (1, 2, 5, 10)}
print(f"sqrt(V_z / V_x) = {(V_z.value / V_x.value) ** 0.5:.2f}")
print("Variance at equal cost, encoder included, relative to L = 1:")
print("   ".join(f"L = {L}: {value / product[1]:.2f}" for L, value in product.items()))

# %%
# With the encoder included, two samples are as good as one here, and more are worse.
#
# The claim, checked
# ------------------
# Each measured variance agrees with its prediction (\|z\| < 4). L = 1 has the lowest variance, by more than 4
# standard errors. The VAE trained with L = 1 ends highest, by more than 3 paired standard errors.
for L in (1, 2, 5, 10):
    z = measured[L].value - predicted[L].value
    z /= (measured[L].standard_error ** 2 + predicted[L].standard_error ** 2) ** 0.5
    assert abs(z) < 4, f"L = {L}: measured {measured[L]}, predicted {predicted[L]}, z = {z:.1f}"
    print(f"L = {L:2d}: measured {measured[L]}, predicted {predicted[L]}, z = {z:.1f}")
for L in (2, 5, 10):
    z = measured[L].value - measured[1].value
    z /= (measured[L].standard_error ** 2 + measured[1].standard_error ** 2) ** 0.5
    assert z > 4, f"L = {L} has variance {measured[L]}, L = 1 has {measured[1]}, z = {z:.1f}"
    print(f"L = {L:2d} above L = 1 by {z:.1f} standard errors")
for L in (5, 10):
    lead = pv.Estimate.of(best[1] - best[L])
    assert lead.value > 3 * lead.standard_error, f"held-out ELBO, L = 1 minus L = {L}: {lead} nats"
