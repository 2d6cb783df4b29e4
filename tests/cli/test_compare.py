"""compare: its table, printed and as CSV, is that of pv.compare on the trained networks."""

import io
import math
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers.command_line import FIGURES, pyro_vae, refusal
from rich.console import Console

import pyro_vae as pv
from pyro_vae.cli.tables import format_comparison


def test_compare_prints_what_it_writes(run):
    status, out, err = pyro_vae("compare", run, "--num-images", 100, "--repeats", 3)
    assert (status, err) == (0, "")
    table = pd.read_csv(run / "compare.csv")
    rows = [line.rsplit(maxsplit=8) for line in out.splitlines() if re.search(r"\d ± \d", line)]
    names = ["bound_se", "gap", "estimator_std", "grad_snr_model", "grad_snr_guide"]
    expected = [
        [f"{row['bound']:.2f}", "±"]
        + [f"{row[name]:.{2 if abs(row[name]) < 100 else 0}f}" for name in names]
        + [f"{row['milliseconds']:.0f}"]
        for row in table.to_dict("records")
    ]
    assert [row[1:] for row in rows] == expected
    labels = [f"{row.objective} {row.particles}" for row in table.itertuples()]
    assert [" ".join(row[0].split()) for row in rows] == labels
    assert len(rows) == 8
    assert "…" not in out
    assert max(map(len, out.splitlines()[:-6])) <= 80
    caption = " ".join(out.split())
    assert "mean bound on log p(x) of 100 test images in nats per datum" in caption
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
    Console(file=out).print(format_comparison(pd.DataFrame(numbers, index=index), 500, 10))
    row = ["ELBO,", "closed-form", "KL", "1", "-12345.68", "±", "123.46", "123", "123", "123", "inf", "123457"]
    assert row in [line.split() for line in out.getvalue().splitlines()]


@pytest.mark.parametrize("option", ["--num-images", "--repeats"])
def test_compare_refuses_a_number_too_small(run, option):
    assert option in refusal("compare", run, option, 1)
