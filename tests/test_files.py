"""Files are written all or not at all, and a place has one writer."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyro
import pytest
import torch

import pyro_vae as pv
from pyro_vae.files import one_writer, written_whole


def python(code, *arguments, **options):
    """A Python process that runs this code."""
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def names(folder):
    return [path.name for path in folder.iterdir()]


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    assert path.exists(), process.communicate()


def test_a_file_is_replaced_at_the_end(tmp_path):
    path = tmp_path / "new folder" / "table.csv"
    for text in ("old", "new"):
        with written_whole(path) as unfinished:
            unfinished.write_text(text)
            assert unfinished.suffix == ".csv"
            assert text == "old" or path.read_text() == "old"
        assert path.read_text() == text
    assert names(path.parent) == ["table.csv"]


def test_a_link_stays_a_link_and_a_file_keeps_its_mode(tmp_path):
    path, link = tmp_path / "private.csv", tmp_path / "link.csv"
    path.write_text("old")
    path.chmod(0o600)
    link.symlink_to(path)
    with written_whole(link) as unfinished:
        unfinished.write_text("new")
    assert (link.is_symlink(), path.read_text(), path.stat().st_mode & 0o777) == (True, "new", 0o600)


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(KeyError), written_whole(path) as unfinished:
        unfinished.write_text("half")
        raise KeyError
    assert (names(tmp_path), path.read_text()) == (["table.csv"], "old")


def test_what_a_killed_process_left_is_removed_by_the_next_one(tmp_path):
    path = tmp_path / "table.csv"
    code = (
        "import sys, os, signal; from pyro_vae.files import written_whole\n"
        "with written_whole(sys.argv[1]) as file:\n    file.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert python(code, path).wait() == -signal.SIGKILL
    assert len(names(tmp_path)) == 1
    with written_whole(path) as mine, written_whole(path) as other:  # another's that lives stays
        mine.write_text("mine")
        other.write_text("other")
    assert (names(tmp_path), path.read_text()) == (["table.csv"], "mine")


def test_a_second_writer_of_this_process_is_refused(tmp_path):
    refused = []

    def second():
        refusing = pytest.raises(pv.PyroVAEError, match=r"this process is writing to .*run: expected one writer at")
        with refusing, one_writer(os.path.relpath(tmp_path / "run"), "writing to"):
            pass
        refused.append(True)

    for _ in range(2):  # it ends with its block
        with one_writer(tmp_path / "run", "writing to"), one_writer(tmp_path / "other", "writing to"):
            second()
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()
    assert (len(refused), names(tmp_path)) == (4, [])


def test_a_folder_is_kept_by_a_lock_inside(tmp_path):
    with one_writer(tmp_path / "run", "writing to", inside=True):
        assert names(tmp_path) == ["run"]
        assert names(tmp_path / "run") == [".lock"]
        refusing = pytest.raises(pv.PyroVAEError, match=r"this process is writing to .*run: expected one writer at")
        with refusing, one_writer(tmp_path / "run", "writing to", inside=True):
            pass
    assert names(tmp_path / "run") == []


def test_a_loop_of_links_is_an_error_of_the_system(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="loop"), written_whole(tmp_path / "loop" / "file") as unfinished:
        unfinished.write_text("")
    with pytest.raises(pv.NotWrittenError, match="loop"), one_writer(tmp_path / "loop" / "file", "writing to"):
        pass


HOLDER = """
import multiprocessing, os, sys, time
from pathlib import Path
from pyro_vae.files import one_writer
path = Path(sys.argv[1])
with one_writer(path, "writing to"):
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    (path.parent / "begun").write_text(str(child.pid))
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_ends_however_it_ends(tmp_path):
    """A process that the first one forked, such as a DataLoader's worker, outlives it."""
    path = tmp_path / "run"
    holder = python(HOLDER, path)
    wait_for(tmp_path / "begun", holder)
    time.sleep(0.1)
    with (
        pytest.raises(pv.PyroVAEError, match=f"process {holder.pid} on .* is writing to .*run: expected one writer at"),
        one_writer(path, "writing to"),
    ):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    worker = int((tmp_path / "begun").read_text())
    os.kill(worker, 0)  # it lives
    try:
        with one_writer(path, "writing to"):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
    assert names(tmp_path) == ["begun"]


