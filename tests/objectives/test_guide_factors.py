"""A pyro.factor in the guide is a term of the loss: its value, its gradient, and where it is refused."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.programs import z_score
from pyro import poutine
from pyro.infer.autoguide import AutoHierarchicalNormalMessenger, AutoNormalMessenger

import pyro_vae as pv

N = 20_000
VALUES = {"loc": 0.4, "scale": 0.6, "t": 0.3}
X = torch.full((N,), 0.7, dtype=torch.float64)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
        pyro.sample("x", dist.Normal(z, 0.8), obs=x)


def penalty(z, t):
    """Depends on the sample and on a parameter of its own."""
    return 0.5 * (z - t) ** 2 + 0.3 * t


class Guide:
    """Has a copy of each parameter for each datum, whose derivatives are independent estimates of one number."""

    def __init__(self, has_rsample=True, number=N):
        self.parameters = {n: torch.full((number,), v).double().requires_grad_() for n, v in VALUES.items()}
        self.has_rsample = has_rsample

    def __call__(self, x):
        loc, scale, t = self.parameters.values()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, scale))
            pyro.factor("penalty", penalty(z, t), has_rsample=self.has_rsample)


def exact(reduce, particles):
    """A bound's mean and its derivatives, by quadrature over the noise of all particles."""
    nodes, weights = map(torch.tensor, np.polynomial.hermite_e.hermegauss(41))
    noise = torch.stack(torch.meshgrid([nodes] * particles, indexing="ij")).flatten(1)
    weight = torch.stack(torch.meshgrid([weights / weights.sum()] * particles, indexing="ij")).flatten(1).prod(0)
    loc, scale, t = parameters = [torch.tensor(v).double().requires_grad_() for v in VALUES.values()]
    z = loc + scale * noise
    log_p = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 0.8).log_prob(X[0])
    bound = weight @ reduce(log_p - dist.Normal(loc, scale).log_prob(z) - penalty(z, t))
    return bound.item(), dict(zip(VALUES, torch.autograd.grad(bound, parameters), strict=True))


def linear(log_weights):
    return log_weights.mean(0)


def log_mean_exp(log_weights):
    return log_weights.logsumexp(0) - math.log(len(log_weights))


ELBOS = [
    pv.ELBO(1),
    pv.ELBO(2, "monte_carlo"),
    pv.ELBO(gradient="stl"),
    pv.ELBO(2, gradient="dreg", vectorize_particles=False),
    pv.ELBO(gradient="score"),
    pv.ELBO(2, "monte_carlo", gradient="score", chunk_size=1),
    pv.ELBO(2, gradient="vimco"),
]
IWAES = [
    pv.IWAE(2),
    pv.IWAE(2, "dreg"),
    pv.IWAE(2, "dreg", chunk_size=1),
    pv.IWAE(2, "score"),
    pv.IWAE(2, "vimco"),
    pv.CIWAE(0.0, 2, "dreg"),
]


@pytest.mark.parametrize("has_rsample", [True, False])
@pytest.mark.parametrize("objective", [*ELBOS, *IWAES], ids=lambda o: o.name)
def test_a_factor_of_the_guide_is_a_term_of_the_loss(objective, has_rsample):
    bound, derivatives = exact(linear if isinstance(objective, pv.ELBO) else log_mean_exp, objective.num_particles)
    guide = Guide(has_rsample)
    pyro.set_rng_seed(0)
    objective.differentiable_loss(model, guide, X).backward()
    for name, value in guide.parameters.items():
        assert z_score(-value.grad, derivatives[name]) < 4, name
    with torch.no_grad():
        assert z_score(objective.bound(model, guide, X), bound) < 4


@pytest.mark.parametrize("gradient", ["pathwise", "dreg", "vimco"])
def test_two_reductions_leave_a_factor_to_the_guides(gradient):
    _, derivatives = exact(linear, 1)
    guide = Guide()
    pyro.set_rng_seed(0)
    pv.PIWAE(2, 1, gradient).differentiable_loss(model, guide, X).backward()
    for name, value in guide.parameters.items():
        assert z_score(-value.grad, derivatives[name]) < 4, name


@pytest.mark.parametrize("sleep", [0.0, 0.5, 1.0])
def test_wake_sleep_lowers_a_factor_of_the_guide(sleep):
    """No density is fitted to dreams by it, and no weight of its phases scales it."""
    _, derivatives = exact(log_mean_exp, 2)
    guide = Guide()
    pyro.set_rng_seed(0)
    pv.RWS(2, sleep=sleep).differentiable_loss(model, guide, X).backward()
    assert z_score(-guide.parameters["t"].grad, derivatives["t"]) < 4


