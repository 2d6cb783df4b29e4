r"""
Which estimator of the bound should I use?
==========================================

Every estimator here reduces the log-weights of K samples of the guide; a closed-form KL replaces part of them
by its mean. The estimators differ in three ways: how far their mean is below :math:`\log p(x)`, how noisy
their gradient is, and what they cost. More particles reduce the ELBO's noise, but never raise its mean. They
do raise the importance-weighted bound (Burda, Grosse and Salakhutdinov, 2016, *Importance Weighted
Autoencoders*, `arXiv:1509.00519 <https://arxiv.org/abs/1509.00519>`_). The pathwise gradient of this bound
then loses its signal for the guide (Rainforth et al., 2018, *Tighter Variational Bounds are Not Necessarily
Better*, `arXiv:1802.04537 <https://arxiv.org/abs/1802.04537>`_), unless it is doubly reparameterised (Tucker
et al., 2019, *Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives*, `arXiv:1810.04152
<https://arxiv.org/abs/1810.04152>`_). We measure all three on one small VAE. A table of recommendations is
near the end: `Which to choose`_. For ten particles and a flow guide, for example, it recommends ``pv.IWAE(10,
"dreg")``.
"""

# %%
# One model, one guide, and a reference for log p(x)
# --------------------------------------------------
# With :math:`w_k = p(x, z_k) / q(z_k \mid x)` and :math:`z_k \sim q(z \mid x)`, the average of K weights is
# unbiased for :math:`p(x)`. The logarithm of an average of 2,000 weights is our reference. A Pareto k-hat above
# 0.7 means that a few weights dominate the average of a datum, which is then probably too low. We print the
# proportion of such data, in place of the package's warning.
import textwrap
import warnings

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import torch

import pyro_vae as pv

warnings.filterwarnings("ignore", message=".*Pareto k-hat above 0.7")
digits = pv.data.load("digits", binarize="dynamic")
x = digits.test.x


def train(objective):
    pyro.set_rng_seed(0)
    vae = pv.mlp_vae(digits.event_shape, latent_dim=5, hidden_dims=(100,))
    settings = {"epochs": 30, "batch_size": 64, "lr": 3e-3, "seed": 0, "progress": False}
    history = pv.fit(vae, digits.train, objective, **settings)
    return vae, history.seconds.sum()


vae, elbo_seconds = train(pv.ELBO())
reference = pv.log_likelihood(vae, x, 2000, seed=0, progress=False)
shapes = f"median {reference.pareto_k.median():.2f}, above 0.7 for {reference.share_high_k:.1%}"
print(f"log p(x) of {len(x)} test digits: {reference.estimate} nats per digit, error over digits")
print(f"Monte Carlo error of this mean: {reference.monte_carlo_error:.4f} nats")
print(f"Pareto k-hat of the weights: {shapes}")

