"""A checkpoint of other parts is refused in one line before anything changes, whatever is wrong with it."""

from __future__ import annotations

import copy
import io
import math
import random
import re

import numpy as np
import pyro
import pytest
import torch
from torch.optim import lr_scheduler as schedulers

import pyro_vae as pv

X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
OTHERS = (None, "text", [], {}, -1, math.nan, torch.full((2, 2), math.nan), torch.zeros(3, dtype=torch.int64))


def build():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    likelihood = pv.Gaussian(torch.nn.Linear(1, 3), (3,), scale="learned")
    return pv.VAE(prior=pv.StandardNormal(1), likelihood=likelihood, posterior=pv.DiagonalNormal(encoder, (3,)))


def plateau(optimizer):
    return schedulers.ReduceLROnPlateau(optimizer, threshold_mode="abs")


def fit(vae, path, epochs=2, scheduler=plateau):
    options = {"batch_size": 10, "validation": X[:6], "patience": 9, "lr_scheduler": scheduler, "seed": 1}
    return pv.fit(vae, X, pv.ELBO(), epochs=epochs, checkpoint=path, progress=False, **options)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The path and the bytes of a checkpoint, and the networks that an unbroken training ends with."""
    path = tmp_path_factory.mktemp("reading") / "run.pt"
    fit(build(), path)
    content = path.read_bytes()
    fit(whole := build(), path, epochs=3)
    return path, content, whole.state_dict()


def places(value, at=()):
    """The path of every part of a state; of long lists, that of the first and the last."""
    if at:
        yield at
    inner = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list | tuple) else ()
    for key in inner if len(inner) < 20 else (inner[0], inner[-1]):
        yield from places(value[key], (*at, key))


def changed(state, at, new=None, *, delete=False):
    """The state with another value at a place, or without it."""
    key, rest = at[0], at[1:]
    kind, inner = type(state), dict(state) if isinstance(state, dict) else list(state)
    if delete and not rest:
        del inner[key]
    else:
        inner[key] = changed(inner[key], rest, new, delete=delete) if rest else new
    return inner if kind is dict else kind(inner)


def world(vae):
    """All that a refusal must leave as it is."""
    store = {name: id(value) for name, value in pyro.get_param_store().named_parameters()}
    states = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
    return copy.deepcopy({name: value.tolist() for name, value in vae.state_dict().items()}), store, states


def refusal(path, action, vae):
    """The message of an action that is refused, or None if it is not."""
    before, content = world(vae), path.read_bytes()
    try:
        action()
    except pv.PyroVAEError as error:
        assert not isinstance(error, FloatingPointError), error  # not by the numbers of a step, hence late
        assert "\n" not in str(error)
        assert str(path) in str(error)
        assert world(vae) == before
        assert path.read_bytes() == content
        return str(error)
    return None


def same(vae, state):
    return all(torch.equal(value, state[name]) for name, value in vae.state_dict().items())


def test_a_state_with_another_part_is_refused_or_right(written):
    """One change at a random place each: a part that is missing, or of another kind. No number may be wrong."""
    path, content, whole = written
    state = torch.load(io.BytesIO(content), weights_only=True)
    cases = [(at, new, delete) for at in places(state) for new, delete in [*((o, False) for o in OTHERS), (0, True)]]
    chosen = random.Random(0).sample(cases, 40)
    refused = 0
    for at, new, delete in chosen:
        if at[:2] == ("optimizer", "state") and len(at) == 3 and delete:
            continue  # as of a parameter that no step has used
        torch.save(changed(state, at, new, delete=delete), path)
        said = refusal(path, lambda: fit(vae, path, epochs=3), vae := build())
        refused += said is not None
        if said is None and at[0] != "history":  # bounds of earlier epochs do not matter to the later ones
            assert same(vae, whole), at
    assert refused > 30


@pytest.mark.parametrize(
    ("at", "new", "message"),
    [
        (("format",), "pyro_vae checkpoint 12", "got 'pyro_vae checkpoint 12'. A later version of pyro_vae wrote it"),
        (("format",), torch.zeros(2), "to be a 'pyro_vae checkpoint 1', got tensor"),
        (("history", 0, "train_bound"), "no", "expected ['history'][0]['train_bound'] to be a number, got 'no'"),
        (("history",), [], "expected ['history'] to be epochs, got a list of 0"),
        (("steps",), 7, "expected ['steps'] to be 4, got 7"),
        (("step",), None, "expected ['step'] to be an integer, at least 0, got None"),
        (("best", "epoch"), 7, "['best'] to be an epoch of the history, with its validation bound, got epoch 7 with"),
        (("settings", "new"), 1, "a setting that this version of pyro_vae does not know: expected none, got new=1"),
        (("scheduler", "last_epoch"), 5, "expected ['scheduler']['last_epoch'] to be 2, got 5"),
        (("optimizer", "param_groups", 0, "amsgrad"), True, "['amsgrad'] to be False, got True"),
        (
            ("optimizer", "state", 0, "exp_avg"),
            torch.zeros(5),
            "expected ['optimizer']['state'][0]['exp_avg'] to be a tensor of shape (3,) and torch.float32, without NaN",
        ),
        (("rng", "numpy", 2), 10**6, "expected ['rng']['numpy'][2] to be from 0 to 624, got 1000000"),
        (("rng", "random"), (3, (1, 2), None), "to be states of random number generators, got a dict of 3"),
        (("loader_rng",), [torch.zeros(3)], "expected ['loader_rng'] to be a list of 0, got a list of 1"),
    ],
)
def test_the_message_names_the_part(written, at, new, message):
    path, content, _ = written
    torch.save(changed(torch.load(io.BytesIO(content), weights_only=True), at, new), path)
    said = refusal(path, lambda: fit(vae, path, epochs=3), vae := build())
    assert said is not None
    assert message in said


def test_a_cut_or_flipped_file_is_refused_or_right(written):
    path, content, whole = written
    rng = random.Random(0)
    files = [content[: rng.randrange(len(content))] for _ in range(10)]
    for _ in range(25):
        at = rng.randrange(len(content))
        files.append(content[:at] + bytes([content[at] ^ rng.randrange(1, 256)]) + content[at + 1 :])
    for each in files:
        path.write_bytes(each)
        vae = build()
        if refusal(path, lambda vae=vae: pv.load_parameters(path, vae, X), vae) is None:
            assert torch.load(path, weights_only=True)["format"]
            fit(vae, path, epochs=3)
            assert same(vae, whole)


def test_moments_in_other_memory_are_taken(written):
    """Fused kernels write past the end of a tensor that repeats one number."""
    path, content, _ = written
    state = torch.load(io.BytesIO(content), weights_only=True)
    ends = []
    for moment in (torch.zeros(()).expand(3, 1), torch.zeros(3, 1)):
        assert state["optimizer"]["state"][1]["exp_avg"].shape == moment.shape
        torch.save(changed(state, ("optimizer", "state", 1, "exp_avg"), moment), path)
        fit(vae := build(), path, epochs=3)
        ends.append(vae.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_more_parts_and_missing_defaults_of_pytorch_do_not_matter(written):
    path, content, whole = written
    state = torch.load(io.BytesIO(content), weights_only=True) | {"later": 1}
    del state["optimizer"]["param_groups"][0]["decoupled_weight_decay"], state["optimizer"]["param_groups"][0]["fused"]
    torch.save(state, path)
    fit(vae := build(), path, epochs=3)
    assert same(vae, whole)


NESTED = {
    "sequence": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o), schedulers.CosineAnnealingLR(o, 5)], milestones=[1]
    ),
    "chain": lambda o: schedulers.ChainedScheduler([schedulers.LinearLR(o), schedulers.ExponentialLR(o, 0.9)]),
    "one cycle": lambda o: schedulers.OneCycleLR(o, 0.01, total_steps=9),
    "lambda": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.9**epoch),
    "steps": lambda o: schedulers.MultiStepLR(o, [1, 2]),
    "restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2),
}


@pytest.mark.parametrize("name", NESTED)
def test_every_scheduler_goes_on(tmp_path, name):
    fit(whole := build(), tmp_path / "whole.pt", epochs=4, scheduler=NESTED[name])
    for epochs in (2, 4):
        fit(vae := build(), tmp_path / "run.pt", epochs=epochs, scheduler=NESTED[name])
    assert same(vae, whole.state_dict())


def test_what_is_no_file_and_what_can_not_be_read(tmp_path):
    vae = build()
    with pytest.raises(pv.PyroVAEError, match=r"to be a checkpoint, got a folder\. Pass the file in it"):
        pv.load_parameters(tmp_path, vae, X)
    for value in (torch.zeros(3), vae.state_dict(), [1]):
        torch.save(value, tmp_path / "other.pt")
        with pytest.raises(pv.PyroVAEError, match=re.escape("other.pt to be a 'pyro_vae checkpoint 1', got ")):
            pv.load_parameters(tmp_path / "other.pt", vae, X)
