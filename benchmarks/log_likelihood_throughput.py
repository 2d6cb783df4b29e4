"""How much of the machine's matrix product `pv.log_likelihood` turns into samples: python benchmarks/log_likelihood_throughput.py

A sample of log p(x, z) - log q(z | x) costs at least the two matrix products of the decoder. Here both are timed in one
process and on one thread, in turns, in seconds of the processor; medians are printed, and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time

import pyro
import torch

import pyro_vae as pv
from pyro_vae.evaluation.estimate import rows_at_once

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--num-samples", type=int, default=5000)
parser.add_argument("--num-data", type=int, default=60)
parser.add_argument("--repeats", type=int, default=7)
options = parser.parse_args()

torch.set_num_threads(1)
pyro.set_rng_seed(0)
vae = pv.mlp_vae((1, 28, 28), latent_dim=20, hidden_dims=(400,))
x = (torch.rand(options.num_data, 1, 28, 28) > 0.5).float()
first, second = (layer for layer in vae.likelihood.decoder.modules() if isinstance(layer, torch.nn.Linear))
rows = min(rows_at_once((x,)), options.num_samples)
samples = options.num_samples * options.num_data


@torch.no_grad()
def products(rows: int) -> None:
    z, hidden = torch.randn(rows, 20), torch.randn(rows, 400)
    for _ in range(-(-samples // rows)):
        torch.nn.functional.linear(z, first.weight, first.bias)
        torch.nn.functional.linear(hidden, second.weight, second.bias)


def evaluation() -> None:
    pv.log_likelihood(vae.model, vae.guide, x, options.num_samples, progress=False)


def seconds(contestant, *arguments) -> float:
    started = time.process_time()
    contestant(*arguments)
    return time.process_time() - started


sizes = sorted({rows, 1024, 4096})
times = {size: [] for size in sizes} | {"log_likelihood": []}
for _ in range(options.repeats + 1):
    for size in sizes:
        times[size].append(seconds(products, size))
    times["log_likelihood"].append(seconds(evaluation))
medians = {name: statistics.median(values[1:]) for name, values in times.items()}
print(f"{samples:,} samples, {options.repeats} repeats, one thread; medians")
for size in sizes:
    print(f"matrix products alone, {size:5d} rows at once: {1e6 * medians[size] / samples:6.2f} microseconds a sample")
best = min(medians[size] for size in sizes)
print(
    f"log_likelihood, {rows} rows at once:           {1e6 * medians['log_likelihood'] / samples:6.2f} microseconds a sample"
)
print(f"throughput: {best / medians['log_likelihood']:.2f} of what the matrix products alone would allow")
