"""The palette, the colour of each objective, new figures and conversion to numpy, for all plots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias
from zlib import crc32

import numpy as np
import torch

from pyro_vae.checks import checked, is_dense, shown
from pyro_vae.errors import PyroVAEError
from pyro_vae.extras import require

if TYPE_CHECKING:  # matplotlib is slow to import, and importing this package draws nothing
    from matplotlib.figure import Figure

Array: TypeAlias = torch.Tensor | np.ndarray | Sequence[Any]

# The Okabe-Ito palette, which colour-blind readers can tell apart.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
# Ten classes need two more colours than the palette has. Grey and wine are distinct from its eight.
CLASSES = np.array([BLUE, ORANGE, GREEN, VERMILLION, SKY, PURPLE, YELLOW, BLACK, "#999999", "#882255"])

FAMILIES = {
    "ELBO, closed-form KL": BLUE,
    "ELBO": VERMILLION,
    "IWAE": GREEN,
    "Renyi": PURPLE,
    "MIWAE": SKY,
    "PIWAE": "#332288",
    "CIWAE": ORANGE,
    "TVO": "#882255",
    "JVI": "#999933",
    "RWS": "#666666",
}
_OTHERS = (BLACK, "#661100", "#999999")  # without yellow, because a thin yellow line is hard to see on white


@checked
def objective_colour(objective: str) -> str:
    """Return the colour, as a hex string, that stands for an objective in every plot; it depends on the name alone.

    A name that starts with the name of one of this package's objectives gets the colour of that objective. Any other
    name gets one of three further colours.

    Arguments:
        objective: the name of an objective, such as ``pyro_vae.IWAE(8).name``.

    Example:
        >>> import pyro_vae as pv
        >>> pv.plots.objective_colour("IWAE")
        '#009E73'

    References:
        Okabe and Ito (2008), *Color Universal Design*, for the palette.
    """
    for family, colour in FAMILIES.items():
        if objective.startswith(family):
            return colour
    return _OTHERS[crc32(objective.encode()) % len(_OTHERS)]  # hash() differs between processes


def new_figure(canvas: np.ndarray | None = None, *, left: float = 0, top: float = 0) -> Figure:
    """Return a new pyplot figure; with a canvas of images, the figure has its aspect ratio plus margins in inches."""
    require("matplotlib", by="pv.plots")
    import matplotlib.pyplot as plt

    if canvas is None:
        return plt.figure(layout="constrained")
    height, width = canvas.shape[:2]
    return plt.figure(figsize=(7 + left, 7 * height / width + 0.1 + top), layout="constrained")


def to_numpy(x: Array, *, numbers: bool = True) -> np.ndarray:
    """Return a tensor or array as a numpy array, with floating point as float64 if it is a tensor."""
    array: Any = x
    if is_dense(x) and x.device.type != "meta":
        array = x.detach().cpu()
        array = (array.double() if array.is_floating_point() else array).numpy()  # numpy has no bfloat16
    try:
        array = np.array(None) if isinstance(array, torch.Tensor) else np.asarray(array)
        if numbers and array.dtype.kind not in "biuf":
            array = array.astype(float)
    except (TypeError, ValueError):  # rows of several lengths, or words
        array = np.array(None)
    if array.ndim == 0:
        raise PyroVAEError(
            f"expected an array or a tensor of {'real numbers' if numbers else 'labels'}, got {shown(x)}."
        )
    return array
