"""Everything that evaluation has to say of one VAE and its test data, with the minutes that each part took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch

from pyro_vae import evaluation as ev
from pyro_vae.objectives import ELBO, IWAE
from pyro_vae.vae import VAE


@dataclass
class Report:
    """The parts of an evaluation; see :mod:`pyro_vae.evaluation` for each.

    Attributes:
        bounds: ELBO and IWAE-64 of all data.
        log_likelihood: by importance sampling, of all data.
        decomposition: of the ELBO of all data.
        active: the latent dimensions, of all data.
        annealed: log p(x) of the first of the data.
        sandwich: both sides of log p(x), of as many simulated data.
        gaps: of the first of the data.
        table: what `compare` says, of the first of the data.
        minutes: that each part took.
    """

    bounds: pd.DataFrame
    log_likelihood: ev.LogLikelihood
    decomposition: ev.Decomposition
    active: pd.DataFrame
    annealed: ev.AnnealedLikelihood
    sandwich: ev.Sandwich
    gaps: ev.Gaps
    table: pd.DataFrame
    minutes: dict[str, float] = field(default_factory=dict)

    @property
    def between(self) -> tuple[float, float]:
        """Log p(x) of the annealed data by AIS, and that plus the gap which simulated data leave."""
        return self.annealed.mean, self.annealed.mean + self.sandwich.gap.value

    def rows(self) -> list[tuple[str, ev.Estimate, int, str]]:
        """What a table shows: words, number, how many data, and which part it comes from."""
        number, few = len(self.log_likelihood.per_datum), len(self.annealed.per_datum)
        samples = self.log_likelihood.num_samples
        parts, gaps = self.decomposition, self.gaps
        found = [
            ("ELBO", self._bound(0), number, "bounds"),
            ("IWAE, K = 64", self._bound(1), number, "bounds"),
            (f"log p(x), IS, K = {samples}", self.log_likelihood.estimate, number, "log_likelihood"),
            ("  log p(x) - ELBO", self.log_likelihood.kl_to_posterior, number, "log_likelihood"),
            ("reconstruction", parts.reconstruction, number, "decomposition"),
            ("mutual information of x, z", parts.mutual_information, number, "decomposition"),
            ("KL of aggregate to prior", parts.marginal_kl, number, "decomposition"),
        ]
        if parts.dimension_wise_kl is not None:
            found.append(("  its dimension-wise part", parts.dimension_wise_kl, number, "decomposition"))
        few_ll = ev.Estimate.of(self.log_likelihood.per_datum[:few])
        return [
            *found,
            (f"log p(x), IS, K = {samples}", few_ll, few, "log_likelihood"),
            ("log p(x), AIS", self.annealed.estimate, few, "ais"),
            ("  AIS - IS", ev.Estimate.of(self.annealed.per_datum - self.log_likelihood.per_datum[:few]), few, "ais"),
            ("approximation gap", gaps.approximation, few, "gaps"),
            ("amortisation gap", gaps.amortisation, few, "gaps"),
            ("simulated data: AIS", self.sandwich.lower.estimate, few, "bdmc"),
            ("simulated data: upper bound", self.sandwich.upper, few, "bdmc"),
            ("  upper bound - AIS", self.sandwich.gap, few, "bdmc"),
        ]

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        rows = [
            {"quantity": words.strip(), "value": e.value, "standard_error": e.standard_error, "num_data": n}
            for words, e, n, _ in self.rows()
        ]
        likelihood = self.log_likelihood
        return {
            "nats_per_datum": rows,
            "num_samples": likelihood.num_samples,
            "monte_carlo_error": likelihood.monte_carlo_error,
            "median_ess": likelihood.ess.median().item(),
            "share_pareto_k_above_0.7": likelihood.share_high_k,
            "share_without_pareto_k": likelihood.share_no_k,
            "data_with_zero_weights": int((likelihood.zero_weights > 0).sum()),
            "active_units": int(self.active["active"].sum()),
            "latent_dimensions": len(self.active),
            "ais_acceptance": self.annealed.acceptance.mean().item(),
            "per_datum": {
                "log_likelihood": likelihood.per_datum.tolist(),
                "error": likelihood.per_datum_error.tolist(),
                "pareto_k": [None if k != k else k for k in likelihood.pareto_k.tolist()],
                "ais": self.annealed.per_datum.tolist(),
            },
            "minutes": self.minutes,
        }

    def _bound(self, row: int) -> ev.Estimate:
        return ev.Estimate(self.bounds["bound"].iloc[row], self.bounds["bound_se"].iloc[row])


def evaluate(
    vae: VAE,
    x: torch.Tensor,
    *,
    num_samples: int = 5000,
    ais_data: int = 100,
    ais_steps: int = 1000,
    ais_chains: int = 16,
    seed: int | None = None,
) -> Report:
    """Run every part: those that are cheap on all of x, annealing, gaps and the comparison on its first `ais_data` rows.

    Raises:
        ValueError: as the parts do, before any of them runs, where the arguments alone show it.
    """
    minutes: dict[str, float] = {}

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        minutes[part] = (time.perf_counter() - started) / 60

    first = x[:ais_data]
    program = vae.model, vae.guide
    with timed("ais"):  # first: it refuses more than the others, and a refusal should cost nothing
        annealed = ev.ais(*program, first, ais_steps, ais_chains, seed=seed)
    with timed("bdmc"):
        sandwich = ev.bdmc(*program, first, ais_steps, ais_chains, seed=seed)
    with timed("log_likelihood"):
        likelihood = ev.log_likelihood(*program, x, num_samples, seed=seed)
    with timed("bounds"):
        bounds = ev.compare(*program, x, [ELBO(), IWAE(64)], repeats=2, seed=seed, log_likelihood=likelihood)
    with timed("gaps"):
        few = likelihood.of(slice(0, ais_data))
        best = max((few, annealed), key=lambda evidence: evidence.mean)  # both have log p(x) above their mean
        gaps = ev.inference_gaps(*program, first, num_samples, log_likelihood=best, seed=seed)
    with timed("decomposition"):
        decomposition = ev.decompose_elbo(*program, x, 2 if len(x) > 1000 else 10, seed=seed)
    with timed("active_units"):
        active = ev.active_units(*program, x, seed=seed)
    with timed("compare"):
        table = ev.compare(*program, first, log_likelihood=best, seed=seed)
    return Report(bounds, likelihood, decomposition, active, annealed, sandwich, gaps, table, minutes)
