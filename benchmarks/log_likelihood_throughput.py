"""The throughput of `pv.log_likelihood`, as a share of the decoder's matrix products alone.

    python benchmarks/log_likelihood_throughput.py

A sample of log p(x, z) - log q(z | x) costs at least the two matrix products of the decoder. Both are timed in turns,
in one process on one thread, in seconds of processor time. The script prints medians and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import pyro
import torch

import pyro_vae as pv
from pyro_vae.evaluation.pieces import rows_at_once

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--num-samples", type=int, default=5000)
parser.add_argument("--num-data", type=int, default=60)
parser.add_argument("--repeats", type=int, default=5)
options = parser.parse_args()

torch.set_num_threads(1)
pyro.set_rng_seed(0)
vae = pv.mlp_vae((1, 28, 28), latent_dim=20, hidden_dims=(400,))
x = (torch.rand(5 * options.num_data, 1, 28, 28) > 0.5).float()
first, second = (layer for layer in vae.likelihood.decoder.modules() if isinstance(layer, torch.nn.Linear))
rows = min(rows_at_once((x,)), options.num_samples)
samples = options.num_samples * options.num_data


@torch.no_grad()
def products(rows: int) -> None:
    z, hidden = torch.randn(rows, 20), torch.randn(rows, 400)
    for _ in range(-(-samples // rows)):
        torch.nn.functional.linear(z, first.weight, first.bias)
        torch.nn.functional.linear(hidden, second.weight, second.bias)


def evaluation(num_data: int, compile: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # k-hat is high, since the networks are untrained
        pv.log_likelihood(vae, x[:num_data], options.num_samples, compile=compile, progress=False)


def seconds(contestant, *arguments) -> float:
    started = time.process_time()
    contestant(*arguments)
    return time.process_time() - started


sizes = sorted({rows, 1024, 4096})
few, many = options.num_data, 5 * options.num_data
contestants = {size: (products, size) for size in sizes} | {
    "uncompiled": (evaluation, few, False),
    "few": (evaluation, few, True),
    "many": (evaluation, many, True),
}
times = {name: [] for name in contestants}
for _ in range(options.repeats + 1):
    for name, (contestant, *arguments) in contestants.items():
        times[name].append(seconds(contestant, *arguments))
medians = {name: statistics.median(values[1:]) for name, values in times.items()}
per_sample = {name: 1e6 * medians[name] / samples for name in [*sizes, "uncompiled"]}
per_sample["compiled"] = 1e6 * (medians["many"] - medians["few"]) / (options.num_samples * (many - few))
compilation = medians["few"] - 1e-6 * per_sample["compiled"] * samples
best = min(per_sample[size] for size in sizes)

print(f"{options.num_samples:,} samples of each datum, {options.repeats} repeats, one thread")
print("medians, in microseconds a sample; lower is faster")
for size in sizes:
    print(f"matrix products alone, {size:4d} rows at once      {per_sample[size]:6.2f}")
for name, words in (("uncompiled", "log_likelihood"), ("compiled", "log_likelihood(compile=True)")):
    ratio = f"{best / per_sample[name]:.2f} of the products' throughput"
    print(f"{words:40s}{per_sample[name]:12.2f}   {ratio}".rstrip())
print(
    f"plus {compilation:.1f} s to record and compile, once a call; the compiled time is that of {many - few} more data"
)
