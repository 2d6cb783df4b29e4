"""Everything that evaluation has to say of one VAE and its test data, with the minutes that each part took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pandas as pd
import torch

from pyro_vae import evaluation as ev
from pyro_vae.evaluation.defaults import NUM_CHAINS, NUM_SAMPLES, NUM_STEPS
from pyro_vae.pairs import VAE

NUM_ANNEALED = 100  # data that are annealed, where the other estimates use all
IWAE_PARTICLES = 64


class Row(NamedTuple):
    """A line of the report: its words, the number, how many and which data it is of, and the part it comes from."""

    words: str
    estimate: ev.Estimate
    num_data: int
    data: Literal["all", "first", "simulated"]
    part: str


@dataclass
class Report:
    """The parts of an evaluation; see :mod:`pyro_vae.evaluation` for each.

    Attributes:
        iwae: IWAE with 64 particles, of all data.
        log_likelihood: by importance sampling, of all data.
        decomposition: of the ELBO of all data.
        active: the latent dimensions, of all data.
        annealed: log p(x) of the first of the data.
        sandwich: both sides of log p(x), of as many simulated data.
        gaps: of the first of the data.
        table: what `compare` says, of the first of the data.
        minutes: that each part took.
    """

    iwae: ev.Estimate
    log_likelihood: ev.LogLikelihood
    decomposition: ev.Decomposition
    active: pd.DataFrame
    annealed: ev.AnnealedLikelihood
    sandwich: ev.Sandwich
    gaps: ev.Gaps
    table: pd.DataFrame
    minutes: dict[str, float]

    @property
    def between(self) -> tuple[float, float]:
        """Log p(x) of the annealed data by AIS, and that plus what simulated data leave open, with two standard errors."""
        gap = self.sandwich.gap
        return self.annealed.mean, self.annealed.mean + max(gap.value + 2 * gap.standard_error, 0.0)

    def rows(self) -> list[Row]:
        """What a table shows."""
        number, few = len(self.log_likelihood.per_datum), len(self.annealed.per_datum)
        likelihood, parts, gaps, sandwich = self.log_likelihood, self.decomposition, self.gaps, self.sandwich
        samples, first = likelihood.num_samples, likelihood.of(slice(0, few))
        found = [
            Row("ELBO", ev.Estimate.of(likelihood.elbo), number, "all", "log_likelihood"),
            Row(f"IWAE, K = {IWAE_PARTICLES}", self.iwae, number, "all", "iwae"),
            Row(f"log p(x), IS, K = {samples}", likelihood.estimate, number, "all", "log_likelihood"),
            Row("  log p(x) - ELBO", likelihood.kl_to_posterior, number, "all", "log_likelihood"),
            Row("parts of the ELBO: sum", parts.elbo, number, "all", "decomposition"),
            Row("  reconstruction", parts.reconstruction, number, "all", "decomposition"),
            Row("  - mutual information", parts.mutual_information, number, "all", "decomposition"),
            Row("  - KL of aggregate to prior", parts.marginal_kl, number, "all", "decomposition"),
        ]
        if parts.dimension_wise_kl is not None:
            found.append(Row("    its dimension-wise part", parts.dimension_wise_kl, number, "all", "decomposition"))
        return [
            *found,
            Row("log p(x), AIS", self.annealed.estimate, few, "first", "ais"),
            Row("  AIS - IS", ev.Estimate.of(self.annealed.per_datum - first.per_datum), few, "first", "ais"),
            Row("approximation gap", gaps.approximation, few, "first", "gaps"),
            Row("amortisation gap", gaps.amortisation, few, "first", "gaps"),
            Row("log p(x), AIS", sandwich.lower.estimate, few, "simulated", "bdmc"),
            Row("log p(x), upper bound", sandwich.upper, few, "simulated", "bdmc"),
            Row("  upper bound - AIS", sandwich.gap, few, "simulated", "bdmc"),
        ]

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        rows = [
            {
                "quantity": row.words.strip(" -"),
                "value": row.estimate.value,
                "standard_error": row.estimate.standard_error,
                "num_data": row.num_data,
                "data": row.data,
            }
            for row in self.rows()
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


def make_report(
    vae: VAE,
    x: torch.Tensor,
    *,
    num_samples: int = NUM_SAMPLES,
    ais_data: int = NUM_ANNEALED,
    ais_steps: int = NUM_STEPS,
    ais_chains: int = NUM_CHAINS,
    compile: bool = False,
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
        likelihood = ev.log_likelihood(*program, x, num_samples, compile=compile, seed=seed)
    with timed("iwae"):
        iwae = ev.log_likelihood(
            *program, x, IWAE_PARTICLES, seed=seed
        ).estimate  # IWAE's bound is that, with fewer samples
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
    return Report(iwae, likelihood, decomposition, active, annealed, sandwich, gaps, table, minutes)
