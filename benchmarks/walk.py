"""Count the calls, functions and files of the package in one loss, and the frames from `fit` to the model.

    python benchmarks/walk.py                    (-v lists the functions)

`sys.setprofile` reports the calls. Only this package's own functions are counted.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable
from pathlib import Path

import pyro
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import pyro_vae as pv

PACKAGE = Path(pv.__file__).parent
COMPREHENSIONS = ("<listcomp>", "<dictcomp>", "<setcomp>")  # they have no frame from Python 3.12 on


class Walk:
    """A profiler that counts the calls of the package's functions and their greatest depth."""

    def __init__(self) -> None:
        self.calls: collections.Counter[tuple[str, str]] = collections.Counter()
        self.depth = 0

    def __call__(self, frame, event, argument) -> None:
        if event != "call" or not _ours(frame) or frame.f_code.co_name in COMPREHENSIONS:
            return
        self.calls[_name(frame)] += 1
        self.depth = max(self.depth, len(_stack(frame)))


def walk(function: Callable[[], object]) -> Walk:
    """Call the function under the profiler."""
    found = Walk()
    sys.setprofile(found)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found


def main() -> None:
    torch.set_num_threads(1)
    x = torch.rand(64, 4).round()
    vae = pv.mlp_vae((4,), latent_dim=2, hidden_dims=(8,))
    objective = pv.IWAE(4, "dreg")
    # Model and guide, not the pair: taking a pair apart is one more call, and earlier counts are without it.
    objective.differentiable_loss(vae.model, vae.guide, x)  # the first call finds the plates
    found = walk(lambda: objective.differentiable_loss(vae.model, vae.guide, x).backward())
    files = sorted({file for file, _ in found.calls})
    print(
        f"one loss of {objective!r} and its gradient: {found.calls.total()} calls of {len(found.calls)} functions in "
        f"{len(files)} files, {found.depth} deep"
    )
    if "-v" in sys.argv:
        for (file, name), count in sorted(found.calls.items()):
            print(f"    {count:4} {file} {name}")
    for compile in (False, True):
        for objective in (pv.ELBO(), pv.IWAE(4, "dreg")):
            runs, path = first_step(objective, compile)
            kind = "compiled" if compile else "uncompiled"
            print(f"fit, {objective!r}, {kind}: {runs} runs of the model up to the first step of the optimiser", end="")
            print("" if compile else f"; between fit and the model {len(path)} frames: {', '.join(path)}")


def first_step(objective: pv.Objective, compile: bool) -> tuple[int, list[str]]:
    """The number of runs of the model before the first step, and the frames between `fit` and the last run."""
    pyro.clear_param_store()
    vae = pv.mlp_vae((4,), latent_dim=2, hidden_dims=(8,))
    runs, frames = 0, []

    def model(x: torch.Tensor) -> object:
        nonlocal runs, frames
        runs += 1
        frames = _stack(sys._getframe(1))
        return vae.model(x)

    class Stepped(Exception):
        """Stops `fit` at the optimiser's first step."""

    def stop(*_) -> None:
        raise Stepped

    handle = register_optimizer_step_pre_hook(stop)
    try:
        pv.fit(model, vae.guide, torch.rand(64, 4).round(), objective, epochs=1, compile=compile, progress=False)
    except Stepped:
        pass
    finally:
        handle.remove()
    return runs, [name for _, name in frames[: [name for _, name in frames].index("fit")]][::-1]


def _ours(frame) -> bool:
    return Path(frame.f_code.co_filename).is_relative_to(PACKAGE)


def _name(frame) -> tuple[str, str]:
    return str(Path(frame.f_code.co_filename).relative_to(PACKAGE)), frame.f_code.co_qualname


def _stack(frame) -> list[tuple[str, str]]:
    """The package's frames, from this one to the outermost."""
    found = []
    while frame is not None:
        if _ours(frame):
            found.append(_name(frame))
        frame = frame.f_back
    return found


if __name__ == "__main__":
    main()
