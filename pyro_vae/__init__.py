r"""Variational autoencoders in Pyro, and what their numbers mean.

A model p(z) p(x|z) and a guide q(z|x) are Pyro functions. What is maximised, and what is reported, is a
reduction of their log-weights log w[k, n] = log p(x_n, z_kn) - log q(z_kn | x_n), and it obeys

.. math:: \log p(x) = \underbrace{\mathbb{E}_q \log p(x \mid z) - \mathrm{KL}\bigl(q(z \mid x) \,\|\, p(z)\bigr)}
    _{\mathrm{ELBO}} + \mathrm{KL}\bigl(q(z \mid x) \,\|\, p(z \mid x)\bigr)

In six lines::

    import pyro_vae as pv

    digits = pv.data.load("digits", binarize="dynamic")
    vae = pv.mlp_vae(digits.event_shape, latent_dim=2, hidden_dims=(200,))
    history = pv.fit(vae, digits.train, pv.ELBO(), epochs=50, batch_size=64, lr=1e-3)
    print(pv.compare(vae, digits.test.x))
"""

from pyro_vae import data, networks, plots, schedules, testing
from pyro_vae.arviz_io import to_arviz
from pyro_vae.compiled.step import compile_step
from pyro_vae.engine.weights import log_weights
from pyro_vae.errors import MissingCompilerError, NotFiniteError, PyroVAEError
from pyro_vae.evaluation import (
    AnnealedLikelihood,
    Decomposition,
    Estimate,
    Evidence,
    Gaps,
    LogLikelihood,
    Sandwich,
    active_units,
    ais,
    bdmc,
    compare,
    decompose_elbo,
    inference_gaps,
    log_likelihood,
    pareto_k,
)
from pyro_vae.likelihoods import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogistic,
    Gaussian,
    Likelihood,
    LowRankGaussian,
    NegativeBinomial,
    Poisson,
    StudentT,
)
from pyro_vae.objectives import CIWAE, ELBO, IWAE, JVI, MIWAE, PIWAE, RWS, TVO, NoClosedFormError, Objective, Renyi
from pyro_vae.pairs import (
    VAE,
    Autoencoder,
    BottomUp,
    ConditionalVAE,
    HierarchicalVAE,
    Ladder,
    SemiSupervisedVAE,
    conv_vae,
    mlp_autoencoder,
    mlp_conditional_vae,
    mlp_hierarchical_vae,
    mlp_semi_supervised_vae,
    mlp_vae,
)
from pyro_vae.posteriors import (
    DiagonalNormal,
    FlowPosterior,
    FullNormal,
    LowRankNormal,
    MixturePosterior,
    Posterior,
    Unconditional,
)
from pyro_vae.priors import FlowPrior, MixturePrior, StandardNormal, VampPrior
from pyro_vae.training import fit
from pyro_vae.training.checkpoint import load_parameters

__all__ = [
    "CIWAE",
    "ELBO",
    "IWAE",
    "JVI",
    "MIWAE",
    "PIWAE",
    "RWS",
    "TVO",
    "VAE",
    "AnnealedLikelihood",
    "Autoencoder",
    "Bernoulli",
    "BottomUp",
    "Categorical",
    "ConditionalVAE",
    "ContinuousBernoulli",
    "Decomposition",
    "DiagonalNormal",
    "DiscretizedLogistic",
    "Estimate",
    "Evidence",
    "FlowPosterior",
    "FlowPrior",
    "FullNormal",
    "Gaps",
    "Gaussian",
    "HierarchicalVAE",
    "Ladder",
    "Likelihood",
    "LogLikelihood",
    "LowRankGaussian",
    "LowRankNormal",
    "MissingCompilerError",
    "MixturePosterior",
    "MixturePrior",
    "NegativeBinomial",
    "NoClosedFormError",
    "NotFiniteError",
    "Objective",
    "Poisson",
    "Posterior",
    "PyroVAEError",
    "Renyi",
    "Sandwich",
    "SemiSupervisedVAE",
    "StandardNormal",
    "StudentT",
    "Unconditional",
    "VampPrior",
    "active_units",
    "ais",
    "bdmc",
    "compare",
    "compile_step",
    "conv_vae",
    "data",
    "decompose_elbo",
    "fit",
    "inference_gaps",
    "load_parameters",
    "log_likelihood",
    "log_weights",
    "mlp_autoencoder",
    "mlp_conditional_vae",
    "mlp_hierarchical_vae",
    "mlp_semi_supervised_vae",
    "mlp_vae",
    "networks",
    "pareto_k",
    "plots",
    "schedules",
    "testing",
    "to_arviz",
]
