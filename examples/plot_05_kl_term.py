r"""
What is the KL term, and should it be sampled?
==============================================

A KL is an expected extra surprise, in nats: the cost of expecting p when q is true. It isn't symmetric, and
the ELBO's direction makes a guide fit one mode rather than cover all. In the ELBO the KL can be computed in
closed form or from the samples of z, with the same mean. Which one has less noise depends on the guide. Near
the posterior the noise of a sampled KL cancels that of the reconstruction, and at the posterior itself the
sampled ELBO is exact (Roeder, Wu and Duvenaud, 2017, *Sticking the Landing*, `arXiv:1703.09194
<https://arxiv.org/abs/1703.09194>`_). If the guide is too narrow, a sampled KL adds noise. Reparameterisation
reduces noise far more than this choice does (Kingma and Welling, 2014, *Auto-Encoding Variational Bayes*,
`arXiv:1312.6114 <https://arxiv.org/abs/1312.6114>`_).
"""

# %%
# Expected surprise
# -----------------
# The surprise of an outcome is :math:`-\log p`. Let the outcomes come from :math:`q`. The mean surprise of
# someone who believes :math:`q` is the entropy :math:`H(q)`. The mean surprise of someone who believes
# :math:`p` is the cross-entropy. The difference is the KL:
#
# .. math:: \mathrm{KL}(q \,\|\, p) = \underbrace{-\sum_i q_i \log p_i}_{\text{cross-entropy}}
#    - \underbrace{\Bigl(-\sum_i q_i \log q_i\Bigr)}_{\text{entropy}} \ge 0.
import math

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from scipy.optimize import brentq, minimize
from torch.distributions import kl_divergence

import pyro_vae as pv

# sphinx_gallery_thumbnail_number = 3
probabilities = {"q": torch.tensor([0.70, 0.20, 0.07, 0.03]), "p": torch.tensor([0.25, 0.25, 0.25, 0.25])}
figure, ax = plt.subplots(figsize=(7, 2.8), layout="constrained")
for row, (true, believed) in enumerate((("q", "p"), ("p", "q"))):
    t, b = probabilities[true], probabilities[believed]
    entropy, cross_entropy = -(t * t.log()).sum().item(), -(t * b.log()).sum().item()
    kl = kl_divergence(dist.Categorical(t), dist.Categorical(b)).item()
    parts = f"cross-entropy {cross_entropy:.3f} - entropy {entropy:.3f} = KL {kl:.3f} nats"
    print(f"{true} is true, {believed} believed: {parts}")
    ax.barh(row, entropy, color=pv.plots.SKY, label="entropy of the truth" if row == 0 else None)
    ax.barh(row, kl, left=entropy, color=pv.plots.ORANGE, hatch="//", label="KL" if row == 0 else None)
ax.set_yticks([0, 1], labels=["q true, p believed", "p true, q believed"])
ax.invert_yaxis()
ax.set(xlabel="expected surprise (nats)", title="Cross-entropy is entropy plus KL")
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)

# %%
# The two directions give different numbers. Here q has preferred outcomes and p has none.
#
# Which direction?
# ----------------
# The ELBO contains :math:`\mathrm{KL}(q \,\|\, p)`, with the expectation over the guide. It penalises q where q
# has mass and p has none. The other direction, :math:`\mathrm{KL}(p \,\|\, q)`, penalises q where p has mass
# and q has none. We fit one normal to a mixture of two normals, by each. For :math:`\mathrm{KL}(p \,\|\, q)`
# the best normal has p's mean and variance. For :math:`\mathrm{KL}(q \,\|\, p)` we minimise an integral on a
# grid.
grid = torch.linspace(-9.0, 9.0, 4001, dtype=torch.float64)
step = (grid[1] - grid[0]).item()
weights, means, spread = torch.tensor([0.6, 0.4]), torch.tensor([-2.0, 2.0]), 0.7
mixture = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(means, spread))
log_p = mixture.log_prob(grid)


