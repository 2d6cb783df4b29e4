r"""
What happens when q forgets x?
==============================

If q(z|x) is the same for every x, z carries no information about the image. The best decoder then ignores z,
and the model is no better than one without a latent variable. A guide that does not receive x always ends
there. An amortised guide ends there when the KL has too large a weight: training turns off each unit of z
that costs more than it explains. This is posterior collapse (Bowman and others, 2016, *Generating Sentences
from a Continuous Space*). The weight :math:`\beta` of Higgins and others (2017, *beta-VAE*) is the price of
the KL, so raising :math:`\beta` lowers the KL. Hoffman and Johnson (2016, *ELBO Surgery*) split the KL into
two parts: the information about x in z, and the distance from the aggregate posterior to the prior.
"""

# %%
# A guide that cannot see x
# -------------------------
# :class:`pyro_vae.Unconditional` gives every image the same :math:`q(z)`. We call such a guide, and its pair,
# *blind*. Averaged over N images, its ELBO is
#
# .. math:: \mathbb{E}_{q(z)}\Bigl[\tfrac1N \sum_n \log p(x_n \mid z)\Bigr] - \mathrm{KL}\bigl(q(z) \,\|\, p(z)\bigr)
#     \;\le\; \max_\pi \tfrac1N \sum_n \log \mathrm{Bernoulli}(x_n; \pi) = -\sum_d H(\bar x_d)
#
# because one z has to serve all images. No vector :math:`\pi` of pixel probabilities fits all of them better
# than their mean :math:`\bar x`. Here :math:`H` is the entropy of one pixel. The right side contains no z: it
# is a model of independent pixels, fitted to the images that are tested. It is an upper bound for every decoder
# and every blind guide. Equality requires :math:`q(z) = p(z)` and the same output :math:`\bar x` for every z.
#
# :func:`pyro_vae.decompose_elbo` splits the ELBO into three terms (Hoffman and Johnson), with the aggregate
# posterior :math:`q(z) = \frac1N \sum_n q(z \mid x_n)`:
#
# .. math:: \mathrm{ELBO} = \text{reconstruction}
#     - \underbrace{\tfrac1N \sum_n \mathrm{KL}\bigl(q(z \mid x_n) \,\|\, q(z)\bigr)}
#     _{\text{mutual information of } x \text{ and } z}
#     - \underbrace{\mathrm{KL}\bigl(q(z) \,\|\, p(z)\bigr)}_{\text{marginal KL}}

from itertools import pairwise

# sphinx_gallery_thumbnail_number = 3
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch.distributions import kl_divergence
from torch.optim.lr_scheduler import CosineAnnealingLR

import pyro_vae as pv

digits = pv.data.load("digits", binarize="dynamic")
x, labels = digits.test.x, digits.test.labels


def train(objective, latent_dim, blind=False):
    pyro.set_rng_seed(0)
    vae = pv.mlp_vae(digits.event_shape, latent_dim=latent_dim, hidden_dims=(100,))
    if blind:
        vae.posterior = pv.Unconditional(latent_dim, digits.event_shape)
    pv.fit(
        vae, digits.train, objective, epochs=20, batch_size=100, lr=1e-2, seed=0, progress=False,
        lr_scheduler=lambda optimizer: CosineAnnealingLR(optimizer, 20),
    )  # fmt: skip
    return vae


def take_apart(vae):
    return pv.decompose_elbo(vae, x, num_samples=20, seed=0, progress=False)


pairs = {"amortised": train(pv.ELBO(), 2), "blind": train(pv.ELBO(), 2, blind=True)}
parts = {name: take_apart(vae) for name, vae in pairs.items()}
terms = ["elbo", "reconstruction", "mutual_information", "marginal_kl"]
values = {name: {term: getattr(part, term).value for term in terms} for name, part in parts.items()}
table = pd.DataFrame(values).T
print(f"250 test digits, nats per digit\n{table.round(2).to_string()}")

mean_image = digits.train.images.mean(0)
ceiling = dist.Bernoulli(x.double().mean(0)).entropy().sum().neg().item()
without_z = dist.Bernoulli(mean_image.clamp(1e-3)).to_event(3).log_prob(x)
independent = pv.Estimate.of(without_z)
print(f"\nindependent pixels, fitted to the training images: {independent}, exact for these test digits")
print(f"upper bound for every pair with a blind guide:      {ceiling:.2f}")

# %%
# What the blind pair's decoder draws
# -----------------------------------
# In the amortised pair, ten draws of z from the prior give ten different means of :math:`p(x \mid z)`. In the
# blind pair they give the mean of the training images ten times. The printed number is the standard deviation
# of a pixel's mean over z, averaged over pixels.

z = torch.randn(500, 2)
outputs = {name: vae.decode(z) for name, vae in pairs.items()}
for name, output in outputs.items():
    print(f"{name:9s}  {output.std(0).mean():.4f}")

