"""The command line ``pyro-vae``; ``app.py`` is its entry point, and each command has a file of its name."""

from pyro_vae.cli.app import app, main  # here `app` is the Typer application, not the module of that name

__all__ = ["app", "main"]
