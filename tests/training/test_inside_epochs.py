"""Checkpoints inside of epochs: training goes on from them bit for bit."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from helpers.training import X, same, small_vae
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pyro_vae as pv
from pyro_vae.training import checkpoint as checkpoints


class Interrupt(pv.Callback):
    """Ends the training at a step as Ctrl-C does, which leaves the last checkpoint."""

    def __init__(self, step):
        self.step = step

    def before_step(self, record):
        if record.step == self.step:
            raise KeyboardInterrupt


class Noisy(TensorDataset):
    """A data set whose rows have noise from the global generator."""

    def __getitem__(self, index):
        (row,) = super().__getitem__(index)
        return row + 0.1 * torch.randn(6)


class Twice(IterableDataset):
    """A stream that begins again."""

    def __iter__(self):
        yield from X


DATA = {
    "tensor": lambda: X,
    "loader": lambda: DataLoader(TensorDataset(X), batch_size=8, shuffle=True),
    "own generator": lambda: DataLoader(
        TensorDataset(X), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(4)
    ),
    "noisy rows": lambda: DataLoader(Noisy(X), batch_size=8, shuffle=True),
    "stream": lambda: DataLoader(Twice(), batch_size=8),
}


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stop", [2, 5, 9])
def test_training_goes_on_inside_an_epoch(kind, accumulate, stop, tmp_path):
    settings = {"epochs": 3, "accumulate": accumulate, "seed": 1, "validation": X[:9], "patience": 5}
    if kind == "tensor":
        settings["batch_size"] = 8
    whole, path, every = small_vae(), tmp_path / "run.pt", {"checkpoint_every": 2}
    expected = pv.fit(whole, DATA[kind](), pv.IWAE(2), **settings)
    with pytest.warns(UserWarning, match="training stopped"):
        pv.fit(small_vae(), DATA[kind](), pv.IWAE(2), checkpoint=path, callbacks=Interrupt(stop), **every, **settings)
    assert path.exists() == (stop > 2)
    again = small_vae(5 if stop > 2 else 0)
    history = pv.fit(again, DATA[kind](), pv.IWAE(2), checkpoint=path, **every, **settings)
    assert same(again, whole)
    assert history[["train_bound", "validation_bound"]].equals(expected[["train_bound", "validation_bound"]])


def test_a_time_between_checkpoints(tmp_path):
    saved = []

    class Look(pv.Callback):
        def on_step(self, record):
            saved.append((tmp_path / "run.pt").exists())

    settings = {"epochs": 1, "batch_size": 25, "checkpoint": tmp_path / "run.pt", "callbacks": Look()}
    pv.fit(small_vae(), X, pv.ELBO(), checkpoint_every=timedelta(hours=1), **settings)
    assert saved == [False, False]
    (tmp_path / "run.pt").unlink()
    pv.fit(small_vae(), X, pv.ELBO(), checkpoint_every=timedelta(microseconds=1), **settings)
    assert saved[2:] == [False, True]
    with pytest.raises(pv.PyroVAEError, match="expected checkpoint_every to be a positive time"):
        pv.fit(small_vae(), X, pv.ELBO(), checkpoint_every=timedelta(0), **settings)


@pytest.mark.parametrize(("settings", "written"), [({"epochs": 2}, [2, 3, 4, 6]), ({"steps": 4}, [2, 3, 4])])
def test_a_checkpoint_is_written_once_at_an_end(settings, written, tmp_path, monkeypatch):
    """Also where an epoch, or the training, ends in a step after which it is time for one."""
    steps = []
    monkeypatch.setattr(checkpoints, "save", lambda path, state: steps.append(state["steps"]))
    settings |= {"batch_size": 20, "checkpoint": tmp_path / "run.pt", "checkpoint_every": 2}
    pv.fit(small_vae(), X, pv.ELBO(), **settings)
    assert steps == written


def test_a_stream_that_can_not_begin_again(tmp_path):
    rows = iter(X.repeat(9, 1))

    class Once(IterableDataset):
        def __iter__(self):
            return rows

    with pytest.raises(pv.PyroVAEError, match="expected a DataLoader that begins again with the same minibatches"):
        loader = DataLoader(Once(), batch_size=8)
        pv.fit(small_vae(), loader, pv.ELBO(), epochs=1, checkpoint=tmp_path / "run.pt", checkpoint_every=2)


def test_averages_go_on_inside_an_epoch(tmp_path):
    settings = {"epochs": 2, "batch_size": 8, "seed": 1}
    whole, first, second = (pv.callbacks.EMA(0.5) for _ in range(3))
    pv.fit(small_vae(), X, pv.ELBO(), callbacks=whole, **settings)
    settings |= {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 3}
    with pytest.warns(UserWarning, match="training stopped"):
        pv.fit(small_vae(), X, pv.ELBO(), callbacks=[first, Interrupt(5)], **settings)
    pv.fit(small_vae(), X, pv.ELBO(), callbacks=[second], **settings)
    assert all(torch.equal(second.averages[name], mean) for name, mean in whole.averages.items())


@pytest.mark.slow
def test_a_run_killed_inside_of_epochs_ends_bit_for_bit(tmp_path):
    """Twenty kills by SIGKILL at steps drawn at random, some of them while a checkpoint is written."""
    script = Path(__file__).parents[1] / "helpers" / "killed_inside.py"
    run = subprocess.run([sys.executable, script, tmp_path, "20"], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "20 kills, same bits: True", run.stdout
