"""Distributions where PyTorch's and Pyro's are biased or imprecise, or do not broadcast."""

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to, constraints, transform_to, transforms

from pyro_vae.devices import wide
from pyro_vae.errors import PyroVAEError

LIMITS = torch.finfo(torch.float32)


class _Normal(constraints.greater_than):
    """Positive numbers of float32 with all their digits: a subnormal one has few, and none where it is flushed to 0."""

    def check(self, value: Tensor) -> Tensor:
        """Whether each value is such a number."""
        return (value >= LIMITS.tiny) & (value < math.inf)

    def __repr__(self) -> str:
        return f"PositiveNumber(of at least {LIMITS.tiny:.2g})"


NORMAL_NUMBERS = _Normal(0.0)
for registry in (transform_to, biject_to):  # free parameters of a scale are its logarithms, as of any positive number
    registry.register(_Normal, lambda _: transforms.ExpTransform())


def shared(value: Tensor) -> Tensor:
    """The value with size 1 in the dimensions along which it was expanded: its functions are the same there."""
    if 0 not in value.stride():  # a slice costs time in each step, and in its backward pass
        return value
    return value[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in value.stride())]


class Normal(dist.Normal):
    """PyTorch's normal distribution, for a scale whose square is no float32 number."""

    arg_constraints: dict[str, Any] = {"loc": constraints.real, "scale": NORMAL_NUMBERS}  # noqa: RUF012

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density, of shape `batch`."""
        if self._validate_args:
            self._validate_sample(value)
        norm = -shared(self.scale).log() - 0.5 * math.log(2 * math.pi)
        return norm - 0.5 * ((value - self.loc) / self.scale).square()


class StudentT(dist.StudentT):
    """PyTorch's Student's t distribution, precise for any degrees of freedom."""

    arg_constraints: dict[str, Any] = dist.StudentT.arg_constraints | {"scale": NORMAL_NUMBERS}

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density, of shape `batch`."""
        if self._validate_args:
            self._validate_sample(value)
        df = wide(shared(self.df))
        half, far = df.clamp(max=2e4) / 2, df.clamp(min=1.0).reciprocal()
        # Float64 too loses the difference of two large lgammas. The series is that of log Gamma(a + 1/2) / Gamma(a).
        ratio = torch.where(df < 2e4, (half + 0.5).lgamma() - half.lgamma() - 0.5 * half.log(), far**3 / 24 - far / 4)
        norm = (ratio - 0.5 * math.log(2 * math.pi)).to(self.scale) - shared(self.scale).log()
        # Far out, where squares overflow, log(1 + t^2) is 2 log t.
        distance, root = value - self.loc, shared(self.df).sqrt()
        far = distance.abs() > 1e4 * shared(self.scale) * root
        near = (torch.where(far, 0.0, distance) / self.scale / root).square().log1p()
        log_far = torch.where(far, distance, 1.0).abs().log() - shared(self.scale).log() - root.log()
        return norm - (self.df + 1) * torch.where(far, log_far, 0.5 * near)


class NormalMixture(dist.MixtureOfDiagNormals):
    r"""Pyro's mixture of diagonal normals, with a pathwise derivative that is unbiased in the logits too.

    The derivative is implicit, one dimension after the other. With :math:`F_d` the distribution function of :math:`z_d`
    given the earlier dimensions,

    .. math:: \mathrm d z_d = -\, \frac{\mathrm d F_d(z_d; \theta, z_{<d})}{p(z_d \mid z_{<d})}
    """

    arg_constraints: dict[str, Any] = dist.MixtureOfDiagNormals.arg_constraints | {"coord_scale": NORMAL_NUMBERS}

    @property
    def mean(self) -> Tensor:
        """The mean, of shape (*batch, Z)."""
        return (self.categorical.probs.unsqueeze(-1) * self.locs).sum(-2)

    def rsample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Reparameterised samples of shape (*sample_shape, *batch, Z)."""
        with torch.no_grad():
            which = self.categorical.sample(sample_shape)[..., None, None]
            shape = self._extended_shape(sample_shape)
            loc, scale = (
                tensor.expand(*shape[:-1], *tensor.shape[-2:]).gather(-2, which.expand(*shape[:-1], 1, shape[-1]))
                for tensor in (self.locs, self.coord_scale)
            )
            z: Tensor = loc.squeeze(-2) + scale.squeeze(-2) * torch.randn_like(loc.squeeze(-2))
        if not torch.is_grad_enabled():
            return z
        columns: list[Tensor] = []
        logits = self.categorical.logits
        for value, loc, scale in zip(z.unbind(-1), self.locs.unbind(-1), self.coord_scale.unbind(-1), strict=True):
            components, probs = dist.Normal(loc, scale, validate_args=False), logits.softmax(-1)
            below = (probs * components.cdf(value.unsqueeze(-1))).sum(-1)
            density = (probs * components.log_prob(value.unsqueeze(-1)).exp()).sum(-1)
            columns.append(value - (below - below.detach()) / density.detach())
            logits = logits + components.log_prob(columns[-1].unsqueeze(-1))
        return torch.stack(columns, -1)


class Mixture(dist.MixtureSameFamily):
    """Pyro's mixture, for components that don't broadcast, such as flows with one context for each component."""

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density, of shape (*batch,)."""
        components = self.component_distribution
        value = value.unsqueeze(-1 - len(self.event_shape))
        value = value.expand(torch.broadcast_shapes(value.shape, components.batch_shape + components.event_shape))
        logits = self.mixture_distribution.logits
        return torch.logsumexp(components.log_prob(value) + logits, -1)


