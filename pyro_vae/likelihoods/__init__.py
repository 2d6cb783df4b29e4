"""Likelihoods p(x|z): modules that map z to the distribution of one datum through a decoder."""

from pyro_vae.likelihoods.base import Likelihood
from pyro_vae.likelihoods.binary import Bernoulli, ContinuousBernoulli
from pyro_vae.likelihoods.correlated import LowRankGaussian
from pyro_vae.likelihoods.counts import NegativeBinomial, Poisson
from pyro_vae.likelihoods.discrete import Categorical, DiscretizedLogistic
from pyro_vae.likelihoods.real import Gaussian, StudentT

#: The names of the likelihoods for :func:`pyro_vae.mlp_vae`, the other builders and the command line.
BY_NAME: dict[str, type[Likelihood]] = {
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
    "continuous_bernoulli": ContinuousBernoulli,
    "student_t": StudentT,
    "low_rank_gaussian": LowRankGaussian,
    "categorical": Categorical,
    "discretized_logistic": DiscretizedLogistic,
    "poisson": Poisson,
    "negative_binomial": NegativeBinomial,
}

__all__ = [
    "Bernoulli",
    "Categorical",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "Gaussian",
    "Likelihood",
    "LowRankGaussian",
    "NegativeBinomial",
    "Poisson",
    "StudentT",
]
