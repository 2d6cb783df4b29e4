"""Runs a command in this process, and reads what it printed and wrote."""

import contextlib
import io
from pathlib import Path

import pandas as pd
import pytest

from pyro_vae import cli

TINY = ["--hidden-dims", "16", "--batch-size", "256", "--lr", "0.01"]
QUICK = ["--num-images", 40, "--num-samples", 50, "--ais-images", 4, "--ais-steps", 10, "--ais-chains", 2]
FIGURES = {"training.png", "reconstructions.png", "samples.png", "latent_space.png"}


def pyro_vae(*arguments):
    """Exit status, stdout and stderr of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code or 0, out.getvalue(), err.getvalue()


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(*arguments):
    """What a refused command says: exit status 2, one line on stderr, and nothing else on screen or disk."""
    before = files(Path.cwd())
    status, out, err = pyro_vae(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert files(Path.cwd()) == before
    return err


def history(run):
    return pd.read_csv(
        run / "history.csv", index_col="epoch", float_precision="round_trip"
    )  # older pandas rounds by default


def bounds(run):
    return history(run).drop(columns="seconds")
