"""Trainings on the command line that are ended by signals at random moments, and start again until they are done.

    python -m tests.helpers.random_kills SEED KILLS TERMINATIONS COMPILED

sends so many SIGKILLs and SIGTERMs, COMPILED of each to compiled trainings. It prints a line for each set-up, and every
difference from the unbroken training: parameters and moments, history, configuration and figures, bit for bit.
"""

from __future__ import annotations

import io
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from pyro_vae.cli import main as command

SETUPS = [  # the options of train, each a set-up of its own
    "--hidden-dims 16 --latent-dim 2",
    "--hidden-dims 16,8 --latent-dim 3 --batch-size 128",
    "--network conv --channels 4 --latent-dim 2 --batch-size 256",
    "--likelihood gaussian --hidden-dims 16",
    "--likelihood gaussian --scale per_column --hidden-dims 16",
    "--objective iwae --particles 4 --hidden-dims 16",
    "--objective iwae --particles 4 --gradient dreg --hidden-dims 16",
    "--objective elbo-monte-carlo --gradient stl --hidden-dims 16",
    "--warm-up 3 --hidden-dims 16 --patience 3",
    "--free-bits 0.1 --hidden-dims 16 --binarize fixed",
]
EPOCHS = 6


def run(folder: Path, options: str) -> int:
    """Train in this process, without a word, and return the exit status."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            command(["train", "digits", "--out", str(folder), "--epochs", str(EPOCHS), *options.split()])
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def started(folder: Path, options: str) -> int:
    """A training in a child process, which has everything imported; its number."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os._exit(run(folder, options))
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder: Path) -> dict[str, Any]:
    """All that a training has written, without its times and its lock."""
    found: dict[str, Any] = {
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    }
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    found |= {f"{part} {name}": value for part in ("parameters", "buffers") for name, value in state[part].items()}
    for number, moments in state["optimizer"]["state"].items():
        found |= {f"moments {number} {name}": value for name, value in moments.items()}
    found["history"] = pd.read_csv(folder / "history.csv").drop(columns="seconds").to_numpy().tolist()
    return found | {path.name: path.read_bytes() for path in [folder / "config.json", *folder.rglob("*.png")]}


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    return bool(first == second)


def broken(folder: Path, options: str, sent: list[int], numbers: random.Random, seconds: float) -> Iterator[str]:
    """Train with these signals, each at a random moment of a training, then to the end; yield what goes wrong."""
    for number in sent:
        child = started(folder, options)
        time.sleep(numbers.uniform(0, seconds))
        os.kill(child, number)
        status = ended(child)
        expected = {signal.SIGKILL: (-9, 0), signal.SIGTERM: (128 + 15, 0)}[number]  # 0 where it was done before
        if status not in expected:
            yield f"status {status} after signal {number}"
    status = ended(started(folder, options))
    if status != 0:
        yield f"status {status} of the last training"


def differences(seed: int, kills: int, terminations: int, compiled: int) -> Iterator[tuple[str, list[str]]]:
    """Each set-up with what went wrong."""
    numbers = random.Random(seed)
    sent = {options: [] for options in SETUPS} | {f"{options} --compile": [] for options in SETUPS[:2] if compiled}
    plain, fast = [o for o in sent if "--compile" not in o], [o for o in sent if "--compile" in o]
    for number, count in ((signal.SIGKILL, kills), (signal.SIGTERM, terminations)):
        for i in range(count):
            some = fast if i < compiled else plain
            sent[some[i % len(some)]].append(int(number))
    with tempfile.TemporaryDirectory() as place:
        for i, (options, signals) in enumerate(sent.items()):
            whole, part = Path(place, f"{i}-whole"), Path(place, f"{i}-part")
            begin = time.monotonic()
            found = [f"status {status} of the unbroken training"] if (status := ended(started(whole, options))) else []
            numbers.shuffle(signals)
            # Each training goes on from the last one's epoch, so that a random part of the whole time ends most early.
            found += broken(part, options, signals, numbers, (time.monotonic() - begin) * 0.6)
            if not found:
                expected, got = contents(whole), contents(part)
                found += [name for name in expected | got if not same(expected.get(name), got.get(name))]
            yield f"{options}: {len(signals)} signals", found


def main() -> None:
    for setup, found in differences(*map(int, sys.argv[1:])):
        print(setup, "differs in" if found else "same bits", *found, flush=True)


if __name__ == "__main__":
    main()