class MultivariateNormal(dist.MultivariateNormal):
    """PyTorch's normal with a full covariance, whose density is computed in float64."""

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density, of shape (*batch,)."""
        if self._validate_args:
            self._validate_sample(value)
        # The inverse of a triangle has large elements where latents are almost collinear.
        L = wide(self._unbroadcasted_scale_tril)
        vectors, back = rows_of(wide(value) - wide(self.loc), L)
        white = torch.linalg.solve_triangular(L.mT, vectors, upper=True, left=False)
        half_log_det = L.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * L.shape[-1] * math.log(2 * math.pi)
        return (-0.5 * back(torch.linalg.vecdot(white, white)) - half_log_det).to(self.loc)


class LowRankMultivariateNormal(dist.LowRankMultivariateNormal):
    """PyTorch's normal with a diagonal plus a low-rank covariance, whose density is a sum of squares in float64."""

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density, of shape (*batch,)."""
        if self._validate_args:
            self._validate_sample(value)
            variance, least, most = self._unbroadcasted_cov_diag, LIMITS.tiny, LIMITS.max
            if not bool(NORMAL_NUMBERS.check(variance).all()):
                raise PyroVAEError(
                    f"expected variances between {least:.2g} and {most:.2g}, got {variance.min():.2g} to "
                    f"{variance.max():.2g}, of which float32 has few digits. Clamp the log scales."
                )
        scale = wide(self._unbroadcasted_cov_diag).sqrt()
        return low_rank_log_prob(value, self.loc, self._unbroadcasted_cov_factor, scale)


def low_rank_log_prob(x: Tensor, loc: Tensor, factor: Tensor, scale: Tensor, observed: Tensor | None = None) -> Tensor:
    """The log-density of a normal with covariance F F^T + diag(scale^2), in float64: x (*batch, D) to (*batch,).

    With y = (x - loc) / scale and W = F / scale, the quadratic form is min_u |y - W u|^2 + |u|^2. Its residuals are
    much smaller than y where F is larger than the scale. With Q T the matrix of W above I, I + W^T W is T^T T. Where
    columns of F are alike, a Cholesky factor would be imprecise.
    """
    y, upper, lower, T = _whitened(x, loc, factor, scale, observed)
    log_scale, size = wide(scale).log(), torch.tensor(float(y.shape[-1]))
    if observed is not None:
        log_scale, size = torch.where(observed.to(y.device), log_scale, 0.0), observed.sum(-1)
    rows, back = rows_of(y, upper)
    explained = rows @ upper
    residual, u = _minus(rows, explained, upper), explained @ lower.mT
    quadratic = back(torch.linalg.vecdot(residual, residual) + torch.linalg.vecdot(u, u))
    half_log_det = log_scale.sum(-1) + T.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
    return (-0.5 * (quadratic + wide(size).to(y) * math.log(2 * math.pi)) - half_log_det).to(loc)


def low_rank_factors(x: Tensor, loc: Tensor, factor: Tensor, scale: Tensor, observed: Tensor | None) -> Tensor:
    """The mean of the factors given x: the u of :func:`low_rank_log_prob`, of shape (*batch, R)."""
    y, upper, lower, _ = _whitened(x, loc, factor, scale, observed)
    rows, back = rows_of(y, upper)
    return back(rows @ upper @ lower.mT).to(loc)


def _whitened(
    x: Tensor, loc: Tensor, factor: Tensor, scale: Tensor, observed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, which is zero at missing elements, Q beside W, Q beside I, and T."""
    precision = wide(scale).reciprocal()
    y, W = torch.addcmul(wide(x) * precision, wide(loc), precision, value=-1), wide(factor) * precision[..., None]
    if observed is not None:
        seen = observed.to(y.device)
        y, W = torch.where(seen, y, 0.0), torch.where(seen[..., None], W, 0.0)
    identity = torch.eye(W.shape[-1], dtype=W.dtype, device=W.device).expand(*W.shape[:-2], -1, -1)
    Q, T = torch.linalg.qr(torch.cat([W, identity], -2))
    return y, *Q.split([W.shape[-2], W.shape[-1]], -2), T


def _minus(rows: Tensor, u: Tensor, W: Tensor) -> Tensor:
    """rows - u W^T, in one pass over memory where the batch shapes are the same."""
    if W.dim() == 2:
        return torch.addmm(rows, u, W.mT, alpha=-1)
    if rows.shape[:-2] != W.shape[:-2]:
        return rows - u @ W.mT
    return torch.baddbmm(*(each.flatten(0, -3) for each in (rows, u, W.mT)), alpha=-1).view(rows.shape)


def rows_of(vectors: Tensor, matrices: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Vectors (*samples, *batch, D) as rows (*batch, S, D), so that matrices (*batch, ...) need no copy a sample.

    The function that it returns gives values (*batch, S, ...) the shape (*samples, *batch, ...).
    """
    number = matrices.dim() - 2
    samples = vectors.shape[: vectors.dim() - number - 1]
    rows = vectors.reshape(math.prod(samples), *vectors.shape[len(samples) :]).movedim(0, number)
    return rows, lambda values: values.movedim(number, 0).unflatten(0, samples) if samples else values.squeeze(number)
