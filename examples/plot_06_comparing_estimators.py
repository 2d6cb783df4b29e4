r"""
Which estimator of the bound should I use?
==========================================

Every estimator here reduces the same log-weights of K samples of the guide (a closed-form KL has the
mean of a part of them in its place), and they differ in three ways: how far below :math:`\log p(x)`
their mean lies, how noisy their gradient is, and what they cost. More particles make the ELBO quieter
but never higher. They do raise the importance-weighted bound (Burda, Grosse and Salakhutdinov, 2016,
*Importance Weighted Autoencoders*, `arXiv:1509.00519 <https://arxiv.org/abs/1509.00519>`_), whose
pathwise gradient then loses its signal for the guide (Rainforth et al., 2018, *Tighter Variational
Bounds are Not Necessarily Better*, `arXiv:1802.04537 <https://arxiv.org/abs/1802.04537>`_), unless it is
doubly reparameterised (Tucker et al., 2019, *Doubly Reparameterized Gradient Estimators for Monte Carlo
Objectives*, `arXiv:1810.04152 <https://arxiv.org/abs/1810.04152>`_). We measure all three on one small
VAE. The table by situation is near the end: `Which to choose`_. For ten particles and a flow guide, say,
it is ``pv.IWAE(10, "dreg")``.
"""

# %%
# One model, one guide, and log p(x) as well as it can be had
# -----------------------------------------------------------
# With :math:`w_k = p(x, z_k) / q(z_k \mid x)` and :math:`z_k \sim q(z \mid x)`, the average of K weights is
# unbiased for :math:`p(x)`. With 2,000 of them its logarithm is our reference. A Pareto k-hat above 0.7 says
# that a few weights carry a datum's average, which is then probably too low. We print how many data that
# concerns, in place of the package's warning.
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
print(f"Monte Carlo error of that: {reference.monte_carlo_error:.4f} nats")
print(f"Pareto k-hat of the weights: {shapes}")

