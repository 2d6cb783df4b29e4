"""The error of each log-density in float32: of every likelihood, prior and posterior, at ordinary and extreme values.

    python benchmarks/accuracy.py

The exact log-density is computed with 50 digits from the same rounded parameters and data. An error is allowed to be
0.001 nats for each 1,000 elements of a datum, and 1e-5 of the log-density. The table has the largest error
as a share of what is allowed, and that error in nats; a share above 1 is marked. Each part runs as it is, and inside
``torch.autocast("cpu", torch.bfloat16)``, where only the networks may be of half precision.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import mpmath
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_vae as pv

mpmath.mp.dps = 50
mpf = mpmath.mpf
SIZE = 784  # elements of a datum

Exact = Callable[..., mpmath.mpf]
Pool = list[tuple[float, ...]]  # of x and the features of an element


@dataclass
class Case:
    """Data of one part: what computes their log-densities in float32, and the exact values."""

    part: str
    values: str  # "ordinary" or "extreme"
    distribution: Callable[[], dist.TorchDistribution]
    value: Tensor
    exact: Callable[[], list[mpmath.mpf]]
    size: int = SIZE
    has_networks: bool = False  # which run in half precision under autocast, and are other networks there
    element: Exact | None = None  # the exact density of x and its features, where elements are independent

    def errors(self, expected: Tensor) -> tuple[Tensor, Tensor]:
        """The error of each datum in nats, and as a share of what is allowed."""
        log_prob = pv.log_weights(self.model, lambda x: None, self.value, num_particles=1)[0]
        error = (log_prob.detach().double() - expected).abs().nan_to_num(nan=math.inf)
        return error, error / (1e-6 * self.size + 1e-5 * expected.abs())

    def model(self, x: Tensor) -> None:
        """The data alone: their log-weights are their log-densities."""
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.distribution(), obs=x)


# Elements that are independent given z: a datum has SIZE draws from a pool, whose log-densities are exact.


def elements_of(part: str, likelihood: pv.Likelihood, exact: Exact, ordinary: Pool, *extreme: Pool) -> Iterator[Case]:
    """The cases of a likelihood."""
    for values, pool in (("ordinary", ordinary), *(("extreme", each) for each in extreme)):
        columns = torch.tensor(pool or [(0.0,)], dtype=torch.float32)
        mixed = torch.randint(len(columns), (20, SIZE), generator=torch.Generator().manual_seed(0))
        alike = torch.arange(len(columns))[:, None].expand(-1, SIZE)  # errors of one sign add up
        index = torch.cat([mixed, alike])
        x, *features = columns[index].unbind(-1)

        def sums(columns: Tensor = columns, index: Tensor = index) -> list[mpmath.mpf]:
            each = [exact(*map(mpf, row)) for row in columns.tolist()]
            return [mpmath.fsum(each[i] for i in row) for row in index.tolist()]

        if pool:
            distribution = partial(likelihood.event_distribution, *features, mask=None)
            yield Case(part, values, distribution, x, sums, element=exact)


def softplus(value: mpmath.mpf) -> mpmath.mpf:
    return mpmath.log1p(mpmath.exp(value))


def bernoulli(x: mpmath.mpf, logit: mpmath.mpf) -> mpmath.mpf:
    return -softplus(logit * (1 - 2 * x))


def continuous_bernoulli(x: mpmath.mpf, logit: mpmath.mpf) -> mpmath.mpf:
    norm = mpmath.log(logit / mpmath.tanh(logit / 2)) if logit else mpmath.log(2)
    return x * logit - softplus(logit) + norm


def normal(x: mpmath.mpf, loc: mpmath.mpf, scale: mpmath.mpf) -> mpmath.mpf:
    return -(((x - loc) / scale) ** 2) / 2 - mpmath.log(scale) - mpmath.log(2 * mpmath.pi) / 2


def student_t(x: mpmath.mpf, loc: mpmath.mpf, scale: mpmath.mpf, df: mpmath.mpf) -> mpmath.mpf:
    norm = mpmath.loggamma((df + 1) / 2) - mpmath.loggamma(df / 2) - mpmath.log(df * mpmath.pi) / 2 - mpmath.log(scale)
    return norm - (df + 1) / 2 * mpmath.log1p(((x - loc) / scale) ** 2 / df)


def poisson(x: mpmath.mpf, log_rate: mpmath.mpf) -> mpmath.mpf:
    log_rate = min(max(log_rate, mpf(-30)), mpf(30))
    return x * log_rate - mpmath.exp(log_rate) - mpmath.loggamma(x + 1)


def negative_binomial(x: mpmath.mpf, log_mean: mpmath.mpf, log_r: mpmath.mpf) -> mpmath.mpf:
    mean, r = mpmath.exp(log_mean), mpmath.exp(log_r)
    choices = mpmath.loggamma(x + r) - mpmath.loggamma(x + 1) - mpmath.loggamma(r)
    return choices + r * mpmath.log(r / (r + mean)) + x * mpmath.log(mean / (r + mean))


def categorical(x: mpmath.mpf, *logits: mpmath.mpf) -> mpmath.mpf:
    return logits[int(x)] - log_sum_exp(logits)


def log_sum_exp(values: Iterable[mpmath.mpf]) -> mpmath.mpf:
    values = list(values)
    top = max(values)
    return top + mpmath.log(mpmath.fsum(mpmath.exp(value - top) for value in values))


def logistic_on_grid(x: mpmath.mpf, loc: mpmath.mpf, log_scale: mpmath.mpf, levels: int) -> mpmath.mpf:
    top = levels - 1
    log_scale = min(max(log_scale, -mpmath.log(1000 * top)), mpmath.log(1000))
    level = mpmath.nint(x * top)
    upper, lower = (((level + side) / top - loc) / mpmath.exp(log_scale) for side in (mpf(0.5), -mpf(0.5)))
    if level == 0:
        return -softplus(-upper)
    if level == top:
        return -softplus(lower)
    with mpmath.workdps(60):  # log (sigma(a) - sigma(b)) = log sigma(a) + log sigma(-b) + log (1 - e^(b - a))
        return -softplus(-upper) - softplus(lower) + mpmath.log(-mpmath.expm1(lower - upper))


def normal_per_pixel(x: mpmath.mpf, loc: mpmath.mpf, raw: mpmath.mpf) -> mpmath.mpf:
    return normal(x, loc, softplus(raw) + mpf(0.01))


def logistic_mixture(x: mpmath.mpf, *features: mpmath.mpf) -> mpmath.mpf:
    number = len(features) // 3
    logits, locs, log_scales = (features[i * number : (i + 1) * number] for i in range(3))
    parts = [w + logistic_on_grid(x, m, s, 256) for w, m, s in zip(logits, locs, log_scales, strict=True)]
    return log_sum_exp(parts) - log_sum_exp(logits)


def drawn(number: int, *scales: float) -> list[tuple[float, ...]]:
    """Normal numbers, seeded."""
    generator = torch.Generator().manual_seed(1)
    return [
        tuple(row) for row in (torch.randn(number, len(scales), generator=generator) * torch.tensor(scales)).tolist()
    ]


LOGITS = [0.0, 1e-3, 0.3, 1.0, 5.0, 10.0, 13.0, 14.5, 16.0, 20.0, 50.0, 88.0, 104.0, 1e3, 1e4, 1e6]
COUNTS = [0.0, 1.0, 3.0, 100.0, 12_345.0, 1e6, 2.0**24]
LOG_MEANS = [-40.0, -10.0, 0.0, 1.1, 4.6, 9.4, 13.8, 16.6, 40.0]
SHARP = [  # logits of three categories
    (1e4, 0.0, 0.0), (1e4, 1e4, 0.0), (100.0, 90.0, 88.0), (1e4, 9_999.0, 9_998.0), (-1e4, -9_988.0, -1e4),
    (14.0, 0.0, 0.0), (1e6, 999_992.0, 0.0),
]  # fmt: skip


def binary() -> Iterator[Case]:
    """The likelihoods of pixels in [0, 1]."""
    logits = [sign * value for value in LOGITS for sign in (1, -1)]
    sure = [(float(logit > 0), logit) for (logit,) in drawn(200, 300.0)]  # the terms of the pixels cancel
    tossed = [(float(u < logit), logit) for logit, u in drawn(60, 3.0, 1.0)]
    any_pair = [(float(x), logit) for logit in logits for x in (0, 1)]
    yield from elements_of("Bernoulli", pv.Bernoulli(nn.Identity(), (SIZE,)), bernoulli, tossed, any_pair, sure)
    grey = [(1 / (1 + math.exp(u)), logit) for logit, u in drawn(60, 3.0, 1.0)]
    any_pair = [(x, logit) for logit in logits for x in (0.0, 1e-6, 0.5, 1 - 2**-24, 1.0)]
    likelihood = pv.ContinuousBernoulli(nn.Identity(), (SIZE,))
    yield from elements_of("ContinuousBernoulli", likelihood, continuous_bernoulli, grey, any_pair, sure)


def real() -> Iterator[Case]:
    """Gaussian and Student's t."""
    for scale in (1.0, 0.1, 1e-6, 1e6):
        is_ordinary = scale in (1.0, 0.1)
        steps = [0.0, scale, 30 * scale] if is_ordinary else [0.0, scale, 1e3 * scale, 1.0, 1e4]
        pool = [(loc + step, loc) for loc in ((0.0, 0.7) if is_ordinary else (0.0, 0.7, 1e6)) for step in steps]
        rounded, pools = torch.tensor(scale).item(), (pool,) if is_ordinary else ([], pool)
        exact = partial(normal, scale=mpf(rounded))
        yield from elements_of("Gaussian", pv.Gaussian(nn.Identity(), (SIZE,), scale=scale), exact, *pools)
        for df in (4.0, 100.0, 1.0001, 1e4, 1e8, 1e30):
            likelihood = pv.StudentT(nn.Identity(), (SIZE,), df=df, scale=scale)
            exact = partial(student_t, scale=mpf(rounded), df=mpf(torch.tensor(df).item()))
            far = [] if is_ordinary else [(sign * 1e35, 0.7) for sign in (1, -1)]  # squares and quotients overflow
            yield from elements_of("StudentT", likelihood, exact, *(pools if df in (4.0, 100.0) else ([], pool)), far)
    raws, locs = (-100.0, -10.0, 0.0, 10.0, 1e4), (0.0, 1e3)
    wide = [(x, loc, raw) for raw in raws for loc in locs for x in (loc, loc + 1.0, 0.5)]
    likelihood = pv.Gaussian(nn.Identity(), (SIZE,), scale="per_pixel")
    yield from elements_of("Gaussian, per pixel", likelihood, normal_per_pixel, drawn(60, 1.0, 1.0, 1.0), wide)


