"""The entry point of ``pyro-vae``, outside of the package, so that Ctrl-C is answered before anything is imported."""

import os
import signal
import sys
from typing import Any


def main() -> None:
    """Run :func:`pyro_vae.cli.main`, with standard streams to write to, and with an answer to Ctrl-C at any time."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, _stop)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # it is closed, and the next file to be opened would take its number
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115
    if sys.stdout.errors in ("strict", "surrogateescape"):  # an ASCII terminal shows a question mark for ±
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    from pyro_vae.errors import MissingPackageError
    from pyro_vae.extras import require

    try:
        require("typer", "rich", by="pyro-vae")
    except MissingPackageError as error:
        print("error:", error, file=sys.stderr)
        sys.exit(2)
    from pyro_vae.cli import main as run

    try:
        run()
    finally:
        if signal.getsignal(signal.SIGINT) is _stop:
            # All is done. Python gives the signal its default while it exits, which would end it without a word.
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _stop(number: int, _: Any) -> None:
    # Nothing has begun. KeyboardInterrupt in an import is lost, or ends as another exception.
    if "RANK" not in os.environ:  # of several processes, the one that started them says it
        os.write(2, b"stopped by Ctrl-C.\n")
    os._exit(128 + number)
