"""Training: `fit` and its optimiser, the loop, checkpoints, schedulers of the step size."""

from pyro_vae.training.fit import fit

__all__ = ["fit"]