def kl_on_grid(log_first, log_second):
    """KL(first || second) by the trapezium rule; the integrand is zero at both ends of the grid."""
    return ((log_first.exp() * (log_first - log_second)).sum() * step).item()


def normal(parameters):
    """The log-density of a normal on the grid. The parameters are its mean and its log-scale."""
    return dist.Normal(parameters[0], math.exp(parameters[1])).log_prob(grid)


covering = [mixture.mean.item(), mixture.variance.log().item() / 2]
starts = ([-3.0, 0.0], [3.0, 0.0], [0.0, 1.0])
seeking = min(
    (minimize(lambda v: kl_on_grid(normal(v), log_p), start, method="Nelder-Mead") for start in starts),
    key=lambda r: r.fun,
).x
for name, v in (("KL(q || p)", seeking), ("KL(p || q)", covering)):
    log_q = normal(v)
    forward, backward = kl_on_grid(log_q, log_p), kl_on_grid(log_p, log_q)
    print(f"minimum of {name}: mean {v[0]:5.2f}, scale {math.exp(v[1]):.2f}", end="   ")
    print(f"KL(q || p) {forward:.2f} nats, KL(p || q) {backward:.2f} nats")
figure, ax = plt.subplots(figsize=(7, 3.5), layout="constrained")
ax.fill_between(grid, log_p.exp(), color=pv.plots.SKY, alpha=0.6, label="p, two modes")
ax.plot(grid, normal(seeking).exp(), color=pv.plots.ORANGE, label="q that minimises KL(q || p)")
ax.plot(grid, normal(covering).exp(), "--", color=pv.plots.PURPLE, label="q that minimises KL(p || q)")
ax.set(xlim=(-6, 6), ylim=(0, None), xlabel="z", ylabel="density")
ax.set_title("KL(q || p) seeks a mode, KL(p || q) covers both")
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)

# %%
# Closed form or samples: the value
# ---------------------------------
# Take :math:`z \sim \mathcal N(0, I)` and :math:`x \mid z \sim \mathcal N(z, \lambda^{-1} I)` in d dimensions.
# The posterior has precision :math:`P = 1 + \lambda` and mean :math:`m^* = \lambda x / P`. For a guide
# :math:`\mathcal N(m, \sigma^2 I)`, with :math:`z = m + \sigma \epsilon`, each estimate of the ELBO is
# quadratic in :math:`\epsilon`. The variances per dimension are
#
# .. math:: \operatorname{var}\bigl[\log p(x \mid z)\bigr]
#    = \tfrac12 \lambda^2 \sigma^4 + \lambda^2 \sigma^2 (m - x)^2, \qquad
#    \operatorname{var}\bigl[\log p(x, z) - \log q(z)\bigr]
#    = \tfrac12 (1 - P \sigma^2)^2 + P^2 \sigma^2 (m - m^*)^2.
#
# The first is the variance of the ELBO with a closed-form KL. The second is the variance with a Monte Carlo KL.
# It is zero at the posterior, and 1/2 per dimension for a very narrow guide, wherever its mean is. We move the
# guide from t = 0 to the posterior at t = 1. At t = 0 it has the prior's mean and a tenth of the posterior's
# scale. The rows of x are copies of one datum, so one call gives 20,000 independent estimates.
d, lam, copies = 5, 4.0, 20_000
P = 1 + lam
posterior_mean, posterior_scale = lam / P, P**-0.5  # for x = 1 in every dimension


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, lam**-0.5).to_event(1), obs=x)


def estimates(objective, t, d=d):
    """The ELBO of each copy of x and its gradient in the guide's mean; each copy has a mean of its own."""
    x = torch.ones(copies, d)
    m = torch.full((copies, d), t * posterior_mean, requires_grad=True)
    scale = (0.1 + 0.9 * t) * posterior_scale

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(m, scale).to_event(1))

    bound = objective.bound(model, guide, x)
    (gradient,) = torch.autograd.grad(bound.sum(), m)
    return bound.detach(), gradient


