"""Several processes of a command: started by torchrun, of which one prints and writes."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from pyro_vae.errors import PyroVAEError


def is_first() -> bool:
    """Whether this process prints, and writes the run's files: the first one that torchrun has started, or the only."""
    return os.environ.get("RANK", "0") == "0"


def are_to_be_started(number: int) -> bool:
    """Whether the command is to start so many processes, and is not one of them."""
    return number > 1 and "RANK" not in os.environ


def run(number: int, arguments: Sequence[str]) -> int:
    """Run the command in so many processes on this machine, and return the exit status."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, available // number)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    process = subprocess.Popen([*launcher, "-m", "pyro_vae", *arguments], env=environment)
    while True:
        try:
            status = process.wait()
        except KeyboardInterrupt:  # torchrun ends the processes, which keep their work
            process.send_signal(signal.SIGTERM)
            continue
        return 0 if status == 0 else 130 if status < 0 else 2


def check(number: int, rows: int) -> None:
    """Refuse more processes than a minibatch has images."""
    if number > rows:
        raise PyroVAEError(
            f"each process has a share of every minibatch: expected --processes to be at most its {rows} images, got "
            f"{number}. Pass fewer, or a larger --batch-size."
        )