def counts() -> Iterator[Case]:
    """Poisson and negative binomial."""
    few = [(float(x), log_mean) for x in range(8) for log_mean in (-1.0, 0.0, 1.0, 2.0)]
    many = [(x, log_mean) for x in COUNTS for log_mean in LOG_MEANS]
    yield from elements_of("Poisson", pv.Poisson(nn.Identity(), (SIZE,)), poisson, few, many)
    for raw in (0.0, -20.0, 4.0, 20.0):
        likelihood = pv.NegativeBinomial(nn.Identity(), (SIZE,))
        nn.init.constant_(likelihood.raw_total_count, raw)
        exact = partial(negative_binomial, log_r=mpf(likelihood._log_total_count()[0].item()))
        yield from elements_of("NegativeBinomial", likelihood, exact, few if raw == 0 else [], few, many)


def discrete() -> Iterator[Case]:
    """Categories and grey levels."""
    mild = [(float(i % 3), *row) for i, row in enumerate(drawn(60, 2.0, 2.0, 2.0))]
    sharp = [(float(x), *row) for row in SHARP for x in range(3)]
    sure = [(float(max(range(3), key=row.__getitem__)), *row) for row in drawn(100, 40.0, 40.0, 40.0)]
    likelihood = pv.Categorical(nn.Identity(), (SIZE,), categories=3)
    yield from elements_of("Categorical", likelihood, categorical, mild, sharp, sure)
    for levels in (256, 2, 65_536):
        top = levels - 1
        grid, edges = [0.0, 1.0, 1 / top, round(0.5 * top) / top], [0.5 / top, 1.5 / top, 0.5]
        mild = [(x, loc, s) for x in grid for loc in (0.0, 0.3, 1.0) for s in (-3.0, -2.0, 0.0)]
        scales = (-30.0, -12.0, -7.0, -3.0, 0.0, 9.0)
        steep = [(x, loc, s) for x in grid for loc in (*edges, 0.3, -1e3, 1e3) for s in scales]
        likelihood = pv.DiscretizedLogistic(nn.Identity(), (SIZE,), levels=levels)
        exact = partial(logistic_on_grid, levels=levels)
        yield from elements_of("DiscretizedLogistic", likelihood, exact, mild, steep)
    mild = [(x, 0.0, 0.0, loc, 0.9, -4.0, -3.0) for x in (0.0, 1.0, 128 / 255) for loc in (0.1, 0.5)]
    steep = [
        (x, w, 0.0, loc, 0.9, s, -3.0)
        for x in (0.0, 1.0, 128 / 255)
        for w in (0.0, 50.0, 1e4)
        for loc in (0.1, 0.5, 10.0)
        for s in (-12.0, -4.0, 2.0)
    ]
    likelihood = pv.DiscretizedLogistic(nn.Identity(), (SIZE,), components=2)
    yield from elements_of("DiscretizedLogistic, mixture", likelihood, logistic_mixture, mild, steep)


