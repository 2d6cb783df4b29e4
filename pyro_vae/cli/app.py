"""The Typer application with its four commands, and ``main``, which turns errors into exit statuses."""

import functools
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Any

import typer

from pyro_vae.cli.compare import compare
from pyro_vae.cli.evaluate import evaluate
from pyro_vae.cli.sample import sample
from pyro_vae.cli.train import train
from pyro_vae.errors import PyroVAEError
from pyro_vae.signals import name_of, taken_for_ctrl_c

UsageError: Any = typer.BadParameter.__base__  # typer does not export it, and moved it between versions

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None)


class _StoppedError(Exception):
    """A command was stopped by Ctrl-C, which Typer would answer itself."""


def _stoppable(command: Any) -> Any:
    @functools.wraps(command)
    def stopping(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            raise _StoppedError from None

    return stopping


for command in (train, compare, evaluate, sample):
    app.command()(_stoppable(command))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command in `arguments`, by default the words after ``pyro-vae``, and exit; no words print the help.

    A usage error, a refusal of this package and an error of the operating system each print one line on stderr. Any
    other exception is a bug and keeps its traceback.

    Raises:
        SystemExit: always; the status is 0, 2 after an error, or 128 + n after a signal: 130 after Ctrl-C.
    """
    with taken_for_ctrl_c(then_obeyed=False) as received:
        try:
            status = app(arguments or sys.argv[1:] or ["--help"], standalone_mode=False, obj=received)
        except (UsageError, PyroVAEError, OSError) as error:
            message = error.format_message() if isinstance(error, UsageError) else str(error)
            print("error:", " ".join(message.split()), file=sys.stderr)
            status = 2
        except _StoppedError:
            print(f"stopped by {name_of(received)}.", file=sys.stderr)
            status = 130
    sys.exit(128 + received[0] if received else status)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"pyro-vae {version('pyro_vae')}")
        raise typer.Exit


@app.callback()
def _pyro_vae(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Train a variational autoencoder in Pyro, evaluate it and draw samples."""
    import matplotlib  # only here, so that --help and --version do not wait for it

    matplotlib.use("Agg")  # this backend writes files and needs no screen