figure, axes = plt.subplots(3, 1, figsize=(7, 3.2), layout="constrained")
figure.suptitle("Decoder output at ten draws of z")
pv.plots.images(outputs["amortised"][:10], title="amortised guide", ax=axes[0])
pv.plots.images(outputs["blind"][:10], title="blind guide", ax=axes[1])
pv.plots.images(mean_image.expand(10, 1, 8, 8), title="mean of the training images, ten times", ax=axes[2])

# %%
# What beta does to the KL
# ------------------------
# A beta-VAE minimises :math:`D + \beta R`. The distortion is :math:`D = -\mathbb{E}_q \log p(x \mid z)`, and
# the rate is :math:`R = \mathrm{KL}(q(z \mid x) \,\|\, p(z))`. Let :math:`(D_1, R_1)` be best at
# :math:`\beta_1` and :math:`(D_2, R_2)` at :math:`\beta_2`. Each is no worse than the other at its own
# :math:`\beta`. The sum of these two inequalities is
#
# .. math:: (\beta_1 - \beta_2)(R_1 - R_2) \le 0 .
#
# So a larger :math:`\beta` never raises the KL of the best solution, and never lowers its distortion. Training
# is not exact, but the table agrees. ``active`` is the number of units of z, out of eight, whose mean varies
# with x (:func:`pyro_vae.active_units`).
#
# We try two remedies at :math:`\beta = 4`. Free bits (Kingma and others, 2016, *Improved Variational Inference
# with Inverse Autoregressive Flow*) give each unit 0.3 nats at no cost. Warm-up
# (:class:`pyro_vae.schedules.warm_up`) starts at :math:`\beta = 0` and reaches 4 after half of the training.

steps = 10 * 13  # an epoch has 13 minibatches
objectives = {f"beta {beta:g}": pv.ELBO(beta=beta) for beta in (0.25, 0.5, 1, 2, 4)}
objectives["beta 4, free bits 0.3"] = pv.ELBO(beta=4, free_bits=0.3)
objectives["warm-up to 4"] = pv.ELBO(beta=pv.schedules.warm_up(steps, stop=4))
rows, kl = {}, {}
for name, objective in objectives.items():
    vae = train(objective, 8)
    part, units = take_apart(vae), pv.active_units(vae, x)
    with torch.no_grad():
        kl[name] = kl_divergence(vae.posterior(x), vae.prior())
    rows[name] = {"KL": kl[name].mean().item()} | {term: getattr(part, term).value for term in terms[::-1]}
    rows[name]["active"] = units.active.sum()
sweep = pd.DataFrame(rows).T.astype({"active": int})
print("nats per digit; KL = mutual_information + marginal_kl, up to sampling noise")
print(sweep.round(2).to_string())

# %%
# As :math:`\beta` rises, the KL falls and the reconstruction gets worse. Both parts of the KL fall. The mutual
# information of N images cannot exceed :math:`\log N`, since :math:`q(z) \ge q(z \mid x_n) / N`. At 0.25 it is
# 5.42 with 250 digits, close to :math:`\log 250 = 5.52` (the dotted line in the left panel). So the rest of the
# KL there is marginal. The ELBO itself is highest at :math:`\beta = 1`, the only weight that trains for it. At
# 2 some units are off. At 4 all units are off, and the model is no better than independent pixels.
#
# Free bits keep the KL near :math:`8 \times 0.3 = 2.4` nats. Warm-up does not help here. It gives z an early
# advantage, which helps when training starts badly. But at :math:`\beta = 4` the collapsed solution is the best
# one, so training still reaches it. Some units still count as active, but their KL is only 0.05 nats in total.
#
# The right panel is the rate-distortion curve of Alemi and others (2018, *Fixing a Broken ELBO*). On a straight
# line of slope -1 the ELBO :math:`= -(D + R)` is constant. The curve touches the best of these lines at
# :math:`\beta = 1`.

betas, curve = [0.25, 0.5, 1, 2, 4], sweep.iloc[:5]
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
figure.suptitle("As beta rises, the KL falls and the distortion rises")
left.plot(betas, curve.KL, "o-", color=pv.plots.BLACK, label="KL")
left.plot(betas, curve.mutual_information, "s--", color=pv.plots.ORANGE, label="mutual information")
left.plot(betas, curve.marginal_kl, "^:", color=pv.plots.PURPLE, label="marginal KL")
left.axhline(np.log(len(x)), color=pv.plots.ORANGE, linestyle=":", label=f"log N = {np.log(len(x)):.2f}")
left.set_xscale("log", base=2)
left.set_xticks(betas, labels=[f"{beta:g}" for beta in betas])
left.set(xlabel="beta", ylabel="nats per datum")
left.legend(frameon=False)
best = -curve.elbo.max()
right.plot([0, 11], [best, best - 11], "--", color=pv.plots.BLUE, label=f"D + R = {best:.2f}: ELBO of beta 1")
right.plot(curve.KL, -curve.reconstruction, "o-", color=pv.plots.BLACK, label="beta 0.25 to 4")
right.plot(
    sweep.KL["beta 4, free bits 0.3"],
    -sweep.reconstruction["beta 4, free bits 0.3"],
    "D",
    color=pv.plots.VERMILLION,
    label="beta 4, free bits 0.3",
)
for beta, rate, distortion in zip(betas, curve.KL, -curve.reconstruction, strict=True):
    right.annotate(f"{beta:g}", (rate, distortion), (6, 6), textcoords="offset points")
