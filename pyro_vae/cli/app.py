"""The Typer application with its four commands, and ``main``, which turns errors into exit statuses."""

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from pyro_vae import __version__
from pyro_vae.cli.compare import compare
from pyro_vae.cli.evaluate import evaluate
from pyro_vae.cli.processes import is_first, is_one_of_several
from pyro_vae.cli.sample import sample
from pyro_vae.cli.train import train
from pyro_vae.errors import OtherRankError, PyroVAEError
from pyro_vae.signals import name_of, taken_for_ctrl_c

UsageError: Any = typer.BadParameter.__base__  # typer does not export it, and moved it between versions

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None)


for command in (train, compare, evaluate, sample):
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command in `arguments`, by default the words after ``pyro-vae``, and exit; no words print the help.

    A usage error, a refusal of this package, an error of the operating system and a lack of memory each print one line
    on stderr. Any other exception is a bug and keeps its traceback.

    Raises:
        SystemExit: always; the status is 0, 2 after an error, or 128 + n after a signal: 130 after Ctrl-C.
    """
    with taken_for_ctrl_c(then_obeyed=False, with_ctrl_c=True) as received:
        try:
            status = _run(arguments or sys.argv[1:] or ["--help"], received)
            sys.stdout.flush()  # a full disk is noticed here
        except KeyboardInterrupt:
            status = 130
            if not is_one_of_several():  # else the process that started it says so
                _say(f"stopped by {name_of(received)}.")
        except (UsageError, PyroVAEError, OSError) as error:
            status = 2
            if is_first() or not isinstance(error, OtherRankError):  # else rank 0 says it
                _say("error:", error.format_message() if isinstance(error, UsageError) else str(error))
        except (MemoryError, RuntimeError) as error:  # PyTorch's lack of memory has no class of its own on a CPU
            if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
                raise
            status = 2
            _say(
                "error: expected sizes that fit in memory, got too little memory. Pass smaller ones, or a smaller run."
            )
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # Python tries again when it exits, and would print that
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(128 + received[0] if received else status)


def _run(arguments: Sequence[str], received: list[signal.Signals]) -> int:
    """Run a command and return its status. Typer's own ``main`` would answer Ctrl-C and a closed pipe itself."""
    group = typer.main.get_command(app)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="arviz")  # it is about programs that use ArviZ
        try:
            with group.make_context("pyro-vae", list(arguments), obj=received) as context:
                context.meta["arguments"] = list(arguments)  # by which a command starts processes of its own
                group.invoke(context)
        except typer.Exit as end:
            return end.exit_code
    return 0


def _say(*words: str) -> None:
    with contextlib.suppress(OSError):  # with a full or closed stderr, the status says it
        print(*" ".join(words).split(), file=sys.stderr)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"pyro-vae {__version__}")
        raise typer.Exit


@app.callback()
def _pyro_vae(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Train a variational autoencoder in Pyro, evaluate it and draw samples."""
