"""The README's Python runs as it stands, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pyro_vae as pv

WORDS, NUMBERS = re.compile(r"[A-Za-z][\w-]*"), re.compile(r"-?\d+\.?\d*")
README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Pareto k-hat")
def test_the_lines_of_python_run(tmp_path, monkeypatch, capsys):
    first, own_program = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(first, names)
    assert (tmp_path / "bounds.png").stat().st_size > 2000
    printed = capsys.readouterr().out
    shown = re.search(r"```text\n(.*?)```", README.read_text(), re.S)[1]
    # Another machine rounds otherwise: after 50 epochs, and in single precision, the last digits differ.
    assert WORDS.findall(printed) == WORDS.findall(shown)
    for number, expected in zip(NUMBERS.findall(printed), NUMBERS.findall(shown), strict=True):
        assert float(number) == pytest.approx(float(expected), abs=1.0) or float(expected) > 100, (number, expected)
    assert max(map(len, printed.splitlines())) <= 80
    vae = names["vae"]
    names |= {"pyro": __import__("pyro"), "torch": __import__("torch"), "my_model": vae.model, "my_guide": vae.guide}
    exec(own_program, names | {"parameters": list(vae.parameters())}, names)
    assert names["log_w"].shape == (1000, len(names["x"]))
    assert names["svi"].step(names["x"]) > 0
    assert names["step"](names["x"]).item() > 0
    bound = pv.IWAE(1000).reduce(names["log_w"]).mean().item()
    assert bound == pytest.approx(names["svi"].evaluate_loss(names["x"]) / -len(names["x"]), abs=1.0)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README.read_text()):
        assert (README.parent / target).exists(), target
