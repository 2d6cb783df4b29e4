"""Likelihoods p(x|z): modules from a latent to a distribution over one datum, through a decoder."""

from pyro_vae.likelihoods.base import Likelihood
from pyro_vae.likelihoods.binary import Bernoulli, ContinuousBernoulli
from pyro_vae.likelihoods.correlated import LowRankGaussian
from pyro_vae.likelihoods.counts import NegativeBinomial, Poisson
from pyro_vae.likelihoods.discrete import Categorical, DiscretizedLogistic
from pyro_vae.likelihoods.real import Gaussian, StudentT

#: The likelihoods by the names that :func:`pyro_vae.mlp_vae` and the command line know them by.
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
    "BY_NAME",
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
