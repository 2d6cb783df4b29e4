"""Supports of transformed distributions and of mixtures, which PyTorch declares too wide, or not at all."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import transforms as t

import pyro_vae as pv
from pyro_vae.engine.supports import Unknown, interval, support_of

SHAPED = dist.TransformedDistribution
SHIFTED = SHAPED(dist.Uniform(0.0, 1.0), [t.AffineTransform(-1.0, 2.0)])
KNOWN = {
    "uniform, shifted": (SHIFTED.expand([2]), -1.0, 1.0),
    "uniform, shifted by other numbers": (
        SHAPED(dist.Uniform(torch.zeros(2), 1.0), [t.AffineTransform(torch.tensor([0.0, 5.0]), 2.0)]),
        [0.0, 5.0],
        [2.0, 7.0],
    ),
    "uniform, flipped": (SHAPED(dist.Uniform(0.0, 1.0), [t.AffineTransform(0.0, -3.0)]), -3.0, 0.0),
    "uniform to the real line": (SHAPED(dist.Uniform(0.0, 1.0), [t.SigmoidTransform().inv]), -math.inf, math.inf),
    "exponential, flipped": (SHAPED(dist.Exponential(1.0), [t.AffineTransform(1.0, -2.0)]), -math.inf, 1.0),
    "exponential, shifted, an event": (
        SHAPED(dist.Exponential(torch.ones(2)), [t.AffineTransform(1.0, 1.0)]).to_event(1),
        1.0,
        math.inf,
    ),
    "several transforms in one": (
        SHAPED(dist.Uniform(0.0, 1.0), [t.ComposeTransform([t.AffineTransform(0.0, 2.0), t.ExpTransform()])]),
        1.0,
        math.exp(2),
    ),
    "a transform of an event": (
        SHAPED(dist.Uniform(torch.zeros(2), 1.0).to_event(1), [t.IndependentTransform(t.AffineTransform(1.0, 1.0), 1)]),
        1.0,
        2.0,
    ),
    "masked": (SHAPED(dist.Exponential(torch.ones(3)), [t.AffineTransform(1.0, 1.0)]).mask(False), 1.0, math.inf),
    "a mixture": (
        dist.MixtureSameFamily(dist.Categorical(torch.ones(3, 2)), dist.Uniform(torch.zeros(3, 2), 2.0)),
        0.0,
        2.0,
    ),
    "a mixture of normals": (
        dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2, 3), 1.0).to_event(1)),
        -math.inf,
        math.inf,
    ),
    "a flow": (
        SHAPED(dist.Normal(torch.zeros(2), 1.0).to_event(1), [dist.transforms.affine_autoregressive(2)]),
        -math.inf,
        math.inf,
    ),
}
UNKNOWN = {
    "a flow of a uniform": SHAPED(
        dist.Uniform(torch.zeros(2), 1.0).to_event(1), [dist.transforms.affine_autoregressive(2)]
    ),
    "no bijection": SHAPED(dist.Uniform(-1.0, 1.0), [t.AbsTransform()]),
    "integers": SHAPED(dist.Poisson(1.0), [t.AffineTransform(0.0, 2.0)]),
    "components apart": dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Uniform(torch.zeros(2), torch.tensor([1.0, 2.0]))
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_supports_are_where_the_samples_are(name):
    distribution, *ends = KNOWN[name]
    support = support_of(distribution)
    assert support.event_dim == len(distribution.event_shape)
    pyro.set_rng_seed(0)
    with torch.no_grad():
        values = distribution.sample((4000,)).double()
    for found, expected, extreme in zip(interval(support), ends, (values.amin(0), values.amax(0)), strict=True):
        expected = torch.tensor(expected).double().expand(values.shape[1:])
        assert torch.allclose(torch.as_tensor(found).double().expand_as(expected), expected, rtol=1e-6)
        # The extreme of 4,000 draws is near each finite end; at an infinite one it is beyond 1.
        near = (extreme - expected).abs() < 0.05 if bool(expected.isfinite().all()) else extreme.abs() > 1
        assert bool(near.all())


@pytest.mark.parametrize("name", UNKNOWN)
def test_supports_that_cannot_be_computed_are_unknown(name):
    support = support_of(UNKNOWN[name])
    assert isinstance(support, Unknown) or isinstance(support.base_constraint, Unknown)
    assert support.event_dim == len(UNKNOWN[name].event_shape)


def programs(prior, guide):
    """A model x = z + noise with this prior, and this distribution as the guide."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", prior), 0.5), obs=x)

    def guide_of(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", guide)

    return model, guide_of


X = torch.tensor([0.9, 0.5, 1.5])


def log_evidence(prior, low, high):
    """log p(x) of each of X, by the midpoint rule; the priors here have no density outside of the bounds."""
    number = 200_000
    z = low + (high - low) * (torch.arange(number).double() + 0.5) / number
    density = dist.Normal(z[:, None], 0.5).log_prob(X.double()) + prior.log_prob(z.float()).double()[:, None]
    return density.logsumexp(0) + math.log((high - low) / number)


ANNEALED = {
    "shifted": (SHAPED(dist.Exponential(1.0), [t.AffineTransform(1.0, 1.0)]), 1.0, 30.0),
    "flipped": (SHAPED(dist.Exponential(1.0), [t.AffineTransform(1.0, -1.0)]), -29.0, 1.0),
    "bounded": (SHIFTED, -1.0, 1.0),
    "mixture": (
        dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([-1.0, 2.0]), 0.5)),
        -10.0,
        10.0,
    ),
}


@pytest.mark.parametrize("name", ANNEALED)
def test_annealing_moves_on_the_true_support(name):
    prior, low, high = ANNEALED[name]
    model, _ = programs(prior, prior)
    found = pv.ais(model, None, X, num_steps=200, num_chains=64, seed=0, progress=False)
    z = (found.per_datum - log_evidence(prior, low, high)) / found.per_datum_error
    assert float(z.abs().max()) < 4


def test_annealing_under_the_mixture_priors_of_this_package():
    pyro.set_rng_seed(0)
    vae = pv.mlp_vae((5,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian", prior=pv.MixturePrior(2, 3))
    x = torch.randn(3, 5)
    found = pv.ais(vae.model, None, x, num_steps=100, num_chains=64, seed=0, progress=False)
    exact = pv.log_likelihood(vae, x, 20_000, seed=0, progress=False)
    error = (found.per_datum_error**2 + exact.per_datum_error**2).sqrt()
    assert float(((found.per_datum - exact.per_datum) / error).abs().max()) < 4


COVERS_IN_PART = {"shifted": SHIFTED} | {
    name: UNKNOWN[name] for name in UNKNOWN if name != "no bijection"
}  # no density


@pytest.mark.parametrize("guide", COVERS_IN_PART.values(), ids=COVERS_IN_PART)
def test_a_guide_that_may_not_cover_the_model_is_refused(guide):
    shape = guide.event_shape
    prior = dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z.sum(-1) if shape else z, 0.5), obs=x)

    _, guide_of = programs(prior, guide)
    with pytest.raises(pv.PyroVAEError, match=r"guide.* at site 'z'.*expected a support that covers"):
        pv.log_likelihood(model, guide_of, X, 100, seed=0, progress=False)


def test_a_guide_of_the_models_own_family_covers_it():
    model, guide = programs(SHIFTED, SHIFTED)
    found = pv.log_likelihood(model, guide, X, 20_000, seed=0, progress=False)
    z = (found.per_datum - log_evidence(SHIFTED, -1.0, 1.0)) / found.per_datum_error
    assert float(z.abs().max()) < 4
