"""Every evaluation of particles one by one: a program that takes no more dimensions, beside one that does."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.quick import slow_but
from torch.nn.functional import softmax

import pyro_vae as pv
from pyro_vae.evaluation.runs import run

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
QUIET = {"seed": 0, "progress": False}


def program(dim):
    """Networks that normalise over that dimension, as in the published code of many decoders."""
    pyro.set_rng_seed(1)
    pyro.clear_param_store()
    encoder, decoder = torch.nn.Linear(3, 4), torch.nn.Linear(2, 3)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(softmax(decoder(z), dim), 0.5).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        loc, log_scale = encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


def drawn(groups):
    """The draws of each group, as one array; simulated data have other noise in each run."""
    names = [("posterior", "z"), ("sample_stats", "log_weight"), ("log_likelihood", "x"), ("observed_data", "x")]
    return np.concatenate([groups[group][name].to_numpy().ravel() for group, name in names])


EVALUATIONS = {
    "log_likelihood": lambda p, **k: pv.log_likelihood(p, X, 30, **QUIET, **k).per_datum,
    "ais": lambda p, **k: pv.ais(*p, X, 8, 3, **QUIET, **k).log_weights,
    "ais from the guide": lambda p, **k: pv.ais(*p, X, 8, 3, start="guide", **QUIET, **k).log_weights,
    "bdmc": lambda p, **k: pv.bdmc(*p, X, 8, 3, **QUIET, **k).upper_per_datum,
    "inference_gaps": lambda p, **k: pv.inference_gaps(p, X, 30, num_steps=5, **QUIET, **k).best_elbo,
    "decompose_elbo": lambda p, **k: [
        e.value
        for e in vars(pv.decompose_elbo(p, X, 4, **QUIET, **k)).values()
        if e is not None and hasattr(e, "value")
    ],
    "active_units": lambda p, **k: pv.active_units(p, X, 5, seed=0, **k),
    "to_arviz": lambda p, **k: drawn(pv.to_arviz(p, X, 10, seed=0, **k)),
    "compare": lambda p, **k: pv.compare(p, X, repeats=2, **QUIET, **k)[["bound", "gap"]],
}


@pytest.mark.filterwarnings("ignore:.*Pareto k-hat")
@pytest.mark.parametrize("name", slow_but([n for n in EVALUATIONS if n not in ("compare", "bdmc")], EVALUATIONS))
def test_one_by_one_is_as_all_at_once(name):
    evaluation = EVALUATIONS[name]
    with pytest.raises(pv.PyroVAEError, match="vectorize_particles=False"):
        evaluation(program(dim=1))
    found, right = evaluation(program(dim=1), vectorize_particles=False), evaluation(program(dim=-1))
    if isinstance(found, pd.DataFrame):
        pd.testing.assert_frame_equal(found, right, rtol=1e-4)
    else:
        np.testing.assert_allclose(np.asarray(found), np.asarray(right), rtol=1e-4, atol=1e-5)


FAMILIES = {
    "normal": lambda shift: dist.Normal(shift, torch.tensor([0.5, 2.0])).to_event(1),
    "masked": lambda shift: dist.Normal(shift, 1.0).mask(shift.sum(-1, keepdim=True) > 0).to_event(1),
    "full": lambda shift: dist.MultivariateNormal(shift, scale_tril=torch.tensor([[1.0, 0.0], [0.5, 2.0]])),
    "log-normal": lambda shift: dist.LogNormal(shift, 1.0).to_event(1),
    "categories": lambda shift: dist.Categorical(logits=shift),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_joined_runs_are_the_vectorised_run(name):
    """Values, densities, masks and parameters, where a site depends on an earlier sample."""

    def model(x):
        with pyro.plate("rows", len(x), dim=-2):
            shift = pyro.sample("shift", dist.Normal(x.mean(-1)[:, None, None].expand(-1, 1, 2), 1.0).to_event(1))
            with pyro.plate("columns", 4, dim=-1):
                pyro.sample("z", FAMILIES[name](shift.expand(*shift.shape[:-2], 4, 2)))
            pyro.sample("x", dist.Normal(shift.sum(-1), 1.0), obs=x.sum(-1, keepdim=True))

    whole = pv.engine.program.Program(model, None, (X,), nesting=2)
    runs = []
    for vectorize in (True, False):
        pyro.set_rng_seed(0)
        with torch.no_grad():
            runs.append(run(whole, 5, vectorize))
    one, other = runs
    assert (one.num_particles, one.particle_dim) == (other.num_particles, other.particle_dim)
    if name == "categories":
        return  # whose draws are others
    for site in ("shift", "z", "x"):
        first, second = one.model[site], other.model[site]
        torch.testing.assert_close(first["value"], second["value"])
        torch.testing.assert_close(first["unscaled_log_prob"], second["unscaled_log_prob"])
        assert first["fn"].batch_shape == second["fn"].batch_shape
        torch.testing.assert_close(first["fn"].log_prob(first["value"]), second["fn"].log_prob(second["value"]))