def fit(path, epochs, **options):
    pyro.set_rng_seed(0)
    vae = pv.mlp_vae((5,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
    x = torch.randn(32, 5, generator=torch.Generator().manual_seed(0))
    return pv.fit(vae, x, pv.ELBO(), epochs=epochs, batch_size=16, checkpoint=path, seed=0, **options)


def test_a_second_training_into_one_checkpoint_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with one_writer(path, "training into"), pytest.raises(pv.PyroVAEError, match=r"is training into .*checkpoint\.pt"):
        fit(path, 1)
    assert len(fit(path, 2)) == 2


def test_a_place_that_cannot_be_written_is_found_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(pv.NotWrittenError, match=r"can't be written \(.*\): expected a folder to write to") as found:
        fit(tmp_path / "file" / "checkpoint.pt", 1)
    assert isinstance(found.value, OSError) and found.value.history is None


def test_a_full_disk_keeps_the_last_checkpoint_and_gives_the_history(tmp_path):
    """A limit of the size of files is what a process can set; a full disk raises its error in the same place."""
    path = tmp_path / "checkpoint.pt"
    whole = fit(path, 2)
    before = path.read_bytes()
    code = (
        "import resource, sys; sys.path[:0] = ['tests']; import pyro_vae as pv; from test_files import fit\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "try: fit(sys.argv[1], 4)\n"
        "except pv.NotWrittenError as error: print(error); print(len(error.history), list(error.history.train_bound))"
    )
    process = python(code, path, cwd=Path(__file__).parents[1])
    said, number = process.communicate()[0].splitlines()
    assert f"the checkpoint {path} can't be written ([Errno 27] File too large)" in said
    assert "The file there is as it was. Remove the cause" in said
    assert number.startswith("3 [")
    assert number.endswith("]") and str(whole.train_bound.tolist())[1:-1] in number
    assert (path.read_bytes(), names(tmp_path)) == (before, ["checkpoint.pt"])
    assert len(fit(path, 4)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [False, True], ids=["", "nohup"])
def test_a_signal_ends_the_program_after_fit_has_kept_its_work(tmp_path, ignored):
    code = (
        "import signal, sys; sys.path[:0] = ['tests']; from test_files import fit\n"
        f"signal.signal(signal.SIGHUP, signal.SIG_IGN) if {ignored} else None\n"
        "fit(sys.argv[1], 10**6)\nprint('not reached')"
    )
    path = tmp_path / "checkpoint.pt"
    process = python(code, path, cwd=Path(__file__).parents[1])
    wait_for(path, process)
    if ignored:
        process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=60)[0]
    assert (process.returncode, out) == (-signal.SIGTERM, "")
    assert names(tmp_path) == ["checkpoint.pt"]  # no lock, and nothing unfinished


def test_fit_puts_handlers_back_and_leaves_those_of_others(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    fit(tmp_path / "checkpoint.pt", 1)
    assert signal.getsignal(signal.SIGTERM) is before
    thread = threading.Thread(target=fit, args=(tmp_path / "other.pt", 1))
    thread.start()
    thread.join()
    assert (tmp_path / "other.pt").exists()


WRITING = """
import signal, sys; sys.path[:0] = ['tests']; import torch; from test_files import fit
save, saves = torch.save, []
class Interrupted:
    def __init__(self, file): self.file = file
    def __getattr__(self, name): return getattr(self.file, name)
    def write(self, data):
        if len(saves) == 3:
            saves.append("a second signal would be obeyed at once")
            signal.raise_signal(signal.SIGTERM)
        return self.file.write(data)
def saving(state, file):
    if "format" not in state: return save(state, file)  # not a checkpoint: a trial in memory
    saves.append(state)
    save(state, Interrupted(file))
torch.save = saving
try: fit(sys.argv[1], 10**6)
except BaseException as error: print(type(error))
print('not reached')
"""


@pytest.mark.slow
def test_a_signal_while_a_checkpoint_is_written_ends_the_program_too(tmp_path):
    """PyTorch's writer answers any exception with a RuntimeError."""
    path = tmp_path / "check[0.1].pt"
    process = python(WRITING, path, cwd=Path(__file__).parents[1])
    out = process.communicate(timeout=120)[0]
    assert (process.returncode, out) == (-signal.SIGTERM, "")
    assert names(tmp_path) == ["check[0.1].pt"]
    assert len(torch.load(path, weights_only=True)["history"]) == 2


def test_a_disk_without_room_is_noticed_before_a_library_writes(tmp_path):
    path = tmp_path / "results.nc"
    path.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"of 2.0 MB that it needs.*results.nc"), written_whole(path, room=2_000_000):
            pytest.fail("the library has begun to write")
        with written_whole(path, room=1_000) as unfinished:
            assert not unfinished.exists()
            unfinished.write_text("new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [each.name for each in tmp_path.iterdir()] == ["results.nc"]
    assert path.read_text() == "new"
