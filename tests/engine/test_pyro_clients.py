"""Programs that Pyro publishes: loss and gradients beside Pyro's own estimators, training, and log p(x)."""

from __future__ import annotations

import functools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import pyro_clients as clients
from helpers.quick import slow_but
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoHierarchicalNormalMessenger, AutoNormalMessenger
from pyro.infer.autoguide.effect import AutoRegressiveMessenger
from torch.nn.functional import softplus

import pyro_vae as pv

POSITIVE = torch.linspace(0.3, 3.0, 12)
BITS = (torch.rand(12, 3, generator=torch.Generator().manual_seed(0)) > 0.4).float()
INDEX = torch.arange(12)
ONE_BY_ONE = {"vectorize_particles": False}  # for programs that take no dimension of particles
MESSENGERS = [AutoNormalMessenger, AutoHierarchicalNormalMessenger, AutoRegressiveMessenger, clients.Custom]


def pair(make, data):
    """A program of a class with a model and a guide, and its data."""
    program = make()
    return program.model, program.guide, data()


def steered(guide, model, *args, **options):
    """A program of a guide class of Pyro's that is made from the model."""
    return model, guide(model, **options), args


def rows_first(function):
    """A program of sequences (T, b), called with rows and their indices, as minibatches are."""
    return lambda x, index: function(x.T, index, 12)


PROGRAMS = {
    "scANVI, labels": functools.partial(pair, clients.SCANVI, clients.counts),
    "scANVI, labels, has_rsample": functools.partial(pair, lambda: clients.SCANVI(has_rsample=True), clients.counts),
    "scANVI, no labels": functools.partial(pair, clients.SCANVI, lambda: clients.counts()[:1]),
    "ProdLDA": functools.partial(pair, clients.ProdLDA, lambda: (clients.documents(),)),
    "tracks": functools.partial(pair, clients.Tracks, clients.readings),
    "AIR": functools.partial(pair, clients.AIR, lambda: (clients.scenes(),)),
    "AIR, the guide subsamples": functools.partial(pair, clients.AIR, lambda: (clients.scenes(), 6)),
    "EasyGuide": functools.partial(steered, clients.Walks, clients.walks, BITS.T, INDEX, 12),
    "EasyGuide, some rows": functools.partial(steered, clients.Walks, clients.walks, BITS[3:8].T, INDEX[3:8], 12),
    "EasyGuide, drawn rows": functools.partial(steered, clients.DrawnGroup, clients.drawn_chain, POSITIVE),
    **{
        f"{family.__name__}, {model.__name__}": functools.partial(steered, family, model, POSITIVE, init_scale=0.5)
        for family in MESSENGERS
        for model in (clients.chain, clients.drawn_chain)
    },
}


def loss_and_gradients(elbo, model, guide, args):
    """The loss, and the gradient of each parameter that ``pyro.infer.SVI`` would update."""
    with poutine.trace(param_only=True) as capture:
        loss = elbo.loss_and_grads(model, guide, *args)
    parameters = {name: site["value"].unconstrained() for name, site in capture.trace.nodes.items()}
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    return loss, gradients


SAMPLED = pv.ELBO(1, "monte_carlo"), Trace_ELBO()
VECTORISED = pv.ELBO(3, "monte_carlo"), Trace_ELBO(3, vectorize_particles=True, max_plate_nesting=2)
CLOSED = pv.ELBO(), TraceMeanField_ELBO()
# Batch norm takes rows, not particles of rows.
ALIKE = {"ProdLDA": [SAMPLED, CLOSED], "scANVI, labels, has_rsample": [SAMPLED]}
OTHERS = ("scANVI, labels", "scANVI, no labels", "AIR", "AIR, the guide subsamples")
CASES = [(case, *elbos) for case in PROGRAMS if case not in OTHERS for elbos in ALIKE.get(case, [SAMPLED, VECTORISED])]


def seeded(function, *args):
    pyro.set_rng_seed(1)
    return function(*args)


@pytest.mark.parametrize(("case", "ours", "theirs"), CASES, ids=lambda each: each if isinstance(each, str) else "")
def test_loss_and_gradients_are_pyros_from_the_same_seed(case, ours, theirs):
    program = PROGRAMS[case]()
    ours.loss(*program[:2], *program[2])  # the first run makes parameters
    (loss, gradients), (pyros, pyros_gradients) = (
        seeded(loss_and_gradients, elbo, *program) for elbo in (ours, theirs)
    )
    assert loss == pytest.approx(pyros, rel=1e-5)
    torch.testing.assert_close(gradients, pyros_gradients, rtol=1e-3, atol=1e-5 * abs(loss))