def exact_variances(t):
    """Variances of the ELBO with a closed-form and with a Monte Carlo KL, by the formulas."""
    m, variance = t * posterior_mean, ((0.1 + 0.9 * t) * posterior_scale) ** 2
    closed = lam**2 * variance**2 / 2 + lam**2 * variance * (m - 1) ** 2
    sampled = (1 - P * variance) ** 2 / 2 + P**2 * variance * (m - posterior_mean) ** 2
    return d * closed, d * sampled


pyro.set_rng_seed(0)
places = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
objectives = [pv.ELBO(kl="analytic"), pv.ELBO(kl="monte_carlo"), pv.ELBO(kl="monte_carlo", gradient="stl")]
found = {t: [estimates(objective, t) for objective in objectives] for t in places}
crossing = brentq(lambda t: exact_variances(t)[0] - exact_variances(t)[1], 0.05, 0.95)
rows, z_scores = [], []
for t, ((closed, _), (sampled, _), _) in found.items():
    a, b = pv.Estimate.of(closed), pv.Estimate.of(sampled)
    z_scores.append((a.value - b.value) / math.hypot(a.standard_error, b.standard_error))
    row = {"t": t, "closed form": a.value, "Monte Carlo": b.value, "z": z_scores[-1]}
    row |= {"variance, closed form": closed.var().item(), "variance, Monte Carlo": sampled.var().item()}
    rows.append(row)
print(pd.DataFrame(rows).round(3).to_string(index=False))
print(f"the exact variances cross at t = {crossing:.3f}")

# %%
# Means are in nats and variances in nats squared; z is the difference of the means in standard errors. The
# means agree. Near the posterior the sampled KL has the lower variance; for the narrow guide the closed form
# does. (With the prior as guide, a sampled KL is exactly zero and both are the same.)
#
# Closed form or samples: the gradient
# ------------------------------------
# For the gradient in the guide's mean, the variances per dimension are
#
# .. math:: \lambda^2 \sigma^2 \;\text{(closed form)}, \qquad P^2 \sigma^2 \;\text{(Monte Carlo)}, \qquad
#    P^2 \sigma^2 \Bigl(1 - \frac1{P \sigma^2}\Bigr)^2 \;\text{(STL)}.
#
# Here the plain pathwise gradient of a sampled KL always has more noise than that of the closed form. This
# holds even at the posterior, where the sampled value has no noise. There the noise comes from the score,
# :math:`\partial_m \log q`, whose mean is zero. Sticking the landing (STL) drops the score. Its gradient is
# exact at the posterior: its variance is zero there, which a logarithmic axis can't show. STL has less noise
# than the closed form where :math:`P \sigma^2 > P / (P + \lambda)`.
path = torch.linspace(0, 1, 200)
scales = (0.1 + 0.9 * path) * posterior_scale
stl_crossing = ((P / (P + lam)) ** 0.5 - 0.1) / 0.9
exact_gradients = [(lam * scales) ** 2, (P * scales) ** 2, (P * scales - 1 / scales) ** 2]
figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
for i, (objective, marker, style) in enumerate(zip(objectives, "os^", ("-", "--", ":"), strict=True)):
    # the package would give STL the same colour as the Monte Carlo ELBO
    colour = pv.plots.PURPLE if i == 2 else pv.plots.objective_colour(objective.name)
    values = [results[i][0].var().item() for results in found.values()]
    gradients = [results[i][1].var(0).sum().item() for results in found.values()]
    if i < 2:
        axes[0].plot(path, [exact_variances(t)[i] for t in path], style, color=colour)
        axes[0].plot(places, values, marker, color=colour)
    axes[1].plot(path, d * exact_gradients[i], style, color=colour)
    axes[1].plot(places, gradients, marker, color=colour)
    axes[1].plot([], [], style, marker=marker, color=colour, label=objective.name)
axes[0].axvline(crossing, color="0.6", linewidth=0.8)
axes[1].axvline(stl_crossing, color="0.6", linewidth=0.8)
axes[0].set(title="value", ylabel="variance (nats²)")
axes[1].set(
    title="gradient in the guide's mean",
    ylabel="total variance (nats² per unit² of z)",
    yscale="log",
    ylim=(0.1, None),
)
for ax in axes:
    ax.set_xlabel("t: from a narrow guide (0) to the posterior (1)")
