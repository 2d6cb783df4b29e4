r"""
What happens when q forgets x?
==============================

Then z carries nothing about the image, the best decoder ignores z, and the model is no better than one
without a latent variable. A guide that cannot see x ends there by construction. An amortised guide ends there
by choice when the KL is made too expensive: each unit of z that costs more than it explains is turned off
(posterior collapse; Bowman and others, 2016, *Generating Sentences from a Continuous Space*). The weight
:math:`\beta` of Higgins and others (2017, *beta-VAE*) sets that price, so raising :math:`\beta` lowers the
KL. What the KL is made of is the subject of Hoffman and Johnson (2016, *ELBO Surgery*): what z says about x,
and how far the aggregate posterior is from the prior.
"""

# %%
# A guide that cannot see x
# -------------------------
# :class:`pyro_vae.Unconditional` gives every image the same :math:`q(z)`. Averaged over N images, its ELBO is
#
# .. math:: \mathbb{E}_{q(z)}\Bigl[\tfrac1N \sum_n \log p(x_n \mid z)\Bigr] - \mathrm{KL}\bigl(q(z) \,\|\, p(z)\bigr)
#     \;\le\; \max_\pi \tfrac1N \sum_n \log \mathrm{Bernoulli}(x_n; \pi) = -\sum_d H(\bar x_d)
#
# because one z meets all images at once, and no vector :math:`\pi` of pixel probabilities fits all of them
# better than their mean :math:`\bar x`. Here :math:`H` is the entropy of one pixel. The right side has no z:
# it is a model of independent pixels, fitted to the very images it is judged on. It is a ceiling for every
# decoder and every guide that is blind to x. Equality needs :math:`q(z) = p(z)` and the same output
# :math:`\bar x` for every z.
#
# :func:`pyro_vae.decompose_elbo` takes the ELBO apart (Hoffman and Johnson), with
# :math:`q(z) = \frac1N \sum_n q(z \mid x_n)`, the aggregate posterior:
#
# .. math:: \mathrm{ELBO} = \text{reconstruction} - \underbrace{\tfrac1N \sum_n \mathrm{KL}\bigl(q(z \mid x_n) \,\|\, q(z)\bigr)}
#     _{\text{mutual information of } x \text{ and } z} - \underbrace{\mathrm{KL}\bigl(q(z) \,\|\, p(z)\bigr)}_{\text{marginal KL}}

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
print(f"ceiling for every pair whose guide is blind to x:   {ceiling:.2f}")

# %%
# What the blind pair's decoder draws
# -----------------------------------
# Ten draws of z from the prior give ten different means :math:`p(x \mid z)` in the amortised pair. The blind
# pair draws the mean of the training images ten times. The numbers are the standard deviation of a pixel's
# mean over z, averaged over pixels.

z = torch.randn(500, 2)
outputs = {name: vae.decode(z) for name, vae in pairs.items()}
for name, output in outputs.items():
    print(f"{name:9s}  {output.std(0).mean():.4f}")

figure, axes = plt.subplots(3, 1, figsize=(7, 3.2), layout="constrained")
figure.suptitle("Decoder output at ten draws of z")
pv.plots.images(outputs["amortised"][:10], title="amortised guide", ax=axes[0])
pv.plots.images(outputs["blind"][:10], title="guide blind to x", ax=axes[1])
pv.plots.images(mean_image.expand(10, 1, 8, 8), title="mean of the training images, ten times", ax=axes[2])

# %%
# What beta does to the KL
# ------------------------
# A beta-VAE minimises :math:`D + \beta R`: the distortion :math:`D = -\mathbb{E}_q \log p(x \mid z)` plus
# :math:`\beta` times the rate :math:`R = \mathrm{KL}(q(z \mid x) \,\|\, p(z))`. Let :math:`(D_1, R_1)` be
# best at :math:`\beta_1` and :math:`(D_2, R_2)` at :math:`\beta_2`. Each is no worse at its own price, and
# the two inequalities add up to
#
# .. math:: (\beta_1 - \beta_2)(R_1 - R_2) \le 0 .
#
# So a larger :math:`\beta` never raises the KL of the best solution, nor lowers its distortion. Training is
# not exact, but the table follows. ``active`` counts the units of z, of eight, whose mean moves with x
# (:func:`pyro_vae.active_units`).
#
# Two remedies are tried at :math:`\beta = 4`. Free bits (Kingma and others, 2016, *Improved Variational
# Inference with Inverse Autoregressive Flow*) let each unit have 0.3 nats at no charge. Warm-up
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
print("nats per digit; KL = mutual_information + marginal_kl, but for sampling noise")
print(sweep.round(2).to_string())

