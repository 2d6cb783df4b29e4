"""The pages' Python runs as it stands, from the first block to the last; and no public name lacks a page."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import pyro_vae as pv

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {str(page.relative_to(DOCS)): page for page in sorted(DOCS.rglob("*.md")) if "```python\n" in page.read_text()}
PRINTED = {"evaluation.md": ("log p(x) = -", "log p(x) >= -", "log p(x) - ELBO = ", "ELBO -")}  # how a line begins
PEERS = {"coming-from/numpyro.md": "numpyro", "coming-from/pythae.md": "pythae"}  # make bench runs these two


@pytest.mark.docs
@pytest.mark.filterwarnings("ignore:.*Pareto k-hat")
@pytest.mark.parametrize("page", PAGES)
def test_each_block_runs(page, tmp_path, monkeypatch, capsys):
    if page in PEERS:
        pytest.importorskip(PEERS[page], reason="run by make bench, which installs it")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGES[page].read_text(), re.S):
        exec(block, names)
    lines = capsys.readouterr().out.splitlines()
    for start in PRINTED.get(page, ()):
        assert any(line.startswith(start) for line in lines), start
    if page == "evaluation.md":
        assert names["groups"]["posterior"]["z"].shape == (1, 500, 20, 2)


@pytest.mark.docs
def test_several_processes_print_what_one_does(tmp_path):
    """The page's script, by one process and by two; the noise of training differs, and that of the evaluation not."""
    page = DOCS / "how-to" / "several-processes.md"
    script = tmp_path / "train.py"
    script.write_text(re.findall(r"```python\n(.*?)```", page.read_text(), re.S)[0])
    bounds = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]):
        (tmp_path / "run.pt").unlink(missing_ok=True)
        done = subprocess.run([sys.executable, *launcher, script], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        (found,) = re.findall(r"validation bound (.*), log p", done.stdout)
        bounds.append(float(found))
    assert abs(bounds[0] - bounds[1]) < 0.5  # nats; five epochs move it by 20


@pytest.mark.docs
def test_the_example_on_one_screen_runs():
    """The gallery runs the others."""
    script = DOCS.parent / "examples" / "svi_digits.py"
    done = subprocess.run([sys.executable, script, "--epochs", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nats below log p(x)" in done.stdout


def test_every_public_name_has_a_page():
    pages = [page.read_text() for page in (DOCS / "api").glob("*.md")]
    names = [name for page in pages for name in re.findall(r"^   ([\w.]+)$", page, re.M)]
    listed = set(names)
    assert len(names) == len(listed)
    modules = {name for name in pv.__all__ if isinstance(getattr(pv, name), ModuleType)}
    assert set(pv.__all__) - modules - listed == set()
    with_own_names = modules - {"evaluation", "likelihoods", "pairs", "posteriors", "priors"}
    for module in with_own_names:
        assert any(name.startswith(f"{module}.") for name in listed), module


def test_the_page_to_cite_agrees_with_the_file():
    """The BibTeX entry has the title, the version and the year of CITATION.cff."""
    file = (DOCS.parent / "CITATION.cff").read_text()
    entry = " ".join((DOCS / "cite.md").read_text().replace("\\_", "_").split())
    for name, pattern in (
        ("title", r'^title: "(.*)"$'),
        ("version", r"^version: (.*)$"),
        ("year", r"^date-released: (\d+)"),
    ):
        (value,) = re.findall(pattern, file, re.M)
        assert f"{name} = {{{value}}}," in entry
