"""The report of ``pyro-vae evaluate``: all evaluations of one VAE on test data, and the time of each."""

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

NUM_ANNEALED = 100  # number of data for the slow estimates; the others use all data
IWAE_PARTICLES = 64


class Row(NamedTuple):
    """A row of the report.

    Attributes:
        label: the name of the quantity; indentation shows that it belongs to the row above.
        estimate: its value and standard error, in nats per datum.
        num_data: the number of data that it is the mean of.
        data: which data these are.
        part: the evaluation that it comes from, a key of `Report.minutes`.
    """

    label: str
    estimate: ev.Estimate
    num_data: int
    data: Literal["all", "first", "simulated"]
    part: str


@dataclass
class Report:
    """The results of all evaluations.

    Attributes:
        iwae: the IWAE bound with 64 particles on all data, in nats per datum.
        log_likelihood: log p(x) of all data by importance sampling, from :func:`pyro_vae.log_likelihood`.
        decomposition: the parts of the ELBO on all data, from :func:`pyro_vae.decompose_elbo`.
        active: the latent dimensions on all data, from :func:`pyro_vae.active_units`.
        annealed: log p(x) of the first data by annealed importance sampling, from :func:`pyro_vae.ais`.
        sandwich: lower and upper bounds of log p(x) on simulated data, from :func:`pyro_vae.bdmc`.
        gaps: the approximation and amortisation gaps on the first data, from :func:`pyro_vae.inference_gaps`.
        table: the bounds on the first data, from :func:`pyro_vae.compare`.
        minutes: the time of each evaluation.
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
    def log_likelihood_range(self) -> tuple[float, float]:
        """A lower and an upper value for the mean log p(x) of the first data, in nats per datum.

        The lower value is the AIS estimate. The upper value adds the gap between the bounds on simulated data, plus
        two of its standard errors.
        """
        gap = self.sandwich.gap
        return self.annealed.mean, self.annealed.mean + max(gap.value + 2 * gap.standard_error, 0.0)

    def rows(self) -> list[Row]:
        """The rows of the printed table."""
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
        """All numbers, as the content of evaluation.json."""
        rows = [
            {
                "quantity": row.label.strip(" -"),
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
    """Evaluate a VAE: the cheap estimates on all data; AIS, gaps and the comparison on the first data.

    Arguments:
        vae: the trained VAE.
        x: test data, (N, ...), with N at least 2.
        num_samples: importance samples for each datum, at least 25.
        ais_data: the number of rows of x for the slow estimates, at least 2. As many data are simulated.
        ais_steps: temperatures of annealed importance sampling.
        ais_chains: annealed chains for each datum.
        compile: whether importance sampling runs as compiled code.
        seed: seed of each evaluation; None continues from the current state of the random number generators.

    Returns:
        The results, with the time of each evaluation.

    Raises:
        PyroVAEError: an argument is invalid. Most invalid arguments are refused before the first evaluation.
    """
    minutes: dict[str, float] = {}

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        minutes[part] = (time.perf_counter() - started) / 60

    first = x[:ais_data]
    program = vae.model, vae.guide
    with timed("ais"):  # AIS comes first, since it refuses the most: a refusal should come before the work
        annealed = ev.ais(*program, first, ais_steps, ais_chains, seed=seed)
    with timed("bdmc"):
        sandwich = ev.bdmc(*program, first, ais_steps, ais_chains, seed=seed)
    with timed("log_likelihood"):
        likelihood = ev.log_likelihood(*program, x, num_samples, compile=compile, seed=seed)
    with timed("iwae"):
        # The IWAE bound is the same estimator with fewer samples.
        iwae = ev.log_likelihood(*program, x, IWAE_PARTICLES, seed=seed).estimate
    with timed("gaps"):
        few = likelihood.of(slice(0, ais_data))
        best = max((few, annealed), key=lambda evidence: evidence.mean)  # both are lower bounds in the mean
        gaps = ev.inference_gaps(*program, first, num_samples, log_likelihood=best, seed=seed)
    with timed("decomposition"):
        decomposition = ev.decompose_elbo(*program, x, 2 if len(x) > 1000 else 10, seed=seed)
    with timed("active_units"):
        active = ev.active_units(*program, x, seed=seed)
    with timed("compare"):
        table = ev.compare(*program, first, log_likelihood=best, seed=seed)
    return Report(iwae, likelihood, decomposition, active, annealed, sandwich, gaps, table, minutes)
