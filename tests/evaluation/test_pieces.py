"""Data of a guide with parameters for each datum are never split into minibatches."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.programs import wide
from helpers.quick import slow_but
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide

import pyro_vae as pv
from pyro_vae.engine.program import Program
from pyro_vae.evaluation import pieces


@pytest.mark.parametrize("kind", slow_but(["rows by index"], ["all rows", "rows by index", "one network"]))
def test_guides_with_parameters_for_each_datum_are_run_whole(monkeypatch, kind):
    """In a minibatch, such a guide would use another datum's parameters, without any error where it indexes them."""
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


@pytest.mark.parametrize("made", ["pyro.param", "AutoNormal", "AutoNormalMessenger"])
def test_the_first_run_of_a_guide_makes_its_parameters_for_all_data(made):
    """A run on some of the data would make them for these alone, and no later run could change that."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", lambda: x / 2)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.8))

    if made != "pyro.param":
        guide = getattr(pyro.infer.autoguide, made)(model, init_scale=0.8)
    x = torch.linspace(-1, 1, 20)
    result = pv.log_likelihood(model, guide, x, 2000, seed=0)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x)
    assert (((result.per_datum - exact) / result.per_datum_error).abs() < 4).all()


def test_a_shape_that_does_not_fit_is_not_called_a_value_outside_the_support():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    with pytest.raises(
        ValueError, match=r"fits its Normal of batch shape \(5,\) and event shape \(3,\), got one of shape \(5, 4\)"
    ) as caught:
        pv.log_weights(model, poutine.block(model, hide=["x"]), torch.zeros(5, 4), num_particles=2)
    assert "support" not in str(caught.value)


def normal_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_an_easy_guide_is_as_new_after_a_run_that_failed():
    """It keeps its plates, with their sizes, until a run ends well."""

    class Guide(EasyGuide):
        def guide(self, x):
            gain = pyro.param("gain", torch.tensor(0.5))
            with self.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(gain * x, 0.5**0.5))
                torch.ones(len(x)).matmul(z)  # which several particles at once don't fit

    guide, x = Guide(normal_model), torch.randn(25)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        pv.IWAE(3).bound(normal_model, guide, x)
    for rows in (x[:7], x[5:], torch.randn(40)):  # the guide is the posterior
        exact = dist.Normal(0.0, 2**0.5).log_prob(rows)
        bound = pv.IWAE(3, vectorize_particles=False).bound(normal_model, guide, rows)
        assert torch.allclose(bound, exact, atol=1e-5)
    history = pv.fit(normal_model, guide, x, pv.ELBO(kl="monte_carlo"), epochs=1, batch_size=10, lr=1e-9)
    assert history.train_bound.item() == pytest.approx(dist.Normal(0.0, 2**0.5).log_prob(x).mean().item(), abs=1e-5)


def test_data_inside_a_program_count_as_elements_in_memory():
    def model():
        with pyro.plate("data", 2):
            pyro.sample("x", dist.Normal(torch.zeros(500), 1.0).to_event(1), obs=torch.ones(2, 500))

    program = pieces.program_on(model, lambda: None, ())
    assert pieces.rows_at_once(program.args) == pieces.ELEMENTS_AT_ONCE // 500
    assert not pieces.is_divisible(program)  # though the data are equal
