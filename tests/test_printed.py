"""What results print: statements that fit a terminal, and tables for a notebook, with the numbers that they have."""

from __future__ import annotations

import re
from dataclasses import is_dataclass, replace
from xml.etree import ElementTree

import pyro
import pytest
import torch

import pyro_vae as pv
from pyro_vae.printed import COLUMNS, Printed

pytestmark = pytest.mark.filterwarnings("ignore:.*k-hat", "ignore:.*did not reach an error")


@pytest.fixture(scope="module")
def results():
    pyro.set_rng_seed(0)
    vae = pv.mlp_vae((5,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
    x = torch.randn(20, 5)
    often = {"progress": False, "seed": 0}
    records: list[Printed] = []

    class Keep(pv.Callback):
        def on_epoch(self, record):
            records.append(record)

    pv.fit(vae, x, pv.ELBO(), epochs=1, callbacks=[Keep()], **often)
    found = [
        pv.Estimate.of(torch.tensor([1.0, 2.0, 3.0])),
        pv.Estimate.of(torch.tensor([1.0])),
        pv.Evidence.from_weights(torch.tensor([[0.0, 0.0], [0.0, -torch.inf]])),
        pv.log_likelihood(vae, x, 100, **often),
        pv.log_likelihood(vae, x, error=0.1, **often),
        pv.ais(vae, x, 5, 4, **often),
        pv.bdmc(vae, x, 5, 4, **often),
        pv.calibrate(vae, x, 20, **often),
        pv.calibrate(vae, x, 20, refine=True, **often),
        pv.inference_gaps(vae, x, 20, num_steps=2, **often),
        pv.decompose_elbo(vae, x, 5, **often),
        pv.expect(vae, x, "z", 50, **often),
    ]
    return found + records


def cells(result):
    """The rows of a notebook's table, which is well-formed."""
    rows = ElementTree.fromstring(result._repr_html_()).iter("tr")
    return {row.find("th").text: row.find("td").text for row in rows}


def test_every_class_of_results_is_here(results):
    classes = [Printed]
    for each in classes:
        classes += each.__subclasses__()
    ours = {each for each in classes[1:] if each.__module__.startswith("pyro_vae.")}
    assert {type(each) for each in results} == ours
    public = {each for each in vars(pv).values() if isinstance(each, type) and is_dataclass(each)}
    assert public <= ours


def test_statements_fit_a_terminal_and_show_no_tensors(results):
    for result in results:
        assert repr(result) == str(result)
        assert max(map(len, str(result).splitlines())) <= COLUMNS
        for text in (str(result), result._repr_html_()):
            assert not re.search(r"tensor\(|object at|DataFrame|\N{NO-BREAK SPACE}", text), text


def test_a_line_ends_between_phrases(results):
    for result in results:
        assert not re.search(r"[^,;\n]\n  [^(+-]|[(]\n", str(result)), result


def test_tables_have_the_numbers_of_the_results(results):
    estimate, one, zeros, plain, stated, annealed, sandwich, calibration, refined, gaps, parts, mean, record = (
        cells(each) for each in results
    )
    assert estimate == {"estimate": "2.00 ± 0.58", "95% interval": "0.87 to 3.13"}
    assert list(one) == ["estimate"]
    assert zeros["weights of zero"] == "at 1 data" and zeros["data N"] == "2"
    log_p = results[3]
    assert plain["log p(x), nats per datum"] == f"{log_p.mean:.2f} ± {log_p.standard_error:.2f}"
    assert plain["samples K of a datum"] == "100" and plain["data with k-hat > 0.7"].endswith("%")
    assert "on average" in stated["samples K of a datum"]
    assert annealed["steps"] == "5" and "lower bound, nats per datum" in annealed
    assert sandwich["chains of a datum"] == "4" and sandwich["gap"] == str(results[6].gap)
    assert "of 2 dimensions" in calibration["verdict"] and "verdict" not in refined
    assert gaps["amortisation gap"] == str(results[9].amortisation)
    assert parts["dimension-wise KL"] == str(results[10].dimension_wise_kl)
    assert cells(replace(results[10], dimension_wise_kl=None))["dimension-wise KL"] == "unknown"
    assert mean["shape of E[f(z) | x]"] == "(20, 2)"
    assert record["bound"] == f"{results[12].bound:.4g}" and record["epoch"] == "1"


def test_what_a_table_shows_is_escaped():
    class Odd(Printed):
        def _rows(self):
            return {"a < b": "<script>alert(1)</script> & c"}

    assert "<script>" not in Odd()._repr_html_()
    assert cells(Odd()) == {"a < b": "<script>alert(1)</script> & c"}
