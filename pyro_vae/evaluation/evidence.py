"""Records of estimates of log p(x) for each datum, with errors and diagnostics, made from importance weights."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pyro_vae.checks import shown
from pyro_vae.devices import of_float64, wide
from pyro_vae.errors import NotFiniteError, PyroVAEError
from pyro_vae.evaluation.diagnostics import HIGH_K, pareto_k
from pyro_vae.evaluation.estimate import Estimate
from pyro_vae.printed import Printed


@dataclass(frozen=True, repr=False)
class Evidence(Printed):
    r"""Estimates of log p(x_n) from K importance weights for each datum.

    Attributes:
        per_datum: :math:`\log \frac1K \sum_k w_{kn}` in nats, (N,); minus infinity where all weights are zero.
        per_datum_error: its Monte Carlo standard error by the delta method,
            :math:`\operatorname{std}_k(w_{kn}) / (\sqrt K \, \bar w_n)`, in nats, (N,). It is too small where k-hat is
            above 0.7.
        ess: the effective sample size :math:`(\sum_k w_{kn})^2 / \sum_k w_{kn}^2`, between 1 and K, (N,).
        zero_weights: the number of weights that are zero, (N,). They count in all the other numbers.
        num_samples: K.

    Example:
        >>> import torch, pyro_vae as pv
        >>> evidence = pv.Evidence.from_weights(torch.tensor([[0.0, 0.0], [0.0, -torch.inf]]))
        >>> evidence.ess.tolist(), evidence.zero_weights.tolist()
        ([2.0, 1.0], [0, 1])
    """

    per_datum: Tensor
    per_datum_error: Tensor
    ess: Tensor
    zero_weights: Tensor
    num_samples: int

    _not_per_datum: ClassVar[tuple[str, ...]] = ("num_samples",)

    @classmethod
    def from_weights(cls, log_w: Tensor, /, **other_fields: Any) -> Self:
        """The record of log-weights (K, N); `other_fields` are those that a subclass adds.

        Raises:
            FloatingPointError: a log-weight is NaN or plus infinity.
        """
        check_finite(log_w)
        number = len(log_w)
        top = log_w.max(0).values
        weights = (log_w - torch.where(top.isfinite(), top, 0.0)).exp()
        mean = weights.mean(0)
        return cls(
            per_datum=top + mean.log(),
            per_datum_error=weights.std(0) / (math.sqrt(number) * mean),
            ess=weights.sum(0).square() / weights.square().sum(0),
            zero_weights=(log_w == -math.inf).sum(0),
            num_samples=number,
            **other_fields,
        )

    @property
    def estimate(self) -> Estimate:
        """The mean over data, with its standard error over data, which includes the Monte Carlo error."""
        return Estimate.of(self.per_datum)

    @property
    def mean(self) -> float:
        """The mean over data, in nats per datum."""
        return self.estimate.value

    @property
    def standard_error(self) -> float:
        r"""The standard error of the mean over data, :math:`\operatorname{std}_n / \sqrt N`, in nats."""
        return self.estimate.standard_error

    @property
    def monte_carlo_error(self) -> float:
        r"""The Monte Carlo error of the mean for these data, :math:`\frac1N \sqrt{\sum_n \mathrm{se}_n^2}`, in nats."""
        return self.per_datum_error.square().sum().sqrt().item() / len(self.per_datum_error)

    def of(self, rows: slice | Tensor) -> Self:
        """The record of some of the data."""
        return replace(self, **{name: getattr(self, name)[..., rows] for name in self._per_datum_fields()})

    @classmethod
    def _per_datum_fields(cls) -> list[str]:
        return [f.name for f in fields(cls) if f.name not in cls._not_per_datum]

    def _zeros(self) -> str:
        some = int((self.zero_weights > 0).sum())
        lost = int((self.per_datum == -math.inf).sum())
        all_lost = f", all of them at {lost}" if lost else ""
        return f"; weights of zero at {some} data{all_lost}" if some else ""

    def _statement(self) -> str:
        return (
            f"log p(x) = {self.estimate} nats per datum (K = {self.num_samples}, N = {len(self.per_datum)}; "
            f"Monte Carlo error {self.monte_carlo_error:.2g}, median ESS {self.ess.median():.1f}{self._zeros()})"
        )

    def _rows(self) -> dict[str, object]:
        rows: dict[str, object] = {
            "log p(x), nats per datum": self.estimate,
            "Monte Carlo error": f"{self.monte_carlo_error:.2g}",
            "data N": len(self.per_datum),
            "samples K of a datum": self.num_samples,
            "median ESS": f"{self.ess.median():.1f}",
        }
        if zeros := self._zeros().removeprefix("; weights of zero "):
            rows["weights of zero"] = zeros
        return rows


@dataclass(frozen=True, repr=False)
class LogLikelihood(Evidence):
    r"""The result of :func:`pyro_vae.log_likelihood`; see :class:`pyro_vae.Evidence` for the other attributes.

    Attributes:
        elbo: the mean log-weight :math:`\frac1K \sum_k \log w_{kn}`, which estimates the ELBO, in nats, (N,).
        upper: the mean log-weight of posterior draws, :math:`\sum_k \bar w_{kn} \log w_{kn}` with weights that sum to
            one, in nats, (N,). It estimates the upper bound :math:`\mathbb E_{p(z|x)} \log w` on log p(x), by the same
            weights as log p(x) itself. So what the draws miss, it misses too. :func:`pyro_vae.calibrate` has an upper
            bound that holds, on simulated data.
        pareto_k: :func:`pyro_vae.pareto_k` of each datum's weights, (N,); NaN where no fit is possible.
        drawn: the number of each datum's samples, (N,), which is K unless they were drawn to a stated error;
            `num_samples` is the largest.
    """

    elbo: Tensor
    upper: Tensor
    pareto_k: Tensor
    drawn: Tensor

    @classmethod
    def from_weights(cls, log_w: Tensor, /, **other_fields: Any) -> Self:
        """The record of log-weights (K, N); see :meth:`pyro_vae.Evidence.from_weights`."""
        drawn = torch.full_like(log_w[0], len(log_w), dtype=torch.long)
        shares = (log_w - log_w.logsumexp(0).nan_to_num(neginf=0.0)).exp()
        upper = torch.where(shares > 0, shares * log_w, 0.0).sum(0)
        upper = torch.where(shares.sum(0) > 0, upper, -math.inf)  # of weights of zero alone
        fields = {"elbo": log_w.mean(0), "upper": upper, "pareto_k": pareto_k(log_w), "drawn": drawn}
        return super().from_weights(log_w, **fields, **other_fields)

    @classmethod
    def joined(cls, parts: Iterable[Self], num_data: int, device: torch.device) -> Self:
        """One record of all data from those of consecutive minibatches."""
        # Each part is copied into one preallocated block and dropped. Small tensors kept for each minibatch would pin
        # the memory of the large ones between them.
        names = cls._per_datum_fields()
        block = torch.full((len(names), num_data), math.nan, dtype=torch.float64, device=of_float64(device))
        done = num_samples = 0
        for part in parts:
            size, num_samples = len(part.per_datum), max(num_samples, part.num_samples)
            for row, name in zip(block, names, strict=True):
                row[done : done + size] = getattr(part, name)
            done += size
            del part
        columns = dict(zip(names, block, strict=True))
        columns |= {name: columns[name].long() for name in ("zero_weights", "drawn")}
        return cls(**columns, num_samples=num_samples)

    @classmethod
    def together(cls, parts: Sequence[Self]) -> Self:
        """One record of the data of several ones; `num_samples` is the largest."""
        if len(parts) == 1:
            return parts[0]
        columns = {n: torch.cat([getattr(part, n) for part in parts], -1) for n in cls._per_datum_fields()}
        return replace(parts[0], **columns, num_samples=max(part.num_samples for part in parts))

    def into(self, whole: Self | None, rows: Tensor, num_data: int) -> Self:
        """A record of so many data, with these values at some rows, and those of `whole`, if any, elsewhere."""
        found: dict[str, Any] = {}
        for name in self._per_datum_fields():
            own: Tensor = getattr(self, name)
            empty = own.new_zeros(num_data)
            found[name] = (empty if whole is None else getattr(whole, name)).index_put((rows.to(own.device),), own)
        most = max(self.num_samples, 0 if whole is None else whole.num_samples)
        return replace(self, **found, num_samples=most)

    def where(self, condition: Tensor, other: Self) -> Self:
        """The record with these values for data where `condition` (N,) holds, and those of `other` elsewhere."""
        names = self._per_datum_fields()
        chosen: dict[str, Any] = {n: torch.where(condition, getattr(self, n), getattr(other, n)) for n in names}
        return replace(self, **chosen)

    @property
    def share_high_k(self) -> float:
        """The share of data whose k-hat is above 0.7."""
        return wide(self.pareto_k > HIGH_K).mean().item()

    @property
    def share_no_k(self) -> float:
        """The share of data without a k-hat."""
        return wide(self.pareto_k.isnan()).mean().item()

    @property
    def kl_to_posterior(self) -> Estimate:
        """KL(q(z|x) || p(z|x)) = log p(x) - ELBO, averaged over data: how much a perfect guide would raise the ELBO."""
        return Estimate.of(self.per_datum - self.elbo)

    def _number(self) -> str:
        if int(self.drawn.min()) == self.num_samples:
            return f"{self.num_samples}"
        return f"{self.drawn.min()} to {self.num_samples}, {wide(self.drawn).mean():.0f} on average"

    def _high_k(self) -> str:
        return f"{self.share_high_k:.1%}" + (f", {self.share_no_k:.1%} without" if self.share_no_k else "")

    def _statement(self) -> str:
        return (
            f"log p(x) = {self.estimate} nats per datum (importance sampling, K = {self._number()}, "
            f"N = {len(self.per_datum)}; Monte Carlo error {self.monte_carlo_error:.2g}, median ESS "
            f"{self.ess.median():.0f}, k-hat > {HIGH_K}: {self._high_k()}{self._zeros()})"
        )

    def _rows(self) -> dict[str, object]:
        return super()._rows() | {
            "samples K of a datum": self._number(),
            "median ESS": f"{self.ess.median():.0f}",
            f"data with k-hat > {HIGH_K}": self._high_k(),
            "log p(x) - ELBO": self.kl_to_posterior,
        }


def check_finite(log_w: Tensor) -> None:
    """Raise an error for log-weights that are NaN or plus infinity."""
    if bool((log_w.isnan() | (log_w == math.inf)).any()):
        raise NotFiniteError(
            "expected log-weights that are finite, or minus infinity for a weight of zero, got NaN or plus infinity. "
            "Look for scales of zero or densities that overflow: pv.log_weights(...).isfinite() shows for which data."
        )


def check_same_data(evidence: Evidence | None, number: int | None) -> None:
    """Raise an error if there are estimates, and they are not as many as the data; None is not known yet."""
    if evidence is not None and not isinstance(evidence, Evidence):
        raise PyroVAEError(
            f"expected log_likelihood to be the result of pv.log_likelihood, pv.ais or pv.bdmc, got {shown(evidence)}. "
            "Pass one."
        )
    if evidence is not None and number is not None and len(evidence.per_datum) != number:
        raise PyroVAEError(
            f"expected log_likelihood to be of the same data, got {len(evidence.per_datum)} of them for {number} data. "
            "Estimate it on x."
        )
