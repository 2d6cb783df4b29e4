"""Model/guide pairs: generative models and their guides as Pyro functions. They know no loss."""

from pyro_vae.pairs.build import conv_vae, mlp_vae
from pyro_vae.pairs.vae import VAE

__all__ = ["VAE", "conv_vae", "mlp_vae"]
