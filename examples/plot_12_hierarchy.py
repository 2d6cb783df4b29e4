r"""
What do more layers of latents add, and is a diffusion model a VAE?
===================================================================

Each layer adds a KL to the ELBO, and nothing else changes. More layers are not better by themselves: on the
digits, two layers with the training steps of one layer end about half a nat lower. A diffusion model is a VAE
with one layer for each noising step. Its guide has no parameters: it only adds noise. Its loss is the same
sum of KLs. With Gaussian data every term has a closed form. So we can check the ELBO, and see what closes the
gap to log p(x).

Sønderby, Raiko, Maaløe, Sønderby and Winther (2016), `Ladder Variational Autoencoders
<https://arxiv.org/abs/1602.02282>`_; Ho, Jain and Abbeel (2020), `Denoising Diffusion Probabilistic Models
<https://arxiv.org/abs/2006.11239>`_; Kingma, Salimans, Poole and Ho (2021), `Variational Diffusion Models
<https://arxiv.org/abs/2107.00630>`_.
"""

# %%
# One KL for each layer
# ---------------------
# The model has two layers, :math:`p(z_2)\,p(z_1 \mid z_2)\,p(x \mid z_1)`. The guide is a
# :class:`pyro_vae.Ladder`, which samples in the same order, :math:`q(z_2 \mid x)\,q(z_1 \mid x, z_2)`:
#
# .. math:: \mathrm{ELBO} = \mathbb{E}_q \log p(x \mid z_1)
#     - \mathrm{KL}\bigl(q(z_2 \mid x) \,\|\, p(z_2)\bigr)
#     - \mathbb{E}_{q(z_2 \mid x)} \mathrm{KL}\bigl(q(z_1 \mid x, z_2) \,\|\, p(z_1 \mid z_2)\bigr)
#
# :func:`pyro_vae.active_units` gives the KL of each dimension. Its sum over a site is that site's term. A Pyro
# trace gives the reconstruction term, and the sum of the three must be the ELBO. For a lower layer, use the KL
# rather than "active": a dimension of z1 may vary with x through z2 alone, which costs no KL.
import math

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

import pyro_vae as pv
from pyro_vae.plots import BLACK, BLUE, GREEN, objective_colour

digits = pv.data.load("digits", binarize="dynamic")
x = digits.test.x
pyro.set_rng_seed(0)
settings = {"epochs": 60, "batch_size": 128, "lr": 3e-3, "seed": 0, "progress": False}
two = pv.mlp_hierarchical_vae(digits.event_shape, latent_dims=(10, 5), hidden_dims=(100, 50), guide="ladder")
pv.fit(two, digits.train, pv.ELBO(), **settings)

elbo = pv.Estimate.of(pv.ELBO(200).bound(two, x).detach())
table = pv.active_units(two, x, 200)
per_site = table.groupby(level="site").kl.sum()
with torch.no_grad(), pyro.plate("particles", 200, dim=-2):
    latents = poutine.trace(two.guide).get_trace(x)
    run = poutine.trace(poutine.replay(two.model, latents)).get_trace(x)
run.compute_log_prob()
reconstruction = run.nodes["x"]["log_prob"].mean().item()
print("two layers, test digits, nats per datum:")
print(f"reconstruction {reconstruction:.2f} - KL of z1 {per_site['z1']:.2f} - KL of z2 {per_site['z2']:.2f} = "
      f"{reconstruction - per_site.sum():.2f}; the ELBO by pyro_vae: {elbo.value:.2f}")  # fmt: skip

figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharey=True, width_ratios=(10, 5))
figure.suptitle("KL of each latent dimension in the two layers, largest first")
for ax, site, colour, where in zip(axes, ("z1", "z2"), (BLUE, GREEN), ("below", "on top"), strict=True):
    of_layer = table.loc[site].sort_values("kl", ascending=False)
    ax.bar(of_layer.index.astype(str), of_layer.kl, yerr=of_layer.kl_se, color=colour, error_kw={"linewidth": 0.8})
    ax.set(title=f"{site}, the layer {where}: {of_layer.kl.sum():.2f} nats", xlabel=f"dimension of {site}")