# Vectors whose elements depend on each other: matrices in 50 digits.


def matrix(value: Tensor) -> mpmath.matrix:
    return mpmath.matrix(value.double().tolist())


def low_rank(x: Tensor, loc: Tensor, factor: Tensor, variances: list[mpmath.mpf]) -> mpmath.mpf:
    """The log-density under N(loc, F F' + diag(variances)), by Woodbury's identity."""
    d, F = matrix(x.reshape(-1, 1)) - matrix(loc.reshape(-1, 1)), matrix(factor)
    n, rank = F.rows, F.cols
    over = mpmath.matrix(n, rank)
    for i in range(n):
        for j in range(rank):
            over[i, j] = F[i, j] / variances[i]
    small = mpmath.eye(rank) + F.T * over
    cholesky = mpmath.cholesky(small)
    half = mpmath.lu_solve(cholesky, over.T * d)
    quadratic = mpmath.fsum(d[i] ** 2 / variances[i] for i in range(n)) - mpmath.fsum(h**2 for h in half)
    log_det = mpmath.fsum(mpmath.log(v) for v in variances) + 2 * mpmath.fsum(
        mpmath.log(cholesky[i, i]) for i in range(rank)
    )
    return -(quadratic + log_det + n * mpmath.log(2 * mpmath.pi)) / 2


