"""Data of a guide with parameters for each datum are never split into minibatches."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
from helpers.programs import wide

import pyro_vae as pv
from pyro_vae.engine.program import Program


@pytest.mark.parametrize("kind", ["all rows", "rows by index", "one network"])
def test_guides_with_parameters_for_each_datum_are_run_whole(monkeypatch, kind):
    """In a minibatch, such a guide would use another datum's parameters, without any error where it indexes them."""
    from pyro_vae.evaluation import pieces

    program = wide((3, 2, 12))
    loc = program.x @ program.A.T + program.c

    def guide(x):
        rows = pyro.param("loc", loc)
        with pyro.plate("data", len(x)) as index:
            at = {"all rows": rows, "rows by index": rows[index], "one network": x @ program.A.T + program.c}[kind]
            pyro.sample("z", dist.MultivariateNormal(at, scale_tril=program.L.tril()))

    assert pieces.is_divisible(Program(program.model, guide, (program.x,))) == (kind == "one network")
    monkeypatch.setattr(pieces, "ELEMENTS_AT_ONCE", 2000)
    exact = program.log_evidence()
    result = pv.log_likelihood(program.model, guide, program.x, 500, seed=0)
    assert (((result.per_datum - exact) / result.per_datum_error).abs() < 4.5).all()
    annealed = pv.ais(program.model, guide, program.x, 20, 64, start="guide", seed=0)
    assert (((annealed.per_datum - exact) / annealed.per_datum_error).abs() < 4.5).all()
    parts = pv.decompose_elbo(program.model, guide, program.x, 50, seed=0)
    assert abs(parts.elbo.value - program.exact_elbo().mean().item()) < 4 * parts.elbo.standard_error
    gaps = pv.inference_gaps(program.model, guide, program.x, 100, num_steps=20, seed=0)
    assert gaps.elbo.mean().item() == pytest.approx(program.exact_elbo().mean().item(), abs=0.1)
    table = pv.active_units(program.model, guide, program.x)
    assert table.variance.tolist() == pytest.approx(loc.var(0).tolist())
