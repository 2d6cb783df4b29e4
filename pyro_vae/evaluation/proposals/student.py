r"""Student t distributions of a datum's latents, as one vector y of D numbers, and mixtures of them.

    y = loc + scale e / sqrt(g / df),    e ~ N(0, 1) of D numbers,    g ~ chi2(df)

Its tails are heavier than a normal's, so weights of a normal posterior against it stay bounded. The first d elements of
y have the same form, so a mixture has a density site by site: that of the first d elements, less that of those before.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pyro_vae.devices import wide


class Scale(ABC):
    """A factor S of the matrix S S^T for each datum."""

    @abstractmethod
    def times_noise(self, number: int) -> Tensor:
        """S e for that many standard normal e, (K, N, D)."""

    @abstractmethod
    def whitened(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Of the first d elements, for y (K, N, d): y^T (S S^T)^-1 y, (K, N), and log |S|, (N,)."""

    @abstractmethod
    def solved(self, y: Tensor) -> Tensor:
        """(S S^T)^-1 y for y (K, N, D)."""

    def of(self, rows: Tensor) -> Self:
        """Those of some data."""
        return type(self)(*(value[rows] for value in vars(self).values()))

    def wider(self, factor: float) -> Self:
        """S times a factor."""
        return type(self)(*(factor * value for value in vars(self).values()))


def _noise(like: Tensor, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class Full(Scale):
    """A lower triangle (N, D, D) with a positive diagonal."""

    tril: Tensor

    def times_noise(self, number: int) -> Tensor:  # noqa: D102
        return (self.tril @ _noise(self.tril, *self.tril.shape[:2], number)).movedim(-1, 0)

    def whitened(self, y: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        first = self.tril[:, : y.shape[-1], : y.shape[-1]]
        solved = torch.linalg.solve_triangular(first, y.movedim(0, -1), upper=False)
        return solved.square().sum(1).T, first.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def solved(self, y: Tensor) -> Tensor:  # noqa: D102
        half = torch.linalg.solve_triangular(self.tril, y.movedim(0, -1), upper=False)
        return torch.linalg.solve_triangular(self.tril.mT, half, upper=True).movedim(-1, 0)


@dataclass(frozen=True)
class LowRank(Scale):
    """S S^T = diag(sd^2) + U U^T, with sd (N, D) and U (N, D, R)."""

    sd: Tensor
    u: Tensor

    def times_noise(self, number: int) -> Tensor:  # noqa: D102
        shared = self.u @ _noise(self.u, len(self.u), self.u.shape[-1], number)
        return self.sd * _noise(self.sd, number, *self.sd.shape) + shared.movedim(-1, 0)

    def whitened(self, y: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        # Two large numbers cancel in the square: float32 would lose whole nats.
        scaled, v, inner = self._parts(wide(y), wide(self.sd), wide(self.u))
        shared = torch.linalg.solve_triangular(inner, v.mT @ scaled, upper=False)
        square = scaled.square().sum(1) - shared.square().sum(1)
        log_det = inner.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return square.T.to(y), self.sd[:, : y.shape[-1]].log().sum(-1) + log_det.to(y)

    def solved(self, y: Tensor) -> Tensor:  # noqa: D102
        scaled, v, inner = self._parts(y, self.sd, self.u)
        return (scaled - v @ torch.cholesky_solve(v.mT @ scaled, inner)).movedim(-1, 0) / self.sd

    @staticmethod
    def _parts(y: Tensor, sd: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Y / sd, (N, d, K); U / sd; and the Cholesky factor of 1 + (U / sd)^T U / sd, by which Woodbury inverts."""
        sd, u = sd[:, : y.shape[-1]], u[:, : y.shape[-1]]
        v = u / sd[..., None]
        one = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
        return (y / sd).movedim(0, -1), v, torch.linalg.cholesky(one + v.mT @ v)


@dataclass(frozen=True)
class Diagonal(Scale):
    """Standard deviations (N, D)."""

    sd: Tensor

    def times_noise(self, number: int) -> Tensor:  # noqa: D102
        return self.sd * _noise(self.sd, number, *self.sd.shape)

    def whitened(self, y: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        sd = self.sd[:, : y.shape[-1]]
        return (y / sd).square().sum(-1), sd.log().sum(-1)

    def solved(self, y: Tensor) -> Tensor:  # noqa: D102
        return y / self.sd.square()


@dataclass(frozen=True)
class Student:
    """A Student t for each of N data."""

    loc: Tensor  # (N, D)
    scale: Scale
    df: Tensor  # (N,)

    def sample(self, number: int) -> Tensor:
        """That many draws, (K, N, D)."""
        chi2 = 2 * torch._standard_gamma((0.5 * self.df).expand(number, -1))
        return self.loc + self.scale.times_noise(number) / (chi2 / self.df).sqrt()[..., None]

    def log_prob(self, y: Tensor) -> Tensor:
        """The log-density (K, N) of the first d elements at y (K, N, d)."""
        d, df = y.shape[-1], self.df
        square, log_det = self.scale.whitened(y - self.loc[:, :d])
        constant = torch.lgamma(0.5 * (df + d)) - torch.lgamma(0.5 * df) - 0.5 * d * (df * math.pi).log()
        return constant - log_det - 0.5 * (df + d) * torch.log1p(square / df)

    def of(self, rows: Tensor) -> Self:
        """Those of some data."""
        return type(self)(self.loc[rows], self.scale.of(rows), self.df[rows])

    def with_rows(self, rows: Tensor, others: Self) -> Self:
        """The same, with those of some rows replaced."""

        def replaced(own: Tensor, new: Tensor) -> Tensor:
            return own.index_put((rows,), new)

        scales = (vars(each.scale).values() for each in (self, others))
        scale = type(self.scale)(*map(replaced, *scales))
        return type(self)(replaced(self.loc, others.loc), scale, replaced(self.df, others.df))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Those of consecutive minibatches, with scales of one kind."""
        kind = type(parts[0].scale)
        values = zip(*(vars(part.scale).values() for part in parts), strict=True)
        scale = kind(*(torch.cat(each) for each in values))
        return cls(torch.cat([part.loc for part in parts]), scale, torch.cat([part.df for part in parts]))


@dataclass(frozen=True)
class Normal(Student):
    """A normal for each of N data, which a Student t of infinite `df` is."""

    def sample(self, number: int) -> Tensor:
        """That many draws, (K, N, D)."""
        return self.loc + self.scale.times_noise(number)

    def log_prob(self, y: Tensor) -> Tensor:
        """The log-density (K, N) of the first d elements at y (K, N, d)."""
        square, log_det = self.scale.whitened(y - self.loc[:, : y.shape[-1]])
        return -log_det - 0.5 * (square + y.shape[-1] * math.log(2 * math.pi))
