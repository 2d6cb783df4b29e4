r"""
What is the reconstruction term?
================================

The first term of the ELBO, :math:`\mathbb E_q \log p(x \mid z)`, is a log-likelihood in nats. For a Gaussian
likelihood it is a squared error, and for a Bernoulli a cross-entropy. This is not an analogy: it is exact,
constants included. The constants and the scale matter, because the other term, the KL, is in nats too. The
Gaussian's :math:`\sigma` sets the exchange rate between the two terms: :math:`\sigma^2` is the :math:`\beta`
of a beta-VAE (Higgins et al., 2017, *beta-VAE*, ICLR). A plain sum of squares corresponds to :math:`\sigma`
near 1. That is far too wide for pixels in [0, 1], and the VAE then ignores its latent variable. The remedy is
to learn :math:`\sigma`, whose optimum is the root mean squared residual (Rybkin, Daniilidis and Levine, 2021,
*Simple and Effective VAE Training with Calibrated Decoders*, ICML; `arXiv:2006.13202
<https://arxiv.org/abs/2006.13202>`_).
"""

# %%
# A squared error, a cross-entropy
# --------------------------------
# With a mean :math:`\mu(z)` from the decoder and one :math:`\sigma` for all :math:`D` pixels, a Gaussian
# likelihood is
#
# .. math:: \log p(x \mid z) = -\frac{\lVert x - \mu(z) \rVert^2}{2 \sigma^2} - \frac D2 \log 2 \pi \sigma^2.
#
# A Bernoulli likelihood is for pixels that are 0 or 1. The decoder gives its logits, and :math:`\log p(x \mid
# z) = \sum_d x_d \log \pi_d + (1 - x_d) \log (1 - \pi_d)` is minus the binary cross-entropy. We compare the
# package's likelihoods with PyTorch's losses, summed over pixels, in float64.
import functools
import math

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss
from torch.optim.lr_scheduler import CosineAnnealingLR

import pyro_vae as pv

pyro.set_rng_seed(0)
digits = pv.data.load("digits")  # grey, in [0, 1]
shape, D = digits.event_shape, math.prod(digits.event_shape)
grey, binary = digits.test.x.double(), pv.data.load("digits", binarize="fixed").test.x.double()

decoder = pv.networks.mlp(16, [128], D).double()
z = torch.randn(len(grey), 16, dtype=torch.float64)
output, sigma = decoder(z).reshape(grey.shape), 0.5

gaussian = pv.Gaussian(decoder, shape, scale=sigma).double()(z).log_prob(grey)
squared_error = mse_loss(output, grey, reduction="none").flatten(1).sum(1)
from_error = -squared_error / (2 * sigma**2) - D / 2 * math.log(2 * math.pi * sigma**2)

bernoulli = pv.Bernoulli(decoder, shape)(z).log_prob(binary)
cross_entropy = binary_cross_entropy_with_logits(output, binary, reduction="none").flatten(1).sum(1)

for name, density, loss in (("Gaussian", gaussian, from_error), ("Bernoulli", bernoulli, -cross_entropy)):
    print(
        f"{name:9}  log p(x|z) {density.mean():8.3f} nats   from the loss {loss.mean():8.3f} nats"
        f"   largest difference {(density - loss).abs().max():.0e}"
    )

# %%
# Grey pixels under a Bernoulli give a loss that can be minimised, but not a density: at a logit of 0 it
# integrates to 1/2 over [0, 1]. The package raises an error for grey pixels.
# :class:`pyro_vae.ContinuousBernoulli` has the missing constant.
#
# The exchange rate
# -----------------
# Multiply a Gaussian VAE's ELBO by :math:`\sigma^2`:
#
# .. math:: \sigma^2 \Bigl( \mathrm{ELBO}_\sigma + \tfrac D2 \log 2 \pi \sigma^2 \Bigr)
#    = -\tfrac12 \mathbb E_q \lVert x - \mu(z) \rVert^2 - \sigma^2\, \mathrm{KL}
#    = \mathrm{ELBO}_{\sigma = 1,\, \beta = \sigma^2} + \tfrac D2 \log 2 \pi.
#
# At a fixed :math:`\sigma` the two objectives differ by a positive factor and a constant, so the same networks
# maximise both. To set :math:`\beta` with a squared error is to choose :math:`\sigma = \sqrt\beta`. A mean over
# pixels, in place of a sum, corresponds to :math:`\sigma^2 = D / 2`, here :math:`\sigma = 5.7`. Both objectives
# below use the same samples of :math:`z`.
vae = pv.mlp_vae(shape, latent_dim=16, hidden_dims=(128,), likelihood="gaussian", scale=sigma).double()
unit_likelihood = pv.Gaussian(vae.likelihood.decoder, shape)
unit = pv.VAE(prior=vae.prior, likelihood=unit_likelihood, posterior=vae.posterior).double()

