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

from pyro_vae import (
    callbacks,
    data,
    distributed,
    evaluation,
    likelihoods,
    networks,
    objectives,
    pairs,
    plots,
    posteriors,
    priors,
    schedules,
    testing,
)
from pyro_vae.arviz_io import to_arviz
from pyro_vae.compiled.step import compile_step
from pyro_vae.engine.weights import log_weights
from pyro_vae.errors import (
    CallbackError,
    MissingCompilerError,
    NoDensityError,
    NotFiniteError,
    NotWrittenError,
    OtherRankError,
    PyroVAEError,
)
from pyro_vae.evaluation import *
from pyro_vae.likelihoods import *
from pyro_vae.objectives import *
from pyro_vae.pairs import *
from pyro_vae.posteriors import *
from pyro_vae.priors import *
from pyro_vae.training import fit
from pyro_vae.training.calling import Callback
from pyro_vae.training.checkpoint import load_parameters
from pyro_vae.training.scales import fit_scale

__all__ = ["callbacks", "data", "distributed", "networks", "plots", "schedules", "testing"]
__all__ += ["Callback", "compile_step", "fit", "fit_scale", "load_parameters", "log_weights", "to_arviz"]
__all__ += [
    "CallbackError",
    "MissingCompilerError",
    "NoDensityError",
    "NotFiniteError",
    "NotWrittenError",
    "OtherRankError",
    "PyroVAEError",
]
__all__ += evaluation.__all__
__all__ += likelihoods.__all__
__all__ += objectives.__all__
__all__ += pairs.__all__
__all__ += posteriors.__all__
__all__ += priors.__all__