@pytest.mark.parametrize("gradient", ["pathwise", "stl"])
def test_a_factor_without_rsample_is_a_term_of_the_loss(gradient):
    """Pyro multiplies its gradient by the loss of the datum, as a score: the classifier's is then another one."""
    names = ("scANVI, labels", "scANVI, labels, has_rsample")
    results = {}
    for elbo in (pv.ELBO(1, "monte_carlo", gradient), Trace_ELBO()):
        for name in names:
            pyro.clear_param_store()
            program = seeded(PROGRAMS[name])
            results[type(elbo), name] = seeded(loss_and_gradients, elbo, *program)
    ours, pyros = ([results[kind, name] for name in names] for kind in (pv.ELBO, Trace_ELBO))
    assert ours[0][0] == ours[1][0] == pytest.approx(pyros[0][0], rel=1e-5)
    torch.testing.assert_close(ours[0][1], ours[1][1])
    (_, right), (_, as_score), (loss, own) = pyros[1], pyros[0], ours[0]
    name = "scanvi$$$classifier.0.weight"
    torch.testing.assert_close(own[name], right[name], rtol=1e-3, atol=1e-5 * loss)
    assert (as_score[name] - own[name]).norm() > 3 * own[name].norm()


# Ours, with how many draws, and the one that trains Pyro's example.
MEANS = {
    "scANVI, no labels": (
        (pv.ELBO(200, "monte_carlo", "vimco"), 40),
        (TraceEnum_ELBO(16, vectorize_particles=True, max_plate_nesting=1), 40),
    ),
    "AIR": ((pv.ELBO(2, "monte_carlo", "vimco", **ONE_BY_ONE), 40), (TraceGraph_ELBO(2), 40)),
    "AIR, the guide subsamples": ((pv.ELBO(1, "monte_carlo", "score"), 300), (TraceGraph_ELBO(), 300)),
}


@pytest.mark.parametrize("case", slow_but(("scANVI, no labels",), MEANS))
def test_the_mean_of_score_functions_is_that_of_pyros(case):
    """Each parameter's gradient along one fixed direction."""
    model, guide, args = seeded(PROGRAMS[case])
    if "scANVI" in case:
        guide.__self__.eval()  # a minibatch's statistics make a class depend on the others of the minibatch
    _, first = loss_and_gradients(MEANS[case][0][0], model, guide, args)
    directions = {name: torch.randn(gradient.shape) for name, gradient in first.items()}
    means, variances = [], []
    for elbo, number in MEANS[case]:
        enumerated = config_enumerate(guide, "parallel", expand=True) if isinstance(elbo, TraceEnum_ELBO) else guide
        draws = [loss_and_gradients(elbo, model, enumerated, args) for _ in range(number)]
        rows = [[loss, *((found[n] * directions[n]).sum() for n in directions)] for loss, found in draws]
        values = torch.tensor(rows, dtype=torch.float64)
        means.append(values.mean(0))
        variances.append(values.var(0) / number)
    z = (means[0] - means[1]) / sum(variances).sqrt().clamp(min=1e-9)
    assert z.abs().max() < 4, dict(zip(["loss", *directions], z.tolist(), strict=True))


class Scenario:
    """How a program is trained, and its exact log p(x)."""

    def __init__(self, program, objective, exact, *, epochs=40, lr=2e-2, batch_size=6, **options):
        self.program, self.objective, self.exact = program, objective, exact
        self.training = {"epochs": epochs, "lr": lr, "batch_size": batch_size}
        self.options = options  # of log_likelihood


def of_chain(model, args):
    return dist.LogNormal(0.0, 1.89**0.5).log_prob(args[0])


def of_prod_lda(model, args):
    """Two topics depend on the difference of two standard normals alone."""
    nodes, weights = map(torch.tensor, np.polynomial.hermite_e.hermegauss(61))
    first = (2**0.5 * nodes).sigmoid().float()
    words = model.__self__.decoder(torch.stack([first, 1 - first], -1))
    (docs,) = args
    density = dist.Multinomial(1, words[:, None], validate_args=False).log_prob(docs)
    return ((weights / weights.sum()).log()[:, None] + density).logsumexp(0)