pyro.set_rng_seed(1)
of_sigma = pv.ELBO().bound(vae, grey).detach()
pyro.set_rng_seed(1)
of_beta = pv.ELBO(beta=sigma**2).bound(unit, grey).detach()

left = sigma**2 * (of_sigma + D / 2 * math.log(2 * math.pi * sigma**2))
right = of_beta + D / 2 * math.log(2 * math.pi)
print(f"from sigma = {sigma}:   {left.mean():.6f}")
print(f"from beta = {sigma**2}:   {right.mean():.6f}   largest difference {(left - right).abs().max():.0e}")

# %%
# What sigma does to the latent variable
# --------------------------------------
# We train four VAEs on the grey digits; they differ only in :math:`\sigma`. In a linear VAE a latent dimension
# is worth its KL only if the data vary along it by more than :math:`\sigma^2` (Tipping and Bishop, 1999,
# *Probabilistic Principal Component Analysis*, `doi:10.1111/1467-9868.00196
# <https://doi.org/10.1111/1467-9868.00196>`_; Lucas et al., 2019, *Don't Blame the ELBO*, `arXiv:1911.02469
# <https://arxiv.org/abs/1911.02469>`_). So we count the principal components of the training data whose
# variance is above :math:`\sigma^2`, next to the number of active units, out of 16. These networks are not
# linear, so the count is only a rough prediction.
component_variances = torch.linalg.eigvalsh(torch.cov(digits.train.x.flatten(1).T))
held_out, vaes, bounds, rows = digits.test.x, {}, {}, []


def squared_residuals(vae, x):
    """Squared error of each datum: the sum over pixels, averaged over 64 samples of q(z|x)."""
    with torch.no_grad():
        samples = vae.posterior(x).sample((64,))
    return (vae.decode(samples) - x).square().flatten(2).sum(2).mean(0)


def fit(vae, epochs, batch_size, lr):
    """Train by Adam with a learning rate that falls to zero, so that the last steps add little noise."""
    cosine = functools.partial(CosineAnnealingLR, T_max=epochs)
    args = (vae, digits.train, pv.ELBO())
    pv.fit(*args, epochs=epochs, batch_size=batch_size, lr=lr, lr_scheduler=cosine, seed=0, progress=False)


for scale in (1.0, 0.5, "learned", 0.05):
    pyro.set_rng_seed(0)
    vae = pv.mlp_vae(shape, latent_dim=16, hidden_dims=(128,), likelihood="gaussian", scale=scale)
    fit(vae, epochs=60, batch_size=128, lr=1e-2)
    pyro.set_rng_seed(2)
    vaes[scale], units = vae, pv.active_units(vae, held_out)
    bounds[scale] = pv.ELBO(64).bound(vae, held_out).detach()
    sigma = vae.likelihood.log_scale.exp().item() if scale == "learned" else scale
    row = {
        "sigma": f"{sigma:.3f}{' learned' if scale == 'learned' else '        '}",
        "RMS residual": (squared_residuals(vae, held_out).mean() / D).sqrt().item(),
        "reconstruction": bounds[scale].mean().item() + units.kl.sum(),  # since bound = reconstruction - KL
        "KL": units.kl.sum(),
        "bound": bounds[scale].mean().item(),
        "active": units.active.sum(),
        "components above": (component_variances > sigma**2).sum().item(),
    }
    rows.append(row)
print(pd.DataFrame(rows).round(3).to_string(index=False))

# %%
# The table is for held-out digits. The residual is in units of grey. Reconstruction, KL and bound are in nats
# per digit; a log-density may be positive.
#
# At :math:`\sigma = 1` no component of the data varies by more than the decoder's noise. The KL is near zero,
# no unit is active, and each reconstruction is the mean digit. Training has not failed: with such wide noise, a
# blurred mean is the best explanation. The smallest :math:`\sigma` has the smallest residual and the largest
# KL. Its bound is below that of :math:`\sigma = 0.5`, whose digits are far more blurred. So a residual alone
# can't rank models; the bound can.
originals = held_out[:12]
figure, ax = plt.subplots(figsize=(8, 3.6), layout="constrained")
pyro.set_rng_seed(3)
reconstructions = [vae.reconstruct(originals) for vae in vaes.values()]
pv.plots.images(torch.cat([originals, *reconstructions]), columns=12, ax=ax)
labels = ["original"] + [f"sigma {row['sigma'].strip()}" for row in rows]
ax.set_yticks([9 * i + 3.5 for i in range(5)], labels=labels)
ax.set_title("Held-out digits and their reconstructions at four sigma")

