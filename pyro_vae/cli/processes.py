"""Several processes of a command: started by torchrun, of which one prints and writes."""

import logging
import os
import signal
import sys
from collections.abc import Sequence

from pyro_vae.errors import PyroVAEError


def is_first() -> bool:
    """Whether this process prints, and writes the run's files: the first one that torchrun has started, or the only."""
    return os.environ.get("RANK", "0") == "0"


def are_to_be_started(number: int) -> bool:
    """Whether the command is to start so many processes, and is not one of them."""
    return number > 1 and not is_one_of_several()


def is_one_of_several() -> bool:
    """Whether torchrun has started this process."""
    return "RANK" in os.environ


def run(number: int, arguments: Sequence[str], received: list[signal.Signals]) -> int:
    """Run the command in so many processes on this machine, and return the exit status.

    The processes print their own errors, so torchrun's log is off. torchrun catches a signal before this program, and
    passes it to the processes, which keep their work.
    """
    from torch.distributed import run as torchrun  # only here: it takes a second
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available // number)))
    words = ["--standalone", f"--nproc-per-node={number}", "-m", "pyro_vae", *arguments]
    sys.stdout.flush()
    logging.disable(logging.ERROR)
    try:
        torchrun.run(torchrun.parse_args(words))
    except SignalException as stop:
        received.append(stop.sigval)
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            raise PyroVAEError(
                f"expected all processes to end by themselves, got process {rank} of {number} ended by "
                f"{failure.signal_name()}. If memory was too small, pass fewer processes or a smaller --batch-size. "
                "The same command continues from the checkpoint."
            ) from error
        return failure.exitcode
    finally:
        logging.disable(logging.NOTSET)
    return 0


def check(number: int, rows: int) -> None:
    """Refuse more processes than a minibatch has images."""
    if number > rows:
        raise PyroVAEError(
            f"each process has a share of every minibatch: expected --processes to be at most its {rows} images, got "
            f"{number}. Pass fewer, or a larger --batch-size."
        )
