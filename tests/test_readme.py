"""The README's Python runs as it stands, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pyro_vae as pv

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Pareto k-hat")
def test_the_lines_of_python_run(tmp_path, monkeypatch, capsys):
    first, own_program = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(first, names)
    assert (tmp_path / "reconstructions.png").stat().st_size > 2000
    printed = capsys.readouterr().out
    assert "IWAE" in printed and "log p(x) = -" in printed
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
