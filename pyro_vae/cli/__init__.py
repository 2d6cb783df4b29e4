"""The command line."""

from pyro_vae.cli.app import app, main

__all__ = ["app", "main"]
