"""Training on several processes: the same as on one, and what is refused on all of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from helpers import killed_ranks, ranks

ALONE = {n: v for n, v in os.environ.items() if n not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
# Sums of some hundred numbers of one size, in another order, in each of 50 steps.
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-6}


def started(folder, name, *arguments, number):
    """What a function of ranks.py returns on each of so many ranks, started by torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    command = [sys.executable, *launcher, ranks.__file__, name, folder, *arguments]
    done = subprocess.run(command, env=ALONE, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(number)]


def check_same(one, other):
    """Whether two trainings are the same, up to the order of sums."""
    (parameters, history), (others, other_history) = one, other
    for name, value in parameters.items():
        bound = CLOSE[value.dtype] * value.norm()
        assert (value - others[name]).norm() <= bound, name
    assert history.shape == other_history.shape
    rows = torch.tensor(history), torch.tensor(other_history)
    torch.testing.assert_close(*rows, rtol=CLOSE[value.dtype], atol=0, equal_nan=True)


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def on_ranks(request, tmp_path_factory):
    """What each rank has found, in one start of all."""
    return started(tmp_path_factory.mktemp("ranks"), "everything", number=request.param)


def test_the_training_of_several_ranks_is_that_of_one(on_ranks):
    """Noise is a column of the data; 75 data in minibatches of 16, so that shares differ, and the last one too."""
    one, each = ranks.cases(), [found["cases"] for found in on_ranks]
    assert one["ELBO"][1].shape == (10, 2)
    for found in each:
        assert found.keys() == one.keys()
        for name in found:
            check_same(one[name], found[name])
            for parameter, value in found[name][0].items():  # to the last bit the same on all ranks
                assert torch.equal(value, each[0][name][0][parameter])
    # A callback of rank 0 has ended this one at step 40, in the eighth epoch.
    assert len(each[0]["averaged"][1]) == 8


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3])
def test_compiled_steps(tmp_path, number):
    one = ranks.compiled()
    for other in started(tmp_path, "compiled", number=number):
        for name in one:
            check_same(one[name], other[name])


def test_loaders_of_own_data(on_ranks):
    """The ranks' minibatches of 8 data are together those of 16 data in order."""
    if len(on_ranks) == 3:
        pytest.skip("16 is no multiple of 3")
    one = ranks.loaders()
    for found in (each["loaders"] for each in on_ranks):
        check_same(one["own data"], found["own data"])
        check_same(one["own data"], found["stream"])
        check_same(one["whole"], found["whole"])
        check_same(one["whole"], found["whole stream"])
        assert torch.tensor(found["sampler"][1])[:, 0].isfinite().all()


REFUSED = {
    "settings": "PyroVAEError: the ranks of pv.fit have different lr: expected 0.01, as on rank 0, got 0.02 on rank 1",
    "epochs": "different epochs: expected 1, as on rank 0, got 2 on rank 1",
    "parameters": r"different parameter 'shift_loc': expected absent, as on rank 0, got \(2,\) of torch.float64",
    "data": "the ranks have different data: expected .* Pass all data on each rank",
    "loader": "expected each rank's DataLoader to have data of its own, got the same on rank 0 and rank 1",
    "outside of the plate": "got model site 'shift' outside the data's plate of size 75",
    "validation data": "the ranks have different validation data: expected the number of rows to be 20",
    "free bits": "free bits average the KL over a minibatch, of which each rank has a share",
    "score": r"expected at least two data of each minibatch on a rank, got batch_size=(\d) on \1 ranks",
    "batch norm": r"expected none in training, got BatchNorm1d 'decoder\.1'",
    "not finite": "NotFiniteError: the loss is inf in epoch 1, step",
    "spoilt": "rank 1 of . has other parameters in epoch 1: expected .* set its on_all_ranks to True",
    "other call": "the ranks make different calls: .* rank 0 pv.ais, rank 1 pv.fit",
}
# What one rank alone meets: which rank, what that rank raises, and what the other one does.
MET_BY_ONE = {
    "program": (1, "RuntimeError: a worker has died", "OtherRankError: rank 1 of . has failed in pv.fit: RuntimeError"),
    "callback": (
        0,
        "CallbackError: callback Fails failed in on_step, in epoch 1, step 3: RuntimeError: no room",
        "OtherRankError: rank 0 of . has failed in pv.fit: CallbackError: callback Fails",
    ),
    "arguments": (
        1,
        "PyroVAEError: expected lr to be positive",
        "OtherRankError: rank 1 of . has failed in pv.fit: PyroVAEError: expected lr",
    ),
}


def test_refusals_on_all_ranks(on_ranks):
    """Each call after a refusal works, so no rank waits for another one."""
    each = [found["refusals"] for found in on_ranks]
    assert each[0].keys() == each[1].keys() == REFUSED.keys() | MET_BY_ONE.keys()
    for name, message in REFUSED.items():
        for found in each:
            assert re.search(message, found[name]), (name, found[name])
    for name, (which, own, told) in MET_BY_ONE.items():
        assert re.search(own, each[which][name]), (name, each[which][name])
        for other in {0, 1} - {which}:
            assert re.search(told, each[other][name]), (name, each[other][name])


@pytest.mark.slow
@pytest.mark.parametrize(("place", "rank", "number"), [("step", 1, 8), ("reduction", 2, 11), ("checkpoint", 0, 3)])
def test_a_killed_rank_is_started_again_and_the_training_ends_bit_for_bit(tmp_path, place, rank, number):
    ends = []
    for name in ("nowhere", place):
        folder = tmp_path / name
        folder.mkdir()
        done = killed_ranks.start(folder, name, rank, number)
        assert done.returncode == 0, done.stderr
        assert ("-9" in done.stderr) == (name != "nowhere")
        ends.append(torch.load(folder / "end.pt"))
    assert killed_ranks.same(*ends)


@pytest.mark.slow
def test_fewer_ranks_go_on(tmp_path):
    """Of three ranks one is killed in the third epoch; two go on, and say that their noise is new."""
    assert killed_ranks.start(tmp_path, "step", 1, 12, restarts=0).returncode != 0
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    assert len(saved["ranks"]) == 3
    done = killed_ranks.start(tmp_path, "nowhere", 0, 1, ranks=2)
    assert done.returncode == 0, done.stderr
    assert re.search("was written by 3 processes, and 2 go on with it: the noise of samples is new", done.stderr)
    bounds = torch.load(tmp_path / "end.pt")["bounds"]
    assert len(bounds) == 4
    assert bounds[:2] == [[row["train_bound"], row["validation_bound"]] for row in saved["history"]]


@pytest.mark.slow
def test_a_rank_that_leaves_is_noticed(tmp_path):
    first, second = started(tmp_path, "left", number=2)
    assert re.search(r"OtherRankError: rank 0 of 2 has waited in pv.fit for a rank that has left, or did not", first)
    assert second == "left"


@pytest.mark.slow
def test_a_process_by_itself(tmp_path):
    """One fold for each rank; and a call of one rank."""
    (parameters, _), history = started(tmp_path, "alone", number=2)[0]
    (others, _), absent = started(tmp_path, "alone", number=2)[1]
    assert not torch.equal(parameters["decoder.weight"], others["decoder.weight"])
    assert len(history) == 1
    assert absent is None
