import matplotlib
import pyro
import pytest
import torch

from pyro_vae.compiled import function

collect_ignore = ["installed"]  # scripts, which make release-check runs against an installed wheel
matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def fresh_pyro():
    """Each test starts from the same random state and an empty parameter store."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    torch.set_num_threads(1)  # these tensors are small
    function._CODE.clear()  # some tests run graphs without the compiler


@pytest.fixture
def without_inductor(monkeypatch):
    """Runs the recorded graph without the compiler."""
    monkeypatch.setattr("pyro_vae.compiled.function._inductor", lambda graph, inputs: graph)
