"""Refuses sizes that this machine has no memory for, before anything is allocated."""

import os
from collections.abc import Sequence
from itertools import pairwise

from pyro_vae.errors import PyroVAEError


def check_memory(options: str, numbers: int) -> None:
    """Refuse options that need more memory than the machine has, for so many float32 `numbers` held at once.

    `numbers` is at most what is needed, so that no run is refused that could end.
    """
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # Windows does not say
        memory = 2**48  # bytes that a processor can address
    if 4 * numbers > memory:
        raise PyroVAEError(
            f"expected sizes that fit in this machine's memory of {memory / 2**30:.1f} GiB, got {options} that take at "
            f"least {4 * numbers // 2**30} GiB. Pass smaller ones."
        )


def fewest_weights(features: int, widths: Sequence[int], latent_dim: int) -> int:
    """A number of weights that an encoder and a decoder of these widths, or channels, exceed."""
    return 2 * sum(narrow * wide for narrow, wide in pairwise([features, *widths, latent_dim]))
