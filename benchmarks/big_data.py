"""Memory of training and evaluating on a memory-mapped array that is larger than the memory they use.

    python benchmarks/big_data.py

writes an array of binary pixels to a file of 4 GB, trains a VAE on it for one epoch, and evaluates it. For each it
prints the time and the largest anonymous memory, which leaves out the pages of the file that the system keeps.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyro
import torch

import pyro_vae as pv

PIXELS = 784


def anonymous() -> float:
    """The anonymous memory of this process, in MB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon"))


@contextmanager
def measured(what: str) -> Iterator[None]:
    """Print the time and the largest anonymous memory inside, and how much that is above the memory at its start."""
    before, peak, done = anonymous(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, anonymous())

    watcher, start = threading.Thread(target=watch), time.perf_counter()
    watcher.start()
    yield
    done.set()
    watcher.join()
    seconds = time.perf_counter() - start
    print(f"{what:28s}{seconds:7.0f} s{peak:9.0f} MB, {peak - before:+.0f} MB", flush=True)


def main() -> None:
    """Write the file, train and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = int(options.gigabytes * 1e9 / (4 * PIXELS))
    with tempfile.TemporaryDirectory() as folder:
        path, generator = Path(folder) / "x.npy", np.random.default_rng(0)
        block = (generator.random((1000, PIXELS)) < 0.3).astype("f4")
        array = np.lib.format.open_memmap(path, "w+", "f4", (rows, PIXELS))
        for start in range(0, rows, len(block)):
            part = array[start : start + len(block)]
            part[:] = np.roll(block, start, axis=1)[: len(part)]
        del array
        x = np.load(path, mmap_mode="r")
        print(f"{rows:,} rows, {path.stat().st_size / 1e9:.1f} GB")
        pyro.set_rng_seed(0)
        vae = pv.mlp_vae((PIXELS,), latent_dim=10, hidden_dims=(100,))
        few = np.array(x[:2000])
        with measured("fit, 2,000 rows in memory"):
            pv.fit(vae, few, pv.ELBO(), epochs=1, batch_size=500, progress=False)
        with measured("fit, all rows"):
            pv.fit(vae, x, pv.ELBO(), epochs=1, batch_size=500, progress=False)
        with measured("active units"):
            pv.active_units(vae, x, 10, progress=False)
        with measured("log p(x), K = 10, a tenth"):
            print(pv.log_likelihood(vae, x[: rows // 10], 10, progress=False))


if __name__ == "__main__":
    main()
