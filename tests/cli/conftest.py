"""A terminal of 80 columns in an empty folder, and a trained run folder."""

import shutil

import pytest
from helpers.command_line import TINY, pyro_vae


@pytest.fixture(autouse=True)
def terminal(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run of three epochs, and what training printed."""
    run = tmp_path_factory.mktemp("trained") / "run"
    status, out, err = pyro_vae("train", "digits", *TINY, "--epochs", 3, "--out", run)
    assert (status, err) == (0, "")
    return run, out


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run, to work on."""
    return shutil.copytree(trained[0], tmp_path / "run")