EVALUATIONS = {
    "log_weights": lambda guide: pv.log_weights(model, guide, X[:8], num_particles=2),
    "log_likelihood": lambda guide: pv.log_likelihood(model, guide, X[:8], 100, progress=False),
    "ais": lambda guide: pv.ais(model, guide, X[:8], 5, 4, start="guide", progress=False),
    "bdmc": lambda guide: pv.bdmc(model, guide, X[:8], 5, 4, start="guide", progress=False),
    "inference_gaps": lambda guide: pv.inference_gaps(model, guide, X[:8], progress=False),
    "decompose_elbo": lambda guide: pv.decompose_elbo(model, guide, X[:8], progress=False),
}


@pytest.mark.parametrize("call", EVALUATIONS)
def test_evaluations_refuse_a_factor_of_the_guide(call):
    with pytest.raises(
        ValueError, match=r"guide site 'penalty' is a factor.*poutine\.block\(guide, hide=\['penalty'\]\)"
    ):
        EVALUATIONS[call](Guide(number=8))


def test_a_factor_that_is_hidden_is_no_part_of_a_weight():
    hidden = poutine.block(Guide(number=8), hide=["penalty"])
    loc, scale, _ = VALUES.values()

    def without(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.tensor(loc).double(), scale))

    results = [pv.log_likelihood(model, guide, X[:8], 100, seed=0, progress=False) for guide in (hidden, without)]
    torch.testing.assert_close(results[0].per_datum, results[1].per_datum)


@pytest.mark.parametrize("factor", [False, True])
def test_compare_says_which_rows_are_no_bounds(factor):
    def guide(x):
        t = pyro.param("t", torch.tensor(1 / 1.64))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(t * x, 0.6))
            if factor:
                pyro.factor("penalty", -3.0 * t.expand(len(x)), has_rsample=False)

    bounds = [pv.ELBO(beta=2.0), pv.IWAE(2), pv.Renyi(0.5, 2), pv.JVI(3, 0)]
    others = [pv.ELBO(beta=0.5), pv.ELBO(beta=lambda step: 0.1), pv.Renyi(-1.0, 2), pv.JVI(3, 1)]
    table = pv.compare(model, guide, X[:50], [*bounds, *others], repeats=2, seed=0, progress=False)
    assert table["is_bound"].tolist() == 4 * [not factor] + 4 * [False]
    _, *legend = [text.get_text() for text in pv.plots.bounds(table).get_legend().get_texts()]  # without log p(x)
    assert [label.endswith(" (no bound)") for label in legend] == [not each for each in table["is_bound"]]
    exact = dist.Normal(0.0, 1.64**0.5).log_prob(X[:50]).mean().item()
    # The gap is to log p(x), of which the factor is no part; guides so near the posterior have weights near 1.
    assert (table["bound"] + table["gap"]).tolist() == pytest.approx([exact] * 8, abs=0.05)


@pytest.mark.parametrize(
    "objective", [pv.ELBO(), pv.IWAE(2), pv.ELBO(beta=4.0), pv.ELBO(beta=lambda step: 1.0), pv.ELBO(free_bits=0.1)]
)
def test_a_weighted_objectives_curve_is_not_called_a_bound(objective):
    vae = pv.mlp_vae((3,), latent_dim=2, hidden_dims=(4,), likelihood="gaussian")
    history = pv.fit(vae, torch.randn(8, 3), objective, epochs=1, progress=False)
    weighted = "beta" in objective.name or "free bits" in objective.name
    label = objective.name if weighted else "bound on log p(x)"
    assert pv.plots.training_curve(history).get_ylabel() == f"{label} (nats per datum)"


def penalised(x):
    """A model with a factor, which a guide that runs it runs too."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("tilt", -0.5 * z**2)
        pyro.sample("x", dist.Normal(z, 0.8), obs=x)


@pytest.mark.parametrize("family", [AutoNormalMessenger, AutoHierarchicalNormalMessenger])
def test_guides_that_run_the_model_do_not_count_its_data(family):
    """The factor makes the prior's precision 2, and its constant smaller by log 2 / 2."""
    x = torch.tensor([0.5, -1.0])
    exact = dist.Normal(0.0, (0.8**2 + 0.5) ** 0.5).log_prob(x) - math.log(2) / 2
    guide = family(penalised, init_scale=0.5)
    weights = pv.log_weights(penalised, guide, x, num_particles=20_000).detach()
    assert (z_score(weights.exp(), exact.exp()) < 4).all()
    own, pyros = [], []
    for losses, elbo in ((own, pv.ELBO(1, "monte_carlo")), (pyros, pyro.infer.Trace_ELBO())):
        pyro.set_rng_seed(0)
        losses.append(elbo.loss(penalised, guide, x))
    assert own == pytest.approx(pyros, rel=1e-5)


def test_a_factor_under_a_name_of_the_models_is_refused():
    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("tilt", -0.5 * z**2, has_rsample=True)

    with pytest.raises(ValueError, match=r"site 'tilt' is a factor of the guide and a site of the model.*Rename it"):
        pv.ELBO().loss(penalised, guide, torch.zeros(3))
