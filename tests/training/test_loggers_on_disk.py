"""Loggers and KeepBest where the disk is full, and where another training writes to the same place."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager

import pandas as pd
import pytest
import torch
from helpers.quick import slow_but
from helpers.training import X, same, small_vae

import pyro_vae as pv

resource = pytest.importorskip("resource")
SETTINGS = {"batch_size": 5, "validation": X[:9], "seed": 1}


@contextmanager
def room(number):
    """No file may have more bytes: a write fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Counts(pv.Callback):
    """Keeps how many steps it has seen."""

    steps = 0

    def on_step(self, record):
        self.steps += 1

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


class Log(pv.callbacks.CSV):
    """A log that begins long, to fill a disk soon."""

    def on_start(self, record):
        super().on_start(record)
        if not record.step:
            with self.path.open("a") as file:
                file.write(29_000 * "step,0,0,1\n")


def tensorboard(folder):
    pytest.importorskip("tensorboard")
    noise = torch.rand(9, 1, 60, 60)
    return pv.callbacks.TensorBoard(folder, images={"noise": lambda: noise})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own thread
@pytest.mark.parametrize(("name", "make"), [("log.csv", Log), ("board", tensorboard)])
def test_a_full_disk_is_named_and_training_goes_on_from_there(name, make, tmp_path):
    path, run, counts = tmp_path / name, tmp_path / "run.pt", Counts()
    settings = SETTINGS | {"checkpoint": run}
    words = rf"failed in on_(step|epoch), .*{name} can't be written \(File too large\): expected room"
    with room(330_000), pytest.raises(pv.CallbackError, match=words) as raised:
        pv.fit(small_vae(), X, pv.ELBO(), epochs=999, callbacks=[make(path), counts], **settings)
    assert isinstance(raised.value.__cause__, pv.NotWrittenError)
    kept = torch.load(run, weights_only=True)
    assert counts.steps == kept["steps"] == kept["callbacks"]["Counts"]["steps"] > 9
    assert len(raised.value.history) == len(kept["history"])
    if name == "log.csv":
        table = pd.read_csv(path)
        assert table.step.max() == kept["steps"] - 1
        assert table.bound.notna().all()  # no part of a row
    again, whole, steps = small_vae(5), small_vae(), kept["steps"] + 5
    pv.fit(again, X, pv.ELBO(), steps=steps, callbacks=[make(path), Counts()], **settings)
    pv.fit(whole, X, pv.ELBO(), steps=steps, **(settings | {"checkpoint": None}))
    assert same(again, whole)


def test_a_disk_that_is_full_for_the_checkpoint_too(tmp_path):
    class Fills(pv.Callback):
        def on_step(self, record):
            if record.step == 12:
                resource.setrlimit(resource.RLIMIT_FSIZE, (10, -1))

    run = tmp_path / "run.pt"
    with room(10_000_000), pytest.raises(pv.CallbackError, match=r"CSV failed in on_step, in epoch 2") as raised:
        callbacks = [Fills(), pv.callbacks.CSV(tmp_path / "log.csv")]
        pv.fit(small_vae(), X, pv.ELBO(), epochs=2, callbacks=callbacks, checkpoint=run, **SETTINGS)
    (note,) = raised.value.__notes__
    assert "run.pt can't be written" in note
    assert "The file there is as it was" in note
    assert len(raised.value.history) == len(torch.load(run, weights_only=True)["history"]) == 1


def test_a_row_that_a_kill_has_cut_is_dropped(tmp_path):
    path, settings = tmp_path / "log.csv", SETTINGS | {"checkpoint": tmp_path / "run.pt"}
    pv.fit(small_vae(), X, pv.ELBO(), epochs=1, callbacks=pv.callbacks.CSV(path), **settings)
    with path.open("a") as file:
        file.write("step,1,1")  # of step 11
    pv.fit(small_vae(), X, pv.ELBO(), epochs=2, callbacks=pv.callbacks.CSV(path), **settings)
    assert pd.read_csv(path).step.tolist() == [*range(1, 11), 10, *range(11, 21), 20]


def test_a_file_that_is_no_log_stays(tmp_path):
    path, settings = tmp_path / "log.csv", SETTINGS | {"checkpoint": tmp_path / "run.pt"}
    pv.fit(small_vae(), X, pv.ELBO(), epochs=1, **settings)
    path.write_text("name,age\nEva,3\n")
    with pytest.raises(pv.CallbackError, match=r"expected .*log\.csv to be a log of pv.callbacks.CSV"):
        pv.fit(small_vae(), X, pv.ELBO(), epochs=2, callbacks=pv.callbacks.CSV(path, overwrite=True), **settings)
    assert path.read_text() == "name,age\nEva,3\n"


OTHER = """
import sys, torch, pyro_vae as pv
class Wait(pv.Callback):
    def on_step(self, record):
        print("ready", flush=True)
        input()
kind, path = sys.argv[1:]
vae, x = pv.mlp_vae((6,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian"), torch.randn(20, 6)
pv.fit(vae, x, pv.ELBO(), epochs=1, validation=x, callbacks=[getattr(pv.callbacks, kind)(path), Wait()])
"""


WRITERS = [("CSV", "logging to"), ("KeepBest", "keeping its best epochs in")]


@pytest.mark.parametrize(("kind", "words"), slow_but(WRITERS[:1], WRITERS))
def test_a_second_writer_is_refused(kind, words, tmp_path):
    path = tmp_path / "place"
    make = getattr(pv.callbacks, kind)
    options = {"overwrite": True} if kind == "CSV" else {}
    command = [sys.executable, "-c", OTHER, kind, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "ready\n"
        before = contents(path)
        with pytest.raises(
            pv.CallbackError, match=f"process {other.pid} on .* is {words} .*place: expected one writer"
        ):
            pv.fit(small_vae(), X, pv.ELBO(), epochs=1, callbacks=make(path, **options), **SETTINGS)
        assert contents(path) == before
        other.communicate("\n")
    assert other.returncode == 0
    with pytest.raises(pv.CallbackError, match="this process is"):
        callbacks = [make(path, **options), make(path, **options)]
        pv.fit(small_vae(), X, pv.ELBO(), epochs=1, callbacks=callbacks, **SETTINGS)
    pv.fit(small_vae(), X, pv.ELBO(), epochs=1, callbacks=make(path, **options), **SETTINGS)  # the place is free again
    assert not list(tmp_path.rglob("*.lock"))


def contents(path):
    """The bytes of a file, or of the files of a folder."""
    files = [path] if path.is_file() else sorted(path.iterdir())
    return {file.name: file.read_bytes() for file in files}


def test_the_event_file_is_closed_after_an_error(tmp_path):
    """Its last rows are on disk, also those after the last epoch."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    class Fails(pv.Callback):
        def on_step(self, record):
            if record.step == 13:
                raise RuntimeError("no")

    with pytest.raises(pv.CallbackError):
        callbacks = [pv.callbacks.TensorBoard(tmp_path), Fails()]
        pv.fit(small_vae(), X, pv.ELBO(), epochs=2, callbacks=callbacks, **SETTINGS)
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("step/bound")] == list(range(1, 14))
