"""Model/guide pairs: generative models and their guides as Pyro functions, independent of any objective."""

from pyro_vae.pairs.autoencoder import Autoencoder
from pyro_vae.pairs.build import (
    conv_vae,
    mlp_autoencoder,
    mlp_conditional_vae,
    mlp_hierarchical_vae,
    mlp_semi_supervised_vae,
    mlp_vae,
)
from pyro_vae.pairs.conditional import ConditionalVAE
from pyro_vae.pairs.hierarchical import BottomUp, HierarchicalVAE, Ladder
from pyro_vae.pairs.semi_supervised import SemiSupervisedVAE
from pyro_vae.pairs.vae import VAE

__all__ = [
    "VAE",
    "Autoencoder",
    "BottomUp",
    "ConditionalVAE",
    "HierarchicalVAE",
    "Ladder",
    "SemiSupervisedVAE",
    "conv_vae",
    "mlp_autoencoder",
    "mlp_conditional_vae",
    "mlp_hierarchical_vae",
    "mlp_semi_supervised_vae",
    "mlp_vae",
]
