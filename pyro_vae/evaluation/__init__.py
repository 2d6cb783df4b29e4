"""How good a model is, and how far off the number: estimates of log p(x), gaps, decompositions, comparisons."""

from pyro_vae.evaluation.annealing import AnnealedLikelihood, Sandwich, ais, bdmc
from pyro_vae.evaluation.comparison import compare
from pyro_vae.evaluation.estimate import Estimate
from pyro_vae.evaluation.likelihood import LogLikelihood, log_likelihood
from pyro_vae.evaluation.psis import pareto_k

__all__ = [
    "AnnealedLikelihood",
    "Estimate",
    "LogLikelihood",
    "Sandwich",
    "ais",
    "bdmc",
    "compare",
    "log_likelihood",
    "pareto_k",
]
