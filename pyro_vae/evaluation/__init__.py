"""Evaluations of a model: log p(x), inference gaps, the parts of the ELBO, active units, comparison of objectives."""

from pyro_vae.evaluation.annealing import AnnealedLikelihood, Sandwich, ais, bdmc
from pyro_vae.evaluation.blame import blame
from pyro_vae.evaluation.calibration import Calibration, calibrate
from pyro_vae.evaluation.comparison import compare
from pyro_vae.evaluation.decomposition import Decomposition, decompose_elbo
from pyro_vae.evaluation.diagnostics import pareto_k
from pyro_vae.evaluation.estimate import Estimate
from pyro_vae.evaluation.evidence import Evidence, LogLikelihood
from pyro_vae.evaluation.expectation import Expectation, expect
from pyro_vae.evaluation.gaps import Gaps, inference_gaps
from pyro_vae.evaluation.latents import active_units
from pyro_vae.evaluation.likelihood import log_likelihood
from pyro_vae.evaluation.models import compare_models
from pyro_vae.evaluation.proposals.guide import RefinedGuide
from pyro_vae.evaluation.proposals.refine import refine

__all__ = [
    "AnnealedLikelihood",
    "Calibration",
    "Decomposition",
    "Estimate",
    "Evidence",
    "Expectation",
    "Gaps",
    "LogLikelihood",
    "RefinedGuide",
    "Sandwich",
    "active_units",
    "ais",
    "bdmc",
    "blame",
    "calibrate",
    "compare",
    "compare_models",
    "decompose_elbo",
    "expect",
    "inference_gaps",
    "log_likelihood",
    "pareto_k",
    "refine",
]
