"""Peak memory of `pv.log_likelihood` at few and at many samples: python benchmarks/log_likelihood_memory.py --root data

Each number of samples gets a process of its own, whose peak resident memory the operating system reports.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import torch

import pyro_vae as pv

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--root", default="data", help="Folder of MNIST, as torchvision lays it out.")
parser.add_argument("--num-data", type=int, default=10_000)
parser.add_argument("--num-samples", type=int, nargs="+", default=[100, 5000])
parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
options = parser.parse_args()

if options.child is None:
    peaks = []
    for number in options.num_samples:
        command = [sys.executable, "-W", "ignore", __file__, "--root", options.root, "--child", str(number)]
        started = time.perf_counter()
        printed = subprocess.run(
            [*command, "--num-data", str(options.num_data)], check=True, capture_output=True, text=True
        )
        peaks.append(float(printed.stdout.splitlines()[-1]))
        minutes = (time.perf_counter() - started) / 60
        print(f"{options.num_data} images, {number} samples: {peaks[-1]:.0f} MiB at the peak, {minutes:.1f} minutes")
    print(f"difference: {(peaks[-1] / peaks[0] - 1):+.1%}")
else:
    torch.set_num_threads(1)
    x = pv.data.load("mnist", root=options.root, binarize="fixed", validation=0).test.x[: options.num_data]
    vae = pv.mlp_vae((1, 28, 28), latent_dim=20, hidden_dims=(400,))
    pv.log_likelihood(vae.model, vae.guide, x, options.child, progress=False)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
