"""What a checkpoint holds: the one description of its parts, and the check of a file's parts against it.

A description is made of kinds. A type is the kind of its values: ``float`` of any number, ``Tensor`` of dense tensors,
``object`` of anything. ``[kind]`` is that of lists of any length, and a tuple of kinds leaves the choice.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.errors import PyroVAEError
from pyro_vae.training.data_sums import num_blocks


@dataclass(frozen=True)
class Parts:
    """A dictionary that has each of the `needed` names, and may have more."""

    needed: dict[Any, Any]
    optional: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Each:
    """A dictionary of any length, with keys of a type, and values of a kind."""

    key: type
    value: Any


@dataclass(frozen=True)
class Items:
    """A list or a tuple with one value of each kind."""

    kinds: list[Any]


@dataclass(frozen=True)
class Where:
    """Values of a kind for which a condition holds, in words too."""

    kind: Any
    words: str
    holds: Callable[[Any], object]


COUNT = Where(int, "an integer, at least 0", lambda n: n >= 0)
PARAMETERS = Each(str, Where(Tensor, "a tensor of finite numbers", lambda t: bool(t.isfinite().all())))
# A module's own buffer may be sparse.
BUFFERS = Each(str, Where(object, "a tensor", lambda value: isinstance(value, Tensor) and not value.is_meta))
BEST = Parts({"epoch": COUNT, "bound": float, "parameters": PARAMETERS, "buffers": BUFFERS})
COLUMN = Where(
    Parts({"shape": Where([int], "a shape", len), "dtype": str, "sums": Tensor, "sizes": Tensor}),
    "a sum in float64 for each block of rows",
    lambda column: (
        {describe(column["sums"]), describe(column["sizes"])}
        == {f"of shape ({num_blocks(column['shape'][0])},) and torch.float64"}
    ),
)
DATA = Parts({"rows": (None, int), "minibatches": (None, int), "columns": [(None, COLUMN)], "dynamic": (None, bool)})
DENSITIES = Where(Tensor, "a tensor of log-densities", lambda t: t.is_floating_point())
SITES = Each(str, Parts({"family": str, "value": (None, DENSITIES), "size": float}))
ROWS = Where(list, "the rows of a minibatch", len)
# These four are together in the file, or not at all.
COMPARED = {"rows": ROWS, "latents": Each(str, Tensor), "sites": SITES, "same_sites": bool}
SCHEDULES = Each(str, Each(int, float))
FINGERPRINT = Parts(
    {"data": DATA, "validation": (None, DATA), "schedules": SCHEDULES, "repeats": (None, bool), "precision": float}
)
MOMENTS = Parts({"step": Tensor, "exp_avg": Tensor, "exp_avg_sq": Tensor})
GROUP = Parts({"lr": float, "params": [int]})
NUMPY = Items([str, Tensor, Where(int, "from 0 to 624", lambda n: 0 <= n <= 624), int, float])
BYTES = Where(Tensor, "a tensor of bytes", lambda t: t.dtype == torch.uint8)
RNG = Parts({"torch": BYTES, "random": tuple, "numpy": NUMPY}, {"cuda": [BYTES]})
SETTING = (None, bool, float, str)
FIRST = {  # what the first version had
    "settings": Parts(
        dict.fromkeys(("objective", "batch_size", "lr", "seed", "N"), SETTING),
        dict.fromkeys(
            ("lr_scheduler", "compile", "optimizer", "scheduler_every", "clip_norm", "accumulate", "precision"), SETTING
        ),
    ),
    "history": [Parts({"train_bound": float, "validation_bound": float, "seconds": float})],
    "parameters": PARAMETERS,
    "buffers": BUFFERS,
    "optimizer": Parts({"state": Each(int, Each(str, object)), "param_groups": Where([GROUP], "groups", len)}),
    "rng": Where(RNG, "states of random number generators", lambda state: _are_states(state)),
    "loader_rng": [Tensor],
    "step": (None, COUNT),
}
SECOND = {"best": (None, BEST), "scheduler": (None, dict)}  # version 0.1.0
THIRD = {"steps": COUNT, "fingerprint": (None, FINGERPRINT)}  # None: saved by a callback, without a checkpoint
STATES = Parts({"rng": Where(RNG, "states of random number generators", lambda state: _are_states(state))})
START = Parts(STATES.needed | {"loader_rng": [Tensor]})
EPOCH = Parts(
    {
        "start": START,
        "minibatches": Where(int, "an integer, at least 1", lambda n: n >= 1),
        "total": float,
        "count": Where(float, "a number, at least 0", lambda n: n >= 0),
        "parts": (None, [float]),
        "settings": [Each(str, float)],
        "seconds": float,
    }
)
RANK = Parts(STATES.needed | {"loader_rng": [Tensor], "start": (None, START)})
LATER = {
    "current": EPOCH,
    "callbacks": Each(str, dict),
    "key": COUNT,
    "ranks": Where([RANK], "ranks", len),
}  # in a file of which each may be missing


def check(path: str | Path, state: dict[str, Any]) -> None:
    """Refuse a state with missing parts, or with parts of other types, as no version of this package writes it."""
    third = bool(state.keys() & THIRD.keys())
    second = third or bool(state.keys() & SECOND.keys())
    check_parts(path, state, Parts(FIRST | (SECOND if second else {}) | (THIRD if third else {}), LATER))
    if not state["history"] and "current" not in state:
        raise _refused(path, "['history'] to be epochs, got a list of 0")
    fingerprint, best, history = state.get("fingerprint"), state.get("best"), state["history"]
    if fingerprint is not None and fingerprint.keys() & COMPARED.keys():
        check_parts(path, fingerprint, Parts(COMPARED), "['fingerprint']")
    if best is not None:
        row = history[best["epoch"] - 1] if 0 < best["epoch"] <= len(history) else {}
        bound = row.get("validation_bound")
        kept = -math.inf if bound != bound else bound  # NaN counts as the lowest
        if bound is None or best["bound"] != kept:
            found = f"epoch {best['epoch']} with {best['bound']!r}"
            raise _refused(path, f"['best'] to be an epoch of the history, with its validation bound, got {found}")


def check_parts(path: str | Path, state: Any, kind: Any, place: str = "") -> None:
    """Refuse a state of another kind; `place` is where it stands in the checkpoint."""
    found = difference(state, kind, place)
    if found is not None:
        raise _refused(path, found)


def like(own: Any) -> Any:
    """The kind of this value at another time: with the same names, lengths, shapes and types; None may be anything."""
    if isinstance(own, dict):
        return Parts({name: like(value) for name, value in own.items()})
    if isinstance(own, list | tuple):
        return Items([like(value) for value in own])
    if isinstance(own, Tensor):
        return _tensor_like(own)
    if isinstance(own, bool | str):
        return type(own)
    return Where(float, "a number", lambda value: value == value) if isinstance(own, int | float) else object


def equal(own: Any) -> Where:
    """This value alone."""
    return Where(object, repr(own), lambda value: type(value) is type(own) and value == own)


def of_adam(optimizer: torch.optim.Optimizer, steps: float, *, scheduled: bool) -> Parts:
    """The state of this optimiser, Adam with one group, after so many steps, if a scheduler changes its settings."""
    group, parameters = optimizer.state_dict()["param_groups"][0], optimizer.param_groups[0]["params"]
    settings = {
        name: like(value) if scheduled and type(value) in (int, float, tuple) else equal(value)
        for name, value in group.items()
    }
    needed = {name: settings.pop(name) for name in ("params", "lr", "betas")}  # versions of PyTorch add others
    if scheduled:
        needed["lr"] = Where(float, "a number, at least 0", lambda lr: 0 <= lr < math.inf)
        needed["betas"] = Items([Where(float, "a number from 0 to 1", lambda beta: 0 <= beta < 1)] * 2)
    step = Where(_tensor_like(torch.tensor(0.0)), f"a number of steps, at most {steps}", lambda t: 0 < t <= steps)
    moments = {
        i: Parts({"step": step, "exp_avg": _tensor_like(value), "exp_avg_sq": _tensor_like(value)})
        for i, value in enumerate(parameters)
    }
    # A parameter that no step has used has no moments.
    used = Where(
        Parts({}, moments), f"moments of {len(moments)} parameters", lambda state: state.keys() <= moments.keys()
    )
    return Parts({"state": used, "param_groups": Items([Parts(needed, settings)])})


def of_generators(generators: list[torch.Generator]) -> Items:
    """The states of these random number generators."""

    def of(own: torch.Generator) -> Where:
        takes = lambda state: _works(lambda: torch.Generator(own.device).set_state(state))  # noqa: E731
        return Where(Tensor, "the state of a random number generator", takes)

    return Items([of(own) for own in generators])


def describe(tensor: Tensor) -> str:
    """The shape and the type of a tensor, in words."""
    layout = "" if tensor.layout == torch.strided else f", {tensor.layout}"
    return f"of shape {tuple(tensor.shape)} and {tensor.dtype}{layout}"


def _tensor_like(own: Tensor) -> Where:
    def holds(tensor: Tensor) -> bool:
        return describe(tensor) == describe(own) and not tensor.requires_grad and not bool(tensor.isnan().any())

    return Where(Tensor, f"a tensor {describe(own)}, without NaN", holds)


def _are_states(state: dict[str, Any]) -> bool:
    """Whether generators of torch, Python and NumPy take the states."""

    def take() -> None:
        algorithm, keys, *rest = state["numpy"]
        torch.Generator().set_state(state["torch"])
        random.Random().setstate(state["random"])
        np.random.RandomState().set_state((algorithm, keys.numpy().astype(np.uint32), *rest))

    return _works(take)


def _works(action: Callable[[], Any]) -> bool:
    try:
        action()
    except Exception:  # whatever a library says of a state that it does not take
        return False
    return True


_MISSING = object()
_WORDS = {int: "an integer", float: "a number", str: "text", bool: "True or False", Tensor: "a tensor"}


def difference(value: Any, kind: Any, place: str = "") -> str | None:
    """The first part of a value that is not of its kind: what was expected of it, and what came."""
    if isinstance(kind, Where):
        found = difference(value, kind.kind, place)
        if found is not None and not found.startswith(f"{place} to be "):  # a part of it
            return found
        return None if found is None and kind.holds(value) else _wrong(value, kind, place)
    if isinstance(kind, tuple):
        each = [difference(value, one, place) for one in kind]
        return None if None in each else each[-1] if isinstance(value, dict) else _wrong(value, kind, place)
    parts: list[tuple[Any, Any, Any]] = []  # key, value and kind
    if isinstance(kind, Parts) and isinstance(value, dict):
        parts = [(key, value.get(key, _MISSING), part) for key, part in kind.needed.items()]
        parts += [(key, value[key], part) for key, part in kind.optional.items() if key in value]
    elif isinstance(kind, Each) and isinstance(value, dict):
        if not all(_is(key, kind.key) for key in value):
            return f"each name in {place} to be {_words(kind.key)}, got others"
        parts = [(key, part, kind.value) for key, part in value.items()]
    elif isinstance(kind, Items) and isinstance(value, list | tuple) and len(value) == len(kind.kinds):
        parts = list(zip(range(len(value)), value, kind.kinds, strict=True))
    elif isinstance(kind, list) and isinstance(value, list):
        parts = [(i, part, kind[0]) for i, part in enumerate(value)]
    elif not _is(value, kind):
        return _wrong(value, kind, place)
    return next((found for k, v, part in parts if (found := difference(v, part, f"{place}[{k!r}]"))), None)


def _is(value: Any, kind: Any) -> bool:
    if kind is None or value is _MISSING:
        return kind is value
    if kind is Tensor:
        return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return isinstance(kind, type) and isinstance(value, kind)


def _words(kind: Any) -> str:
    if isinstance(kind, Where):
        return kind.words
    if isinstance(kind, tuple):
        return " or ".join(map(_words, kind))
    if isinstance(kind, Parts | Each):
        return "a dictionary"
    if isinstance(kind, Items):
        return f"a list of {len(kind.kinds)}"
    return _WORDS.get(kind, f"a {kind.__name__}") if isinstance(kind, type) else "a list" if kind else "None"


def _wrong(value: Any, kind: Any, place: str) -> str:
    if value is _MISSING:
        got = "none"
    elif isinstance(value, Tensor):
        got = f"a tensor {describe(value)}"
    elif isinstance(value, dict | list | tuple):
        got = f"a {type(value).__name__} of {len(value)}"
    else:
        got = shortened(value)
    return f"{place} to be {_words(kind)}, got {got}"


def shortened(value: Any) -> str:
    """The repr of a value, if it is long only its beginning."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _refused(path: str | Path, found: str) -> PyroVAEError:
    return PyroVAEError(
        f"{path} is not a checkpoint as pv.fit writes it: expected {found}. Delete it and train again, or pass another "
        "path."
    )
