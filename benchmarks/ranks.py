"""How much faster evaluations are with several processes: `log_likelihood` of MLPs, in turns with one process.

    OMP_NUM_THREADS=1 python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/ranks.py

In each round, rank 0 makes the call alone while the others wait; then all ranks make it together. Each process has one
thread. The numbers must be equal to the last digit. The networks have the sizes of MNIST, 784-400-20, untrained; rows
are random.
"""

from __future__ import annotations

import argparse
import statistics
import time

import pyro
import torch
import torch.distributed as dist

import pyro_vae as pv

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--rows", type=int, default=200)
parser.add_argument("--num-samples", type=int, default=1000)
parser.add_argument("--rounds", type=int, default=7)
options = parser.parse_args()
torch.set_num_threads(1)
pyro.set_rng_seed(0)
vae = pv.mlp_vae((784,), latent_dim=20, hidden_dims=(400,))
x = (torch.rand(options.rows, 784) < 0.2).float()


def seconds(distributed: bool) -> tuple[float, torch.Tensor]:
    """The time of one call, and its numbers."""
    started = time.perf_counter()
    found = pv.log_likelihood(vae, x, options.num_samples, seed=0, distributed=distributed, progress=False)
    return time.perf_counter() - started, found.per_datum


alone, together = [], []
seconds(True)  # imports ArviZ, and starts the group
for _ in range(options.rounds):
    own = seconds(False) if dist.get_rank() == 0 else None
    dist.barrier()
    shared = seconds(True)
    if own is not None:
        if not torch.equal(own[1], shared[1]):
            raise SystemExit("expected the numbers of one process, to the last digit, got others.")
        alone.append(own[0])
        together.append(shared[0])
if dist.get_rank() == 0:
    ratios = [one / many for one, many in zip(alone, together, strict=True)]
    print(
        f"{options.rows} rows, K = {options.num_samples}, {dist.get_world_size()} processes of one thread: "
        f"{statistics.median(alone):.2f} s alone, {statistics.median(together):.2f} s together, median ratio "
        f"{statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} rounds); "
        "the numbers are equal"
    )