right.set_ylim(top=28.5)
right.set(xlabel="rate: KL (nats per datum)", ylabel="distortion: -E log p(x|z) (nats per datum)")
right.legend(frameon=False)

# %%
# The aggregate posterior
# -----------------------
# The figure shows four draws of z from :math:`q(z \mid x)` for each test digit, in two dimensions. The rings
# contain 50% and 95% of the prior. With a small :math:`\beta` the digits extend beyond the prior on one side
# and leave another side empty. This is the marginal KL. At :math:`\beta = 1` they fill the prior. At 4 the
# guide of every digit is the prior: the marginal KL is 0, and so is the mutual information.

flat = {0.1: train(pv.ELBO(beta=0.1), 2), 1: pairs["amortised"], 4: train(pv.ELBO(beta=4), 2)}
figure, axes = plt.subplots(1, 3, figsize=(11, 4), layout="constrained", sharex=True, sharey=True)
figure.suptitle("Draws of q(z) by digit, and rings that contain 50% and 95% of the prior")
angle = np.linspace(0, 2 * np.pi, 200)
for ax, (beta, vae) in zip(axes, flat.items(), strict=True):
    with torch.no_grad():
        draws = vae.posterior(x).sample((4,)).flatten(0, 1)
    pv.plots.latent_space(draws, labels.repeat(4), ax=ax)
    for mass in (0.5, 0.95):
        radius = np.sqrt(-2 * np.log(1 - mass))  # in two dimensions the squared distance is exponential
        ax.plot(radius * np.cos(angle), radius * np.sin(angle), "--", color=pv.plots.BLACK, linewidth=2, zorder=5)
    part = take_apart(vae)
    information, marginal = part.mutual_information.value, part.marginal_kl.value
    ax.set_title(f"beta {beta:g}: information {information:.2f},\nmarginal KL {marginal:.2f} nats")
    if ax is not axes[-1]:
        ax.get_legend().remove()

# %%
# The claim, checked
# ------------------
# The terms add up to the ELBO. With one set of samples the sum is exact. It agrees within error with other
# samples and a closed-form KL. The blind pair's mutual information is 0 up to the rounding of float32, since
# none of its terms has noise. Its ELBO is not above its upper bound. The amortised pair's ELBO is above
# independent pixels by more than 5 standard errors of the paired difference over digits. Each increase of
# :math:`\beta` lowers the KL, and the ELBO itself is highest at :math:`\beta = 1`.

for name, vae in pairs.items():
    part = parts[name]
    total = part.reconstruction.value - part.mutual_information.value - part.marginal_kl.value
    assert abs(total - part.elbo.value) < 1e-9, f"{name}: the terms sum to {total}, the ELBO is {part.elbo.value}"
    bounds = [pv.ELBO().bound(vae, x).mean().detach() for _ in range(100)]
    again = pv.Estimate.of(torch.stack(bounds))
    score = (part.elbo.value - again.value) / np.hypot(part.elbo.standard_error, again.standard_error)
    assert abs(score) < 4, f"{name}: the terms sum to {part.elbo}, the closed-form ELBO is {again}: z = {score:.1f}"
    print(f"{name}: sum of terms {part.elbo}, closed-form KL {again} nats, z = {score:.1f}")
blind, sees = parts["blind"].mutual_information, parts["amortised"].mutual_information
assert abs(blind.value) < 3 * blind.standard_error + 1e-5, f"the blind guide has mutual information {blind}"
assert sees.value > 20 * sees.standard_error, f"the amortised guide has mutual information {sees}"
print(f"mutual information: blind {blind.value:.1e}, amortised {sees} nats")
gap = ceiling - parts["blind"].elbo.value
assert gap > -4 * parts["blind"].elbo.standard_error, f"the blind guide's ELBO is {-gap} nats above its upper bound"
above = pv.Estimate.of(pv.ELBO(100).bound(pairs["amortised"], x).detach() - without_z)
assert above.value > 5 * above.standard_error, f"the amortised pair is {above} nats above independent pixels"
print(f"blind: {gap:.2f} nats below its upper bound; amortised: {above} nats above independent pixels")
for low, high in pairwise(betas):
    drop = pv.Estimate.of(kl[f"beta {low:g}"] - kl[f"beta {high:g}"])
    assert drop.value > 5 * drop.standard_error, f"from beta {low} to {high} the KL falls by {drop} nats"
    print(f"from beta {low:g} to {high:g} the KL falls by {drop} nats")
assert curve.elbo.idxmax() == "beta 1", f"the ELBO is highest at {curve.elbo.idxmax()}"
