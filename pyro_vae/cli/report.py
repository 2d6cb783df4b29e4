"""The report of ``pyro-vae evaluate``: all evaluations of one VAE on test data, and the time of each."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeVar

import pandas as pd
import torch

from pyro_vae import evaluation as ev
from pyro_vae.evaluation.diagnostics import HIGH_K
from pyro_vae.pairs import VAE

IWAE_PARTICLES = 64
SANDWICH_SAMPLES = 1000  # with more, the gap is smaller
FEW_HIGH = 0.01  # share of high k-hats up to which the mean of log p(x) can be trusted
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

    encoder: ev.LogLikelihood  # from 64 samples of the encoder, which is the IWAE bound
    log_likelihood: ev.LogLikelihood  # from refined proposals
    decomposition: ev.Decomposition
    active: pd.DataFrame  # from active_units
    annealed: ev.AnnealedLikelihood  # first, from refined proposals
    sandwich: ev.Calibration  # of refined proposals, on simulated data
    calibration: ev.Calibration  # of the encoder, on simulated data
    gaps: ev.Gaps  # first
    table: pd.DataFrame  # from compare, first
    minutes: dict[str, float]

    @property
    def log_likelihood_range(self) -> tuple[float, float]:
        """Log p(x) of the first data; and the same plus the sandwich's gap and two of its standard errors, in nats."""
        lowest = self._of_first().mean
        return lowest, lowest + self._most_missed()

    def _of_first(self) -> ev.LogLikelihood:
        return self.log_likelihood.of(slice(0, len(self.annealed.per_datum)))

    def _most_missed(self) -> float:
        gap = self.sandwich.gap
        return max(gap.value + 2 * gap.standard_error, 0.0)

    @property
    def verdict(self) -> str:
        """What log p(x) is and whether it can be trusted, in three lines: k-hat, simulated images, and AIS say it."""
        shapes, gap = self.log_likelihood.pareto_k, self.sandwich.gap
        share, few = (shapes <= HIGH_K).double().mean().item(), len(self.annealed.per_datum)
        sign = "=" if share >= 1 - FEW_HIGH else ">="
        return (
            f"log p(x) {sign} {self.log_likelihood.estimate} nats per image (k-hat <= {HIGH_K}: {share:.1%})\n"
            f"On {few} images simulated from the model, such estimates lose {gap} nats.\n"
            f"On {few} test images, AIS minus this estimate is {self._annealed_minus_refined()}."
        )

    def _annealed_minus_refined(self) -> ev.Estimate:
        return ev.Estimate.of(self.annealed.per_datum - self._of_first().per_datum)

    def rows(self) -> list[Row]:
        """The rows of the printed table."""
        likelihood, parts, gaps, sandwich = self.log_likelihood, self.decomposition, self.gaps, self.sandwich
        few = len(self.annealed.per_datum)
        gap = ev.Estimate.of(likelihood.per_datum - self.encoder.elbo)
        found = [
            ("ELBO", ev.Estimate.of(self.encoder.elbo), "all", "encoder"),
            (f"IWAE, K = {IWAE_PARTICLES}", self.encoder.estimate, "all", "encoder"),
            (f"log p(x), refined, K = {likelihood.num_samples}", likelihood.estimate, "all", "log_likelihood"),
            ("  upper bound, estimated", ev.Estimate.of(likelihood.upper), "all", "log_likelihood"),
            ("  log p(x) - ELBO", gap, "all", "log_likelihood"),
            ("parts of the ELBO: sum", parts.elbo, "all", "decomposition"),
            ("  reconstruction", parts.reconstruction, "all", "decomposition"),
            ("  - mutual information", parts.mutual_information, "all", "decomposition"),
            ("  - KL of aggregate to prior", parts.marginal_kl, "all", "decomposition"),
            ("    its dimension-wise part", parts.dimension_wise_kl, "all", "decomposition"),
            ("log p(x), AIS from proposals", self.annealed.estimate, "first", "ais"),
            ("  AIS - refined", self._annealed_minus_refined(), "first", "ais"),
            ("approximation gap", gaps.approximation, "first", "gaps"),
            ("amortisation gap", gaps.amortisation, "first", "gaps"),
            ("of simulated: log p(x), refined", sandwich.lower.estimate, "simulated", "sandwich"),
            ("  upper bound", sandwich.upper, "simulated", "sandwich"),
            ("  upper bound - refined", sandwich.gap, "simulated", "sandwich"),
            ("  KL(p || q) + KL(q || p), encoder", self.calibration.kl, "simulated", "calibration"),
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
            "verdict": self.verdict,
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
    # What refuses the most comes first: a refusal should come before the work.
    annealed = timed("ais", _annealed, first, ais_steps, ais_chains)
    sandwich = timed("sandwich", ev.calibrate, first, min(num_samples, SANDWICH_SAMPLES), refine=True)
    calibration = timed("calibration", ev.calibrate, first)
    likelihood = timed("log_likelihood", ev.log_likelihood, x, num_samples, refine=True, compile=compile)
    encoder = timed("encoder", ev.log_likelihood, x, IWAE_PARTICLES)  # the same estimator with fewer samples is IWAE
    # Both are lower bounds in the mean.
    best = max((likelihood.of(slice(0, ais_data)), annealed), key=lambda evidence: evidence.mean)
    gaps = timed("gaps", ev.inference_gaps, first, num_samples, log_likelihood=best)
    decomposition = timed("decomposition", ev.decompose_elbo, x, 2 if len(x) > 1000 else 10)
    active = timed("active_units", ev.active_units, x)
    table = timed("compare", ev.compare, first, log_likelihood=best)
    return Report(encoder, likelihood, decomposition, active, annealed, sandwich, calibration, gaps, table, minutes)


def _annealed(
    model: Any, guide: Any, x: torch.Tensor, num_steps: int, num_chains: int, *, seed: int
) -> ev.AnnealedLikelihood:
    """The estimates by annealing from refined proposals."""
    refined = ev.refine(model, guide, x, seed=seed)
    return ev.ais(model, refined, x, num_steps, num_chains, start="guide", seed=seed)
