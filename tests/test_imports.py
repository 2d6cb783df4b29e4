"""What is imported when: each public name at its first use, and slow packages only by what needs them."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
from types import ModuleType

import pytest

import pyro_vae as pv

SLOW = {
    "arviz",
    "matplotlib",
    "numpy",
    "pandas",
    "pyro",
    "rich",
    "scipy",
    "sklearn",
    "torch",
    "torchvision",
    "tqdm",
    "typer",
    "xarray",
}
OF_TORCH = {"numpy", "torch", "tqdm", "scipy"}  # Pyro imports tqdm; PyTorch imports SciPy where it is installed
CLI = {"rich", "typer"}  # old versions of Typer import Rich
HELP = "import pyro_vae_command, sys; sys.argv[1:] = '{}'.split(); pyro_vae_command.main()"
LEFT_OUT = [  # what is run, its exit status, and the slow packages that it may import
    ("import pyro_vae", 0, set()),
    ("from pyro_vae import PyroVAEError", 0, set()),
    ("import pyro_vae as pv; dir(pv); pv.__all__; pv.__version__", 0, set()),
    ("import pyro_vae as pv; pv.ELBO(); pv.mlp_vae((5,), latent_dim=2)", 0, OF_TORCH | {"pyro"}),
    ("import pyro_vae as pv; pv.data; pv.plots; pv.log_likelihood; pv.fit", 0, OF_TORCH | {"pyro", "pandas"}),
    (HELP.format("--help"), 0, CLI),
    (HELP.format("--version"), 0, CLI),
    (HELP.format("train --help"), 0, CLI),
    (HELP.format("evaluate --help"), 0, CLI),
    (HELP.format("train digits --epochs many"), 2, CLI),
    (HELP.format("train digits --channels 3"), 2, CLI),
    (HELP.format("compare --num-images 1 run"), 2, CLI),
]


@pytest.mark.parametrize(("code", "status", "allowed"), LEFT_OUT, ids=[row[0][-40:] for row in LEFT_OUT])
def test_slow_packages_wait_for_their_use(code, status, allowed):
    show = "import atexit, sys; atexit.register(lambda: print('imported', *sys.modules, file=sys.__stderr__)); "
    done = subprocess.run([sys.executable, "-c", show + code], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    imported = set(done.stderr.split("imported ")[-1].split())
    assert imported & SLOW <= allowed


def test_every_name_of_a_part_is_a_name_of_the_package():
    for part in ("evaluation", "likelihoods", "objectives", "pairs", "posteriors", "priors", "training"):
        names = importlib.import_module(f"pyro_vae.{part}").__all__
        assert set(names) <= set(pv.__all__)
    assert set(pv.__all__) <= set(dir(pv))


def test_names_are_the_same_objects_however_they_are_imported():
    star: dict[str, object] = {}
    exec("from pyro_vae import *", star)
    for name in pv.__all__:
        value = getattr(pv, name)
        assert star[name] is value
        if isinstance(value, ModuleType):
            assert sys.modules[f"pyro_vae.{name}"] is value
        else:
            assert value.__name__ == name
            assert pickle.loads(pickle.dumps(value)) is value


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="Elbo"):
        pv.Elbo  # noqa: B018
    with pytest.raises(ImportError, match="Elbo"):
        from pyro_vae import Elbo  # noqa: F401