# %%
# Bounds against the number of samples
# ------------------------------------
# Two bounds enclose most of the others:
#
# .. math:: \mathrm{ELBO} = \mathbb E\, \frac1K \sum_k \log w_k \;\le\;
#     \mathrm{IWAE}_K = \mathbb E \log \frac1K \sum_k w_k \;\le\; \log p(x).
#
# The mean of K log-weights has the same expectation for every K. The logarithm of the mean weight rises with K.
# The reason is that a mean of K weights is the mean of its leave-one-out averages, and the logarithm is
# concave. For large K its distance to :math:`\log p(x)` is close to :math:`\operatorname{Var}(w) / (2 K
# p(x)^2)`.
#
# Three bounds lie between the two: :class:`pyro_vae.Renyi` with :math:`0 < \alpha < 1`, :class:`pyro_vae.CIWAE`
# (their average, at :math:`\beta = 0.5`) and :class:`pyro_vae.TVO`. :class:`pyro_vae.MIWAE` averages M bounds
# of K samples each. It has the mean of IWAE with K particles, and costs M K samples. :class:`pyro_vae.JVI`
# removes the bias of order 1/K from IWAE. It is not a bound: its mean may be below or above :math:`\log p(x)`.
#
# :func:`pyro_vae.compare` gives each objective the same random numbers. ``gap`` is :math:`\log p(x)` minus the
# bound, and ``gap_se`` is its standard error over digits. ``estimator_std`` is the standard deviation of one
# digit's estimate. All are in nats. ``ms`` is the time of the loss and its gradient on all digits, in
# milliseconds. Estimates from few samples are noisy, so they get more repeats.
tables = []
for samples, repeats in (((1, 4), 64), ((16, 64), 8)):
    objectives = []
    for k in samples:
        objectives += [pv.ELBO(k), pv.ELBO(k, "monte_carlo"), pv.IWAE(k)]
        if k > 1:
            objectives += [pv.Renyi(0.5, k), pv.CIWAE(0.5, k), pv.TVO(k), pv.MIWAE(4, k // 4), pv.JVI(k)]
    settings = {"repeats": repeats, "log_likelihood": reference, "seed": 1, "progress": False}
    part = pv.compare(vae, x, objectives, **settings)
    tables.append(part.assign(samples=[objective.num_samples for objective in objectives]))
table = pd.concat(tables)
table = pd.concat([rows for _, rows in table.groupby(level="objective", sort=False)])
table["ms"], table["ms/sample"] = table.milliseconds, table.milliseconds / table.samples
digits_shown = {"bound": 2, "gap": 3, "gap_se": 3, "estimator_std": 2, "ms": 1, "ms/sample": 1}
shown = table[["samples", *digits_shown]].round(digits_shown)
print(shown.droplevel("particles").to_string())

figure, ax = plt.subplots(figsize=(8, 4.6), layout="constrained")
ax.axhline(0, color=pv.plots.BLACK, label="log p(x), importance sampling")
for marker, (name, rows) in zip("os^vDP*X", table.groupby(level="objective", sort=False), strict=True):
    style = {"color": pv.plots.objective_colour(name), "marker": marker, "markerfacecolor": "none"}
    ax.errorbar(rows.samples, -rows.gap, rows.gap_se, label=name, markersize=8, capsize=3, **style)
ax.set_xscale("log", base=2)
ax.set_xticks([1, 4, 16, 64], labels=["1", "4", "16", "64"])
ax.set(xlabel="samples of the guide per datum", ylabel="bound minus log p(x) (nats per datum)")
ax.set_title("More samples raise IWAE, not the ELBO")
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)

# %%
# More particles make the ELBO less noisy and leave its mean unchanged. The errors of the gaps are over digits
# and paired with the reference, so they are far smaller than those of the bounds. More samples cost less time
# each. With few samples most of the time is Python's overhead, which ``compile=True`` removes. With one
# particle, ``estimator_std`` is smaller with the sampled KL. Its noise cancels part of the reconstruction's
# once the guide is near the posterior (:doc:`plot_05_kl_term`).
#
# Signal and noise in the guide's gradient
# ----------------------------------------
# The mean of a noisy gradient g trains the guide. For IWAE this mean falls as 1/K for large K, since in the
# limit every guide gives :math:`\log p(x)`. The noise of the pathwise estimate falls only as :math:`1/\sqrt K`,
# so its signal-to-noise ratio (SNR) falls. DReG has the same mean and less noise. We print the noise
# :math:`\sqrt{\operatorname{tr Cov} g}` of both estimators. The signal :math:`\lVert \mathbb E g \rVert` is
# measured from the draws of DReG, and corrected for their noise.
guide_parameters = list(vae.posterior.parameters())


def gradient(objective):
    bound = objective.bound(vae, x[:50]).mean()
    return torch.cat([part.flatten() for part in torch.autograd.grad(bound, guide_parameters)]).double()


pyro.set_rng_seed(2)
rows = []
for k in (1, 4, 16, 64):
    pathwise = torch.stack([gradient(pv.IWAE(k)) for _ in range(30)])
    dreg = torch.stack([gradient(pv.IWAE(k, "dreg")) for _ in range(30)])
    noise = pathwise.var(0).sum().sqrt().item(), dreg.var(0).sum().sqrt().item()
    signal = (dreg.mean(0).square().sum().item() - noise[1] ** 2 / len(dreg)) ** 0.5
    rows.append([k, signal, *noise, signal / noise[0], signal / noise[1]])
names = ["K", "signal", "noise, pathwise", "noise, DReG", "SNR, pathwise", "SNR, DReG"]
gradients = pd.DataFrame(rows, columns=names).set_index("K")
print(gradients.round(2).to_string())

figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
for name, marker, line in (("pathwise", "o", "-"), ("DReG", "s", "--")):
    style = {"color": pv.plots.objective_colour("IWAE"), "marker": marker, "linestyle": line}
    ratios = gradients[f"SNR, {name}"]
    ax.plot(ratios.index, ratios, label=f"IWAE, {name}", markerfacecolor="none", **style)
ax.set(xscale="log", yscale="log", xlabel="particles K", ylabel="SNR of the guide's gradient")
ax.set_xticks([1, 4, 16, 64], labels=["1", "4", "16", "64"])
ax.set_yticks([0.2, 0.5, 1, 2], labels=["0.2", "0.5", "1", "2"])
ax.minorticks_off()
ax.set_title("IWAE's gradient for the guide: DReG is quieter than pathwise at every K")
ax.legend(loc="center right", frameon=False)

# %%
# At every K, the noise of DReG is less than half of the pathwise estimator's. Theory predicts more: an SNR that
# rises as :math:`\sqrt K`. It does not rise here. The likely reason is the heavy tail of the weights. They have
# moments up to order 1/k-hat, which is two to three for the median digit. DReG squares the weights, so its
# noise needs the fourth moment. In a Gaussian problem with light tails, both slopes agree with theory
# (``benchmarks/gradient_snr.py``).
#
# Does it train a better model?
# -----------------------------
# We train the same VAE from the same initial weights by IWAE with 16 particles and DReG, with the same number
# of steps. For both VAEs the gap is :math:`\log p(x)` minus the ELBO. Errors are over digits, for differences
# paired by digit. They do not include the variation between training seeds.
vae_iwae, iwae_seconds = train(pv.IWAE(16, "dreg"))
trained_iwae = pv.log_likelihood(vae_iwae, x, 2000, seed=0, progress=False)
print("Held out, in nats per digit:")
for name, result in (("ELBO", reference), ("IWAE(16), DReG", trained_iwae)):
    parts = f"log p(x) {result.mean:.2f}   ELBO {result.elbo.mean():.2f}   gap {result.kl_to_posterior}"
    print(f"trained by {name:15s} {parts}   k-hat above 0.7: {result.share_high_k:.1%}")
print(f"log p(x), IWAE - ELBO     {pv.Estimate.of(trained_iwae.per_datum - reference.per_datum)}")
print(f"ELBO, IWAE - ELBO         {pv.Estimate.of(trained_iwae.elbo - reference.elbo)}")
print(f"training time, IWAE over ELBO   {iwae_seconds / elbo_seconds:.1f}")

# %%
# The model is better, but its guide is further from the posterior. IWAE trains the guide for a good *average*
# weight, not for the posterior. This is a disadvantage for a user of :math:`q(z \mid x)` itself.
#
# DReG costs no extra time: a compiled step with it takes as long as a pathwise step. The choice of the bound
# costs as little (:doc:`/costs`). Only K is expensive.
#
# Which to choose
# ---------------
#
# .. list-table::
#    :header-rows: 1
#    :widths: 30 32 38
#
#    * - situation
#      - take
#      - because
#    * - one particle, guide far from the posterior
#      - ``pv.ELBO()``, closed-form KL
#      - it is the cheapest step, and a sampled KL would only add noise
#    * - one particle, guide near the posterior
#      - ``pv.ELBO(gradient="stl")``
#      - its gradient has no noise at the exact posterior
#    * - about 4 particles or more, for the best model
#      - ``pv.IWAE(K, "dreg")``, or :class:`pyro_vae.PIWAE`
#      - the bound rises with K, and the guide's pathwise gradient loses its signal
#    * - two particles or more, for the best posterior
#      - ``pv.ELBO(K, gradient="stl")``
#      - K samples reduce the noise, and the bound stays where it is
#    * - flow or mixture guide
#      - ``pv.IWAE(K, "dreg")`` or ``pv.ELBO(K, gradient="stl")``, by purpose
#      - there is no closed-form KL, and neither needs one
#    * - discrete latents
#      - ``gradient="vimco"`` from two particles on, else ``"score"``; or :class:`pyro_vae.RWS`
#      - a discrete sample has no pathwise derivative; ``"vimco"`` has less noise than ``"score"``
#    * - Bernoulli latents, ELBO with two particles
#      - ``pv.ELBO(2, gradient="disarm")``
#      - its antithetic pairs have less noise than ``"vimco"`` with two particles
#    * - guide that has to cover the posterior
#      - :class:`pyro_vae.RWS`
#      - its wake phase lowers KL(p(z|x) || q(z|x))
#    * - not enough memory
#      - ``chunk_size=``
#      - the result is the same, and the model sees a part of the particles at a time
#    * - a number to report
#      - :func:`pyro_vae.log_likelihood`, with its k-hat
#      - it is the tightest bound; where k-hat is high, use :func:`pyro_vae.ais`
#
# So for ten particles and a flow guide, take ``pv.IWAE(10, "dreg")`` for the best model. A flow's KL has no
# closed form. Ten particles raise the bound only if their weights are averaged before the logarithm. A flow is
# reparameterised, and DReG requires nothing else. For the best posterior, take ``pv.ELBO(10, gradient="stl")``.
flow = pv.mlp_vae(digits.event_shape, latent_dim=5, hidden_dims=(100,), posterior=pv.FlowPosterior)
try:
    pv.ELBO(10).bound(flow, x)
except pv.NoClosedFormError as error:
    print(textwrap.fill(f"closed form: {error}", 100))
bound = pv.IWAE(10, "dreg").bound(flow, x)
print("IWAE(10), DReG, before training:", pv.Estimate.of(bound), "nats per digit")

# %%
# The claim, checked
# ------------------
# With more particles, the ELBO's mean does not change (\|z\| < 4). The steps from the ELBO to IWAE(4), to
# IWAE(16), and to :math:`\log p(x)` all go up, each by more than 4 paired standard errors over digits. Each
# bound is the mean of 16 independent draws. For digits with a high k-hat, the estimate of :math:`\log p(x)` is
# too low. This makes the last step smaller, so the check is conservative. DReG has less noise than the pathwise
# gradient at every K. The model trained by IWAE is better by more than 3 paired standard errors.
pyro.set_rng_seed(3)


@torch.no_grad()
def average(objective):
    return torch.stack([objective.bound(vae, x) for _ in range(16)]).mean(0)


one, many = average(pv.ELBO(1, "monte_carlo")), average(pv.ELBO(16, "monte_carlo"))
four, sixteen = average(pv.IWAE(4)), average(pv.IWAE(16))
change = pv.Estimate.of(many - one)
z = change.value / change.standard_error
assert abs(z) < 4, f"the ELBO changed by {change} nats with 16 particles, z = {z:.1f}"
print(f"ELBO(16) - ELBO(1):       {change} nats, z = {z:.1f}")
steps = {"IWAE(4) - ELBO(16)": four - many, "IWAE(16) - IWAE(4)": sixteen - four}
steps["log p(x) - IWAE(16)"] = reference.per_datum - sixteen
for name, difference in steps.items():
    step = pv.Estimate.of(difference)
    z = step.value / step.standard_error
    assert z > 4, f"{name} is {step} nats, z = {z:.1f}"
    print(f"{name + ':':25s} {step} nats, z = {z:.1f}")
quieter = gradients["noise, DReG"] < gradients["noise, pathwise"]
assert quieter.all(), f"DReG has more noise than the pathwise gradient:\n{gradients}"
gained = pv.Estimate.of(trained_iwae.per_datum - reference.per_datum)
assert gained.value > 3 * gained.standard_error, f"log p(x) after IWAE minus log p(x) after ELBO: {gained} nats"
