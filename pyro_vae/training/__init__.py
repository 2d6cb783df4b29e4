"""Training: `fit`, its loop, its checkpoints."""

from pyro_vae.training.fit import fit

__all__ = ["fit"]
