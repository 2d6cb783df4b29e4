"""The slopes of the literature's benchmark, by the functions of the benchmark that draws them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gradient_snr as example


@pytest.mark.slow
def test_signal_to_noise_goes_as_theory_says():
    """Rainforth et al. (2018), Tucker et al. (2019): -1/2 pathwise, +1/2 DReG and the model, sqrt(M / K) MIWAE."""
    benchmark = example.Benchmark()
    table = example.measure(benchmark, particles=[64, 256], gradients=["pathwise", "dreg"])
    found = example.slopes(table, example.measure_miwae(benchmark, repeats=5))
    assert ((found.measured - found.theory).abs() < 0.1).all(), found
    assert (table.distance["phi", "pathwise"] < 2 * table.chance["phi", "pathwise"]).all()


def test_sticking_the_landing_is_far_off_where_the_guides_family_is_wrong():
    """Quiet, and wrong: many times further from the unbiased gradient than chance takes it."""
    table = example.measure(example.Benchmark(), particles=[16], gradients=["stl", "dreg"], repeats=5)
    assert table.distance["phi", "stl", 16] > 10 * table.chance["phi", "stl", 16]