# %%
# Read the KL column downwards: :math:`\beta` buys a lower KL with a worse reconstruction. Both parts of the KL
# fall. The mutual information of N images cannot exceed :math:`\log N`, since
# :math:`q(z) \ge q(z \mid x_n) / N`: at 0.25 it is 5.42 with 250 digits, close to :math:`\log 250 = 5.52`, the
# dotted line in the left panel, so that what more the KL holds there is marginal. The ELBO itself is best at
# :math:`\beta = 1`, the only weight that trains for it. At 2 some units are off. At 4 all are off here, and the
# ELBO is that of the blind pair. Free bits hold the KL near :math:`8 \times 0.3 = 2.4` nats. Warm-up does not
# help here: it gives z a head start, which cures a bad start of the training, but at a price of 4 the collapsed
# solution is the best one, so training goes there all the same: the units that still count as active are barely
# so, with 0.05 nats between them.
#
# The right panel is the rate-distortion curve of Alemi and others (2018, *Fixing a Broken ELBO*). On a
# straight line of slope -1 the ELBO :math:`= -(D + R)` is constant. The curve touches the best of these lines
# at :math:`\beta = 1`.

betas, curve = [0.25, 0.5, 1, 2, 4], sweep.iloc[:5]
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
figure.suptitle("The KL falls as beta rises, and the distortion pays for it")
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
# Four draws of z from :math:`q(z \mid x)` for each test digit, in two dimensions. The rings hold 50% and 95%
# of the prior. With a cheap KL the digits lie beyond the prior on one side and leave another side of it
# empty: the marginal KL. At :math:`\beta = 1` they fill it. At 4 every digit has the whole prior: the
# marginal KL is 0, and so is the mutual information.

flat = {0.1: train(pv.ELBO(beta=0.1), 2), 1: pairs["amortised"], 4: train(pv.ELBO(beta=4), 2)}
figure, axes = plt.subplots(1, 3, figsize=(11, 4), layout="constrained", sharex=True, sharey=True)
figure.suptitle("Draws of q(z) by digit, and rings that hold 50% and 95% of the prior")
angle = np.linspace(0, 2 * np.pi, 200)
for ax, (beta, vae) in zip(axes, flat.items(), strict=True):
    with torch.no_grad():
        draws = vae.posterior(x).sample((4,)).flatten(0, 1)
    pv.plots.latent_space(draws, labels.repeat(4), ax=ax)
    for mass in (0.5, 0.95):
        radius = np.sqrt(-2 * np.log(1 - mass))  # the square of a distance is exponential in two dimensions
        ax.plot(radius * np.cos(angle), radius * np.sin(angle), "--", color=pv.plots.BLACK, linewidth=2, zorder=5)
    part = take_apart(vae)
    information, marginal = part.mutual_information.value, part.marginal_kl.value
    ax.set_title(f"beta {beta:g}: information {information:.2f},\nmarginal KL {marginal:.2f} nats")
    if ax is not axes[-1]:
        ax.get_legend().remove()

# %%
# The claim, checked
# ------------------
# The parts add up to the ELBO: exactly, as one set of samples gives them all, and within error to other
# samples, with the KL in closed form. The blind pair's mutual information is 0 up to the rounding of float32;
# no term of it has any noise. Its ELBO is not above the ceiling; the amortised pair's is above independent
# pixels, by many standard errors of the paired difference over the digits. And each step up in :math:`\beta`
# lowers the KL; the ELBO itself is best at :math:`\beta = 1`.

for name, vae in pairs.items():
    part = parts[name]
    total = part.reconstruction.value - part.mutual_information.value - part.marginal_kl.value
    assert abs(total - part.elbo.value) < 1e-9, f"{name}: the parts make {total}, the ELBO is {part.elbo.value}"
    bounds = [pv.ELBO().bound(vae, x).mean().detach() for _ in range(100)]
    again = pv.Estimate.of(torch.stack(bounds))
    score = (part.elbo.value - again.value) / np.hypot(part.elbo.standard_error, again.standard_error)
    assert abs(score) < 4, f"{name}: the parts make {part.elbo}, the closed-form ELBO is {again}: z = {score:.1f}"
    print(f"{name}: parts {part.elbo}, closed form {again} nats, z = {score:.1f}")
blind, sees = parts["blind"].mutual_information, parts["amortised"].mutual_information
assert abs(blind.value) < 3 * blind.standard_error + 1e-5, f"a guide blind to x has mutual information {blind}"
assert sees.value > 20 * sees.standard_error, f"the amortised guide has mutual information {sees}"
print(f"mutual information: blind {blind.value:.1e}, amortised {sees} nats")
gap = ceiling - parts["blind"].elbo.value
assert gap > -4 * parts["blind"].elbo.standard_error, f"a guide blind to x is {-gap} nats above its ceiling"
amortised = pairs["amortised"]
above = pv.Estimate.of(pv.ELBO(100).bound(amortised.model, amortised.guide, x).detach() - without_z)
assert above.value > 5 * above.standard_error, f"the amortised pair is {above} nats above independent pixels"
print(f"blind: {gap:.2f} nats below its ceiling; amortised: {above} nats above independent pixels")
for low, high in pairwise(betas):
    drop = pv.Estimate.of(kl[f"beta {low:g}"] - kl[f"beta {high:g}"])
    assert drop.value > 5 * drop.standard_error, f"from beta {low} to {high} the KL falls by {drop} nats"
    print(f"from beta {low:g} to {high:g} the KL falls by {drop} nats")
assert curve.elbo.idxmax() == "beta 1", f"the ELBO is best at {curve.elbo.idxmax()}"
