"""evaluate: the printed report, its files, and refusals before any work."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command_line import QUICK, TINY, pyro_vae, refusal

import pyro_vae as pv

EVALUATED = {"bounds_and_log_likelihood.png", "pareto_k.png", "active_units.png"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:arviz")
def test_evaluate_prints_what_it_writes(run):
    status, out, err = pyro_vae("evaluate", run, *QUICK)
    assert (status, err) == (0, "")
    report = json.loads((run / "evaluation.json").read_text())
    verdict, simulated, annealed, *table = out.splitlines()
    assert "\n".join([verdict, simulated, annealed]) == report["verdict"]
    lines = [line for line in table if re.search(r"\d ± \d", line)]
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
    likelihood = numbers["log p(x), refined, K = 50"]
    assert f" {likelihood:.2f} ± " in verdict
    low = np.mean([k is not None and k <= 0.7 for k in report["per_datum"]["pareto_k"]])
    assert verdict.startswith("log p(x) = " if low >= 0.99 else "log p(x) >= ")
    assert "4 images simulated" in simulated
    assert "AIS minus this estimate" in annealed
    assert numbers["ELBO"] < numbers["IWAE, K = 64"]
    assert numbers["log p(x) - ELBO"] == pytest.approx(likelihood - numbers["ELBO"])
    assert likelihood == pytest.approx(np.mean(report["per_datum"]["log_likelihood"]))
    assert len(report["per_datum"]["pareto_k"]) == 40
    assert len(report["per_datum"]["ais"]) == 4
    assert report["latent_dimensions"] == 2
    assert set(report["minutes"]) >= {"ais", "sandwich", "log_likelihood", "gaps", "decomposition"}
    paths = [Path(path) for path in out.splitlines()[-5:]]
    assert {path.name for path in paths} == EVALUATED | {"evaluation.json", "evaluation.nc"}
    assert all(path.is_file() for path in paths)
    assert max(map(len, out.splitlines()[:-5])) <= 80
    import arviz

    groups = arviz.from_netcdf(run / "evaluation.nc")
    assert groups["posterior"]["z"].shape == (1, 200, 20, 2)
    pyro_vae("train", "digits", *TINY, "--epochs", 4, "--out", run)  # and a report of other parameters is gone
    assert not any(path.exists() for path in paths)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:arviz")
def test_one_seed_gives_one_report(run):
    reports = []
    for _ in range(2):
        assert pyro_vae("evaluate", run, *QUICK)[0] == 0
        reports.append(json.loads((run / "evaluation.json").read_text()) | {"minutes": 0})
    assert reports[0] == reports[1]


def test_evaluate_refuses_before_it_works(run):
    assert "--num-samples" in refusal("evaluate", run, "--num-samples", 29)
    assert "nowhere to be a run folder, got no such folder" in refusal("evaluate", "nowhere")
    (run / "checkpoint.pt").unlink()
    assert "Train first" in refusal("evaluate", run)
    foreign = pv.mlp_vae((3,), latent_dim=2)
    x = torch.rand(8, 3).round()
    pv.fit(foreign.model, foreign.guide, x, pv.ELBO(), epochs=1, checkpoint=run / "checkpoint.pt")
    assert "is of another program" in refusal("evaluate", run)
