"""The files that describe the package agree with each other, and a missing package is named before any work."""

from __future__ import annotations

import re
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import torch

import pyro_vae as pv
import pyro_vae_command
from pyro_vae.extras import EXTRA_OF

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DISTRIBUTION = {"sklearn": "scikit-learn"}  # of packages that are installed by another name


def floors(requirements):
    """The oldest version of each requirement; "pyro_vae[plots]" is none."""
    return dict(requirement.split(">=") for requirement in requirements if not requirement.startswith("pyro_vae["))


ALL_FLOORS = floors(PROJECT["dependencies"]) | floors(chain(*EXTRAS.values()))


def test_the_oldest_versions_are_the_floors():
    lines = (ROOT / "tests" / "oldest.txt").read_text().splitlines()
    assert lines[1:] == [f"{name}=={floor}" for name, floor in ALL_FLOORS.items()]
    python, pytorch, pyro = PROJECT["requires-python"].removeprefix(">="), ALL_FLOORS["torch"], ALL_FLOORS["pyro-ppl"]
    supported = f"Python {python}, PyTorch {pytorch} and Pyro {pyro}, and all later versions"
    assert supported in (ROOT / "README.md").read_text()


def test_each_optional_package_is_in_its_extra():
    for package, extra in EXTRA_OF.items():
        assert DISTRIBUTION.get(package, package) in floors(EXTRAS[extra])


def test_all_is_every_extra_of_a_user():
    assert EXTRAS["all"] == [f"pyro_vae[{','.join(sorted({*EXTRA_OF.values()}))}]"]


def test_the_version_and_its_date_are_everywhere_the_same():
    citation, recipe = ((ROOT / name).read_text() for name in ("CITATION.cff", "recipe/recipe.yaml"))
    (date,) = re.findall(r"^date-released: (\S+)$", citation, re.M)
    assert f"\nversion: {pv.__version__}\n" in citation
    assert f'\n  version: "{pv.__version__}"\n' in recipe
    assert f"\n## {pv.__version__} ({date})\n" in (ROOT / "CHANGELOG.md").read_text()


CONDA = {"torch": "pytorch", "matplotlib": "matplotlib-base"}  # of packages that have another name there


def test_the_recipe_has_the_dependencies():
    recipe = (ROOT / "recipe" / "recipe.yaml").read_text()
    lists = re.findall(r"(\w+):((?:\n +- .*)+\n)", recipe)
    sections = {name: {*re.findall(r"- (\S+) >=(\d\S*)\n", lines)} for name, lines in lists}

    def conda(requirements):
        return {(CONDA.get(name, name), floor) for name, floor in floors(requirements).items()}

    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert sections["host"] == conda(build)
    assert sections["run"] == conda(PROJECT["dependencies"])
    assert sections["run_constraints"] == conda(chain(*(EXTRAS[extra] for extra in EXTRA_OF.values())))
    python = PROJECT["requires-python"].removeprefix(">=")
    assert f'python_min: "{python}"' in recipe


def test_the_addresses_are_in_the_repository_of_the_project():
    repository = PROJECT["urls"]["Repository"]
    for name in ("pyproject.toml", "CITATION.cff", "SECURITY.md", "recipe/recipe.yaml"):
        found = re.findall(r"https://github\.com/[^\s\"')]+", (ROOT / name).read_text())
        assert found, name
        assert all(url == repository or url.startswith(f"{repository}/") for url in found), name


def test_the_workflow_runs_what_every_change_must_pass():
    if not (ROOT / ".ci" / "run").exists():
        pytest.skip("an sdist has no .ci")
    targets = set(re.findall(r"^ *make ([\w-]+)", (ROOT / ".ci" / "run").read_text(), re.M))
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert len(targets) >= 6
    assert targets <= {*re.findall(r"target: \[?([\w-]+)", workflow)}
    supported = [name.split()[-1] for name in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", name)]
    assert [*re.findall(r'"(3\.\d+)"', re.search(r"python: \[(.*)\]", workflow)[0])] == supported


@pytest.fixture
def missing(monkeypatch, tmp_path):
    """Hides packages, as if they were not installed."""
    monkeypatch.chdir(tmp_path)
    return lambda *packages: [monkeypatch.setitem(sys.modules, package, None) for package in packages]


def said(extra):
    return rf"expected the package \w+, which .+ needs, got none\. Install it: pip install \"pyro_vae\[{extra}\]\"\."


@pytest.mark.parametrize(
    ("package", "extra", "call"),
    [
        ("matplotlib", "plots", lambda: pv.plots.images(torch.zeros(1, 2, 2))),
        ("sklearn", "data", lambda: pv.data.load("digits")),
        ("torchvision", "data", lambda: pv.data.load("mnist", root="data")),
        ("arviz", "arviz", lambda: pv.to_arviz(lambda x: 1 / 0, lambda x: 1 / 0, torch.zeros(2))),
        ("tensorboard", "tensorboard", lambda: pv.callbacks.TensorBoard("board")),
    ],
)
def test_a_missing_package_is_named_with_its_extra(missing, package, extra, call):
    missing(package)
    with pytest.raises(pv.MissingPackageError, match=said(extra)) as raised:
        call()
    assert package in str(raised.value)
    assert isinstance(raised.value, ImportError)


@pytest.mark.parametrize(
    ("package", "extra", "command"),
    [
        ("matplotlib", "plots", "train digits"),
        ("matplotlib", "plots", "compare run"),
        ("matplotlib", "plots", "evaluate run"),
        ("matplotlib", "plots", "sample run"),
        ("sklearn", "data", "train digits"),
        ("h5netcdf", "arviz", "evaluate run"),
        ("arviz", "arviz", "evaluate run"),
        ("typer", "cli", "--help"),
        ("rich", "cli", "compare run"),
    ],
)
def test_a_command_says_at_its_beginning_what_is_missing(missing, monkeypatch, capsys, package, extra, command):
    missing(package)
    monkeypatch.setattr(sys, "argv", ["pyro-vae", *command.split()])
    with pytest.raises(SystemExit) as stop:
        pyro_vae_command.main()
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert re.fullmatch(f"error: {said(extra)}\n", err)
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.filterwarnings("ignore:.*Pareto k-hat")
def test_estimates_and_training_need_no_extra(missing):
    missing(*EXTRA_OF)
    vae = pv.mlp_vae((5,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
    x = torch.randn(64, 5)
    pv.fit(vae, x, pv.ELBO(), epochs=1, batch_size=32, progress=False)
    assert pv.log_likelihood(vae, x, 50).pareto_k.isfinite().all()
    assert len(pv.compare(vae, x, pv.IWAE(4), repeats=2, progress=False)) == 1
