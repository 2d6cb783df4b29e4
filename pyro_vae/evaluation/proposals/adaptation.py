"""More components for a mixture whose weights have a heavy tail, from its own weighted draws.

One has the mean and covariance of the weighted draws. One lies around the draw of the largest weight, where the mixture
is lowest beside the posterior, with the covariance of the draws near it. The shares then rise where the weights are.
"""

import math
from typing import NamedTuple, Self

import torch
from torch import Tensor

from pyro_vae.devices import wide
from pyro_vae.evaluation.diagnostics import pareto_k, relative_variance
from pyro_vae.evaluation.proposals.guide import Mixture
from pyro_vae.evaluation.proposals.student import Full, Scale, Student

GOOD_K, GOOD_ESS = 0.6, 0.05  # k-hat, and the share of effective draws, that need no more components
DF = 3.0  # of the components that are added
WIDER = 1.3  # how much wider than their draws they are
NEAR = 0.1  # share of the draws that are near the one of the largest weight
NARROWER = 0.5  # the scale there, where a covariance of few draws would be singular
ROUNDS = 5  # of the EM algorithm for the shares
LEAST = 0.02  # share of a component


class Pilot(NamedTuple):
    """Draws of a proposal: the latents (S, N, D), their log-weights (S, N), and what these show of each datum, (N,)."""

    y: Tensor
    log_w: Tensor
    pareto_k: Tensor
    ess: Tensor
    variance: Tensor  # see relative_variance

    @classmethod
    def of_draws(cls, y: Tensor, log_w: Tensor, unsound: Tensor) -> Self:
        """With what the weights show; draws without a weight, or of `unsound` data (N,), leave k-hat infinite."""
        kept = ~log_w.isnan() & y.isfinite().all(-1).to(log_w.device)
        log_w = torch.where(kept, log_w, -torch.inf)
        y = torch.where(kept.to(y.device)[..., None], y, 0.0)
        shapes = torch.where(unsound.to(log_w.device) | ~kept.all(0), torch.inf, pareto_k(log_w).to(log_w.device))
        return cls(y, log_w, shapes, 1 / _normalised(log_w).square().sum(0), relative_variance(log_w))

    def where(self, condition: Tensor, other: Self) -> Self:
        """Of the other draws where the condition (N,) holds."""
        pick = condition.to(self.y.device)[:, None]
        y, rest = torch.where(pick, other.y, self.y), zip(self[1:], other[1:], strict=True)
        return type(self)(y, *(torch.where(condition, new, old) for old, new in rest))

    @property
    def is_good(self) -> Tensor:
        """For which data nothing more is done, (N,)."""
        return (self.pareto_k <= GOOD_K) & (self.ess >= GOOD_ESS * len(self.log_w))

    def is_better(self, other: Self) -> Tensor:
        """For which data these weights are better, (N,): by k-hat where one of both is high, else by effective size."""
        own, others = (each.pareto_k.nan_to_num(torch.inf).clamp(min=GOOD_K) for each in (self, other))
        return (own < others) | ((own == others) & (self.ess > other.ess))

    def of(self, rows: Tensor) -> Self:
        """Those of some data."""
        there = rows.to(self.log_w.device)
        return type(self)(self.y[:, rows], self.log_w[:, there], *(each[there] for each in self[2:]))


def adapted(mixture: Mixture, pilot: Pilot) -> Mixture:
    """The mixture with two more components, and other shares, by its own draws."""
    weights = truncated(pilot.log_w)
    first = mixture.students[0]
    students = [*mixture.students, _of_moments(pilot.y, weights, first), _of_the_largest(pilot, first)]
    terms = torch.stack([wide(student.log_prob(pilot.y)) for student in students])  # (M, S, N)
    rest = torch.log1p(-wide(mixture.log_shares[0].exp()))
    shares = torch.full_like(terms[:, 0], 1 / len(students))
    for _ in range(ROUNDS):  # Cappé et al. (2008)
        each = (terms + shares.log()[:, None]).softmax(0)
        shares = ((weights * each).sum(1) + LEAST) / (1 + LEAST * len(students))
    log_shares = (shares.log() + rest).to(mixture.log_shares)
    return Mixture(students, torch.cat([mixture.log_shares[:1], log_shares]), mixture.has_guide)


def truncated(log_w: Tensor) -> Tensor:
    """Weights that sum to one, the largest of them truncated (Ionides 2008), so that more than a few draws count."""
    return _normalised(torch.minimum(log_w, log_w.logsumexp(0) - 0.5 * math.log(len(log_w))))


def _of_moments(y: Tensor, weights: Tensor, first: Student) -> Student:
    """The mean and covariance of weighted draws; the fewer count, the more the first component's covariance."""
    loc = (weights[..., None] * wide(y)).sum(0)
    return _student(loc, _covariance(wide(y) - loc, weights, first.scale), first)


def _of_the_largest(pilot: Pilot, first: Student) -> Student:
    """A component around the draw of the largest weight, with the covariance of the draws near it."""
    number, every = len(pilot.y), torch.arange(pilot.y.shape[1], device=pilot.y.device)
    loc = pilot.y[pilot.log_w.argmax(0).to(pilot.y.device), every]
    distance = first.scale.whitened(pilot.y - loc)[0]
    near = distance.topk(max(1, round(NEAR * number)), dim=0, largest=False).indices
    # Raftery and Bao (2010): the mean of their normalised weights and of equal ones.
    own = _normalised(pilot.log_w.gather(0, near.to(pilot.log_w.device)))
    weights = 0.5 * (own + 1 / len(near))
    offset = wide(pilot.y.gather(0, near[..., None].expand(-1, -1, pilot.y.shape[-1])) - loc)
    return _student(wide(loc), _covariance(offset, weights, first.scale.wider(NARROWER)), first)


def _covariance(offset: Tensor, weights: Tensor, prior: Scale) -> Scale:
    """A factor of the covariance of offsets (S, N, D), drawn to another one the more, the fewer of them count."""
    if not isinstance(prior, Full):
        return prior
    trust = 1 / (1 + (1 + offset.shape[-1]) * weights.square().sum(0))[:, None, None]
    scaled = (weights.sqrt()[..., None] * offset).movedim(0, -1)
    old = wide(prior.tril)
    found, failed = torch.linalg.cholesky_ex(trust * (scaled @ scaled.mT) + (1 - trust) * (old @ old.mT))
    sound = (failed == 0) & found.isfinite().all(-1).all(-1)
    return Full(torch.where(sound[:, None, None], found, old).to(prior.tril))


def _normalised(log_w: Tensor) -> Tensor:
    """Weights that sum to one over the draws; equal ones where all are zero."""
    some = (log_w > -torch.inf).any(0)
    return torch.where(some, log_w, 0.0).softmax(0)


def _student(loc: Tensor, scale: Scale, like: Student) -> Student:
    return Student(loc.to(like.loc), scale.wider(WIDER), torch.full_like(like.df, DF))
