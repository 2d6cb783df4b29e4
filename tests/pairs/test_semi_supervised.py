"""Partly observed labels: log p(x) and log p(x, y) against quadrature, bounds against Pyro's enumeration."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.programs import z_score
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate

import pyro_vae as pv

CLASSES = 3
pytestmark = pytest.mark.filterwarnings("ignore:.*Pareto k-hat")
Y = torch.tensor([-1, 0, 2, -1, 1])


def build(weight=0.0, likelihood="gaussian", latent_dim=1, spread=0.3):
    vae = pv.mlp_semi_supervised_vae(
        (2,),
        latent_dim=latent_dim,
        num_classes=CLASSES,
        hidden_dims=(4,),
        classifier_weight=weight,
        likelihood=likelihood,
    ).double()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter += spread * torch.randn_like(parameter)
    x = torch.randn(5, 2, dtype=torch.float64)
    return vae, x if likelihood == "gaussian" else (x > 0).double()


class Exact:
    """log p(x, y) for observed y, log p(x) for unobserved y, and the ELBO, by a grid of z and a sum over classes."""

    def __init__(self, vae, points=700, width=14.0):
        self.vae = vae
        t = torch.linspace(-width, width, points, dtype=torch.float64)
        latent_dim = len(vae.prior.loc)
        self.z = torch.cartesian_prod(*[t] * latent_dim).reshape(-1, 1, latent_dim)
        self.cell = (t[1] - t[0]).item() ** latent_dim

    def log_joint(self, x, label):
        """log p(x, y, z) on the grid, of shape (G, N)."""
        vectors = torch.eye(CLASSES, dtype=torch.float64)[label].expand(len(x), -1)
        prior = dist.Normal(0.0, 1.0).log_prob(self.z).sum(-1)
        return prior + self.vae.likelihood(self.z, vectors).log_prob(x) - math.log(CLASSES)

    def log_evidence(self, x, y):
        by_class = [self.log_joint(x, label).logsumexp(0) + math.log(self.cell) for label in range(CLASSES)]
        by_class = torch.stack(by_class, -1)
        observed = by_class.gather(-1, y.clamp(min=0)[:, None])[:, 0]
        return torch.where(y == -1, by_class.logsumexp(-1), observed)

    def elbo(self, x, y):
        """The ELBO of each datum, differentiable in the parameters of model and guide."""
        log_q = self.vae.classifier(x).log_softmax(-1)
        by_class = []
        for label in range(CLASSES):
            vectors = torch.eye(CLASSES, dtype=torch.float64)[label].expand(len(x), -1)
            q = self.vae.posterior(x, vectors).log_prob(self.z)
            by_class.append((q.exp() * (self.log_joint(x, label) - q)).sum(0) * self.cell)
        by_class = torch.stack(by_class, -1)
        observed = by_class.gather(-1, y.clamp(min=0)[:, None])[:, 0]
        return torch.where(y == -1, (log_q.exp() * (by_class - log_q)).sum(-1), observed)


def trace_enum(vae):
    return TraceEnum_ELBO(max_plate_nesting=1), config_enumerate(vae.guide)


@pytest.mark.parametrize("latent_dim", [1, 2])
@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("y", [Y, None, Y.clamp(min=0)], ids=["mixed", "none", "all"])
def test_log_likelihood_is_the_integral(latent_dim, likelihood, y):
    vae, x = build(likelihood=likelihood, latent_dim=latent_dim)
    last = vae.posterior.encoder.network[-1]  # these weights make the guide a proposal that covers the posterior
    last.weight.data *= 0.3
    last.bias.data[latent_dim:] = 0.2
    exact = Exact(vae, points=700 if latent_dim == 1 else 140)
    with torch.no_grad():
        expected = exact.log_evidence(x, torch.full((5,), -1) if y is None else y)
    data = x if y is None else (x, y)
    estimate = pv.log_likelihood(vae.model, vae.guide, data, num_samples=5000, seed=1)
    assert ((estimate.per_datum - expected).abs() < 4 * estimate.per_datum_error + 1e-6).all()
    assert (estimate.per_datum_error < 0.05).all()
    assert (estimate.zero_weights == 0).all()


@pytest.mark.parametrize("y", [Y, torch.full((5,), -1), Y.clamp(min=0)], ids=["mixed", "none", "all"])
def test_the_elbo_is_the_integral_and_pyros_by_enumeration(y):
    vae, x = build()
    with torch.no_grad():
        exact = Exact(vae).elbo(x, y)
        bound = pv.ELBO(1, "monte_carlo", "score").bound(vae.model, vae.guide, x.repeat(4000, 1), y.repeat(4000))
        assert (z_score(bound.reshape(-1, 5), exact) < 4.5).all()
        closed = pv.ELBO(1, "analytic", "score").bound(vae.model, vae.guide, x.repeat(4000, 1), y.repeat(4000))
        assert (z_score(closed.reshape(-1, 5), exact) < 4.5).all()
        objective, guide = trace_enum(vae)
        copies = (x.repeat(100, 1), y.repeat(100))
        pyros = torch.tensor([-objective.loss(vae.model, guide, *copies) / 100 for _ in range(30)])
        assert z_score(pyros, exact.sum()) < 4.5
        assert (Exact(vae).log_evidence(x, y) > exact).all()


GRADIENTS = {
    "score": lambda: pv.ELBO(1, "monte_carlo", "score"),
    "score, closed form": lambda: pv.ELBO(1, "analytic", "score"),
    "vimco": lambda: pv.ELBO(3, "monte_carlo", "vimco"),
    "enumerated": None,
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_average_to_the_gradient_of_the_integral(name):
    vae, x = build()
    parameters = list(vae.parameters())
    exact = torch.autograd.grad(-Exact(vae).elbo(x, Y).sum(), parameters)
    exact = torch.cat([gradient.flatten() for gradient in exact])
    objective, guide = trace_enum(vae) if GRADIENTS[name] is None else (GRADIENTS[name](), vae.guide)
    copies, draws = 150, []
    for _ in range(40):
        loss = objective.differentiable_loss(vae.model, guide, x.repeat(copies, 1), Y.repeat(copies)) / copies
        draws.append(torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, parameters)]))
    scores = z_score(torch.stack(draws), exact)
    assert scores.max() < 5  # Student's t with 39 degrees of freedom, for about 70 parameters
    assert scores.square().mean() < 3.5  # the mean is 1.1, but the scores are correlated


def test_all_bounds_below_the_evidence_rise_with_particles():
    vae, x = build()
    with torch.no_grad():
        evidence = Exact(vae).log_evidence(x, Y)
        arguments = (vae.model, vae.guide, x.repeat(500, 1), Y.repeat(500))
        bounds = [pv.IWAE(k, "vimco").bound(*arguments).reshape(-1, 5) for k in (2, 20)]
    low, high = (b.mean(0) for b in bounds)
    error = bounds[1].std(0) / 500**0.5
    assert (high < evidence + 4 * error).all()
    assert high.mean() > low.mean()


def test_the_classifiers_term_is_at_observed_labels_in_training_mode():
    weight = 7.0
    vae, x = build(weight)
    log_q = vae.classify(x).log().gather(-1, Y.clamp(min=0)[:, None])[:, 0]
    expected = torch.where(Y == -1, 0.0, weight * log_q)
    loss = {}
    for weighted in (True, False):
        for training in (True, False):
            vae.classifier_weight = weight if weighted else 0.0
            vae.train(training)
            pyro.set_rng_seed(4)
            loss[weighted, training] = pv.ELBO(1, "monte_carlo", "score").loss(vae.model, vae.guide, x, Y)
    assert loss[True, True] == pytest.approx(loss[False, True] - expected.sum().item())
    assert loss[True, False] == loss[False, False] == loss[False, True]
    vae.train()
    vae.classifier_weight = weight
    factor = poutine.trace(vae.model).get_trace(x, Y).nodes["classifier"]
    torch.testing.assert_close(factor["fn"].log_prob(factor["value"]), expected)
    vae.eval()
    assert "classifier" not in poutine.trace(vae.model).get_trace(x, Y).nodes


def test_the_classifiers_term_has_its_gradient():
    """If all labels are observed, the bound does not depend on q(y|x), and only this term trains the classifier."""
    vae, x = build(3.0)
    y = Y.clamp(min=0)
    parameters = list(vae.classifier.parameters())
    expected = torch.autograd.grad(
        3.0 * torch.nn.functional.cross_entropy(vae.classifier(x), y, reduction="sum"), parameters
    )
    for objective, guide in ((pv.ELBO(1, "monte_carlo", "score"), vae.guide), trace_enum(vae)):
        loss = objective.differentiable_loss(vae.model, guide, x, y)
        for ours, hand in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
            torch.testing.assert_close(ours, hand)


@pytest.mark.parametrize("mode", [True, False])
def test_estimates_omit_the_classifiers_term(mode):
    vae, x = build(7.0)
    vae.train(mode)
    with_term = pv.log_likelihood(vae.model, vae.guide, (x, Y), num_samples=50, seed=1)
    assert vae.training is mode
    vae.classifier_weight = 0.0
    without = pv.log_likelihood(vae.model, vae.guide, (x, Y), num_samples=50, seed=1)
    assert torch.equal(with_term.per_datum, without.per_datum)


@pytest.mark.parametrize("how", ["score", "enumerated"])
def test_few_labels_are_enough(how):
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[3.0, 0.0], [-1.5, 2.6], [-1.5, -2.6]])
    truth = torch.arange(240) % 3
    x = centres[truth] + 0.5 * torch.randn(240, 2, generator=generator)
    y = torch.where(torch.arange(240) < 12, truth, -1)
    vae = pv.mlp_semi_supervised_vae(
        (2,), latent_dim=1, num_classes=3, hidden_dims=(16,), classifier_weight=20.0, likelihood="gaussian"
    )
    objective, guide = (pv.ELBO(gradient="score"), vae.guide) if how == "score" else trace_enum(vae)
    history = pv.fit(vae.model, guide, (x, y), objective, epochs=20, batch_size=40, lr=3e-2)
    assert history.train_bound.iloc[-1] > history.train_bound.iloc[0]
    probabilities = vae.classify(x)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(240))
    assert (probabilities.argmax(-1) == truth)[y == -1].double().mean() > 0.95
    drawn = vae.generate(torch.arange(3).repeat(50)).reshape(50, 3, 2).mean(0)
    assert torch.equal(torch.cdist(drawn, centres).argmin(-1), torch.arange(3))


def test_sites_and_event_dimensions():
    vae, x = build(latent_dim=2)
    model, guide = poutine.trace(vae.model).get_trace(x, Y), poutine.trace(vae.guide).get_trace(x, Y)
    for trace in (model, guide):
        assert [n for n in trace.stochastic_nodes if n != "data"] == ["y", "z"]
        assert trace.nodes["y"]["fn"].batch_shape == trace.nodes["z"]["fn"].batch_shape == (5,)
        assert trace.nodes["z"]["fn"].event_shape == (2,)
    observed = guide.nodes["y"]["value"][Y != -1]
    assert torch.equal(observed, Y[Y != -1])
    hidden = guide.nodes["y"]["fn"].probs[Y == -1]
    torch.testing.assert_close(hidden, vae.classify(x)[Y == -1])
    with torch.no_grad():
        assert pv.log_weights(vae.model, vae.guide, x, Y, num_particles=4).shape == (4, 5)
        assert pv.log_weights(vae.model, vae.guide, x, Y, subsample_size=2, num_particles=4).shape == (4, 2)


def test_labels_stay_with_their_data_in_subsamples():
    vae, x = build()
    trace = poutine.trace(vae.guide).get_trace(x, Y, subsample_size=3)
    rows = trace.nodes["data"]["value"]
    seen, drawn = Y[rows], trace.nodes["y"]["value"]
    assert torch.equal(drawn[seen != -1], seen[seen != -1])


def test_embed_decode_reconstruct_generate():
    vae, x = build(latent_dim=2)
    best = torch.where(Y == -1, vae.classify(x).argmax(-1), Y)
    vectors = torch.eye(CLASSES, dtype=torch.float64)[best]
    z = vae.embed(x, Y)
    torch.testing.assert_close(z, vae.posterior(x, vectors).mean)
    torch.testing.assert_close(vae.reconstruct(x, Y), vae.likelihood(z, vectors).mean)
    torch.testing.assert_close(vae.reconstruct(x, Y), vae.decode(z, best))
    guessed = torch.eye(CLASSES, dtype=torch.float64)[vae.classify(x).argmax(-1)]
    torch.testing.assert_close(vae.embed(x), vae.posterior(x, guessed).mean)
    generated = vae.generate(torch.tensor([0, 1, 2, 2]))
    assert generated.shape == (4, 2)
    assert not generated.requires_grad
    many = vae.generate(torch.zeros(4000, dtype=torch.long))
    nodes, weights = map(torch.tensor, np.polynomial.hermite_e.hermegauss(20))
    grid = torch.cartesian_prod(nodes, nodes)
    probability = torch.cartesian_prod(weights, weights).prod(-1) / weights.sum() ** 2
    exact = (probability[:, None] * vae.decode(grid, torch.zeros(400, dtype=torch.long))).sum(0)
    assert (z_score(many, exact) < 4.5).all()


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (
            Y.double(),
            r"integer labels of shape \(5,\), -1 where unobserved, got torch.float64 of shape \(5,\)",
        ),
        (Y[:4], r"integer labels of shape \(5,\).*got torch.int64 of shape \(4,\)"),
        (torch.eye(5)[:, :3].long(), r"got torch.int64 of shape \(5, 3\)"),
        (Y.tolist(), r"got (list|\[-1, 0, 2, -1, 1\])"),
        (Y + 1, r"labels from -1 to 2, got 0 to 3"),
        (Y - 1, r"labels from -1 to 2, got -2 to 1"),
    ],
)
def test_wrong_labels(y, message):
    vae, x = build()
    for call in (
        lambda: vae.model(x, y),
        lambda: vae.guide(x, y),
        lambda: vae.embed(x, y),
        lambda: vae.reconstruct(x, y),
        lambda: pv.ELBO(gradient="score").loss(vae.model, vae.guide, x, y),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_other_refusals():
    for weight in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"classifier_weight to be a (finite )?number"):
            build(weight)
    vae, x = build()
    with pytest.raises(ValueError, match=r"guide site 'y' can't be reparameterised.*gradient='score'"):
        pv.ELBO().differentiable_loss(vae.model, vae.guide, x, Y)
    for call in (vae.model, vae.guide, vae.classify, vae.embed):
        with pytest.raises(ValueError, match=r"expected x of shape \(N, 2\), got \(5, 3\)"):
            call(torch.zeros(5, 3, dtype=torch.float64))


def test_labels_of_any_integer_type():
    vae, x = build()
    values = []
    for y in (Y, Y.int(), Y.to(torch.int8)):
        pyro.set_rng_seed(0)
        values.append(pv.ELBO(1, "monte_carlo", "score").bound(vae.model, vae.guide, x, y))
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[0], values[2])
    assert torch.equal(vae.embed(x, Y), vae.embed(x, Y.int()))


def test_observed_labels_count_with_a_guide_that_ignores_them():
    pyro.set_rng_seed(0)
    vae = pv.mlp_semi_supervised_vae((3,), latent_dim=1, num_classes=3, hidden_dims=(6,)).double()
    x, y = torch.rand(4, 3).double().round(), torch.tensor([0, 2, -1, 1])

    def guide(x, y=None):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=torch.zeros(3)))
            pyro.sample("z", dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))

    own = pv.log_likelihood(vae.model, vae.guide, (x, y), 20_000, progress=False)
    other = pv.log_likelihood(vae.model, guide, (x, y), 20_000, progress=False)
    error = (own.per_datum_error.square() + other.per_datum_error.square()).sqrt()
    assert ((own.per_datum - other.per_datum).abs() < 4 * error).all()


def test_estimates_of_wrapped_functions_omit_the_classifiers_term():
    vae = pv.mlp_semi_supervised_vae((3,), latent_dim=1, num_classes=3, hidden_dims=(6,), classifier_weight=20.0)
    x, y = torch.rand(4, 3).round(), torch.tensor([0, 2, -1, 1])
    found = [
        pv.log_likelihood(model, guide, (x, y), 50, seed=0, progress=False).mean
        for model, guide in ((vae.model, vae.guide), (lambda *args: vae.model(*args), lambda *args: vae.guide(*args)))
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_the_guide_keeps_the_digits_of_large_logits():
    logits = torch.tensor([10_000.0, 9_999.0, 0.0])
    x = torch.zeros(1, 2)
    vae = pv.mlp_semi_supervised_vae((2,), latent_dim=1, num_classes=CLASSES, likelihood="gaussian")
    vae.classifier.forward = lambda x: logits.expand(len(x), -1)
    site = poutine.trace(vae.guide).get_trace(x).nodes["y"]
    exact = logits.double().log_softmax(-1)[site["value"]]
    found = site["fn"].log_prob(site["value"])
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
