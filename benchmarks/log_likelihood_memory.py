"""Peak memory of `pv.log_likelihood` with few and with many samples.

    python benchmarks/log_likelihood_memory.py --root data           (about a quarter of an hour)

Each number of samples gets a process of its own, which reads only the test images. Linux reports its peak resident
memory.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import pyro_vae as pv


def peak_memory() -> float:
    """Peak resident memory in MiB, from /proc: the resource module's number is inherited from the parent."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--root", default="data", help="Folder of MNIST, as torchvision lays it out.")
parser.add_argument("--num-data", type=int, default=10_000)
parser.add_argument("--num-samples", type=int, nargs="+", default=[100, 5000])
parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
options = parser.parse_args()

if options.child is None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "images.pt")
        test = pv.data.load("mnist", root=options.root, binarize="fixed", validation=0).test
        torch.save(test.x[: options.num_data].clone(), path)
        peaks = []
        for number in options.num_samples:
            started = time.perf_counter()
            command = [sys.executable, "-W", "ignore", __file__, "--child", str(path), str(number)]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            before, peak = map(float, printed.split())
            peaks.append(peak)
            minutes = (time.perf_counter() - started) / 60
            print(
                f"{options.num_data} images, {number} samples: {peak:.0f} MiB at the peak, {before:.0f} MiB with the "
                f"images read; {minutes:.1f} minutes",
                flush=True,
            )
    print(f"difference: {peaks[-1] / peaks[0] - 1:+.1%}")
else:
    torch.set_num_threads(1)
    x = torch.load(options.child[0])
    vae = pv.mlp_vae((1, 28, 28), latent_dim=20, hidden_dims=(400,))
    print(peak_memory())
    pv.log_likelihood(vae, x, int(options.child[1]), progress=False)
    print(peak_memory())
