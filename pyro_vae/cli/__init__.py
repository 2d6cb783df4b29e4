"""The command line."""

from pyro_vae.cli.app import main

__all__ = ["main"]
