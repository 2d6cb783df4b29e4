"""Imports point one way, so that estimators serve any Pyro program, and the package imports quickly."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pyro_vae

PACKAGE = Path(pyro_vae.__file__).parent
ALLOWED = {
    "networks": set(),
    "flows": set(),
    "distributions": set(),
    "priors": {"flows", "distributions"},
    "likelihoods": {"networks"},
    "posteriors": {"networks", "flows", "distributions"},
    "pairs": {"networks", "priors", "likelihoods", "posteriors", "modules"},
    "rng": set(),
    "tracing": set(),
    "batch_plate": {"tracing"},
    "agreement": {"batch_plate", "tracing"},
    "sequential": {"rng"},
    "runs": {"rng", "batch_plate", "agreement", "modules", "sequential", "tracing"},
    "weights": {"batch_plate", "agreement", "modules", "runs"},
    "objectives": {"rng", "batch_plate", "agreement", "modules", "runs", "weights"},
    "compilation": {"rng", "modules", "objectives", "runs", "tracing"},
    "minibatches": {"rng"},
    "modules": set(),
    "checkpoint": {"runs", "modules"},
    "schedules": set(),
    "learning_rates": set(),
    "supports": {"agreement", "minibatches", "runs", "modules"},
    "training": {"rng", "runs", "minibatches", "modules", "checkpoint", "compilation", "learning_rates", "supports"},
    "evaluation": {
        "rng",
        "batch_plate",
        "agreement",
        "minibatches",
        "runs",
        "weights",
        "modules",
        "objectives",
        "compilation",
    },
    "arviz_io": {"rng", "batch_plate", "minibatches", "modules", "runs", "weights"},
    "report": {"evaluation", "objectives", "pairs"},
    "plots": set(),
    "data": set(),
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pyro_vae":
            if node.module == "pyro_vae":
                yield from (alias.name for alias in node.names)
            else:
                yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("pyro_vae."))


def test_imports_point_one_way():
    modules = {}
    for path in PACKAGE.rglob("*.py"):
        modules.setdefault(path.relative_to(PACKAGE).with_suffix("").parts[0], []).append(path)
    assert modules.keys() == ALLOWED.keys() | {"__init__", "cli"}
    for name, allowed in ALLOWED.items():
        for path in modules[name]:
            assert set(imports(path)) <= allowed | {name}, path


def test_importing_the_package_leaves_slow_libraries_out():
    code = "import sys, pyro_vae; print(sorted({'arviz', 'torchvision', 'matplotlib', 'sklearn'} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
