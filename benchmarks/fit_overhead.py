"""What a step of `fit` costs beside a compiled step alone.

    python benchmarks/fit_overhead.py

trains a VAE of 784-200-50 units on minibatches of 20 images, on one thread: by `fit`, and after each of its epochs by
`compile_step`, with minibatches that are gathered from a tensor. It prints the processor time of a step of each, the
median over epochs, and their ratio; then the same with callbacks that log each step, and each hundredth.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import pyro
import torch

import pyro_vae as pv

BATCH_SIZE = 20


def build() -> pv.VAE:
    """The model of each contestant."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    return pv.mlp_vae((784,), latent_dim=50, hidden_dims=(200,))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--steps", type=int, default=500, help="of each turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    x = (torch.rand(options.steps * BATCH_SIZE, 784) < 0.3).float()
    alone = build()
    step = pv.compile_step(alone, pv.ELBO(), torch.optim.Adam(alone.parameters(), lr=1e-3, fused=True))

    def measure(callbacks: list[pv.Callback]) -> tuple[list[float], list[float]]:
        """Processor time of each epoch of `fit`, and of the steps alone in between."""
        fitted, base, start = [], [], 0.0

        def turn(epoch: int) -> float:
            """Called after each epoch, as the rule of a scheduler."""
            nonlocal start
            now = time.process_time()
            if epoch > 1:  # the first epoch compiles
                fitted.append(now - start)
            with torch.enable_grad():
                for rows in torch.randperm(len(x)).split(BATCH_SIZE):
                    step(x[rows])
            if epoch > 1:
                base.append(time.process_time() - now)
            start = time.process_time()
            return 1.0

        settings = {"batch_size": BATCH_SIZE, "compile": True, "progress": False, "callbacks": callbacks}
        schedule = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, turn)  # noqa: E731
        pv.fit(build(), x, pv.ELBO(), epochs=options.turns + 1, lr_scheduler=schedule, **settings)
        return fitted, base

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.csv"
        for name, callbacks in {
            "without callbacks": [],
            "a CSV of each step": [pv.callbacks.CSV(log)],
            "a CSV of each 100 steps": [pv.callbacks.CSV(log, every=100, overwrite=True)],
        }.items():
            fitted, base = measure(callbacks)
            ratio = statistics.median(mine / theirs for mine, theirs in zip(fitted, base, strict=True))
            mine, theirs = (statistics.median(times) / options.steps * 1e3 for times in (fitted, base))
            print(f"{name:26s} fit {mine:.3f} ms a step, compile_step {theirs:.3f}, ratio {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