# %%
# Learning sigma
# --------------
# With everything else fixed, the ELBO averaged over data has one maximum in :math:`\sigma`:
#
# .. math:: \frac{\partial\, \mathrm{ELBO}}{\partial \log \sigma}
#    = \frac{\mathbb E_q \lVert x - \mu(z) \rVert^2}{\sigma^2} - D = 0
#    \quad\Longleftrightarrow\quad \sigma^2 = \frac1D\, \mathbb E_q \lVert x - \mu(z) \rVert^2,
#
# averaged over the training data. This is the mean squared residual, including the noise of :math:`z`. With
# this :math:`\sigma` the reconstruction term is :math:`-\frac D2 \log \mathrm{MSE}` plus a constant. ``pv.fit`` sets
# :math:`\sigma` so in its first steps; then it follows the residual by its gradient, with a delay. So we freeze the
# networks and fit :math:`\sigma` alone, by 100 steps on all the data. The curve shows the bound of these networks
# on the held-out digits at other values of :math:`\sigma`.
best = vaes["learned"]
residual_variance = squared_residuals(best, digits.train.x).mean().item() / D
lagging_variance = best.likelihood.log_scale.exp().square().item()
best.eval().requires_grad_(False)  # Pyro warns about frozen parameters in training mode
best.likelihood.log_scale.requires_grad_(True)
fit(best, epochs=100, batch_size=len(digits.train), lr=1e-2)
learned_variance = best.likelihood.log_scale.exp().square().item()
settled_bound = pv.ELBO(64).bound(best, held_out).mean().item()
print(f"sigma^2 trained with the networks        {lagging_variance:.5f}")
print(f"sigma^2 with the networks frozen         {learned_variance:.5f}")
print(f"mean squared residual, training data     {residual_variance:.5f}")

sigmas = torch.logspace(math.log10(0.08), math.log10(1.4), 200)
kl = rows[2]["KL"]
error_term = squared_residuals(best, held_out).mean() / (2 * sigmas**2)
curve = -error_term - D / 2 * (2 * math.pi * sigmas**2).log() - kl
figure, ax = plt.subplots(figsize=(8, 4.2), layout="constrained")
ax.plot(sigmas, curve, color=pv.plots.BLUE, label="networks of the learned sigma,\nat other values of sigma")
ax.plot(learned_variance**0.5, settled_bound, "o", color=pv.plots.BLUE, markersize=9, label="learned sigma")
fixed = [row for row in rows if "learned" not in row["sigma"]]
places = [float(row["sigma"]) for row in fixed]
ax.plot(places, [row["bound"] for row in fixed], "s", color=pv.plots.PURPLE, label="trained with fixed sigma")
ax.axvline(residual_variance**0.5, color="0.5", linestyle=":", label="RMS residual, training data")
ax.set(xscale="log", xlabel="sigma (units of grey)", ylabel="bound on log p(x) (nats per datum)")
ax.set_xticks([0.05, 0.1, 0.2, 0.5, 1], labels=["0.05", "0.1", "0.2", "0.5", "1"])
ax.minorticks_off()
figure.suptitle("Held-out bound against sigma: the learned sigma is near the maximum")
ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)

# %%
# The claim, checked
# ------------------
# The identities hold up to rounding. Training finds a :math:`\sigma^2` within 1% of the mean squared
# residual; this margin allows for the noise of the samples of :math:`z`. On held-out data the bound with the
# learned :math:`\sigma` is above that with each fixed one, by paired differences of more than 5 standard
# errors.
assert (gaussian - from_error).abs().max() < 1e-9, "a Gaussian's log-density is not its squared error"
assert (bernoulli + cross_entropy).abs().max() < 1e-9, "a Bernoulli's log-density is not minus the cross-entropy"
assert (left - right).abs().max() < 1e-9, "the ELBO at sigma and the beta-ELBO at beta = sigma^2 differ"
ratio = learned_variance / residual_variance
assert abs(ratio - 1) < 0.01, f"learned sigma^2 is {ratio:.3f} of the mean squared residual"
gains = {scale: pv.Estimate.of(bounds["learned"] - bounds[scale]) for scale in (1.0, 0.5, 0.05)}
for scale, gain in gains.items():
    assert gain.value > 5 * gain.standard_error, f"learned sigma minus sigma = {scale}: {gain} nats"
print(f"learned sigma^2 / mean squared residual = {ratio:.4f}")
for scale, gain in gains.items():
    print(f"bound with learned sigma minus bound with sigma = {scale}: {gain} nats per held-out digit")