axes[0].set_ylabel("KL (nats per datum)")

# %%
# One layer or two?
# -----------------
# The model with one layer has ten latent dimensions. Its width gives it at least as many parameters, and it
# trains for as many steps. The importance-weighted bound (:class:`pyro_vae.IWAE`, 500 samples) compares models
# rather than guides. Each model was trained once: the error is over test digits, not over training seeds.
one = pv.mlp_vae(digits.event_shape, latent_dim=10, hidden_dims=(150,))
pv.fit(one, digits.train, pv.ELBO(), **settings)
bounds, rows = {}, []
for name, pair in (("one layer", one), ("two layers", two)):
    with torch.no_grad():
        bounds[name] = pv.IWAE(500).bound(pair, x)
        found = [pv.Estimate.of(pv.ELBO(20).bound(pair, x)), pv.Estimate.of(bounds[name])]
    rows.append([name, sum(p.numel() for p in pair.parameters()), *map(str, found)])
print(pd.DataFrame(rows, columns=["", "parameters", "ELBO", "IWAE, 500"]).to_string(index=False))
gain = pv.Estimate.of(bounds["two layers"] - bounds["one layer"])
print(f"two layers minus one: {gain} nats per datum (IWAE, paired)")

# %%
# A diffusion model is a hierarchy with a fixed guide
# ---------------------------------------------------
# The guide adds noise to x in T steps. The model starts from :math:`\mathcal N(0, 1)` and goes back:
#
# .. math:: q(z_t \mid z_{t-1}) = \mathcal N\bigl(\sqrt{1 - \beta_t}\, z_{t-1}, \beta_t\bigr), \quad z_0 = x, \qquad
#     p(x, z) = p(z_T) \textstyle\prod_{t=2}^{T} p(z_{t-1} \mid z_t) \; p(x \mid z_1)
#
# The data are :math:`x \sim q(x) = \mathcal N(0, s^2)`. Then :math:`z_t` has variance :math:`v_t = (1 -
# \beta_t) v_{t-1} + \beta_t`, with :math:`v_0 = s^2`, and the exact reverse of the guide is Gaussian:
#
# .. math:: q(z_{t-1} \mid z_t) = \mathcal N(a_t z_t, r_t), \quad
#     a_t = \sqrt{1 - \beta_t}\, v_{t-1} / v_t, \quad r_t = \beta_t v_{t-1} / v_t
#
# The model takes this mean, which a real diffusion model has to learn. Its variance is :math:`r_t` or
# :math:`\beta_t`; the latter is one of the two fixed variances of Ho et al. Each :math:`z_t` is a site in the
# same plate.
scale = 2.0


def reverse(betas, exact):
    """The model's factor of the mean and its variance for each t = 1 to T, and the variance v_T of z_T."""
    v, steps = scale**2, []
    for beta in betas:
        after = (1 - beta) * v + beta
        steps.append((math.sqrt(1 - beta) * v / after, beta * v / after if exact else beta))
        v = after
    return steps, v


def diffusion(betas, exact):
    steps, _ = reverse(betas, exact)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample(f"z{len(betas)}", dist.Normal(torch.zeros_like(x), 1.0))
            for t in range(len(betas) - 1, -1, -1):
                below = dist.Normal(steps[t][0] * z, math.sqrt(steps[t][1]))
                z = pyro.sample(f"z{t}", below) if t else pyro.sample("x", below, obs=x)

    def guide(x):
        z = x
        with pyro.plate("data", len(x)):
            for t, beta in enumerate(betas, 1):
                z = pyro.sample(f"z{t}", dist.Normal(math.sqrt(1 - beta) * z, math.sqrt(beta)))

    return model, guide