def of_states(model, args):
    nodes, weights = map(torch.tensor, np.polynomial.hermite_e.hermegauss(21))
    grid = torch.cartesian_prod(nodes, nodes, nodes).mul(0.7).cumsum(-1).float()
    weight = torch.cartesian_prod(weights, weights, weights).prod(-1) / weights.sum() ** 3
    return (weight.log()[:, None] + dist.Bernoulli(logits=grid[:, None]).log_prob(args[0]).sum(-1)).logsumexp(0)


def of_scanvi(model, args):
    """By sums over grids of z1, z2 and log l, for one latent dimension each."""
    scanvi, x = model.__self__, args[0]
    z1, z2, log_l = torch.linspace(-6, 6, 81), torch.linspace(-8, 8, 401), torch.linspace(0, 7, 141)
    steps = 12 / 80 * 16 / 400 * 7 / 140
    prior = dist.Normal(0.0, 1.0)
    y = torch.eye(scanvi.classes)
    loc, scale = clients.halves(scanvi.z2_decoder, clients.joined(z1[:, None, None], y))  # (81, classes, 1)
    given = dist.Normal(loc, softplus(scale)).log_prob(z2)  # (81, classes, 401)
    log_z2 = (prior.log_prob(z1)[:, None, None] + given).logsumexp(0) - np.log(scanvi.classes)
    gate, share = clients.halves(scanvi.x_decoder, z2[:, None])
    theta = pyro.param("inverse_dispersion")
    rate = log_l.exp()[:, None, None] * share.softmax(-1)  # (141, 401, genes)
    logits = (theta + 1e-6).log() - (rate + 1e-6).log()
    counts = dist.ZeroInflatedNegativeBinomial(gate_logits=gate, total_count=theta, logits=logits).to_event(1)
    log_x = torch.stack([counts.log_prob(row) for row in x]) + dist.Normal(3.0, 1.0).log_prob(log_l)[:, None]
    classes = (log_z2 + log_x.logsumexp(1)[:, None]).logsumexp(-1) + np.log(steps)  # (N, classes)
    return classes.logsumexp(-1) if len(args) == 1 else (classes * args[1]).sum(-1)


def of_air(model, args):
    """The mean over a quasi-random grid of the place and the content of one object, or none."""
    air, (x,) = model.__self__, args
    uniform = torch.quasirandom.SobolEngine(4, scramble=True, seed=0).draw(2**18)
    z = torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6))
    image = air.moved(air.decode(z[:, 3:]), air.where_loc + air.where_scale * z[:, :3], air.side)
    density = dist.Normal(0.0, 0.3)
    present = torch.stack([density.log_prob(each - image).sum(-1).logsumexp(0) for each in x]) - np.log(len(z))
    return torch.logaddexp(present, density.log_prob(x).sum(-1)) + np.log(0.5)


def easy(x):
    """The walks with a known drift, since data that share a latent have no log p(x) each."""
    model = functools.partial(clients.walks, drift=0.7)
    return rows_first(model), rows_first(clients.States(model)), (x, INDEX)


def scanvi(*args):
    return functools.partial(pair, lambda: clients.SCANVI(z_dim=1), lambda: args)


X, Y = clients.counts()
SCENARIOS = {
    "scANVI, labels": Scenario(scanvi(X, Y), pv.IWAE(8), of_scanvi, epochs=200),
    "scANVI, no labels": Scenario(scanvi(X), pv.IWAE(8, "vimco"), of_scanvi, epochs=200),
    "ProdLDA": Scenario(
        functools.partial(pair, lambda: clients.ProdLDA(topics=2, dropout=0.1), lambda: (clients.documents(),)),
        pv.IWAE(4, **ONE_BY_ONE),
        of_prod_lda,
        epochs=100,
        batch_size=8,
        **ONE_BY_ONE,
    ),
    "AIR": Scenario(
        functools.partial(pair, lambda: clients.AIR(steps=1, z_dim=1), lambda: (clients.scenes(),)),
        pv.IWAE(4, "vimco", **ONE_BY_ONE),
        of_air,
        batch_size=10,
        epochs=60,
        **ONE_BY_ONE,
    ),
    "tracks": Scenario(
        PROGRAMS["tracks"], pv.IWAE(8), lambda model, args: model.__self__.log_evidence(*args), epochs=60
    ),
    "EasyGuide": Scenario(functools.partial(easy, BITS), pv.IWAE(4), of_states),
    **{
        family.__name__: Scenario(
            functools.partial(steered, family, clients.chain, POSITIVE, init_scale=0.2),
            pv.IWAE(8, "dreg"),
            of_chain,
            batch_size=12,
            epochs=150,
            lr=5e-2,
        )
        for family in MESSENGERS
    },
    "by index": Scenario(
        functools.partial(
            steered, AutoHierarchicalNormalMessenger, clients.indexed_chain, POSITIVE, INDEX, init_scale=0.2
        ),
        pv.IWAE(8, "dreg"),
        of_chain,
        epochs=60,
        lr=5e-2,
    ),
}


