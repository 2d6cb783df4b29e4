r"""
How far below log p(x) is the ELBO?
===================================

The ELBO is below log p(x) by exactly KL(q(z|x) || p(z|x)), for every guide q (Jordan, Ghahramani, Jaakkola
and Saul, 1999, *An Introduction to Variational Methods for Graphical Models*,
https://doi.org/10.1023/A:1007665907178). So a guide that raises the ELBO comes nearer to the posterior, and
nobody has to know the posterior for that. We move a guide from the prior to the exact posterior of a linear
model, in which every term is known. Then we write the ELBO in four ways (Kingma and Welling, 2014,
*Auto-Encoding Variational Bayes*, https://arxiv.org/abs/1312.6114). Last, we show why the prior may be a
standard normal (Doersch, 2016, *Tutorial on Variational Autoencoders*, https://arxiv.org/abs/1606.05908).
"""

# %%
# Two derivations
# ---------------
# **Jensen's inequality.** Multiply and divide by the guide. The logarithm of a mean is at least the mean of the
# logarithms:
#
# .. math:: \log p(x) = \log \mathbb E_{q(z \mid x)} \frac{p(x, z)}{q(z \mid x)}
#     \ge \mathbb E_{q(z \mid x)} \log \frac{p(x, z)}{q(z \mid x)} = \mathrm{ELBO}
#
# This shows that the ELBO is a lower bound, but not how far below :math:`\log p(x)` it is.
#
# **The KL to the posterior.** The second derivation gives the distance. For every z, :math:`p(x) = p(x, z) /
# p(z \mid x)`. Take logarithms, add and subtract :math:`\log q`, and average over the guide:
#
# .. math:: \log p(x) = \underbrace{\mathbb E_q \log \frac{p(x, z)}{q(z \mid x)}}_{\mathrm{ELBO}}
#     + \underbrace{\mathbb E_q \log \frac{q(z \mid x)}{p(z \mid x)}}
#     _{\mathrm{KL}(q(z \mid x) \,\|\, p(z \mid x)) \,\ge\, 0}
#
# Here is a model in which every term is known. It has two latent and three observed dimensions, and we draw 200
# data from it.
#
# .. math:: z \sim \mathcal N(0, I), \quad x \mid z \sim \mathcal N(W z, \sigma^2 I), \quad
#     p(z \mid x) = \mathcal N(\Sigma W^\top x / \sigma^2, \Sigma), \; \Sigma^{-1} = I + W^\top W / \sigma^2

import math

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch.distributions import kl_divergence

import pyro_vae as pv

pyro.set_rng_seed(0)
identity = torch.eye(2, dtype=torch.float64)  # in double precision, so that identities hold to 1e-9
centre = torch.zeros(2, dtype=torch.float64)
W = torch.tensor([[1.0, 0.6], [0.2, 0.9], [-0.5, 0.4]], dtype=torch.float64)
sigma = 0.8
prior = dist.MultivariateNormal(centre, identity)
x = prior.sample((200,)) @ W.T + sigma * torch.randn(200, 3, dtype=torch.float64)

covariance = torch.linalg.inv(identity + W.T @ W / sigma**2)
posterior = dist.MultivariateNormal(x @ W @ covariance / sigma**2, covariance)
noise = sigma**2 * torch.eye(3, dtype=torch.float64)
log_p = dist.MultivariateNormal(torch.zeros(3, dtype=torch.float64), W @ W.T + noise).log_prob(x)
print(f"log p(x) = {log_p.mean():.4f} nats per datum, exact")

# %%
# Guides between the prior and the posterior
# ------------------------------------------
# At t = 0 the guide is the prior, and at t = 1 it is the posterior. Between them, mean and covariance are
# interpolated. The ELBO of a Gaussian guide with mean m and covariance C has a closed form here:
#
# .. math:: \mathrm{ELBO} &= \mathbb E_q \log p(x \mid z) - \mathrm{KL}(q(z \mid x) \,\|\, p(z)) , \\
#     \mathbb E_q \log p(x \mid z) &= -\tfrac32 \log(2 \pi \sigma^2)
#     - \frac{\|x - W m\|^2 + \operatorname{tr}(W C W^\top)}{2 \sigma^2}
#
# Neither of its terms contains the posterior. Still, the ELBO plus the KL to the posterior is :math:`\log
# p(x)`, for each of the 200 data and at every t. The guide at t = 0 has zero KL to the prior and is the worst
# one.


def guide_at(t):
    return dist.MultivariateNormal(t * posterior.loc, (1 - t) * identity + t * covariance)


def reconstruction(q):
    squares = (x - q.loc @ W.T).square().sum(-1) + (W.T @ W * q.covariance_matrix).sum((-2, -1))
    return -1.5 * math.log(2 * math.pi * sigma**2) - squares / (2 * sigma**2)


def elbo(q):
    return reconstruction(q) - kl_divergence(q, prior)


