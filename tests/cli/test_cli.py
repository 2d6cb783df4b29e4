"""The command line, run for real on tiny networks: what it writes, prints, goes on with and refuses."""

import contextlib
import io
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import entry_points, version
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
import typer
from matplotlib.image import imread
from rich.console import Console

import pyro_vae as pv
from pyro_vae import cli

TINY = ["--hidden-dims", "16", "--batch-size", "256", "--lr", "0.01"]
FIGURES = {"training.png", "reconstructions.png", "samples.png", "latent_space.png"}


@pytest.fixture(autouse=True)
def terminal(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)


def pyro_vae(*arguments):
    """Exit status, stdout and stderr of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code or 0, out.getvalue(), err.getvalue()


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(*arguments):
    """What a refused command says: exit status 2, one line on stderr, and nothing else on screen or disk."""
    before = files(Path.cwd())
    status, out, err = pyro_vae(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert files(Path.cwd()) == before
    return err


def history(run):
    return pd.read_csv(run / "history.csv", index_col="epoch")


def bounds(run):
    return history(run).drop(columns="seconds")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three epochs, and what training printed."""
    run = tmp_path_factory.mktemp("trained") / "run"
    status, out, err = pyro_vae("train", "digits", *TINY, "--epochs", 3, "--out", run)
    assert (status, err) == (0, "")
    return run, out


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run, to work on."""
    return shutil.copytree(trained[0], tmp_path / "run")


def test_train_writes_a_run(trained):
    run, out = trained
    assert {path.name for path in run.iterdir()} == {"config.json", "checkpoint.pt", "history.csv", "figures"}
    assert len(history(run)) == 3
    assert history(run).notna().all(axis=None)
    last = history(run).iloc[-1]
    line, *paths = out.splitlines()
    assert line.startswith("3 epochs: ELBO, closed-form KL, K = 1:")
    assert f"{last.train_bound:.2f} (train), {last.validation_bound:.2f} (validation) nats per datum" in line
    assert {Path(path) for path in paths} == {run / "figures" / name for name in FIGURES}
    for path in paths:
        height, width, _ = imread(path).shape
        assert width > 900
        assert height > 300


def test_config_holds_every_option(trained):
    given = {"hidden_dims": "16", "batch_size": 256, "lr": 0.01, "epochs": 3, "data": "digits", "binarize": "dynamic"}
    config = json.loads((trained[0] / "config.json").read_text())
    options = {option.name for option in typer.main.get_command(cli.app).commands["train"].params}
    assert config.keys() == options - {"out", "help"} | {"pyro_vae"}
    assert config["pyro_vae"] == version("pyro_vae")
    assert given.items() <= config.items()


def test_the_same_command_gives_the_same_run(trained, tmp_path):
    pyro_vae("train", "digits", *TINY, "--epochs", 3)
    run = tmp_path / "runs" / "digits"  # the folder where no --out is given
    pd.testing.assert_frame_equal(bounds(run), bounds(trained[0]), check_exact=True)
    for name in FIGURES:
        assert (run / "figures" / name).read_bytes() == (trained[0] / "figures" / name).read_bytes()


def test_another_seed_gives_another_run(trained, tmp_path):
    pyro_vae("train", "digits", *TINY, "--epochs", 1, "--seed", 1, "--out", tmp_path / "other")
    assert not np.isclose(bounds(tmp_path / "other").loc[1], bounds(trained[0]).loc[1]).any()


def test_more_epochs_go_on_to_where_an_unbroken_run_ends(trained, tmp_path):
    run = tmp_path / "run"
    pyro_vae("train", "digits", *TINY, "--epochs", 1, "--out", run)
    first = (run / "history.csv").read_text()
    pyro_vae("compare", run, "--num-images", 5, "--repeats", 2)
    status, out, _ = pyro_vae("train", "digits", *TINY, "--epochs", 3, "--out", run)
    assert status == 0
    assert out.startswith(f"{run} has 1 epoch: going on.")
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


def test_every_kind_of_network_likelihood_and_objective(tmp_path):
    conv = ["--network", "conv", "--channels", "4", "--latent-dim", 3, "--validation", 0, "--batch-size", 512]
    gaussian = ["--likelihood", "gaussian", "--scale", "0.5", "--objective", "iwae", "--particles", 2]
    run = tmp_path / "run"
    status, out, _ = pyro_vae("train", "digits", *conv, *gaussian, "--epochs", 1, "--out", run)
    assert status == 0
    assert out.startswith("1 epoch: IWAE, K = 2:")
    assert "validation" not in out
    assert json.loads((run / "config.json").read_text())["binarize"] == "none"
    assert {path.name for path in (run / "figures").iterdir()} == FIGURES - {"latent_space.png"}
    # nats: 64 pixels of N(x | about 0.3, 0.5^2), with x in [0, 1]
    assert -64 < history(run).train_bound.item() < -64 * math.log(0.5 * math.sqrt(2 * math.pi))
    assert pyro_vae("compare", run, "--num-images", 5, "--repeats", 2)[0] == 0


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
    assert out.startswith(f"{best + 2} epochs, the best {best}: ELBO")
    assert f"{row.train_bound:.2f} (train), {row.validation_bound:.2f} (validation)" in out
    until_best = tmp_path / "until_best"
    pyro_vae(*command, "--epochs", best, "--out", until_best)
    kept, expected = (cli._load(folder)[1].state_dict() for folder in (run, until_best))
    assert all(torch.equal(kept[name], value) for name, value in expected.items())
    assert (run / "figures" / "samples.png").read_bytes() == (until_best / "figures" / "samples.png").read_bytes()
    again = pyro_vae(*command, "--patience", 2)
    assert again[0] == 0
    assert again[1] == f"{run} has {best + 2} epochs: nothing left to train.\n{out}"
    assert "going on." in pyro_vae(*command, "--patience", 3)[1]
    assert len(history(run)) > best + 2
    config = json.loads((run / "config.json").read_text())
    assert config["patience"] == 3
    assert "a run with patience=3, and patience=None is asked for" in refusal(*command)


def test_runs_of_before_there_was_a_choice_go_on(run):
    config = json.loads((run / "config.json").read_text())
    for name in cli.BEFORE:
        del config[name]
    (run / "config.json").write_text(json.dumps(config))
    assert pyro_vae("train", "digits", *TINY, "--epochs", 4, "--root", config["root"], "--out", run)[0] == 0


def test_compare_prints_what_it_writes(run):
    status, out, err = pyro_vae("compare", run, "--num-images", 100, "--repeats", 3)
    assert (status, err) == (0, "")
    table = pd.read_csv(run / "compare.csv")
    rows = [line.rsplit(maxsplit=8) for line in out.splitlines() if re.search(r"\d ± \d", line)]
    names = ["bound_se", "gap", "estimator_std", "grad_snr_model", "grad_snr_guide"]
    expected = [
        [f"{row['bound']:.2f}", "±"] + [f"{row[name]:.2f}" for name in names] + [f"{row['milliseconds']:.0f}"]
        for row in table.to_dict("records")
    ]
    assert [row[1:] for row in rows] == expected
    labels = [f"{row.objective} {row.particles}" for row in table.itertuples()]
    assert [" ".join(row[0].split()) for row in rows] == labels
    assert len(rows) == 8
    assert "…" not in out
    assert max(map(len, out.splitlines()[:-6])) <= 80
    caption = " ".join(out.split())
    assert "nats per datum, mean of 100 test images" in caption
    assert "over 3 repeats" in caption
    paths = [Path(path) for path in out.splitlines()[-6:]]
    assert paths == [run / "compare.csv", *sorted(run / "figures" / name for name in FIGURES | {"bounds.png"})]
    assert all(path.is_file() for path in paths)


def test_compare_measures_the_trained_networks_on_the_test_images(run):
    pyro_vae("compare", run, "--repeats", 2)
    written = pd.read_csv(run / "compare.csv", index_col=["objective", "particles"])
    digits = pv.data.load("digits", binarize="dynamic")
    vae = pv.mlp_vae(digits.event_shape, latent_dim=2, hidden_dims=(16,))
    state = torch.load(run / "checkpoint.pt", weights_only=True)["parameters"]
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            owner, _, rest = name.partition(".")
            parameter.copy_(state[f"{owner}$$${rest}"])
    table = pv.compare(vae.model, vae.guide, digits.test.x, repeats=2, seed=0)
    drop = ["milliseconds"]
    pd.testing.assert_frame_equal(written.drop(columns=drop), table.drop(columns=drop), rtol=1e-6)


def test_numbers_of_many_digits_fit_80_columns():
    index = pd.MultiIndex.from_tuples([("ELBO, closed-form KL", 1)], names=["objective", "particles"])
    numbers = {
        "bound": -12345.678,
        "bound_se": 123.456,
        "gap": 123.456,
        "pareto_k": 0.51,
        "estimator_std": 123.456,
        "grad_snr_model": 123.456,
        "grad_snr_guide": math.inf,
        "milliseconds": 123456.7,
    }
    out = io.StringIO()
    Console(file=out).print(cli._format(pd.DataFrame(numbers, index=index), 500, 10))
    row = ["ELBO,", "closed-form", "KL", "1", "-12345.68", "±", "123.46", "123", "123", "123", "inf", "123457"]
    assert row in [line.split() for line in out.getvalue().splitlines()]


QUICK = ["--num-images", 40, "--num-samples", 50, "--ais-images", 4, "--ais-steps", 10, "--ais-chains", 2]
EVALUATED = {"bounds_and_log_likelihood.png", "pareto_k.png", "active_units.png"}


@pytest.mark.filterwarnings("ignore::FutureWarning:arviz")
def test_evaluate_prints_what_it_writes(run):
    status, out, err = pyro_vae("evaluate", run, *QUICK)
    assert (status, err) == (0, "")
    report = json.loads((run / "evaluation.json").read_text())
    lines = [line for line in out.splitlines() if re.search(r"\d ± \d", line)]
    assert len(lines) == len(report["nats_per_datum"])
    for line, row in zip(lines, report["nats_per_datum"], strict=True):
        value, _, error, *number = line.replace(row["quantity"], "").strip(" -").split()[:5]
        sign = -1 if line.replace(row["quantity"], "").split()[0].startswith("-") and row["value"] < 0 else 1
        assert sign * float(value.lstrip("-")) == pytest.approx(
            row["value"], abs=0.5 * 10 ** -len(value.partition(".")[2]) + 1e-9
        )
        assert float(error) == pytest.approx(
            row["standard_error"], abs=0.5 * 10 ** -len(error.partition(".")[2]) + 1e-9
        )
        assert str(row["num_data"]) in number
    numbers = {row["quantity"]: row["value"] for row in report["nats_per_datum"] if row["data"] == "all"}
    assert numbers["parts of the ELBO: sum"] == pytest.approx(
        numbers["reconstruction"] - numbers["mutual information"] - numbers["KL of aggregate to prior"]
    )
    likelihood = numbers["log p(x), IS, K = 50"]
    assert numbers["ELBO"] < numbers["IWAE, K = 64"]
    assert numbers["log p(x) - ELBO"] == pytest.approx(likelihood - numbers["ELBO"])
    assert likelihood == pytest.approx(np.mean(report["per_datum"]["log_likelihood"]))
    assert len(report["per_datum"]["pareto_k"]) == 40
    assert len(report["per_datum"]["ais"]) == 4
    assert report["latent_dimensions"] == 2
    assert set(report["minutes"]) >= {"ais", "bdmc", "log_likelihood", "gaps", "decomposition"}
    paths = [Path(path) for path in out.splitlines()[-5:]]
    assert {path.name for path in paths} == EVALUATED | {"evaluation.json", "evaluation.nc"}
    assert all(path.is_file() for path in paths)
    assert max(map(len, out.splitlines()[:-5])) <= 80
    import arviz

    groups = arviz.from_netcdf(run / "evaluation.nc")
    assert groups["posterior"]["z"].shape == (1, 200, 20, 2)
    assert pyro_vae("evaluate", run, *QUICK)[0] == 0
    again = json.loads((run / "evaluation.json").read_text())
    assert {**again, "minutes": 0} == {**report, "minutes": 0}  # one seed, one report
    pyro_vae("train", "digits", *TINY, "--epochs", 4, "--out", run)  # and a report of other parameters is gone
    assert not any(path.exists() for path in paths)


def test_evaluate_refuses_before_it_works(run):
    assert "--num-samples" in refusal("evaluate", run, "--num-samples", 24)
    assert "not a run" in refusal("evaluate", "nowhere")
    (run / "checkpoint.pt").unlink()
    assert "Train first" in refusal("evaluate", run)
    foreign = pv.mlp_vae((3,), latent_dim=2)
    x = torch.rand(8, 3).round()
    pv.fit(foreign.model, foreign.guide, x, pv.ELBO(), epochs=1, checkpoint=run / "checkpoint.pt")
    assert "is of another program" in refusal("evaluate", run)


def test_sample(run):
    drawn = (run / "figures" / "samples.png").read_bytes()
    status, out, err = pyro_vae("sample", run)
    assert (status, out, err) == (0, f"{run / 'figures' / 'samples.png'}\n", "")
    assert (run / "figures" / "samples.png").read_bytes() == drawn  # train draws the same number, with seed 0
    for arguments in (["--seed", 1], ["--num-samples", 3]):
        pyro_vae("sample", run, *arguments)
        assert (run / "figures" / "samples.png").read_bytes() != drawn
        drawn = (run / "figures" / "samples.png").read_bytes()


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
    assert err == f"stopped by Ctrl-C: {run} holds 1 epoch of 3. The same command goes on.\n"
    assert out.startswith("1 epoch: ")
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


def test_ctrl_c_by_signal(tmp_path):
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
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130, err
    assert err.startswith("stopped by Ctrl-C: run holds ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["digist"], "did you mean 'digits'?"),
        (["digits", "--network", "mpl"], "'mlp', 'conv'"),
        (["digits", "--binarize", "sometimes"], "'dynamic'"),
        (["digits", "--epoch", 1], "--epochs"),
        (["digits", "--epochs", 0], "--epochs"),
        (["digits", "--epochs"], "requires an argument"),
        (["digits", "--lr", 0], "positive --lr"),
        (["digits", "--lr", "nan"], "positive --lr"),
        (["digits", "--hidden-dims", "400;200"], "400,200"),
        (["digits", "--hidden-dims", "0"], "positive integers"),
        (["digits", "--network", "conv", "--channels", "a"], "--channels"),
        (["digits", "--likelihood", "gaussian", "--scale", "lerned"], "learned or per_pixel"),
        (["digits", "--likelihood", "gaussian", "--scale", "-1"], "positive number"),
        (["digits", "--scale", "0.1"], "needs --likelihood gaussian"),
        (["digits", "--channels", "8"], "needs --network conv"),
        (["digits", "--network", "conv", "--hidden-dims", "8"], "needs --network mlp"),
        (
            ["digits", "--objective", "iwae", "--warm-up", 5],
            "--warm-up needs --objective elbo or elbo-monte-carlo, got",
        ),
        (["digits", "--objective", "iwae", "--free-bits", 0.1], "--free-bits needs --objective elbo or"),
        (["digits", "--free-bits", "inf"], "free_bits to be a number of nats"),
        (["digits", "--warm-up", -1], "--warm-up"),
        (["digits", "--patience", 0], "--patience"),
        (["digits", "--patience", 3, "--validation", 0], "--patience needs images for validation, got none"),
        (["digits", "--binarize", "none"], "zeros and ones"),
        (["digits", "--validation", 5000], "below the 1547"),
        (["binarized_mnist", "--root", "nowhere"], "nowhere"),
        (["binarized_mnist"], "data"),
        ([], "DATA"),
    ],
)
def test_train_refuses_before_it_writes(tmp_path, arguments, said):
    assert said in refusal("train", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_run_refuses_other_options(run):
    said = refusal("train", "digits", *TINY, "--epochs", 3, "--out", run, "--latent-dim", 3)
    assert "latent_dim=2, and latent_dim=3" in said
    assert "--out" in said
    assert "3 epochs, and 2 in all" in refusal("train", "digits", *TINY, "--epochs", 2, "--out", run)


def test_train_refuses_the_folder_of_something_else(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("the only copy")
    assert "not a run" in refusal("train", "digits", *TINY, "--out", "thesis")
    (tmp_path / "thesis" / "config.json").write_text("{}")
    assert "something else" in refusal("train", "digits", *TINY, "--out", "thesis")
    (tmp_path / "thesis" / "chapter.tex").unlink()
    assert "something else" in refusal("train", "digits", *TINY, "--out", "thesis")
    assert "--out" in refusal("train", "digits", *TINY, "--out", "thesis/config.json")


@pytest.mark.parametrize("command", ["compare", "sample"])
def test_commands_refuse_what_is_not_a_run(command, run, tmp_path):
    assert "no such folder" in refusal(command, "nowhere")
    assert "no config.json" in refusal(command, tmp_path)
    whole = (run / "checkpoint.pt").read_bytes()
    (run / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    assert "truncated" in refusal(command, run)
    (run / "checkpoint.pt").unlink()
    assert "found none" in refusal(command, run)
    for text in ("{", "[]", '{"lr": 0.1}', "\udcff"):
        (run / "config.json").write_bytes(text.encode(errors="surrogateescape"))
        assert "config.json" in refusal(command, run)


def test_train_refuses_a_truncated_checkpoint(run):
    whole = (run / "checkpoint.pt").read_bytes()
    (run / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    assert "truncated" in refusal("train", "digits", *TINY, "--epochs", 4, "--out", run)


@pytest.mark.parametrize("option", ["--num-images", "--repeats"])
def test_compare_refuses_a_number_too_small(run, option):
    assert option in refusal("compare", run, option, 1)


def test_divergence_is_no_bug_and_does_not_take_the_folder(tmp_path):
    run = tmp_path / "run"
    arguments = ["train", "digits", "--hidden-dims", "4", "--epochs", 1, "--out", run]
    status, out, err = pyro_vae(*arguments, "--lr", "1e30")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "learning rate too high" in err
    assert [path.name for path in run.iterdir()] == ["config.json"]
    assert pyro_vae(*arguments, "--lr", "1e-3")[0] == 0
    assert json.loads((run / "config.json").read_text())["lr"] == 1e-3


@pytest.mark.parametrize(("module", "name"), [(pv, "compare"), (pv.plots, "bounds")])
def test_a_bug_keeps_its_traceback(run, monkeypatch, module, name):
    def broken(*args, **kwargs):
        raise ValueError("a bug")

    monkeypatch.setattr(module, name, broken)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["compare", str(run)])


@pytest.mark.parametrize("command", ["train", "compare", "sample"])
def test_help_lists_every_option_with_its_default(command):
    status, out, _ = pyro_vae(command, "--help")
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80
    options = typer.main.get_command(cli.app).commands[command].params
    assert len(options) >= 3
    for option in options:
        entry = re.search(rf"^  {option.metavar or option.opts[0]} .*?(?=^  -|\Z)", out, re.MULTILINE | re.DOTALL)
        assert entry, option.name
        said = " ".join(entry[0].split())
        if option.name == "help":
            continue
        if option.required:
            assert "[required]" in said
        elif isinstance(option.show_default, str):
            assert f"[default: ({option.show_default})" in said
        elif option.is_flag:
            assert not option.default
        else:
            assert f"[default: {option.default}" in said
        assert (option.help or "").rstrip(".") in said


def test_help_names_the_data_sets():
    for name in pv.data.NAMES:
        assert name in cli.DATA_HELP


def test_version_and_entry_point():
    assert pyro_vae("--version")[:2] == (0, f"pyro-vae {version('pyro_vae')}\n")
    (script,) = entry_points(group="console_scripts", name="pyro-vae")
    assert script.load() is cli.main


def test_without_a_command_it_helps(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pyro-vae"])
    status, out, _ = pyro_vae()
    assert status == 0
    assert all(command in out for command in ("train", "compare", "sample"))
