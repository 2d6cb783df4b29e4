"""Plots of bounds, training, diagnostics, images and latent spaces.

Each function draws on matplotlib's Axes `ax`, and returns those Axes. An array is a torch tensor, on any device and
with or without gradients, or a numpy array. Only :func:`traversal` and :func:`interpolation` run a network; no function
trains or opens a window. Without the argument `ax`, pyplot makes a new figure. A notebook shows it once, at the end of
the cell. Elsewhere, show it with ``matplotlib.pyplot.show()``, or save it with ``ax.figure.savefig("plot.png")``.
"""

from pyro_vae.plots.charts import active_units, bounds, calibration, models, pareto_k, training_curve
from pyro_vae.plots.latents import interpolation, traversal
from pyro_vae.plots.pictures import images, latent_grid, latent_space, reconstructions
from pyro_vae.plots.shared import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION, YELLOW, Array, objective_colour

__all__ = [
    "BLACK",
    "BLUE",
    "GREEN",
    "ORANGE",
    "PURPLE",
    "SKY",
    "VERMILLION",
    "YELLOW",
    "Array",
    "active_units",
    "bounds",
    "calibration",
    "images",
    "interpolation",
    "latent_grid",
    "latent_space",
    "models",
    "objective_colour",
    "pareto_k",
    "reconstructions",
    "training_curve",
    "traversal",
]
