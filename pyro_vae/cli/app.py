"""The Typer application with its four commands, and ``main``, which turns errors into exit statuses."""

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

UsageError: Any = typer.BadParameter.__base__  # typer does not export it, and moved it between versions

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None)
for command in (train, compare, evaluate, sample):
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit.

    A usage error, a refusal of this package and an error of the operating system each print one line on stderr; the
    exit status is 2. Any other exception is a bug and keeps its traceback.

    Arguments:
        arguments: the words after ``pyro-vae``; by default those of this process. No words print the help.

    Raises:
        SystemExit: always; the status is 0, 2 after an error, or 130 after Ctrl-C.
    """
    try:
        status = app(arguments or sys.argv[1:] or ["--help"], standalone_mode=False)
    except UsageError as error:
        status = _print_error(error.format_message())
    except (PyroVAEError, OSError) as error:
        status = _print_error(str(error))
    sys.exit(status)


def _print_error(message: str) -> int:
    """Print one line on stderr; return the exit status."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    return 2


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