# %%
# Bounds against the number of samples
# ------------------------------------
# Two of them frame the others:
#
# .. math:: \mathrm{ELBO} = \mathbb E\, \frac1K \sum_k \log w_k \;\le\;
#     \mathrm{IWAE}_K = \mathbb E \log \frac1K \sum_k w_k \;\le\; \log p(x).
#
# The mean of K logarithms has the same expectation for any K. The logarithm of the mean of K weights rises
# with K, since the mean of all its leave-one-out averages is itself and the logarithm is concave. Its
# distance to :math:`\log p(x)` is close to :math:`\operatorname{Var}(w) / (2 K p(x)^2)` once K is large.
# Between the two lie :class:`pyro_vae.Renyi` with :math:`0 < \alpha < 1`, :class:`pyro_vae.CIWAE` (their
# average, at :math:`\beta = 0.5`) and :class:`pyro_vae.TVO`. :class:`pyro_vae.MIWAE` averages M bounds of K
# samples each, and so is as high as IWAE with K, for M K samples. :class:`pyro_vae.JVI` takes the bias of
# order 1/K out of IWAE, and is then no bound: it may lie on either side.
#
# :func:`pyro_vae.compare` gives each the same random numbers. ``gap`` is :math:`\log p(x)` minus the
# bound, ``gap_se`` its error over digits, ``estimator_std`` the spread of one digit's estimate, all in
# nats, and ``ms`` is the time of the loss and its gradient on all digits. Few samples are noisy, so they
# get more repeats.
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
# More particles make the ELBOs less noisy and leave them where they are. The errors here are over digits,
# paired with the reference, so they are far smaller than those of the bounds. A sample costs less the more
# there are: at few of them the time is mostly Python's, which ``compile=True`` takes away. At one particle,
# ``estimator_std`` is smaller with the sampled KL, whose noise cancels part of the reconstruction's once the
# guide is near the posterior (:doc:`plot_05_kl_term`).
#
# Signal and noise in the guide's gradient
# ----------------------------------------
# What trains the guide is the mean of a noisy gradient g. For IWAE this mean falls as 1/K once K is large,
# since in the limit every guide gives :math:`\log p(x)`. The pathwise estimate's noise falls only as
# :math:`1/\sqrt K`, so its signal-to-noise ratio (SNR) falls. DReG has the same mean and less noise. We print
# the noise :math:`\sqrt{\operatorname{tr Cov} g}` of both, and the signal :math:`\lVert \mathbb E g \rVert`
# as DReG's draws have it, less what noise adds.
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
# At every K, DReG's noise is a small part of the pathwise. Theory promises more: an SNR that rises as
# :math:`\sqrt K`. It does not rise here. The likely reason is the tail of the weights. They have moments up
# to order 1/k-hat, two to three for the median digit, and the noise of DReG, which squares them, needs the
# fourth. In a Gaussian problem with light tails both slopes come out (``benchmarks/gradient_snr.py``).
#
# Does it train a better model?
# -----------------------------
# The same VAE from the same first weights, trained with IWAE of 16 particles and DReG for as many steps. The
# gap is :math:`\log p(x)` less the ELBO, whatever was trained with. Errors are over digits, of differences
# paired over them; they do not include the luck of a training run.
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
# The model is better and its guide is further from the posterior: IWAE asks the guide for samples whose
# *average* weight is good, not for the posterior. Who wants to use :math:`q(z \mid x)` itself pays for that.
#
# DReG itself is not what costs: once compiled, a step with it takes as long as a pathwise one, and the choice
# between bounds costs as little (:doc:`/costs`). What costs is K.
#
# Which to choose
# ---------------
# .. list-table::
#    :header-rows: 1
#    :widths: 30 32 38
#
#    * - situation
#      - take
#      - because
#    * - one particle, guide far from the posterior
#      - ``pv.ELBO()``, closed-form KL
#      - the cheapest step; a sampled KL would only add noise
#    * - one particle, guide near the posterior
#      - ``pv.ELBO(gradient="stl")``
#      - no noise at all at the exact posterior
#    * - from some 4 particles on, for the best model
#      - ``pv.IWAE(K, "dreg")``, or :class:`pyro_vae.PIWAE`
#      - the bound rises, and the guide's pathwise gradient loses its signal
#    * - two particles or more, for the best posterior
#      - ``pv.ELBO(K, gradient="stl")``
#      - the mean of K, which leaves the bound where it is
#    * - flow or mixture guide
#      - the two above, by what it is for
#      - there is no closed-form KL, and neither needs one
#    * - discrete latents
#      - ``gradient="vimco"``, ``"score"``, or :class:`pyro_vae.RWS`
#      - no path through a sample
#    * - guide that covers the posterior
#      - :class:`pyro_vae.RWS`
#      - its wake phase lowers KL(p(z|x) || q(z|x))
#    * - not enough memory
#      - ``chunk_size=``
#      - same number, model run in portions
#    * - a number to report
#      - :func:`pyro_vae.log_likelihood`, with its k-hat
#      - tightest; where k-hat is high, :func:`pyro_vae.ais`
#
# So, for ten particles and a flow guide: ``pv.IWAE(10, "dreg")`` for the best model. A flow's KL has no
# closed form, ten particles buy a higher bound only if their weights are averaged before the logarithm, and a
# flow is reparameterised, which is all that DReG asks. For the posterior itself, ``pv.ELBO(10,
# gradient="stl")``.
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
# With particles, the ELBO's mean does not move (\|z\| < 4), and each further step up, from ELBO to IWAE
# with 4, then 16 particles, then to :math:`\log p(x)`, is more than 4 paired standard errors over
# digits. Each bound is averaged over 16 draws, all of them independent of each other. Digits with a high
# k-hat have their :math:`\log p(x)` too low, which makes the last step smaller, so that the check is on
# the safe side. DReG is quieter than the pathwise gradient at every K, and IWAE trained the better model
# by more than 3 paired errors.
pyro.set_rng_seed(3)


@torch.no_grad()
def average(objective):
    return torch.stack([objective.bound(vae, x) for _ in range(16)]).mean(0)


one, many = average(pv.ELBO(1, "monte_carlo")), average(pv.ELBO(16, "monte_carlo"))
four, sixteen = average(pv.IWAE(4)), average(pv.IWAE(16))
change = pv.Estimate.of(many - one)
z = change.value / change.standard_error
assert abs(z) < 4, f"the ELBO moved by {change} nats with 16 particles, z = {z:.1f}"
print(f"ELBO(16) - ELBO(1):       {change} nats, z = {z:.1f}")
steps = {"IWAE(4) - ELBO(16)": four - many, "IWAE(16) - IWAE(4)": sixteen - four}
steps["log p(x) - IWAE(16)"] = reference.per_datum - sixteen
for name, difference in steps.items():
    step = pv.Estimate.of(difference)
    z = step.value / step.standard_error
    assert z > 4, f"{name} is {step} nats, z = {z:.1f}"
    print(f"{name + ':':25s} {step} nats, z = {z:.1f}")
quieter = gradients["noise, DReG"] < gradients["noise, pathwise"]
assert quieter.all(), f"DReG is not quieter:\n{gradients}"
gained = pv.Estimate.of(trained_iwae.per_datum - reference.per_datum)
assert gained.value > 3 * gained.standard_error, f"log p(x), trained by IWAE less by ELBO: {gained} nats"
