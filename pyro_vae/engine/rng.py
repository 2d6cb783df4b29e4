"""The states of the random number generators of a Pyro program: torch, CUDA, NumPy and Python."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import pyro
import torch

State = dict[str, Any]


def get_state() -> State:
    """The states of all generators, in types that ``torch.load(weights_only=True)`` can read."""
    state = pyro.util.get_rng_state()
    algorithm, keys, *rest = state["numpy"]
    state["numpy"] = [algorithm, torch.from_numpy(keys.astype(np.int64)), *rest]
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_state(state: State) -> None:
    """Restore the states that :func:`get_state` returned."""
    algorithm, keys, *rest = state["numpy"]
    pyro.util.set_rng_state(state | {"numpy": (algorithm, keys.numpy().astype(np.uint32), *rest)})
    for device, own in zip(range(torch.cuda.device_count()), state.get("cuda", ()), strict=False):  # it may have others
        torch.cuda.set_rng_state(own, device)


@contextmanager
def preserved(seed: int | None = None) -> Iterator[None]:
    """Seed the generators inside, if there is a seed, and restore their states afterwards."""
    state = get_state()
    try:
        if seed is not None:
            pyro.set_rng_seed(seed)
        yield
    finally:
        set_state(state)


def seeded(seed: int | None) -> AbstractContextManager[None]:
    """Seed the generators inside and restore their states afterwards; without a seed, change nothing."""
    return nullcontext() if seed is None else preserved(seed)