path = torch.linspace(0, 1, 6, dtype=torch.float64)
table = pd.DataFrame(index=pd.Index(path.numpy().round(1), name="t"))
table["reconstruction"] = [reconstruction(guide_at(t)).mean().item() for t in path]
table["KL to prior"] = [kl_divergence(guide_at(t), prior).mean().item() for t in path]
table["ELBO"] = [elbo(guide_at(t)).mean().item() for t in path]
table["KL to posterior"] = [kl_divergence(guide_at(t), posterior).mean().item() for t in path]
table["ELBO + KL to post."] = table["ELBO"] + table["KL to posterior"]
print("mean over data, in nats per datum:")
print(table.round(4).to_string())

# %%
# The ELBO from samples
# ---------------------
# The reconstruction term of a VAE has no closed form, so it is estimated from samples of the guide.
# :class:`pyro_vae.ELBO` does this for any Pyro program. The KL to the prior is computed in closed form, or
# sampled too. Both estimates have the exact ELBO as mean. ``z`` is the estimate minus the exact ELBO in
# standard errors, over 200 data with 100 samples each.
#
# At t = 1 the Monte Carlo estimate has no noise at all: there :math:`p(x, z) / q(z \mid x)` is :math:`p(x)` for
# every z. So the table gives no z-value, and the check below tests equality.


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", prior)
        pyro.sample("x", dist.Normal(z @ W.T, sigma).to_event(1), obs=x)


def sampling_from(q):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", q)

    return guide


objectives = {kl: pv.ELBO(100, kl=kl) for kl in ("analytic", "monte_carlo")}
sampled, errors = {kl: [] for kl in objectives}, {kl: [] for kl in objectives}
for t in path:
    q = guide_at(t)
    for kl, objective in objectives.items():
        bound = objective.bound(model, sampling_from(q), x)
        sampled[kl].append(bound.mean().item())
        errors[kl].append(pv.Estimate.of(bound - elbo(q)))
comparison = table[["ELBO"]].rename(columns={"ELBO": "exact"})
for kl, words in (("analytic", "closed-form KL"), ("monte_carlo", "Monte Carlo KL")):
    comparison[words] = sampled[kl]
    noisy = [e if e.standard_error > 1e-9 else None for e in errors[kl]]
    comparison[f"z, {words}"] = [e.value / e.standard_error if e else math.nan for e in noisy]
print(comparison.round(3).to_string(na_rep="no noise"))

fine = torch.linspace(0, 1, 101, dtype=torch.float64)
curve = [elbo(guide_at(t)).mean().item() for t in fine]
height = log_p.mean().item()
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.6), layout="constrained")
figure.suptitle("From the prior to the posterior, the ELBO rises to log p(x)")
circle = torch.linspace(0, 2 * math.pi, 200, dtype=torch.float64)
circle = torch.stack([circle.cos(), circle.sin()])
datum = int(posterior.loc.norm(dim=-1).argmax())
styles = {0.0: (pv.plots.SKY, "--", "prior, t = 0"), 1.0: (pv.plots.BLACK, "-", "posterior, t = 1")}
for t in path.tolist():
    q = guide_at(t)
    ellipse = q.loc[datum][:, None] + q.scale_tril[datum] @ circle
    colour, line, label = styles.get(t, (pv.plots.ORANGE, "-.", "guides between" if t < 0.3 else None))
    left.plot(*ellipse, color=colour, linestyle=line, linewidth=2 if t in styles else 1, label=label)
left.set(xlabel="z1", ylabel="z2", title="q(z|x) of one datum (one s.d.)", aspect="equal")
right.axhline(height, color=pv.plots.BLACK, label="log p(x)")
right.fill_between(fine, curve, height, color=pv.plots.ORANGE, alpha=0.25, label="KL(q(z|x) || p(z|x))")
blue, vermillion = (pv.plots.objective_colour(objective.name) for objective in objectives.values())
right.plot(fine, curve, color=blue, label="ELBO, exact")
right.plot(path, sampled["monte_carlo"], "o", color=vermillion, label="ELBO, Monte Carlo")
right.set(xlabel="t, from prior to posterior", ylabel="bound on log p(x) (nats per datum)")
for ax in (left, right):
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


# %%
# Is there another way to write it?
# ---------------------------------
# There are many: :math:`\log p(x, z)` can be split in different ways, and entropies can be kept together or
# apart. All give the same number:
#
# .. math:: \mathrm{ELBO} &= \mathbb E_q \log p(x \mid z) - \mathrm{KL}(q(z \mid x) \,\|\, p(z))
#     \qquad \text{reconstruction - KL} \\
#     &= \mathbb E_q \log p(x, z) + \mathrm H(q(z \mid x)) \qquad \text{joint + entropy} \\
#     &= \log p(x) - \mathrm{KL}(q(z \mid x) \,\|\, p(z \mid x)) \qquad \text{evidence - gap} \\
#     &= \mathbb E_q \log w , \quad w = p(x, z) / q(z \mid x) \qquad \text{mean log-weight}
#
# They differ in what must be known. The third needs :math:`\log p(x)`, which is unknown. The first two need the
# mean of the decoder's log-density under the guide, which sampling estimates. The fourth needs only densities
# at samples, so it works for any program: :func:`pyro_vae.log_weights`.