# %%
# The ELBO as a sum of KLs
# ------------------------
# Ho et al. and Kingma et al. regroup the terms in two steps. The first step reverses the guide. Each factor of
# the guide depends on x only through :math:`z_{t-1}`, so Bayes' rule given x holds for it. In the product of
# the factors, all fractions but one cancel:
#
# .. math:: q(z_t \mid z_{t-1}) = q(z_{t-1} \mid z_t, x)\, \frac{q(z_t \mid x)}{q(z_{t-1} \mid x)} \text{ for } t \ge 2,
#     \qquad q(z \mid x) = q(z_T \mid x) \prod_{t=2}^{T} q(z_{t-1} \mid z_t, x)
#
# Now model and guide both go from :math:`z_T` down. The second step inserts this into :math:`-\mathrm{ELBO} =
# \mathbb{E}_q \log q(z \mid x) - \mathbb{E}_q \log p(x, z)` and matches the factors. Each match is a KL, and
# :math:`p(x \mid z_1)` is left over:
#
# .. math:: -\mathrm{ELBO} = \mathrm{KL}\bigl(q(z_T \mid x) \,\|\, p(z_T)\bigr) + \sum_{t=2}^{T} \mathbb{E}_q
#     \mathrm{KL}\bigl(q(z_{t-1} \mid z_t, x) \,\|\, p(z_{t-1} \mid z_t)\bigr) - \mathbb{E}_q \log p(x \mid z_1)
#
# All distributions are Gaussian, also :math:`q(z_{t-1} \mid z_t, x) = \mathcal N(\tilde\mu_t, \tilde\beta_t)`.
# With :math:`q(z_t \mid x) = \mathcal N(\sqrt{\bar\alpha_t}\,x, 1 - \bar\alpha_t)`, the difference of the means
# is linear in :math:`z_t`, and its expected square is known. :class:`pyro_vae.ELBO` uses none of this. It
# samples the chain, with a Monte Carlo KL, since model and guide sample in opposite orders.


def normal_kl(square, own, other):
    """KL of normals with variances own and other, in nats; square is the expected squared difference of the means."""
    return 0.5 * (math.log(other / own) + (own + square) / other - 1)


def sum_of_terms(x, betas, exact):
    """The ELBO of each datum in nats, in closed form."""
    steps, _ = reverse(betas, exact)
    keep = [math.prod(1 - beta for beta in betas[:t]) for t in range(len(betas) + 1)]
    elbo = -normal_kl(keep[-1] * x**2, 1 - keep[-1], 1.0)
    for t, (beta, (a, r)) in enumerate(zip(betas, steps, strict=True), 1):
        on_x = math.sqrt(keep[t - 1]) * beta / (1 - keep[t])
        on_z = math.sqrt(1 - beta) * (1 - keep[t - 1]) / (1 - keep[t]) - a
        square = (on_x + on_z * math.sqrt(keep[t])) ** 2 * x**2 + on_z**2 * (1 - keep[t])
        if t > 1:
            elbo = elbo - normal_kl(square, beta * (1 - keep[t - 1]) / (1 - keep[t]), r)
        else:  # the last step gives x itself, so its term is a log-density, not a KL
            elbo = elbo - 0.5 * (math.log(2 * math.pi * r) + square / r)
    return elbo


