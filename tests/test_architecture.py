"""Imports point one way, so that estimators serve any Pyro program, and the package imports quickly."""

from __future__ import annotations

import ast
from pathlib import Path

import pyro_vae

PACKAGE = Path(pyro_vae.__file__).parent
ROOT = Path(__file__).parents[1]
# Each module or folder of the package, with the others that it may import; all may import these.
FOR_ALL = ("errors", "extras", "defaults", "checks", "devices", "distributed", "printed", "__version__")
ALLOWED = {
    "errors": set(),
    "extras": set(),
    "defaults": set(),
    "checks": set(),
    "devices": set(),
    "distributed": set(),
    "printed": set(),
    "files": set(),
    "signals": set(),
    "networks": set(),
    "flows": set(),
    "distributions": set(),
    "priors": {"flows", "distributions"},
    "likelihoods": {"networks", "distributions"},
    "posteriors": {"networks", "flows", "distributions"},
    "pairs": {
        "networks",
        "priors",
        "likelihoods",
        "posteriors",
        "engine.modules",
        "engine.precision",
        "engine.threads",
    },
    "engine": set(),
    "objectives": {"engine"},
    "compiled": {"engine", "objectives"},
    "training": {"engine", "objectives", "compiled", "files", "signals"},
    "callbacks": {"training"},
    "evaluation": {"engine", "objectives", "compiled"},
    "arviz_io": {"engine", "evaluation"},
    "schedules": set(),
    "plots": {"pairs"},
    "data": {"shapes"},
    "shapes": set(),
    "__init__": None,  # everything
    "__main__": None,
    "cli": None,
    "testing": None,
}
MOST_LINES = 400


def imports(path):
    """The modules of this package that a file imports, as engine.modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pyro_vae":
            inside = node.module.removeprefix("pyro_vae").lstrip(".")
            if "." in inside or (PACKAGE / inside).with_suffix(".py").is_file():
                yield inside
            else:
                yield from (f"{inside}.{alias.name}".strip(".") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("pyro_vae.") for a in node.names if a.name.startswith("pyro_vae."))


def test_imports_point_one_way():
    found = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in PACKAGE.rglob("*.py")}
    assert found == ALLOWED.keys()
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        allowed = ALLOWED[own]
        for module in imports(path):
            top = module.split(".")[0]
            free = allowed is None or top in (own, *FOR_ALL)
            assert free or {top, module} & allowed, f"{path} imports {module}"


def test_a_file_holds_one_idea():
    long = {path: count for path in PACKAGE.rglob("*.py") if (count := len(path.read_text().splitlines())) > MOST_LINES}
    assert long == {}
