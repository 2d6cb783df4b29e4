"""The state of every random generator that a Pyro program may draw from: torch, CUDA, NumPy and Python."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import pyro
import torch

State = dict[str, Any]


def get_state() -> State:
    """The generators' states, to be handed back to :func:`set_state`; of types that ``weights_only`` loads."""
    state = pyro.util.get_rng_state()
    algorithm, keys, *rest = state["numpy"]
    state["numpy"] = [algorithm, torch.from_numpy(keys.astype(np.int64)), *rest]
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_state(state: State) -> None:
    """Put the generators back to where :func:`get_state` found them."""
    algorithm, keys, *rest = state["numpy"]
    pyro.util.set_rng_state(state | {"numpy": (algorithm, keys.numpy().astype(np.uint32), *rest)})
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def preserved(seed: int | None = None) -> Iterator[None]:
    """Leave the generators as they were found; inside, start them from `seed` when one is given."""
    state = get_state()
    try:
        if seed is not None:
            pyro.set_rng_seed(seed)
        yield
    finally:
        set_state(state)


def seeded(seed: int | None) -> AbstractContextManager[None]:
    """Inside, the generators start from `seed`, and are put back after; without one they just go on."""
    return nullcontext() if seed is None else preserved(seed)
