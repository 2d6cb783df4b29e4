"""train: what it writes and prints, how it continues, Ctrl-C, and refusals before any work."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from helpers.command_line import FIGURES, TINY, bounds, history, pyro_vae, refusal
from matplotlib.image import imread

import pyro_vae as pv
from pyro_vae.cli.run_folder import RunFolder
from pyro_vae.cli.train import DATA_HELP, FOR_SHAPES


def test_train_writes_a_run(trained):
    run, out = trained
    assert {path.name for path in run.iterdir()} == {"config.json", "checkpoint.pt", "history.csv", "figures"}
    assert len(history(run)) == 3
    assert history(run).notna().all(axis=None)
    last = history(run).iloc[-1]
    training, result, *paths = out.splitlines()
    assert training == "3 epochs with ELBO, closed-form KL, K = 1"
    bound = f"{last.train_bound:.2f} (train), {last.validation_bound:.2f} (validation) nats per datum"
    assert result == f"mean bound on log p(x): {bound}"
    assert {Path(path) for path in paths} == {run / "figures" / name for name in FIGURES}
    for path in paths:
        height, width, _ = imread(path).shape
        assert width > 900
        assert height > 300


def test_the_same_command_gives_the_same_run(trained, tmp_path):
    pyro_vae("train", "digits", *TINY, "--epochs", 3)
    run = tmp_path / "runs" / "digits"  # the folder where no --out is given
    pd.testing.assert_frame_equal(bounds(run), bounds(trained[0]), check_exact=True)
    for name in FIGURES:
        assert (run / "figures" / name).read_bytes() == (trained[0] / "figures" / name).read_bytes()


def test_another_seed_gives_another_run(trained, tmp_path):
    pyro_vae("train", "digits", *TINY, "--epochs", 1, "--seed", 1, "--out", tmp_path / "other")
    assert not np.isclose(bounds(tmp_path / "other").loc[1], bounds(trained[0]).loc[1]).any()


@pytest.mark.slow
def test_more_epochs_go_on_to_where_an_unbroken_run_ends(trained, tmp_path):
    run = tmp_path / "run"
    pyro_vae("train", "digits", *TINY, "--epochs", 1, "--out", run)
    first = (run / "history.csv").read_text()
    pyro_vae("compare", run, "--num-images", 5, "--repeats", 2)
    status, out, _ = pyro_vae("train", "digits", *TINY, "--epochs", 3, "--out", run)
    assert status == 0
    assert out.startswith(f"{run} has 1 epoch: training continues.")
    assert not (run / "compare.csv").exists()  # it was about the parameters of before
    assert not (run / "figures" / "bounds.png").exists()
    assert (run / "history.csv").read_text().startswith(first)  # the seconds of the first epoch too
    pd.testing.assert_frame_equal(bounds(run), bounds(trained[0]), check_exact=True)
    assert json.loads((run / "config.json").read_text()) == json.loads((trained[0] / "config.json").read_text()) | {
        "root": str(tmp_path / "data")
    }
    pyro_vae("compare", run, "--num-images", 5, "--repeats", 2)
    assert "has 3 epochs: nothing left to train." in pyro_vae("train", "digits", *TINY, "--epochs", 3, "--out", run)[1]
    assert (run / "compare.csv").exists()


@pytest.mark.slow
def test_every_kind_of_network_likelihood_and_objective(tmp_path):
    conv = ["--network", "conv", "--channels", "4", "--latent-dim", 3, "--validation", 0, "--batch-size", 512]
    gaussian = ["--likelihood", "gaussian", "--scale", "0.5", "--objective", "iwae", "--particles", 2]
    run = tmp_path / "run"
    status, out, _ = pyro_vae("train", "digits", *conv, *gaussian, "--epochs", 1, "--out", run)
    assert status == 0
    assert out.startswith("1 epoch with IWAE, K = 2\n")
    assert "validation" not in out
    assert json.loads((run / "config.json").read_text())["binarize"] == "none"
    assert {path.name for path in (run / "figures").iterdir()} == FIGURES - {"latent_space.png"}
    # nats: 64 pixels of N(x | about 0.3, 0.5^2), with x in [0, 1]
    assert -64 < history(run).train_bound.item() < -64 * math.log(0.5 * math.sqrt(2 * math.pi))
    assert pyro_vae("compare", run, "--num-images", 5, "--repeats", 2)[0] == 0


@pytest.mark.slow
def test_shapes_have_defaults_of_their_own(tmp_path):
    run = tmp_path / "run"
    small = ["--channels", "4,4,4", "--batch-size", 1000]
    status, _, err = pyro_vae("train", "shapes", *small, "--epochs", 1, "--out", run)
    assert (status, err) == (0, "")
    config = json.loads((run / "config.json").read_text())
    expected = FOR_SHAPES | {"channels": "4,4,4", "epochs": 1, "binarize": "none"}
    assert {name: config[name] for name in expected} == expected
    assert {path.name for path in (run / "figures").iterdir()} == FIGURES - {"latent_space.png"}
    assert pyro_vae("train", "shapes", *small, "--epochs", 1, "--out", run)[0] == 0  # it continues with these too


@pytest.mark.slow
def test_binarized_mnist_without_labels(tmp_path):
    (tmp_path / "data" / "binarized_mnist").mkdir(parents=True)
    bits = np.packbits(np.random.default_rng(0).integers(0, 2, (20, 784), dtype=np.uint8), axis=1)
    path = tmp_path / "data" / "binarized_mnist" / "binarized_mnist_larochelle_packed.npz"
    np.savez(path, train=bits, valid=bits, test=bits)
    arguments = ["--hidden-dims", "4", "--epochs", 1, "--objective", "elbo-monte-carlo"]
    status, out, _ = pyro_vae("train", "binarized_mnist", *arguments)
    assert status == 0
    assert "ELBO, Monte Carlo KL" in out
    assert json.loads((tmp_path / "runs/binarized_mnist/config.json").read_text())["binarize"] == "none"
    # The data may move: where they lie is no part of what a run is.
    (tmp_path / "data").rename(tmp_path / "moved")
    assert "moved" not in refusal("sample", "runs/binarized_mnist")
    assert pyro_vae("train", "binarized_mnist", *arguments, "--root", "moved")[0] == 0
    assert pyro_vae("sample", "runs/binarized_mnist")[0] == 0


@pytest.mark.slow
def test_warm_up_and_free_bits_are_those_of_the_library(tmp_path):
    run = tmp_path / "run"
    command = ["train", "digits", *TINY, "--warm-up", 2, "--free-bits", "0.25", "--out", run]
    pyro_vae(*command, "--epochs", 1)
    status, out, _ = pyro_vae(*command, "--epochs", 3)
    assert status == 0
    assert "ELBO, closed-form KL, beta schedule, free bits 0.25, K = 1" in out
    digits = pv.data.load("digits", binarize="dynamic")
    pyro.set_rng_seed(0)
    vae = pv.mlp_vae(digits.event_shape, latent_dim=2, hidden_dims=(16,))
    objective = pv.ELBO(beta=pv.schedules.warm_up(2 * 6), free_bits=0.25)  # six steps an epoch
    options = {"epochs": 3, "batch_size": 256, "lr": 0.01, "validation": digits.validation, "seed": 0}
    fitted = pv.fit(vae.model, vae.guide, digits.train, objective, **options)
    np.testing.assert_array_equal(bounds(run), fitted[["train_bound", "validation_bound"]])


@pytest.mark.slow
def test_a_device_a_precision_and_clipping(tmp_path):
    command = ["train", "digits", "--hidden-dims", 16, "--epochs", 1, "--out", tmp_path / "run"]
    options = ["--precision", "bf16", "--clip-norm", 2, "--device", "cpu"]
    assert pyro_vae(*command, *options)[0] == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["precision"], config["clip_norm"], "device" in config) == ("bf16", 2.0, False)
    assert "nothing left to train" in pyro_vae(*command, *options[:-2])[1]  # on any device
    assert "expected precision='bf16', as in the run in" in refusal(*command, *options[2:])


@pytest.mark.slow
def test_patience_stops_early_and_keeps_the_best_epoch(tmp_path):
    run = tmp_path / "run"
    command = [
        "train",
        "digits",
        "--hidden-dims",
        16,
        "--batch-size",
        512,
        "--lr",
        "0.1",
        "--epochs",
        200,
        "--out",
        run,
    ]
    status, out, err = pyro_vae(*command, "--patience", 2)
    assert (status, err) == (0, "")
    best = history(run).validation_bound.idxmax()
    assert len(history(run)) == best + 2 < 200
    row = history(run).loc[best]
    assert out.startswith(f"{best + 2} epochs (the best is epoch {best}) with ELBO")
    assert f"{row.train_bound:.2f} (train), {row.validation_bound:.2f} (validation)" in out
    until_best = tmp_path / "until_best"
    pyro_vae(*command, "--epochs", best, "--out", until_best)
    kept, expected = (RunFolder(folder).load()[1].state_dict() for folder in (run, until_best))
    assert all(torch.equal(kept[name], value) for name, value in expected.items())
    assert (run / "figures" / "samples.png").read_bytes() == (until_best / "figures" / "samples.png").read_bytes()
    again = pyro_vae(*command, "--patience", 2)
    assert again[0] == 0
    assert again[1] == f"{run} has {best + 2} epochs: nothing left to train.\n{out}"
    assert "training continues." in pyro_vae(*command, "--patience", 3)[1]
    assert len(history(run)) > best + 2
    config = json.loads((run / "config.json").read_text())
    assert config["patience"] == 3
    assert f"expected patience=3, as in the run in {run}, got patience=None" in refusal(*command)


@pytest.fixture
def ctrl_c(monkeypatch):
    """Press Ctrl-C within a training step, counted over all epochs: six make one."""

    def press(step):
        loss, steps = pv.ELBO.differentiable_loss, iter(range(-1, 10**6))  # fit tries the loss once before

        def interrupted(self, *args, **kwargs):
            if torch.is_grad_enabled() and next(steps) == step:
                raise KeyboardInterrupt
            return loss(self, *args, **kwargs)

        monkeypatch.setattr(pv.ELBO, "differentiable_loss", interrupted)
        return monkeypatch.undo

    return press


def test_ctrl_c_keeps_whole_epochs(trained, tmp_path, ctrl_c):
    run = tmp_path / "run"
    command = ["train", "digits", *TINY, "--epochs", 3, "--out", run]
    undo = ctrl_c(step=6 + 2)
    status, out, err = pyro_vae(*command)
    undo()
    assert status == 130
    assert err == f"stopped by Ctrl-C: {run} has 1 of 3 epochs. The same command continues.\n"
    assert out.startswith("1 epoch with ")
    pd.testing.assert_frame_equal(bounds(run), bounds(trained[0]).iloc[:1], check_exact=True)
    drawn = (run / "figures" / "samples.png").read_bytes()
    pyro_vae("sample", run)
    assert (run / "figures" / "samples.png").read_bytes() == drawn  # of the epoch's end, as the checkpoint is
    assert pyro_vae(*command)[0] == 0
    pd.testing.assert_frame_equal(bounds(run), bounds(trained[0]), check_exact=True)


def test_ctrl_c_in_the_first_epoch_keeps_nothing(tmp_path, ctrl_c):
    run = tmp_path / "run"
    undo = ctrl_c(step=2)
    status, out, err = pyro_vae("train", "digits", *TINY, "--out", run)
    undo()
    assert (status, out, err.count("\n")) == (130, "", 1)
    assert [path.name for path in run.iterdir()] == ["config.json"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal(tmp_path, number):
    # SIGINT is ignored in what a shell runs in the background, as a test suite may be.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from pyro_vae.cli import main; main('train digits --epochs 100000 --hidden-dims 4 --out run'.split())"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    status, out, err = pyro_vae("train", "digits", "--epochs", 100000, "--hidden-dims", 4, "--out", tmp_path / "run")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"process {process.pid} on " in err
    assert f"is training into {tmp_path / 'run'}: expected one writer" in err
    process.send_signal(number)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number, err
    assert err.startswith(f"stopped by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}: run has ")
    assert (tmp_path / "run" / "figures" / "training.png").exists()


def test_ctrl_c_in_another_command_is_one_line(trained, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pv, "compare", interrupted)
    assert pyro_vae("compare", trained[0]) == (130, "", "stopped by Ctrl-C.\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["digist"], "did you mean 'digits'?"),
        (["digits", "--network", "mpl"], "'mlp', 'conv'"),
        (["digits", "--binarize", "sometimes"], "'dynamic'"),
        (["digits", "--epoch", 1], "--epochs"),
        (["digits", "--epochs", 0], "--epochs"),
        (["digits", "--epochs"], "requires an argument"),
        (["digits", "--lr", 0], "--lr to be a positive, finite number"),
        (["digits", "--lr", "nan"], "--lr to be a positive, finite number"),
        (["digits", "--hidden-dims", "400;200"], "--hidden-dims to be integers"),
        (["digits", "--hidden-dims", "0"], "positive integers"),
        (["digits", "--network", "conv", "--channels", "a"], "--channels"),
        (["digits", "--likelihood", "gaussian", "--scale", "lerned"], "learned, per_column or per_pixel"),
        (["digits", "--likelihood", "gaussian", "--scale", "-1"], "positive number"),
        (["digits", "--scale", "0.1"], "--likelihood gaussian with --scale, got --likelihood bernoulli"),
        (["digits", "--channels", "8"], "--network conv with --channels, got --network mlp"),
        (["digits", "--network", "conv", "--hidden-dims", "8"], "--network mlp with --hidden-dims, got --network conv"),
        (
            ["digits", "--objective", "iwae", "--warm-up", 5],
            "--objective elbo or elbo-monte-carlo with --warm-up, got --objective iwae",
        ),
        (
            ["digits", "--objective", "iwae", "--free-bits", 0.1],
            "--objective elbo or elbo-monte-carlo with --free-bits",
        ),
        (["digits", "--free-bits", "inf"], "free_bits to be a number of nats"),
        (["digits", "--warm-up", -1], "--warm-up"),
        (["digits", "--patience", 0], "--patience"),
        (["digits", "--patience", 3, "--validation", 0], "validation images with --patience, got none"),
        (["digits", "--clip-norm", 0], "expected clip_norm to be a positive number, got 0.0"),
        (["digits", "--clip-norm", -1], "--clip-norm"),
        (["digits", "--precision", "fp8"], "--precision"),
        (["digits", "--device", "abacus"], "expected device to be one that this machine has"),
        (["digits", "--binarize", "none"], "zeros and ones"),
        (["digits", "--validation", 5000], "below the 1547"),
        (["shapes", "--likelihood", "bernoulli"], "expected x of zeros and ones"),
        (["shapes", "--binarize", "dynamic"], "expected binarize='none' for shapes"),
        (["binarized_mnist", "--root", "nowhere"], "nowhere"),
        (["binarized_mnist"], "data"),
        ([], "DATA"),
    ],
)
def test_train_refuses_before_it_writes(tmp_path, arguments, said):
    assert said in refusal("train", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_divergence_is_no_bug_and_does_not_take_the_folder(tmp_path):
    run = tmp_path / "run"
    arguments = ["train", "digits", "--hidden-dims", "4", "--epochs", 1, "--out", run]
    status, out, err = pyro_vae(*arguments, "--lr", "1e30")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "learning rate too high" in err
    assert [path.name for path in run.iterdir()] == ["config.json"]
    assert pyro_vae(*arguments, "--lr", "1e-3")[0] == 0
    assert json.loads((run / "config.json").read_text())["lr"] == 1e-3


def test_help_names_the_data_sets():
    for name in pv.data.NAMES:
        assert name in DATA_HELP


@pytest.mark.slow
def test_several_processes_write_one_run(tmp_path):
    run = tmp_path / "run"
    words = ["train", "digits", *map(str, TINY), "--epochs", "3", "--processes", "2", "--out", str(run)]
    done = subprocess.run([sys.executable, "-m", "pyro_vae", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "3 epochs with ELBO, closed-form KL, K = 1"
    assert {Path(path) for path in lines[2:]} == {run / "figures" / name for name in FIGURES}
    assert len(history(run)) == 3
    (run / "history.csv").unlink()
    again = subprocess.run([sys.executable, "-m", "pyro_vae", *words], capture_output=True, text=True)
    assert "has 3 epochs: nothing left to train." in again.stdout
    assert len(history(run)) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("INT", 130, "stopped by Ctrl-C."),
        ("KILL", 2, "error: expected all processes to end by themselves, got process"),
    ],
)
def test_an_end_of_several_processes_is_one_line(tmp_path, end, status, said):
    """torchrun would print its traceback, and each process a line of its own."""
    words = [
        "train",
        "digits",
        *map(str, TINY),
        "--epochs",
        "100000",
        "--processes",
        "2",
        "--out",
        str(tmp_path / "run"),
    ]
    process = subprocess.Popen([sys.executable, "-m", "pyro_vae", *words], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run/checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.1)
    # Ctrl-C of a terminal reaches all processes.
    subprocess.run(["pkill", f"-{end}", "-P", str(process.pid)], check=True)
    if end == "INT":
        process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert (process.returncode, err.count("\n")) == (status, 1), err
    assert err.startswith(said)


def test_more_processes_than_images_are_refused(tmp_path):
    said = refusal("train", "digits", *TINY, "--batch-size", 4, "--processes", 5, "--out", tmp_path / "run")
    assert "expected --processes to be at most its 4 images, got 5" in said
    assert not (tmp_path / "run").exists()