def full(z: Tensor, loc: Tensor, scale_tril: Tensor) -> mpmath.mpf:
    """The log-density under N(loc, L L')."""
    L = matrix(scale_tril)
    white = mpmath.lu_solve(L, matrix(z[:, None]) - matrix(loc[:, None]))
    log_det = mpmath.fsum(mpmath.log(L[i, i]) for i in range(L.rows))
    return -mpmath.fsum(v**2 for v in white) / 2 - log_det - L.rows * mpmath.log(2 * mpmath.pi) / 2


def correlated() -> Iterator[Case]:
    """The low-rank likelihood, and the correlated posteriors."""
    generator = torch.Generator().manual_seed(2)
    for kind, strength, raw, distance, spread in (
        ("ordinary", 0.3, 0.0, 1.0, 1.0),
        ("extreme", 3.0, -30.0, 1.0, 1.0),
        ("extreme", 1e3, -30.0, 10.0, 1.0),
        ("extreme", 1e4, -30.0, 10.0, 0.0),  # columns that are alike
    ):
        likelihood = pv.LowRankGaussian(nn.Identity(), (200,), rank=3)
        columns = torch.randn(200, 3, generator=generator)
        likelihood.factor.data = strength * torch.lerp(columns[:, :1], columns, spread)
        nn.init.constant_(likelihood.raw_scale, raw)
        loc = torch.randn(4, 200, generator=generator)
        x = (loc + distance * torch.randn(4, 3, generator=generator) @ likelihood.factor.data.T).detach()
        x = x + 0.02 * torch.randn(4, 200, generator=generator)
        variances = [(softplus(mpf(raw)) + mpf(0.01)) ** 2] * 200

        def exact(x=x, loc=loc, factor=likelihood.factor.data, variances=variances) -> list[mpmath.mpf]:
            return [low_rank(a, b, factor, variances) for a, b in zip(x, loc, strict=True)]

        yield Case("LowRankGaussian", kind, partial(likelihood.event_distribution, loc, mask=None), x, exact, 200)

    Z = 20
    for kind, strength, shift, distance in (
        ("ordinary", 1.0, -1.0, 1.0),
        ("extreme", 30.0, -5.0, 1.0),
        ("extreme", 1e3, -8.0, 5.0),
    ):
        posterior = pv.LowRankNormal(nn.Identity(), (1,), rank=2)
        loc, columns = torch.randn(4, Z, generator=generator), strength * torch.randn(4, 2, Z, generator=generator)
        log_scale = shift + 0.3 * torch.randn(4, Z, generator=generator)
        z = loc + (distance * torch.randn(4, 2, 1, generator=generator) * columns).sum(1)
        z = z + log_scale.exp() * torch.randn(4, Z, generator=generator)
        features = torch.cat([loc, log_scale, columns.flatten(1)], -1)

        def exact(z=z, loc=loc, columns=columns, log_scale=log_scale) -> list[mpmath.mpf]:
            variances = [[mpmath.exp(2 * mpf(s)) for s in row] for row in log_scale.tolist()]
            return [low_rank(a, b, c.T, v) for a, b, c, v in zip(z, loc, columns, variances, strict=True)]

        yield Case("LowRankNormal", kind, partial(posterior.latent_distribution, features), z, exact, Z)

    for kind, strength, shift in (("ordinary", 1.0, -1.0), ("extreme", 20.0, -5.0), ("extreme", 30.0, 5.0)):
        posterior = pv.FullNormal(nn.Identity(), (1,))
        features = torch.randn(4, pv.FullNormal.features_for(Z), generator=generator)
        rows = strength * features[:, Z:]
        below, across = torch.tril_indices(Z, Z)
        rows[:, below == across] = shift + 0.3 * features[:, Z:][:, below == across]
        features = torch.cat([features[:, :Z], rows], -1)
        normal = posterior.latent_distribution(features)
        # The triangle is rounded, and samples have that covariance: with almost collinear latents this counts.
        z = normal.loc + (normal.scale_tril @ torch.randn(4, Z, 1, generator=generator)).squeeze(-1)

        def exact(z=z, normal=normal) -> list[mpmath.mpf]:
            return [full(*each) for each in zip(z, normal.loc, normal.scale_tril, strict=True)]

        yield Case("FullNormal", kind, partial(posterior.latent_distribution, features), z, exact, Z)


