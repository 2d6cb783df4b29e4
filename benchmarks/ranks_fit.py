"""How much faster training is with several processes: `fit` of MLPs by IWAE, in turns with one process.

    OMP_NUM_THREADS=1 python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/ranks_fit.py

In each round, rank 0 trains alone while the others wait; then all ranks train together. Each process has one thread.
The networks have the sizes of MNIST, 784-400-20; rows are random. The first steps of each training are not counted. The
time in sums over ranks includes waiting for the slower one.
"""

from __future__ import annotations

import argparse
import statistics
import time

import pyro
import torch
import torch.distributed as dist

import pyro_vae as pv
from pyro_vae.distributed import Group

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--batch-size", type=int, default=128)
parser.add_argument("--particles", type=int, default=50)
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--rounds", type=int, default=7)
parser.add_argument("--compile", action="store_true")
options = parser.parse_args()
torch.set_num_threads(1)
FIRST = 8  # steps that are not counted
x = (torch.rand(options.batch_size * options.steps, 784, generator=torch.Generator().manual_seed(0)) < 0.2).float()
summing = [0.0]
group_sum = Group.sum


def timed(self: Group, *tensors: torch.Tensor) -> None:
    """The sum over ranks, with its time."""
    started = time.perf_counter()
    group_sum(self, *tensors)
    summing[0] += time.perf_counter() - started


Group.sum = timed  # type: ignore[method-assign]


class Clock(pv.Callback):
    """The time of each step."""

    draws = False

    def __init__(self) -> None:
        self.times: list[float] = []
        self.before = 0.0

    def on_step(self, record: object) -> None:
        """Take the time."""
        self.times.append(time.perf_counter())
        if len(self.times) == FIRST:
            self.before = summing[0]


def rates(distributed: bool) -> tuple[float, float]:
    """Steps a second, and seconds of sums over ranks in a step."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    vae, clock = pv.mlp_vae((784,), latent_dim=20, hidden_dims=(400,)), Clock()
    settings = {"batch_size": options.batch_size, "steps": options.steps, "seed": 0, "compile": options.compile}
    pv.fit(vae, x, pv.IWAE(options.particles), callbacks=clock, progress=False, distributed=distributed, **settings)
    if not clock.times:
        return 0.0, 0.0
    counted = options.steps - FIRST
    return counted / (clock.times[-1] - clock.times[FIRST - 1]), (summing[0] - clock.before) / counted


rates(True)  # starts the group; compiles
alone, together, sums = [], [], []
if options.compile and dist.get_rank() == 0:
    rates(False)
for _ in range(options.rounds):
    own = rates(False) if dist.get_rank() == 0 else None
    dist.barrier()
    shared = rates(True)
    if own is not None:
        alone.append(own[0])
        together.append(shared[0])
        sums.append(shared[1])


def predicted(step: float, number: int, bandwidth: float) -> float:
    """The speed of so many ranks relative to one, by the bytes of a ring and 20 microseconds a message."""
    size = 4 * sum(p.numel() for p in pv.mlp_vae((784,), latent_dim=20, hidden_dims=(400,)).parameters())
    return step / (step / number + 2 * (number - 1) / number * size / bandwidth + 2 * (number - 1) * 2e-5)


if dist.get_rank() == 0:
    ratios = [many / one for one, many in zip(alone, together, strict=True)]
    print(
        f"batch {options.batch_size}, K = {options.particles}, {dist.get_world_size()} processes of one thread: "
        f"{statistics.median(alone):.1f} steps a second alone, {statistics.median(together):.1f} together, median "
        f"ratio {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} rounds); "
        f"{1e3 * statistics.median(sums):.1f} ms of a step in sums over ranks"
    )
    measured = 1 / statistics.median(alone)
    for step, whose in ((measured, "measured here"), (1e-3, "of 1 ms, as on a fast GPU")):
        print(f"predicted speed relative to one rank, for a step {whose}:")
        for number, bandwidth, where in ((8, 300e9, "in one machine, 300 GB/s"), (64, 50e9, "in eight, 50 GB/s")):
            print(f"  {number} ranks {where}: {predicted(step, number, bandwidth):.1f}")
