"""Options of likelihoods and posteriors: values arrive, encoders have the right width, wrong options are refused."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv

Z = 3
BUILDERS = {
    "mlp": lambda **options: pv.mlp_vae((1, 4, 4), latent_dim=Z, hidden_dims=(8,), **options),
    "conv": lambda **options: pv.conv_vae((1, 4, 4), latent_dim=Z, channels=(4,), **options),
}
# The class of the posterior, its options, the width of its encoder, and what the options change.
CASES = {
    "diagonal": (pv.DiagonalNormal, {}, 2 * Z, lambda q: True),
    "full": (pv.FullNormal, {}, Z * (Z + 3) // 2, lambda q: True),
    "rank": (pv.LowRankNormal, {"rank": 4}, 6 * Z, lambda q: q.rank == 4),
    "rank by default": (pv.LowRankNormal, {}, 4 * Z, lambda q: q.rank == 2),
    "components": (pv.MixturePosterior, {"components": 2}, 2 * (2 * Z + 1), lambda q: q.components == 2),
    "flow": (
        pv.FlowPosterior,
        {"flow": "coupling", "length": 3, "hidden_dims": (7,), "context_dim": 5},
        2 * Z + 5,
        lambda q: q.flow.flips and len(q.flow.steps) == 3 and q.flow.context_dim == 5 and "(7," in _shapes(q.flow),
    ),
    "flow by default": (pv.FlowPosterior, {}, 3 * Z, lambda q: len(q.flow.steps) == 2 and "(64," in _shapes(q.flow)),
    "flow without context": (pv.FlowPosterior, {"context_dim": 0}, 2 * Z, lambda q: q.flow.context_dim == 0),
}
builders = pytest.mark.parametrize("builder", BUILDERS)


def _shapes(module):
    return str([tuple(parameter.shape) for parameter in module.parameters()])


@builders
@pytest.mark.parametrize("case", CASES)
def test_options_of_a_posterior_arrive(builder, case):
    family, options, width, arrived = CASES[case]
    vae = BUILDERS[builder](posterior=family, posterior_options=options)
    x = torch.rand(5, 1, 4, 4).round()
    assert type(vae.posterior) is family
    assert arrived(vae.posterior)
    assert vae.posterior.encoder(x).shape == (5, width)
    assert family.features_for(Z, **options) == width
    loss = pv.ELBO(2, "monte_carlo").loss_and_grads(vae.model, vae.guide, x)
    assert math.isfinite(loss)
    assert all(parameter.grad is not None for parameter in vae.posterior.parameters())


@builders
def test_options_of_the_likelihood_and_of_the_posterior_are_separate(builder):
    vae = BUILDERS[builder](
        likelihood="low_rank_gaussian", rank=3, posterior=pv.LowRankNormal, posterior_options={"rank": 4}
    )
    assert (vae.likelihood.rank, vae.posterior.rank) == (3, 4)


def test_the_options_of_the_caller_stay_as_they_are():
    options = {"rank": 4}
    pv.mlp_vae((4,), latent_dim=Z, posterior=pv.LowRankNormal, posterior_options=options)
    assert options == {"rank": 4}


class Laplace(pv.Posterior):
    """A posterior that overrides only the abstract methods."""

    @classmethod
    def features_for(cls, latent_dim, **options):
        return 2 * latent_dim

    def latent_distribution(self, features):
        loc, log_scale = features.chunk(2, -1)
        return dist.Laplace(loc, log_scale.exp()).to_event(1)


class Widened(Laplace):
    """A posterior with an option of its own."""

    def __init__(self, encoder, event_shape, factor=1.0):
        super().__init__(encoder, event_shape)
        self.factor = factor

    def latent_distribution(self, features):
        loc, log_scale = features.chunk(2, -1)
        return dist.Laplace(loc, self.factor * log_scale.exp()).to_event(1)


class Open(Widened):
    """A posterior that passes all keyword arguments on."""

    def __init__(self, encoder, event_shape, **options):
        super().__init__(encoder, event_shape, **options)


class Narrow(Laplace):
    """A posterior whose class methods take no options."""

    @classmethod
    def features_for(cls, latent_dim):
        return 2 * latent_dim

    @classmethod
    def build(cls, encoder, event_shape, latent_dim):
        return cls(encoder, event_shape)


@builders
@pytest.mark.parametrize(
    ("family", "options", "factor"),
    [(Laplace, {}, None), (Narrow, {}, None), (Widened, {"factor": 2.5}, 2.5), (Open, {"factor": 2.5}, 2.5)],
)
def test_a_posterior_of_the_user(builder, family, options, factor):
    vae = BUILDERS[builder](posterior=family, posterior_options=options)
    assert type(vae.posterior) is family
    assert getattr(vae.posterior, "factor", None) == factor
    assert vae.posterior.encoder(torch.zeros(5, 1, 4, 4)).shape == (5, 2 * Z)
    assert math.isfinite(pv.IWAE(2).loss(vae.model, vae.guide, torch.ones(5, 1, 4, 4)))


class Scaled(pv.Likelihood):
    """A likelihood that takes any keyword argument."""

    def __init__(self, decoder, event_shape, **options):
        super().__init__(decoder, event_shape)
        self.options = options

    def pixel_distribution(self, loc):
        return dist.Normal(loc, self.options["scale"])


def test_a_likelihood_that_takes_any_option():
    assert pv.mlp_vae((4,), latent_dim=Z, likelihood=Scaled, scale=2.0).likelihood.options == {"scale": 2.0}


@builders
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"posterior": pv.LowRankNormal, "posterior_options": {"rnk": 4}},
            r"an option of LowRankNormal \(its options: rank\), got rnk=4. Drop it, or pass another posterior",
        ),
        (
            {"posterior": pv.FlowPosterior, "posterior_options": {"kind": "iaf"}},
            r"FlowPosterior \(its options: flow, length, hidden_dims, context_dim\), got kind='iaf'",
        ),
        (
            {"posterior": pv.FlowPosterior, "posterior_options": {"latent_dim": 3}},
            r"an option of FlowPosterior .*, got latent_dim=3",
        ),
        ({"posterior_options": {"rank": 4}}, r"an option of DiagonalNormal \(it has no options\), got rank=4"),
        ({"posterior": Laplace, "posterior_options": {"df": 3}}, r"Laplace \(it has no options\), got df=3"),
        ({"posterior": Widened, "posterior_options": {"scale": 3}}, r"Widened \(its options: factor\), got scale=3"),
        (
            {"posterior": pv.LowRankNormal, "posterior_options": 4},
            r"posterior_options to be a dictionary or None, got 4",
        ),
        (
            {"posterior": pv.LowRankNormal, "rank": 4},
            r"an option of Bernoulli \(it has no options\), got rank=4. Pass it in posterior_options={'rank': 4}",
        ),
        (
            {"likelihood": "gaussian", "scales": 2},
            r"option of Gaussian \(its options: scale, min_scale\), got scales=2. Drop it, or pass another likel",
        ),
        (
            {"posterior": pv.LowRankNormal, "posterior_options": {"rank": 0}},
            r"rank to be a positive integer, got 0. For rank 0, use DiagonalNormal",
        ),
        (
            {"posterior": pv.LowRankNormal, "posterior_options": {"rank": "4"}},
            r"rank to be a positive integer, got '4'",
        ),
        (
            {"posterior": pv.MixturePosterior, "posterior_options": {"components": 0}},
            r"components to be a positive integer, got 0",
        ),
        (
            {"posterior": pv.MixturePosterior, "posterior_options": {"components": 2.0}},
            r"components to be a positive integer, got 2.0",
        ),
        (
            {"posterior": pv.FlowPosterior, "posterior_options": {"context_dim": -1}},
            r"context_dim to be an integer of at least 0, got -1",
        ),
        ({"posterior": pv.FlowPosterior, "posterior_options": {"flow": "planar"}}, r"got 'planar'"),
        (
            {"posterior": pv.FlowPosterior, "posterior_options": {"length": "2"}},
            r"length to be a positive integer, got '2'",
        ),
        (
            {"posterior": pv.FlowPosterior, "posterior_options": {"hidden_dims": 64}},
            r"hidden_dims to be a sequence.*got 64",
        ),
    ],
)
def test_wrong_options_are_refused(builder, options, message):
    with pytest.raises(pv.PyroVAEError, match=message):
        BUILDERS[builder](**options)