def mixture(z: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor) -> mpmath.mpf:
    """The log-density of a mixture of diagonal normals at one z."""
    weights = [mpf(value) for value in logits.tolist()]
    parts = [
        w
        + mpmath.fsum(
            normal(mpf(a), mpf(m), mpmath.exp(mpf(s))) for a, m, s in zip(z.tolist(), row, scales, strict=True)
        )
        for w, row, scales in zip(weights, loc.tolist(), log_scale.tolist(), strict=True)
    ]
    return log_sum_exp(parts) - log_sum_exp(weights)


def latents() -> Iterator[Case]:
    """Priors and posteriors with diagonal normals."""
    generator = torch.Generator().manual_seed(3)
    Z = 20

    def normals(*shape: int) -> Tensor:
        return torch.randn(*shape, Z, generator=generator)

    for kind, distance, shift in (
        ("ordinary", 1.0, -1.0),
        ("extreme", 1e4, 0.0),
        ("extreme", 1.0, -15.0),
        ("extreme", 1.0, 15.0),
        ("extreme", 1e-25, -60.0),  # the square of a scale is no float32 number
        ("extreme", 1.0, 60.0),
    ):
        z, loc, log_scale = distance * normals(6), distance * normals(6), shift + normals(6)
        near = loc + log_scale.exp() * normals(6)
        diagonal = pv.DiagonalNormal(nn.Identity(), (2 * Z,))

        def standard(z=z) -> list[mpmath.mpf]:
            return [mixture(row, torch.zeros(1), torch.zeros(1, Z), torch.zeros(1, Z)) for row in z]

        def each(loc=loc, log_scale=log_scale, z=near) -> list[mpmath.mpf]:
            return [mixture(a, torch.zeros(1), b[None], c[None]) for a, b, c in zip(z, loc, log_scale, strict=True)]

        yield Case("StandardNormal", kind, pv.StandardNormal(Z).forward, z, standard, Z)
        features = torch.cat([loc, log_scale], -1)
        yield Case("DiagonalNormal", kind, partial(diagonal.latent_distribution, features), near, each, Z)

        prior = pv.MixturePrior(Z, components=4)
        prior.logits.data = (
            torch.tensor([9_999.0, 1e4, 0.0, 1e4]) if kind == "extreme" else torch.randn(4, generator=generator)
        )
        prior.loc.data, prior.log_scale.data = distance * normals(4), shift + normals(4)
        inputs = torch.cat([prior.loc.data, prior.log_scale.data], -1)
        z = (prior.loc.data[:, None] + prior.log_scale.data.exp()[:, None] * normals(4, 2)).flatten(0, 1)

        def mixtures(logits=prior.logits.data, p=prior, z=z) -> list[mpmath.mpf]:
            return [mixture(a, logits, p.loc.data, p.log_scale.data) for a in z]

        yield Case("MixturePrior", kind, prior.forward, z, mixtures, Z)
        posterior = pv.MixturePosterior(nn.Identity(), (1,), components=4)
        features = torch.cat([prior.logits.data, inputs.flatten()]).expand(len(z), -1)
        yield Case("MixturePosterior", kind, partial(posterior.latent_distribution, features), z, mixtures, Z)
        equal = partial(mixtures, logits=torch.zeros(4))
        yield Case("VampPrior", kind, pv.VampPrior(diagonal, inputs).forward, z, equal, Z)