# %%
# What closes the gap
# -------------------
# With the exact reverse, all factors of the model but the top one equal the guide's. Averaged over q(x), the
# gap is
#
# .. math:: \mathbb{E}_{q(x)} \bigl[ \log q(x) - \mathrm{ELBO}(x) \bigr] = \mathrm{KL}\bigl(q(z_T) \,\|\, p(z_T)\bigr)
#     = \mathrm{KL}\bigl(\mathcal N(0, v_T) \,\|\, \mathcal N(0, 1)\bigr)
#
# There, more steps help only by adding noise, :math:`\beta = 0.2` each. With the variance fixed at
# :math:`\beta_t`, each step has a small error, and finer steps help: T steps that together keep
# :math:`\bar\alpha_T = e^{-8}` of the signal's variance. We scale the data so that their mean square is
# :math:`s^2`. Their mean log-density is then exactly its mean under q(x), which no bound can exceed on average.
data = torch.randn(500, generator=torch.Generator().manual_seed(0)).double()
data *= scale / data.square().mean().sqrt()
log_q = dist.Normal(torch.zeros(1).double(), scale).log_prob(data).mean().item()
pyro.set_rng_seed(0)
rows = []
for exact in (True, False):
    for number in (1, 2, 4, 8, 16, 32):
        betas = [0.2 if exact else 1 - math.exp(-8 / number)] * number
        closed = sum_of_terms(data, betas, exact)
        sampled = pv.ELBO(400, kl="monte_carlo").bound(*diffusion(betas, exact), data)
        difference = pv.Estimate.of(sampled - closed)
        top = normal_kl(0.0, reverse(betas, exact)[1], 1.0)
        z_value = difference.value / difference.standard_error if difference.standard_error > 1e-9 else 0.0
        rows.append([exact, number, sampled.mean().item(), closed.mean().item(), z_value,
                     log_q - closed.mean().item(), top])  # fmt: skip
columns = ["exact", "T", "ELBO, sampled", "sum of terms", "z", "gap to log q(x)", "KL(q(z_T)||p)"]
results = pd.DataFrame(rows, columns=columns)
print("nats per datum; z is the difference of the first two in standard errors")
print(results.round(5).to_string(index=False))

figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained", sharey=True)
figure.suptitle("ELBO of a diffusion model against its number of steps")
titles = ("exact reverse, 0.2 noise per step", "variance fixed, equal total noise")
for ax, exact, title in zip(axes, (True, False), titles, strict=True):
    part = results[results.exact == exact]
    ax.axhline(log_q, color=BLACK, label="log q(x), exact")
    ax.plot(part["T"], part["sum of terms"], "--", color=BLUE, label="sum of KL terms")
    ax.plot(part["T"], part["ELBO, sampled"], "o", color=objective_colour("ELBO, Monte Carlo KL"),
            markerfacecolor="none", markersize=8, label="pv.ELBO, sampled")  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_xticks(part["T"], labels=part["T"].astype(str))
    ax.set(xlabel="number of steps T", title=title)
axes[0].set_ylabel("bound on log p(x) (nats per datum)")
axes[0].legend(loc="lower right", frameon=False)

# %%
# The claim, checked
# ------------------
# The three terms of the two layers sum to their ELBO. The bound of two layers is below that of one. At every T
# the diffusion model's sampled ELBO agrees with the sum of its terms, by a z-test. With the exact reverse the
# gap equals the top KL, up to rounding, and it vanishes as T grows. With the fixed variance the gap shrinks as
# the steps get finer: at 32 steps it is less than a tenth of the gap at 2.
terms = reconstruction - per_site.sum()
assert abs(terms - elbo.value) < 0.05, f"the terms sum to {terms:.3f}, the ELBO is {elbo.value:.3f} nats"
assert gain.value < -3 * gain.standard_error, f"two layers minus one: {gain} nats"
worst = results.z.abs().max()
assert worst < 4, f"ELBO against the sum of terms: |z| = {worst:.1f}"
exact, fixed = (results[results.exact == flag].set_index("T") for flag in (True, False))
off = (exact["gap to log q(x)"] - exact["KL(q(z_T)||p)"]).abs().max()
assert off < 1e-9, f"the gap differs from the top KL by {off:.1e} nats"
assert exact["gap to log q(x)"][32] < 1e-5, f"the gap at 32 steps is {exact['gap to log q(x)'][32]:.1e} nats"
ratio = fixed["gap to log q(x)"][32] / fixed["gap to log q(x)"][2]
assert fixed["gap to log q(x)"].is_monotonic_decreasing, f"gaps: {fixed['gap to log q(x)'].to_dict()}"
assert 0 < ratio < 0.1, f"the gap at 32 steps is {ratio:.2f} of that at 2"
print(f"checked: largest |z| {worst:.1f}; gap minus top KL at most {off:.0e} nats;")
print(f"the gap at 32 steps is {ratio:.3f} of that at 2")