pyro.set_rng_seed(1)
q = guide_at(0.6)
prior_term = -math.log(2 * math.pi) - (q.loc.square().sum(-1) + q.variance.sum(-1)) / 2
log_w = pv.log_weights(model, sampling_from(q), x, num_particles=2000)
forms = {
    "reconstruction - KL": reconstruction(q) - kl_divergence(q, prior),
    "joint + entropy": reconstruction(q) + prior_term + q.entropy(),
    "evidence - gap": log_p - kl_divergence(q, posterior),
}
for name, values in forms.items():
    print(f"{name:<28}{values.mean():.10f}")
weights_error = pv.Estimate.of(log_w.mean(0) - forms["evidence - gap"])
print(f"{'mean log-weight, sampled':<28}{log_w.mean():.4f}, error {weights_error}")

# %%
# Why a standard normal prior?
# ----------------------------
# Another normal prior adds nothing that the decoder can't do. Let :math:`z = L u + m` with u standard normal.
# Then z has the prior :math:`\mathcal N(m, S)` with :math:`S = L L^\top`, and a decoder f(z) of z is the
# decoder f(Lu + m) of u. The same holds for any fixed invertible map. The guide changes with the map: :math:`u
# = L^{-1}(z - m)`. A KL does not change under such a map. Neither does any log-weight, since the Jacobian
# cancels between :math:`p(z)` and :math:`q(z \mid x)`. So the prior costs nothing if the decoder and the
# guide's family can absorb the map. A linear decoder absorbs L and m. A guide with independent dimensions does
# not stay independent under every L.
#
# With the same seed, the two model/guide pairs give the same log-weight for each sample and datum.

m = torch.tensor([1.0, -0.5], dtype=torch.float64)
L = torch.tensor([[1.5, 0.0], [0.7, 0.6]], dtype=torch.float64)


def weights(prior, loadings, offset, loc, scale_tril):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z @ loadings.T + offset, sigma).to_event(1), obs=x)

    pyro.set_rng_seed(2)
    guide = sampling_from(dist.MultivariateNormal(loc, scale_tril=scale_tril))
    return pv.log_weights(model, guide, x, num_particles=100)


other = weights(dist.MultivariateNormal(m, scale_tril=L), W, 0.0, q.loc, q.scale_tril)
inverse = torch.linalg.inv(L)
standard = weights(prior, W @ L, W @ m, (q.loc - m) @ inverse.T, inverse @ q.scale_tril)
change = (other - standard).abs().max().item()
print(f"{other.numel():,} log-weights, mean {other.mean():.4f} and {standard.mean():.4f} nats")
print(f"largest difference {change:.0e} nats")

# %%
# The claim, checked
# ------------------
# For each datum and at every t, the ELBO and the KL to the posterior sum to :math:`\log p(x)`. The mean ELBO
# rises from t = 0 to t = 1. The sampled ELBOs agree with the exact one, without noise at the posterior. The
# other prior changes no log-weight.
#
# The next two scripts, :doc:`plot_04_reconstruction_term` and :doc:`plot_05_kl_term`, are about the two terms
# of the ELBO in a trained VAE.

sums = torch.stack([elbo(guide_at(t)) + kl_divergence(guide_at(t), posterior) for t in fine])
off = (sums - log_p).abs().max().item()
spread = max((values - forms["evidence - gap"]).abs().max().item() for values in forms.values())
at_posterior = errors["monte_carlo"].pop()
noisy = [e for estimates in errors.values() for e in estimates] + [weights_error]
worst_z = max(abs(e.value) / e.standard_error for e in noisy)
assert off < 1e-9, f"ELBO + KL to the posterior differs from log p(x) by {off:.1e} nats"
assert spread < 1e-9, f"the ways to write the ELBO differ by {spread:.1e} nats"
assert pd.Series(curve).is_monotonic_increasing, f"the ELBO does not rise at every t: {curve}"
assert worst_z < 4, f"a sampled ELBO is {worst_z:.1f} standard errors from the exact one"
assert abs(at_posterior.value) < 1e-9, f"at the posterior the sampled ELBO differs by {at_posterior.value:.1e}"
assert change < 1e-9, f"another prior changes a log-weight by {change:.1e} nats"
print(f"largest errors: identity {off:.0e} nats, forms {spread:.0e} nats, at the posterior", end=" ")
print(f"{abs(at_posterior.value):.0e} nats, other prior {change:.0e} nats;")
print(f"largest |z| of {len(noisy)} sampled means: {worst_z:.2f}")