def flows() -> Iterator[Case]:
    """Priors by a flow, against the same networks in float64: the rounding of the networks counts too."""
    generator = torch.Generator().manual_seed(4)
    for flow in ("coupling", "iaf", "spline"):
        for values, spread, distance in (("ordinary", 0.3, 1.0), ("extreme", 0.3, 4.0)):
            torch.manual_seed(0)
            prior = pv.FlowPrior(20, flow)
            for parameter in prior.parameters():
                parameter.data += (
                    spread * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
                )
            z = distance * torch.randn(6, 20, generator=generator)

            def exact(prior=prior, z=z) -> list[mpmath.mpf]:
                return copy.deepcopy(prior).double()().log_prob(z.double()).tolist()

            yield Case(f"FlowPrior, {flow}", values, prior.forward, z, exact, 20, has_networks=True)


def cases() -> Iterator[Case]:
    """All of them."""
    for part in (binary, real, counts, discrete, correlated, latents, flows):
        yield from part()


def main() -> None:
    """Print the table."""
    worst: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for case in cases():
        exact = torch.tensor([float(value) for value in case.exact()], dtype=torch.float64)
        row = []
        for half in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                error, share = case.errors(exact)
            at = share.argmax()
            row.append((math.nan, math.nan) if half and case.has_networks else (float(error[at]), float(share[at])))
        before = worst.setdefault((case.part, case.values), [(0.0, -1.0), (0.0, -1.0)])
        worst[case.part, case.values] = [old if old[1] > new[1] else new for old, new in zip(before, row, strict=True)]
    print(f"{'':40}{'float32':>20}{'under autocast':>20}")
    print(f"{'part':30}{'values':10}" + 2 * f"{'nats':>10}{'share':>10}")
    parts = list(dict.fromkeys(part for part, _ in worst))
    for (part, values), pairs in sorted(
        worst.items(), key=lambda row: (parts.index(row[0][0]), row[0][1] == "extreme")
    ):
        shown = ("".rjust(20) if math.isnan(e) else f"{e:10.1e}{s:9.2f}{'!' if s > 1 else ' '}" for e, s in pairs)
        print(f"{part:30}{values:10}{''.join(shown)}".rstrip())


if __name__ == "__main__":
    main()
