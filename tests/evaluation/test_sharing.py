"""Evaluations over several processes: the same numbers to the last digit, and refusals on all of them at once."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import ranks_evaluate
from torch.utils.data import DataLoader

import pyro_vae as pv
from pyro_vae.evaluation.moments import Moments

pytestmark = pytest.mark.slow  # tests/training/test_ranks.py has the quick tests of a group

SCRIPT = Path(ranks_evaluate.__file__)
LIMIT = 300  # seconds: nothing may hang


def on_ranks(number, folder, *arguments):
    """What each rank has written: its results, and how its refusals ended."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [*command, str(SCRIPT), str(folder), *arguments],
        env=own | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        timeout=LIMIT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ranks = range(number)
    return [[torch.load(folder / f"{what} {rank}", weights_only=False) for rank in ranks] for what in WRITTEN]


WRITTEN = ("results", "refusals")


def require_equal(found, expected, where):
    """Equality to the last digit, in everything that a result has."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for name, value in expected.items():
            require_equal(found[name], value, f"{where}, {name}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            require_equal(found[i], value, f"{where}, {i}")
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, where
        np.testing.assert_array_equal(found.numpy(), expected.numpy(), where)
    else:
        np.testing.assert_equal(found, expected, where)


def alone(cases, monkeypatch):
    """The results of this process, without a group."""
    found = {}
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ranks_evaluate.cut_small(patch.setattr)
        for name, call in cases.items():
            pyro.clear_param_store()
            found[name] = call()
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return on_ranks(2, tmp_path_factory.mktemp("ranks"))


def test_two_ranks_have_the_numbers_of_one_process(two, monkeypatch):
    expected = alone(ranks_evaluate.RESULTS, monkeypatch)
    for rank, found in enumerate(two[0]):
        require_equal(found, expected, f"rank {rank}")


SAME_X = "Pass the same rows in the same order on each rank"
REFUSED = {
    "other data": ["different x: expected 23 rows (hash", "on rank 1 of 2", SAME_X, "distributed=False"],
    "fewer data": ["different x: expected 23 rows", "got 22 rows", SAME_X],
    "other settings": ["pv.log_likelihood have different num_samples: expected 50, as on rank 0, got 60 on rank 1"],
    "a setting that is wrong on one rank": ["different num_samples: expected 50, as on rank 0, got 1 on rank 1 of 2"],
    "other seed": ["different seed: expected 0, as on rank 0, got 1 on rank 1 of 2. Pass the same on each rank"],
    "other objectives": ["different objectives: expected ELBO", "IWAE with 4 particles", "IWAE with 5 particles"],
    "other schedule": ["different schedule: expected 'linear', as on rank 0, got 0.0, 0.0625"],
    "other parameters": [
        "pv.active_units have different parameter",
        "'posterior.encoder.1.bias'",
        "Train with pv.fit on all ranks, or load the same checkpoint on each",
    ],
    "other buffers": ["pv.to_arviz have different buffer 'offset' of VAE", "load the same checkpoint"],
    "sharded loader": ["different x: expected 8 rows", SAME_X, "DistributedSampler"],
    "own order": ["different x: expected 8 rows", SAME_X, "shuffle by a generator that differs"],
    "another call": ["expected one call on all of them, got rank 0 pv.log_likelihood, rank 1 pv.active_units"],
}


@pytest.mark.parametrize("case", REFUSED)
def test_ranks_that_disagree_are_refused_on_all_at_once(two, case):
    for ended in two[1]:
        kind, message = ended[case]
        assert kind == "PyroVAEError"
        for words in REFUSED[case]:
            assert words in message


@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [
        ("data of one rank that are no data", "PyroVAEError", "expected x to be finite"),
        ("failure of one rank", "KeyError", "a file that only rank 0 has"),
    ],
)
def test_the_failure_of_one_rank_is_raised_on_all(two, case, kind, words):
    (other, told), (own, message) = (ended[case] for ended in two[1])
    assert (own, other) == (kind, "OtherRankError")
    assert words in message
    assert f"rank 1 of 2 has failed in pv.log_likelihood: {kind}: " in told
    assert words in told


def test_a_call_of_one_rank_is_refused_and_one_without_the_group_is_not(two):
    kind, message = two[1][0]["call of rank 0 alone"]
    assert kind == "OtherRankError"
    assert "rank 0 of 2 has waited in pv.log_likelihood" in message
    assert "Pass distributed=False to a call that one rank makes alone" in message
    assert [len(ended["alone"][1]) > 2 for ended in two[1]] == [False, True]
    assert {ended["alone"][0] for ended in two[1]} == {"none"}


def test_the_work_is_shared_out(two):
    first, second = (int(ended["work"][1]) for ended in two[1])
    assert min(first, second) > 0.35 * (first + second)


@pytest.mark.parametrize("number", [2, 3])
def test_any_number_of_ranks_has_the_numbers_of_one_process(number, tmp_path, monkeypatch):
    results, refusals = on_ranks(number, tmp_path, "all")
    expected = alone(ranks_evaluate.RESULTS | ranks_evaluate.LONG, monkeypatch)
    for rank, found in enumerate(results):
        require_equal(found, expected, f"rank {rank}")
    for ended in refusals:
        for case, words in REFUSED.items():
            assert all(each.replace("of 2", f"of {number}") in ended[case][1] for each in words)


# Without processes.

X = torch.linspace(-1, 1, 12)
NUMBERS = {
    "log_likelihood": lambda **o: pv.log_likelihood(model, guide, X, 40, progress=False, **o).per_datum,
    "ais": lambda **o: pv.ais(model, guide, X, 6, 4, progress=False, **o).per_datum,
    "bdmc": lambda **o: pv.bdmc(model, guide, X, 6, 4, progress=False, **o).upper_per_datum,
    "inference_gaps": lambda **o: pv.inference_gaps(model, guide, X, 9, num_steps=2, progress=False, **o).best_elbo,
    "decompose_elbo": lambda **o: pv.decompose_elbo(model, guide, X, 4, progress=False, **o).elbo.value,
    "compare": lambda **o: pv.compare(model, guide, X, pv.IWAE(2), repeats=2, progress=False, **o).gap.item(),
    "to_arviz": lambda **o: pv.to_arviz(model, guide, X, 70, **o)["posterior"]["z"].values,
}


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    scale = pyro.param("scale", torch.tensor(0.9))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, scale))


@pytest.mark.parametrize("name", NUMBERS)
def test_a_seed_gives_its_numbers_and_leaves_the_generators_alone(name):
    numbers = NUMBERS[name]
    state = torch.get_rng_state()
    first = numbers(seed=1)
    torch.rand(1)
    np.testing.assert_array_equal(numbers(seed=1), first)
    assert not np.array_equal(numbers(seed=2), first)
    torch.set_rng_state(state)
    unseeded = numbers()
    assert not torch.equal(torch.get_rng_state(), state)  # it goes on
    assert not np.array_equal(numbers(), unseeded)
    torch.set_rng_state(state)
    np.testing.assert_array_equal(numbers(), unseeded)


def test_pieces_and_parts_have_other_noise(monkeypatch):
    """Rows that are equal get the noise of different draws, wherever they are cut apart."""
    ranks_evaluate.cut_small(monkeypatch.setattr)
    equal = torch.full((40, 1), 0.5)

    def of_columns(function):
        return lambda x: function(x[:, 0])

    for data in (equal, DataLoader(equal, batch_size=5)):
        found = pv.log_likelihood(of_columns(model), of_columns(guide), data, 50, seed=0, progress=False).per_datum
        assert len(found.unique()) == len(found)
    table = pv.compare(of_columns(model), of_columns(guide), equal, pv.IWAE(2), repeats=4, seed=0, progress=False)
    assert table.estimator_std.item() > 0.01


def test_moments_that_are_merged():
    values = torch.randn(30, 2, dtype=torch.float64)
    found = Moments()
    for part in values.split(7):
        found.merge(Moments.of(part))
    torch.testing.assert_close(found.variance, values.var(0))


def test_a_group_that_is_not_there():
    with pytest.raises(pv.PyroVAEError, match="expected a process group with distributed=True, got none"):
        pv.log_likelihood(model, guide, X, 40, distributed=True)
