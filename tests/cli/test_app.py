"""Exit statuses, errors in one line, tracebacks of bugs, help and version."""

import pkgutil
import re
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import matplotlib
import pytest
import typer
from helpers.command_line import QUICK, TINY, pyro_vae, refusal

import pyro_vae as pv
import pyro_vae_command
from pyro_vae import cli
from pyro_vae.cli import report


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "owner", "name", "error"),
    [
        ("train", pv, "fit", ValueError),
        ("train", pv, "fit", FloatingPointError),
        ("train", pv.data, "load", KeyError),
        ("compare", pv, "compare", ValueError),
        ("compare", pv, "load_parameters", ValueError),
        ("compare", pv.plots, "bounds", RuntimeError),
        ("evaluate", report.ev, "log_likelihood", ValueError),
        ("sample", pv.VAE, "generate", KeyError),
    ],
)
def test_a_bug_keeps_its_traceback(run, monkeypatch, command, owner, name, error):
    def broken(*args, **kwargs):
        raise error("a bug")

    monkeypatch.setattr(owner, name, broken)
    arguments = {"train": ["digits", "--out", "new"], "evaluate": [run, *QUICK]}.get(command, [run])
    with pytest.raises(error, match="a bug") as raised:
        cli.main([command, *map(str, arguments)])
    assert raised.type is error


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (pv.data, "load", FileNotFoundError),
        (pv, "load_parameters", pv.PyroVAEError),
        (pv, "compare", pv.NotFiniteError),
        (pv, "compare", pv.MissingCompilerError),
        (pv.plots, "bounds", PermissionError),
    ],
)
def test_a_refusal_is_one_line(run, monkeypatch, owner, name, error):
    def refusing(*args, **kwargs):
        raise error("expected one line,\ngot two.  Join them.")

    monkeypatch.setattr(owner, name, refusing)
    status, out, err = pyro_vae("compare", run, "--num-images", 5, "--repeats", 2)
    assert (status, out, err) == (2, "", "error: expected one line, got two. Join them.\n")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_lack_of_memory_is_one_line(run, monkeypatch, error):
    def greedy(*args, **kwargs):
        raise error

    monkeypatch.setattr(pv, "compare", greedy)
    assert "sizes that fit in memory" in refusal("compare", run)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "thesis.tex").write_text("the only copy")
    said = refusal("train", "digits", *TINY, "--out", "thesis.tex/run")
    assert "can't be written" in said
    assert "thesis.tex" in said


def test_a_figure_that_cannot_be_written_is_one_line(run):
    (run / "figures" / "samples.png").unlink()
    (run / "figures" / "samples.png").mkdir()
    said = refusal("sample", run)
    assert "Is a directory" in said
    assert "samples.png" in said


def test_figures_need_no_screen(run):
    matplotlib.use("svg")
    assert pyro_vae("sample", run)[0] == 0
    assert matplotlib.get_backend().lower() == "agg"


@pytest.mark.parametrize("command", ["train", "compare", "evaluate", "sample"])
def test_help_lists_every_option_with_its_default(command):
    status, out, _ = pyro_vae(command, "--help")
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80
    options = typer.main.get_command(cli.app).commands[command].params
    assert len(options) >= 3
    for option in options:
        entry = re.search(rf"^  {option.metavar or option.opts[0]} .*?(?=^  -|\Z)", out, re.MULTILINE | re.DOTALL)
        assert entry, option.name
        said = " ".join(entry[0].split())
        if option.name == "help":
            continue
        if option.required:
            assert "[required]" in said
        elif isinstance(option.show_default, str):
            assert f"[default: ({option.show_default})" in said
        elif option.is_flag:
            assert not option.default
        else:
            assert f"[default: {option.default}" in said
        assert (option.help or "").rstrip(".") in said


def test_version_and_entry_point():
    assert pyro_vae("--version")[:2] == (0, f"pyro-vae {version('pyro_vae')}\n")
    scripts = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["scripts"]
    assert pkgutil.resolve_name(scripts["pyro-vae"]) is pyro_vae_command.main


def test_without_a_command_it_helps(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pyro-vae"])
    status, out, _ = pyro_vae()
    assert status == 0
    assert all(command in out for command in ("train", "compare", "evaluate", "sample"))