figure.suptitle("Variance of the ELBO for guides from narrow to exact: formulas (lines) and samples (markers)")
figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)

# %%
# Reparameterisation against the score function
# ---------------------------------------------
# The score function estimates the same gradient without a derivative through z. It is the mean of
# :math:`\partial_m \log q(z)` times the log-weight minus a baseline. Here the baseline is the mean log-weight
# of the other copies. Each component carries the noise of the log-weight of all dimensions, and this noise
# grows with d. A component of the pathwise gradient depends on its own dimension alone. Both estimators are for
# the sampled ELBO at t = 0.5.
rows, score_z = [], []
for dimension in (1, 4, 16, 64):
    pathwise = estimates(pv.ELBO(kl="monte_carlo"), 0.5, dimension)[1]
    score = estimates(pv.ELBO(kl="monte_carlo", gradient="score"), 0.5, dimension)[1]
    a, b = pv.Estimate.of(pathwise.mean(1)), pv.Estimate.of(score.mean(1))
    score_z.append((a.value - b.value) / math.hypot(a.standard_error, b.standard_error))
    ratio = (score.var(0).mean() / pathwise.var(0).mean()).item()
    row = {"d": dimension, "pathwise": str(a), "score": str(b), "z": score_z[-1]}
    rows.append(row | {"variance ratio": ratio})
print(pd.DataFrame(rows).round(2).to_string(index=False))

# %%
# The table shows the mean gradient of a component with its standard error. The last column is the variance of a
# component with the score function, divided by its variance with the pathwise estimator.
#
# The claim, checked
# ------------------
# Closed form and Monte Carlo have the same mean, and which one has the lower variance changes between t = 0 and
# t = 1. Each estimated variance is a mean of squared deviations, so it has a standard error. It agrees with its
# formula, for the value and for the gradient, at every t with noise.
worst_mean, worst_score = max(map(abs, z_scores)), max(map(abs, score_z))
assert worst_mean < 4, f"closed form and Monte Carlo differ by {worst_mean:.1f} standard errors"
assert worst_score < 4, f"pathwise and score differ by {worst_score:.1f} standard errors"


def off_formula(draws, exact):
    """The variance of draws minus a formula, in standard errors."""
    measured = pv.Estimate.of((draws - draws.mean(0)).square().flatten(1).sum(1))
    return (measured.value - exact) / measured.standard_error


variance_z = []
for t, results in found.items():
    scale = (0.1 + 0.9 * t) * posterior_scale
    formulas = [(lam * scale) ** 2, (P * scale) ** 2, (P * scale - 1 / scale) ** 2]
    pairs = [(results[i][1], d * formulas[i]) for i in range(3)]
    pairs += [(results[i][0][:, None], exact_variances(t)[i]) for i in range(2)]
    variance_z += [off_formula(draws, exact) for draws, exact in pairs if exact > 1e-9]
worst_variance = max(map(abs, variance_z))
assert worst_variance < 4, f"a variance is {worst_variance:.1f} standard errors from its formula"
excess = {}
for t in (0.0, 1.0):
    squares = [(bound - bound.mean()).square() for bound, _ in found[t][:2]]
    excess[t] = pv.Estimate.of(squares[1] - squares[0])
narrow, posterior = (excess[t].value / excess[t].standard_error for t in (0.0, 1.0))
assert narrow > 5, f"Monte Carlo is not noisier for the narrow guide: {excess[0.0]} nats squared"
assert posterior < -5, f"Monte Carlo is not quieter at the posterior: {excess[1.0]} nats squared"
print(f"largest |z| of the means {worst_mean:.2f}, of {len(variance_z)} variances {worst_variance:.2f};")
print(f"Monte Carlo minus closed form, nats squared: {excess[0.0]} at t = 0, {excess[1.0]} at t = 1")
