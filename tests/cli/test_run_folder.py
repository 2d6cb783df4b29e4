"""The run folder: which folders train may continue, and which the other commands refuse."""

import json
from importlib.metadata import version

import pytest
import typer
from helpers.command_line import TINY, pyro_vae, refusal

from pyro_vae import cli
from pyro_vae.cli.run_folder import OLD_VALUES


def test_config_holds_every_option(trained):
    given = {"hidden_dims": "16", "batch_size": 256, "lr": 0.01, "epochs": 3, "data": "digits", "binarize": "dynamic"}
    config = json.loads((trained[0] / "config.json").read_text())
    options = {option.name for option in typer.main.get_command(cli.app).commands["train"].params}
    assert config.keys() == options - {"out", "device", "number", "help"} | {"pyro_vae"}
    assert config["pyro_vae"] == version("pyro_vae")
    assert given.items() <= config.items()


def test_runs_of_before_there_was_a_choice_go_on(run):
    config = json.loads((run / "config.json").read_text())
    for name in OLD_VALUES:
        del config[name]
    (run / "config.json").write_text(json.dumps(config))
    assert pyro_vae("train", "digits", *TINY, "--epochs", 4, "--root", config["root"], "--out", run)[0] == 0


def test_a_run_refuses_other_options(run):
    said = refusal("train", "digits", *TINY, "--epochs", 3, "--out", run, "--latent-dim", 3)
    assert f"expected latent_dim=2, as in the run in {run}, got latent_dim=3" in said
    assert "--out" in said
    assert "holds 3 epochs: expected at least as many in all, got epochs=2" in refusal(
        "train", "digits", *TINY, "--epochs", 2, "--out", run
    )


def test_train_refuses_the_folder_of_something_else(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("the only copy")
    assert "thesis to be a run folder, got a folder without config.json" in refusal(
        "train", "digits", *TINY, "--out", "thesis"
    )
    (tmp_path / "thesis" / "config.json").write_text("{}")
    assert "got other content" in refusal("train", "digits", *TINY, "--out", "thesis")
    (tmp_path / "thesis" / "chapter.tex").unlink()
    assert "got other content" in refusal("train", "digits", *TINY, "--out", "thesis")
    assert "--out" in refusal("train", "digits", *TINY, "--out", "thesis/config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_dim": "2"}, "expected ['latent_dim'] to be an integer, at least 1, got '2'"),
        ({"latent_dim": 0}, "expected ['latent_dim'] to be an integer, at least 1, got 0"),
        ({"latent_dim": 2**62}, "can't be taken"),
        ({"network": "rnn"}, "expected ['network'] to be 'mlp' or 'conv', got 'rnn'"),
        ({"hidden_dims": "wide"}, "can't be taken: expected --hidden-dims to be integers"),
        ({"scale": None}, "expected ['scale'] to be text, got None"),
        ({"new": 1}, "expected no other option, got 'new'. Restore it"),
        ({"new": 1, "pyro_vae": "10.0"}, "pyro_vae 10.0 wrote it, a later version: update pyro_vae"),
    ],
)
def test_a_config_of_other_values_is_refused(run, change, message):
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    said = refusal("sample", run)
    assert message in said
    assert str(path) in said


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"text"', "[" * 100_000, "{}", "\0"])
def test_a_config_of_other_content_is_refused(run, text):
    (run / "config.json").write_text(text)
    assert str(run / "config.json") in refusal("sample", run)


def test_a_missing_option_is_named(run):
    config = json.loads((run / "config.json").read_text())
    for name in config.keys() - OLD_VALUES.keys():
        (run / "config.json").write_text(json.dumps({key: config[key] for key in config if key != name}))
        assert f"expected ['{name}'] to be " in refusal("sample", run)


@pytest.mark.parametrize("command", ["compare", "sample"])
def test_commands_refuse_what_is_not_a_run(command, run, tmp_path):
    assert "no such folder" in refusal(command, "nowhere")
    assert "without config.json" in refusal(command, tmp_path)
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