@pytest.mark.parametrize("case", slow_but(("tracks", "EasyGuide", "by index"), SCENARIOS))
def test_fit_trains_it_and_log_likelihood_is_exact(case):
    scenario = SCENARIOS[case]
    model, guide, args = seeded(scenario.program)
    elbo = pv.ELBO(30, "monte_carlo", **scenario.options)
    before = seeded(elbo.loss, model, guide, *args)
    pv.fit(model, guide, args, scenario.objective, seed=0, **scenario.training)
    assert seeded(elbo.loss, model, guide, *args) < before - 0.1 * len(args[0])
    if case == "scANVI, labels":
        with pytest.raises(pv.PyroVAEError, match=r"poutine\.block\(guide, hide=\['classification_loss'\]\)"):
            pv.log_likelihood(model, guide, args, 100)
        guide = poutine.block(guide, hide=["classification_loss"])
    number = 1000 if scenario.options else 3000
    result = pv.log_likelihood(model, guide, args, number, seed=0, **scenario.options)
    owner = getattr(model, "__self__", torch.nn.Module())
    with torch.no_grad():
        owner.eval()
        exact = scenario.exact(model, args)
    z, reliable = (result.per_datum - exact) / result.per_datum_error, ~(result.pareto_k > 0.7)
    assert z[reliable].abs().max() < 4
    assert reliable.float().mean() > 0.8


@pytest.mark.parametrize("case", ["AIR", "AIR, the guide subsamples"])
def test_the_loss_of_absent_objects_is_pyros(case):
    program = PROGRAMS[case]()
    losses = [seeded(elbo.loss, *program[:2], *program[2]) for elbo in SAMPLED]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_point_that_all_data_share_is_trained_and_gives_no_log_p_of_a_datum():
    model, guide = rows_first(clients.walks), rows_first(clients.Walks(clients.walks))
    history = pv.fit(model, guide, (BITS, INDEX), pv.ELBO(4, "monte_carlo"), epochs=40, lr=2e-2, batch_size=5, seed=0)
    assert history.train_bound.iloc[-1] > history.train_bound.iloc[0] + 0.1
    with pytest.raises(pv.PyroVAEError, match="'drift' is a latent site outside the batch plate 'data'"):
        pv.log_likelihood(model, guide, (BITS, INDEX), 100)


EVALUATIONS = {
    "log_likelihood": lambda *program: pv.log_likelihood(*program, 100),
    "ais": lambda *program: pv.ais(*program, 5, 4),
    "bdmc": lambda *program: pv.bdmc(*program, 5, 4),
    "decompose_elbo": pv.decompose_elbo,
    "inference_gaps": lambda *program: pv.inference_gaps(*program, 50, num_steps=3),
    "active_units": pv.active_units,
    "to_arviz": pv.to_arviz,
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_a_network_of_rows_alone_is_told_what_to_do(name):
    """ProdLDA's batch norm, and its softmax over dim 1; wrapped as the note says, the program is evaluated."""
    model, guide, args = PROGRAMS["ProdLDA"]()
    with pytest.raises(RuntimeError, match="running_mean") as caught:
        EVALUATIONS[name](model, guide, args)
    assert any("Wrap a network that takes none in pyro_vae.networks.apply_batched" in n for n in caught.value.__notes__)
    program, decoder = model.__self__, model.__self__.decoder
    decoder.forward = functools.partial(pv.networks.apply_batched, type(decoder).forward.__get__(decoder), event_dim=1)
    EVALUATIONS[name](program.model, program.guide, args)
