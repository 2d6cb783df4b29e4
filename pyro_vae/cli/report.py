"""The report of ``pyro-vae evaluate``: all evaluations of one VAE on test data, and the time of each."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeVar

import pandas as pd
import torch

from pyro_vae import evaluation as ev
from pyro_vae.pairs import VAE

NUM_ANNEALED = 100  # number of data for the slow estimates; the others use all data
IWAE_PARTICLES = 64
T = TypeVar("T")


class Row(NamedTuple):
    """A row of the report."""

    label: str  # indentation shows that it belongs to the row above
    estimate: ev.Estimate  # in nats per datum
    num_data: int  # the number of data that it is the mean of
    data: str  # "all", "first" or "simulated"
    part: str  # the evaluation that it comes from, a key of `Report.minutes`


@dataclass
class Report:
    """The results of all evaluations; "first" is the first data alone, which are fewer."""

    iwae: ev.Estimate  # the IWAE bound with 64 particles, in nats per datum
    log_likelihood: ev.LogLikelihood
    decomposition: ev.Decomposition
    active: pd.DataFrame  # from active_units
    annealed: ev.AnnealedLikelihood  # first
    sandwich: ev.Sandwich  # simulated data
    gaps: ev.Gaps  # first
    table: pd.DataFrame  # from compare, first
    minutes: dict[str, float]

    @property
    def log_likelihood_range(self) -> tuple[float, float]:
        """The AIS estimate; and the same plus BDMC's gap and two of its standard errors. Both in nats per datum."""
        gap = self.sandwich.gap
        return self.annealed.mean, self.annealed.mean + max(gap.value + 2 * gap.standard_error, 0.0)

    def rows(self) -> list[Row]:
        """The rows of the printed table."""
        likelihood, parts, gaps, sandwich = self.log_likelihood, self.decomposition, self.gaps, self.sandwich
        few = len(self.annealed.per_datum)
        difference = ev.Estimate.of(self.annealed.per_datum - likelihood.per_datum[:few])
        found = [
            ("ELBO", ev.Estimate.of(likelihood.elbo), "all", "log_likelihood"),
            (f"IWAE, K = {IWAE_PARTICLES}", self.iwae, "all", "iwae"),
            (f"log p(x), IS, K = {likelihood.num_samples}", likelihood.estimate, "all", "log_likelihood"),
            ("  log p(x) - ELBO", likelihood.kl_to_posterior, "all", "log_likelihood"),
            ("parts of the ELBO: sum", parts.elbo, "all", "decomposition"),
            ("  reconstruction", parts.reconstruction, "all", "decomposition"),
            ("  - mutual information", parts.mutual_information, "all", "decomposition"),
            ("  - KL of aggregate to prior", parts.marginal_kl, "all", "decomposition"),
            ("    its dimension-wise part", parts.dimension_wise_kl, "all", "decomposition"),
            ("log p(x), AIS", self.annealed.estimate, "first", "ais"),
            ("  AIS - IS", difference, "first", "ais"),
            ("approximation gap", gaps.approximation, "first", "gaps"),
            ("amortisation gap", gaps.amortisation, "first", "gaps"),
            ("log p(x), AIS", sandwich.lower.estimate, "simulated", "bdmc"),
            ("log p(x), upper bound", sandwich.upper, "simulated", "bdmc"),
            ("  upper bound - AIS", sandwich.gap, "simulated", "bdmc"),
        ]
        sizes = {"all": len(likelihood.per_datum), "first": few, "simulated": few}
        return [Row(label, value, sizes[data], data, part) for label, value, data, part in found if value is not None]

    def to_dict(self) -> dict[str, Any]:
        """All numbers, as the content of evaluation.json."""
        rows = [
            {"quantity": label.strip(" -"), **asdict(estimate), "num_data": num_data, "data": data}
            for label, estimate, num_data, data, _ in self.rows()
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
    num_samples: int,
    ais_data: int,
    ais_steps: int,
    ais_chains: int,
    *,
    compile: bool,
    seed: int,
) -> Report:
    """Evaluate a VAE: the cheap estimates on all of x; AIS, gaps and the comparison on its first `ais_data` rows."""
    minutes: dict[str, float] = {}

    def timed(part: str, evaluate: Callable[..., T], *args: Any, **settings: Any) -> T:
        started = time.perf_counter()
        result = evaluate(vae.model, vae.guide, *args, seed=seed, **settings)
        minutes[part] = (time.perf_counter() - started) / 60
        return result

    first = x[:ais_data]
    # AIS comes first, since it refuses the most: a refusal should come before the work.
    annealed = timed("ais", ev.ais, first, ais_steps, ais_chains)
    sandwich = timed("bdmc", ev.bdmc, first, ais_steps, ais_chains)
    likelihood = timed("log_likelihood", ev.log_likelihood, x, num_samples, compile=compile)
    iwae = timed("iwae", ev.log_likelihood, x, IWAE_PARTICLES)  # the same estimator with fewer samples is IWAE
    # Both are lower bounds in the mean.
    best = max((likelihood.of(slice(0, ais_data)), annealed), key=lambda evidence: evidence.mean)
    gaps = timed("gaps", ev.inference_gaps, first, num_samples, log_likelihood=best)
    decomposition = timed("decomposition", ev.decompose_elbo, x, 2 if len(x) > 1000 else 10)
    active = timed("active_units", ev.active_units, x)
    table = timed("compare", ev.compare, first, log_likelihood=best)
    return Report(iwae.estimate, likelihood, decomposition, active, annealed, sandwich, gaps, table, minutes)
