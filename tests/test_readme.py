"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.filterwarnings("ignore:.*Pareto k-hat", "ignore::FutureWarning:arviz")
def test_the_lines_of_python_run(tmp_path, monkeypatch, capsys):
    import pyro_vae as pv

    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(blocks[0], names)
    assert (tmp_path / "reconstructions.png").stat().st_size > 2000
    assert "IWAE" in capsys.readouterr().out
    names |= {"pyro": __import__("pyro"), "my_model": names["vae"].model, "my_guide": names["vae"].guide}
    exec(blocks[1], names)
    assert names["log_w"].shape == (1000, len(names["x"]))
    assert names["svi"].step(names["x"]) > 0
    parts: dict = {"pv": pv}
    exec(blocks[2], parts)
    assert parts["vae"].generate(3).shape == (3, 5)
    exec(blocks[3].replace("epochs=60", "epochs=2"), names)
    assert torch.equal(names["vae"].embed(names["x"]), names["again"].embed(names["x"]))
    capsys.readouterr()
    exec(blocks[4], names)
    printed = capsys.readouterr().out
    for start in ("log p(x) = -", "log p(x) >= -", "log p(x) - ELBO = ", "ELBO -"):
        assert any(line.startswith(start) for line in printed.splitlines()), start
    assert names["groups"]["posterior"]["z"].shape == (1, 500, 20, 2)
    exec(blocks[5], names | {"torch": torch})
    bound = pv.IWAE(1000).reduce(names["log_w"]).mean().item()
    assert bound == pytest.approx(names["svi"].evaluate_loss(names["x"]) / -len(names["x"]), abs=1.0)
