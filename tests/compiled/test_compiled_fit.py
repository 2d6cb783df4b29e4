"""Proposals that are fitted by compiled code: those of the uncompiled fit, from the same random numbers."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.programs import LinearGaussian, gamma_poisson
from helpers.quick import slow_but
from torch import nn

import pyro_vae as pv

QUIET = {"seed": 0, "progress": False}
FEW = {"num_steps": 30, "num_pilot": 100, "rounds": 0}


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that would be compiled; they run as they are."""
    found = []
    monkeypatch.setattr("pyro_vae.compiled.function._inductor", lambda graph, inputs: found.append(graph) or graph)
    return found


def linear():
    program = LinearGaussian(3, 2, 8, wrong=True)
    return program.model, program.guide, program.x


def chain():
    """A guide of two sites, in the other order, of two arguments; the batch plate is left of another one."""

    def model(pixels, noise):
        with pyro.plate("images", len(pixels), dim=-2):
            far = pyro.sample("far", dist.Normal(torch.zeros(len(pixels), 1), 1.0))
            near = pyro.sample("near", dist.Normal(far.sin(), 0.5))
            with pyro.plate("columns", 3, dim=-1):
                pyro.sample("seen", dist.Normal(near, noise[:, None]), obs=pixels)

    def guide(pixels, noise):
        with pyro.plate("images", len(pixels), dim=-2):
            near = pyro.sample("near", dist.Normal(0.5 * pixels.mean(-1, keepdim=True), 0.3))
            pyro.sample("far", dist.Normal(0.5 * near, 0.4))

    return model, guide, (torch.randn(8, 3), 0.5 + torch.rand(8))


def positive():
    return gamma_poisson(8)[:3]


def ordered():
    """A support that is the image of one under a transform."""

    def latent(x):
        base = dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1)
        return pyro.sample("z", dist.TransformedDistribution(base, [dist.transforms.OrderedTransform()]))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(latent(x), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            latent(x)

    return model, guide, torch.randn(8, 2)


def _pair(make, dtype=torch.float32):
    def program():
        vae = make().to(dtype)
        return vae.model, vae.guide, (torch.rand(8, 6) > 0.5).to(dtype)

    return program


PROGRAMS = {
    "linear": linear,
    "chain": chain,
    "positive": positive,
    "ordered": ordered,
    "float64": _pair(lambda: pv.mlp_vae((6,), latent_dim=3, hidden_dims=(8,)), torch.float64),
    "flow": _pair(lambda: pv.mlp_vae((6,), latent_dim=3, hidden_dims=(8,), posterior=pv.FlowPosterior)),
    "layers": _pair(lambda: pv.mlp_hierarchical_vae((6,), latent_dims=(3, 2), hidden_dims=(8, 8))),
}


def both_fits(model, guide, x, **options):
    """Location and scale of the uncompiled fit, and of the compiled one."""
    refined = [pv.refine(model, guide, x, compile=compile, **options, **QUIET) for compile in (False, True)]
    assert len(refined[0].mixture.students) == len(refined[1].mixture.students)
    return [[value for s in each.mixture.students for value in (s.loc, *vars(s.scale).values())] for each in refined]


@pytest.mark.filterwarnings("ignore:.*Pareto k-hat")
@pytest.mark.parametrize("rows", slow_but([3], [1, 3, 8]))
@pytest.mark.parametrize("name", slow_but(["linear", "chain", "flow"], PROGRAMS))
def test_the_compiled_fit_finds_the_same_proposals(name, rows, graphs, monkeypatch):
    torch.manual_seed(0)
    model, guide, x = PROGRAMS[name]()
    columns = x if isinstance(x, tuple) else (x,)
    monkeypatch.setattr("pyro_vae.evaluation.pieces.ELEMENTS_AT_ONCE", rows * 8 * columns[0][0].numel())
    plain, compiled = both_fits(model, guide, x, **FEW)
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)  # sums over a minibatch are rounded
    assert len(graphs) == 1  # for the last minibatch too, which has two data


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Pareto k-hat")
@pytest.mark.parametrize("name", ["linear", "chain", "flow"])
def test_inductors_fit_finds_the_same_proposals(name):
    torch.manual_seed(0)
    plain, compiled = both_fits(*PROGRAMS[name]())
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_log_likelihood_by_compiled_proposals_and_draws_is_exact():
    program = LinearGaussian(3, 2, 8, wrong=True)
    options = {"refine": True, "progress": False}
    compiled = pv.log_likelihood(program.model, program.guide, program.x, 4_000, compile=True, seed=1, **options)
    plain = pv.log_likelihood(program.model, program.guide, program.x, 4_000, seed=2, **options)
    exact = program.log_evidence()
    for found, expected, error in (
        (compiled, exact, compiled.per_datum_error),
        (compiled, plain.per_datum, (compiled.per_datum_error**2 + plain.per_datum_error**2).sqrt()),
    ):
        assert ((found.per_datum - expected).abs() < 4.5 * error).all()
    assert (compiled.pareto_k < 0.7).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Pareto k-hat")
@pytest.mark.parametrize("name", slow_but(["linear"], ["linear", "flow"]))
def test_log_likelihood_compiles_the_fit(name, graphs):
    torch.manual_seed(0)
    pv.log_likelihood(*PROGRAMS[name](), 50, refine=True, compile=True, **QUIET)
    assert len(graphs) == 2  # of the fit, and of the draws


def test_one_datum(graphs):
    model, guide, x = linear()
    torch.testing.assert_close(*both_fits(model, guide, x[:1], **FEW), rtol=1e-4, atol=1e-4)


def test_networks_made_anew_are_those_that_are_compiled(graphs):
    torch.manual_seed(0)
    networks = {}

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(networks["decoder"](z), 0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0 * x[..., :2], 1.0).to_event(1))

    found = []
    for _ in range(2):
        networks["decoder"] = nn.Linear(2, 3)
        plain, compiled = both_fits(model, guide, torch.ones(4, 3), **FEW)
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)
        found.append(compiled[0])
    assert (found[0] - found[1]).abs().max() > 0.1


def test_what_cannot_be_compiled_is_refused_by_its_line():
    _, guide, x = positive()

    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            if rate.mean() > 1e6:
                rate = 2 * rate
            pyro.sample("x", dist.Poisson(rate), obs=x)

    words = r"can't be compiled, since it reads a tensor's value .*test_compiled_fit.py:\d+, in model: `if rate.mean"
    with pytest.raises(pv.PyroVAEError, match=words):
        pv.refine(model, guide, x, compile=True, **QUIET)
    with pytest.raises(pv.PyroVAEError, match=words):
        pv.log_likelihood(model, guide, x, 50, refine=True, compile=True, **QUIET)
    with pytest.raises(pv.PyroVAEError, match="expected vectorize_particles=True with compile=True, got False"):
        pv.refine(model, guide, x, compile=True, vectorize_particles=False)
