"""Supports of transformed distributions and of mixtures, which PyTorch declares too wide, or not at all."""

import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.quick import slow_but
from torch.distributions import biject_to, constraints
from torch.distributions import transforms as t

import pyro_vae as pv
from pyro_vae.engine.coverage import check_covers
from pyro_vae.engine.supports import Unknown, check_fixed_supports, ends_of, support_of

SHAPED = dist.TransformedDistribution
REAL, EXP = t.AffineTransform(0.0, 1.0), t.ExpTransform()
TURN = dist.transforms.Permute(torch.tensor([1, 2, 0]))
with torch.random.fork_rng():  # their parameters are random
    torch.manual_seed(0)
    FLOW = dist.transforms.affine_autoregressive(2)
    SPLINES = {number: dist.transforms.Spline(number) for number in (2, 3)}


def uniform(low, high):
    """A uniform distribution of a vector."""
    return dist.Uniform(torch.as_tensor(low), torch.as_tensor(high)).to_event(1)


def mixture(components):
    """A mixture of two components with equal weights."""
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(components.batch_shape)), components)


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
    "a mixture of uniforms that overlap": (
        mixture(dist.Uniform(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 1.5]))),
        0.0,
        2.0,
    ),
    "a mixture of vectors in pieces": (
        mixture(SHAPED(dist.Normal(torch.zeros(2, 2), 1.0).to_event(1), [t.CatTransform([REAL, EXP], -1)])),
        [-math.inf, 0.0],
        math.inf,
    ),
    "a mixture of scaled betas": (
        mixture(SHAPED(dist.Beta(torch.ones(2), 1.0), [t.AffineTransform(torch.tensor([0.0, 0.5]), 1.0)])),
        0.0,
        1.5,
    ),
    "a mixture of integers": (mixture(dist.Binomial(torch.tensor([2.0, 4.0]), torch.tensor([0.5, 0.9]))), 0.0, 4.0),
    "a mixture of integers side by side": (
        mixture(
            SHAPED(dist.Binomial(torch.tensor([[4.0], [2.0]]), 0.5).to_event(1), [t.ReshapeTransform((1,), (1, 1))])
        ),
        0.0,
        4.0,
    ),
    "a mixture of uniforms inside another": (
        mixture(dist.Uniform(torch.tensor([0.0, 0.5, 2.0]), torch.tensor([3.0, 1.0, 2.5]))),
        0.0,
        3.0,
    ),
    "uniform to a half-line": (SHAPED(dist.Uniform(0.5, 1.0), [t.SigmoidTransform().inv]), 0.0, math.inf),
    "a permutation": (SHAPED(uniform([0.0, 1.0, 2.0], 3.0), [TURN]), [1.0, 2.0, 0.0], 3.0),
    "an inverse permutation": (SHAPED(uniform([0.0, 1.0, 2.0], 3.0), [TURN.inv]), [2.0, 0.0, 1.0], 3.0),
    "a permutation of integers": (SHAPED(dist.Poisson(torch.full((3,), 0.1)).to_event(1), [TURN]), 0.0, math.inf),
    "a permutation of a half-line": (SHAPED(dist.Gamma(torch.full((3,), 1.0), 1.0).to_event(1), [TURN]), 0.0, math.inf),
    "another shape": (
        SHAPED(uniform([0.0, 1.0, 2.0, 3.0], 4.0), [t.ReshapeTransform((4,), (2, 2))]),
        [[0.0, 1.0], [2.0, 3.0]],
        4.0,
    ),
    "pieces": (SHAPED(uniform([0.0, 0.0], 1.0), [t.CatTransform([REAL, EXP], -1)]), [0.0, 1.0], [1.0, math.e]),
    "pieces of a half-line": (
        SHAPED(
            dist.Exponential(torch.ones(2)).to_event(1), [t.StackTransform([t.AffineTransform(1.0, -1.0), EXP], -1)]
        ),
        [-math.inf, 1.0],
        [1.0, math.inf],
    ),
    "pieces turned": (
        SHAPED(dist.Normal(torch.zeros(3), 1.0).to_event(1), [t.CatTransform([EXP, REAL], -1, [1, 2]), TURN]),
        [-math.inf, -math.inf, 0.0],
        math.inf,
    ),
    "flipped in part": (
        SHAPED(dist.Exponential(torch.ones(2)).to_event(1), [t.AffineTransform(0.0, torch.tensor([1.0, -1.0]), 1)]),
        [0.0, -math.inf],
        [math.inf, 0.0],
    ),
    "exponential to half of the unit interval": (SHAPED(dist.Exponential(1.0), [t.SigmoidTransform()]), 0.5, 1.0),
    "uniform, one over": (SHAPED(dist.Uniform(0.0, 1.0), [t.PowerTransform(torch.tensor(-1.0))]), 1.0, math.inf),
    "uniform to the real line, up to rounding": (
        SHAPED(dist.Uniform(-0.7, 0.9), [t.AffineTransform(-0.7, 1.6).inv, t.SigmoidTransform().inv]),
        -math.inf,
        math.inf,
    ),
    **{
        f"a spline of {number}": (SHAPED(uniform(torch.zeros(number), 1.0), [spline]), *ends)
        for number, spline in SPLINES.items()
        for ends in [[spline(torch.full((number,), end)).tolist() for end in (0.0, 1.0)]]
    },
    "a spline of a half-line": (
        SHAPED(dist.Exponential(torch.ones(2)).to_event(1), [SPLINES[2]]),
        SPLINES[2](torch.zeros(2)).tolist(),
        math.inf,
    ),
    "a flow": (
        SHAPED(dist.Normal(torch.zeros(2), 1.0).to_event(1), [FLOW]),
        -math.inf,
        math.inf,
    ),
}
UNKNOWN = {
    "a flow of a uniform": SHAPED(uniform([0.0, 0.0], 1.0), [FLOW]),
    "no bijection": SHAPED(dist.Uniform(-1.0, 1.0), [t.AbsTransform()]),
    "integers": SHAPED(dist.Poisson(1.0), [t.AffineTransform(0.0, 2.0)]),
    "integers, squared": SHAPED(dist.Poisson(1.0), [t.PowerTransform(torch.tensor(2.0))]),
    "components apart": mixture(dist.Uniform(torch.tensor([2.0, 0.0]), torch.tensor([3.0, 1.0]))),
    "no bijection in a piece": SHAPED(uniform([-1.0, -1.0], 1.0), [t.CatTransform([REAL, t.AbsTransform()], -1)]),
}


@pytest.mark.parametrize("name", KNOWN)
def test_supports_are_where_the_samples_are(name):
    distribution, *ends = KNOWN[name]
    support = support_of(distribution)
    assert support.event_dim == len(distribution.event_shape)
    pyro.set_rng_seed(0)
    with torch.no_grad():
        values = distribution.sample((4000,)).double()
    shape = distribution.batch_shape + distribution.event_shape
    for found, expected, extreme in zip(ends_of(support, shape), ends, (values.amin(0), values.amax(0)), strict=True):
        expected = torch.tensor(expected).double().expand(values.shape[1:])
        assert torch.allclose(torch.as_tensor(found).double().expand_as(expected), expected, rtol=1e-6)
        # The extreme of 4,000 draws is near each finite end; at an infinite one it is beyond 1.
        near = torch.where(expected.isfinite(), (extreme - expected).abs() < 0.05, extreme.abs() > 1)
        assert bool(near.all())
    assert support.is_discrete == bool((values % 1 == 0).all())


@pytest.mark.parametrize("name", UNKNOWN)
def test_supports_that_cannot_be_computed_are_unknown(name):
    support = support_of(UNKNOWN[name])
    assert isinstance(support, Unknown) or isinstance(support.base_constraint, Unknown)
    assert support.event_dim == len(UNKNOWN[name].event_shape)
    assert support.is_discrete == name.startswith("integers")


def test_half_lines_from_zero_are_the_positive_numbers():
    """Those have numbers as ends, so that data are checked at once."""
    assert support_of(SHAPED(dist.Gamma(2.0, 1.0), [t.AffineTransform(0.0, 2.0)])) is constraints.positive
    assert type(support_of(SHAPED(dist.Gamma(2.0, 1.0), [REAL, EXP]))) is constraints.greater_than


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


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_but(["bounded"], ANNEALED))
def test_annealing_moves_on_the_true_support(name):
    prior, low, high = ANNEALED[name]
    model, _ = programs(prior, prior)
    found = pv.ais(model, None, X, num_steps=200, num_chains=64, seed=0, progress=False)
    z = (found.per_datum - log_evidence(prior, low, high)) / found.per_datum_error
    assert float(z.abs().max()) < 4


@pytest.mark.slow
def test_annealing_under_the_mixture_priors_of_this_package():
    pyro.set_rng_seed(0)
    vae = pv.mlp_vae((5,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian", prior=pv.MixturePrior(2, 3))
    x = torch.randn(3, 5)
    found = pv.ais(vae.model, None, x, num_steps=100, num_chains=64, seed=0, progress=False)
    exact = pv.log_likelihood(vae, x, 20_000, seed=0, progress=False)
    error = (found.per_datum_error**2 + exact.per_datum_error**2).sqrt()
    assert float(((found.per_datum - exact.per_datum) / error).abs().max()) < 4


COVERS_IN_PART = {"shifted": SHIFTED} | {name: UNKNOWN[name] for name in ("a flow of a uniform", "integers")}


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


def same(model, guide):
    """Whether the supports of a latent under model and guide are the same; an error where the guide's lacks a part."""
    return check_covers("z", model, guide)


TAILS = dist.StudentT(3.0)  # a normal has too light tails: the weights would have no variance
ENDS = torch.tensor(-0.7), torch.tensor(0.9)
ROUNDED = {
    "by hand": (dist.Uniform(0.1, 0.9), SHAPED(TAILS, [t.SigmoidTransform(), t.AffineTransform(0.1, 0.8)])),
    "by PyTorch": (dist.Uniform(0.1, 0.9), SHAPED(TAILS, [biject_to(dist.Uniform(0.1, 0.9).support)])),
    "tensors": (dist.Uniform(*ENDS), SHAPED(TAILS, [biject_to(dist.Uniform(*ENDS).support)])),
    "Beta": (dist.Uniform(0.1, 0.9), SHAPED(dist.Beta(1.0, 1.0), [t.AffineTransform(0.1, 0.8)])),
    "AffineBeta": (dist.Uniform(0.1, 0.9), dist.AffineBeta(*map(torch.tensor, (1.0, 1.0, 0.1, 0.8)))),
    "negative": (dist.Uniform(-0.9, 0.3), SHAPED(TAILS, [t.SigmoidTransform(), t.AffineTransform(0.3, -1.2)])),
}


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("evaluation", slow_but(["log_likelihood"], ["log_likelihood", "ais"]))
def test_the_rounding_of_an_end_is_no_part_of_the_support(name, evaluation):
    model, guide = programs(*ROUNDED[name])
    if evaluation == "ais":
        found = pv.ais(model, guide, X, start="guide", num_steps=50, num_chains=64, seed=0, progress=False)
    else:
        found = pv.log_likelihood(model, guide, X, 5000, seed=0, progress=False)
    low, high = (float(end) for end in (ROUNDED[name][0].low, ROUNDED[name][0].high))
    # The density has no step at the ends: the midpoint rule is exact to its 1e-5.
    z = (found.per_datum - log_evidence(ROUNDED[name][0], low, high)) / found.per_datum_error
    assert float(z.abs().max()) < 4


def test_a_difference_of_more_than_the_rounding_is_one():
    """Four eps of the larger end count as rounding; ends at zero are exact, since much mass may lie near zero."""
    eps = torch.finfo(torch.float32).eps
    for low, high in ((0.5 + 3 * eps, 1.0), (0.5, 1.0 - 3 * eps)):
        assert same(uniform([0.5], 1.0), uniform([low], high))
    for low, high in ((0.5 + 5 * eps, 1.0), (0.5, 1.0 - 5 * eps)):
        with pytest.raises(pv.PyroVAEError, match="does not cover"):
            same(uniform([0.5], 1.0), uniform([low], high))
    with pytest.raises(pv.PyroVAEError, match="does not cover"):
        same(dist.Beta(0.01, 1.0), uniform([1e-9], 1.0))
    low, high = torch.tensor([[0.5], [1.0]], dtype=torch.float64)
    with pytest.raises(pv.PyroVAEError, match="does not cover"):
        same(uniform(low, high), uniform(low + eps, high))


def test_a_mixture_of_integers_stays_discrete():
    prior = mixture(dist.Binomial(torch.tensor([4.0, 4.0]), torch.tensor([0.2, 0.7])))
    model, guide = programs(prior, dist.Binomial(4, torch.tensor(0.5)))
    with pytest.raises(pv.PyroVAEError, match="model site 'z' is discrete"):
        pv.ais(model, None, X, num_steps=10, num_chains=4, seed=0, progress=False)
    found = pv.log_likelihood(model, guide, X, 5000, seed=0, progress=False)
    z = torch.arange(5.0)
    exact = (dist.Normal(z, 0.5).log_prob(X[:, None]) + prior.log_prob(z)).logsumexp(-1)
    assert float(((found.per_datum - exact) / found.per_datum_error).abs().max()) < 4


def halved(distribution):
    return SHAPED(distribution, [t.AffineTransform(0.0, 0.5)])


def flow(high, transform=FLOW):
    return SHAPED(uniform([0.0, 0.0], high), [transform])


def new_flow():
    """A network made anew with the parameters of FLOW."""
    made = dist.transforms.affine_autoregressive(2)
    made.load_state_dict(FLOW.state_dict())
    return made


def apart(*high):
    return mixture(dist.Uniform(torch.tensor([0.0, 2.0]), torch.tensor(high)))


ALIKE = {
    "a flow": (flow(1.0), flow(1.0), True),
    "a flow made anew": (flow(1.0), flow(1.0, new_flow()), True),
    "a flow of more": (flow(1.0), flow(1.5), False),
    "an inverse flow": (flow(1.0, FLOW.inv), flow(1.0, new_flow().inv), True),
    "integers": (halved(dist.Poisson(1.0)), halved(dist.Poisson(2.0)), True),
    "components": (apart(1.0, 3.0), apart(1.0, 3.0), True),
    "wider components": (apart(1.0, 3.0), apart(1.5, 3.0), False),
    "a part of an interval": (apart(1.0, 3.0), dist.Uniform(0.0, 3.0), False),
    "a part of a half-line": (SHAPED(dist.Uniform(-1.0, 1.0), [t.AbsTransform()]), dist.Exponential(1.0), False),
    "a part of the real line": (flow(1.0), dist.Normal(torch.zeros(2), 1.0).to_event(1), False),
}


@pytest.mark.parametrize("name", ALIKE)
def test_guides_that_cover_an_unknown_support(name):
    model, guide, expected = ALIKE[name]
    assert same(model, guide) == expected


UNLIKE = {
    "a permutation of less": (
        SHAPED(uniform([0.0] * 3, 1.0), [TURN]),
        SHAPED(uniform([0.0] * 3, 0.2), [TURN]),
        "cover",
    ),
    "a flow of less": (flow(1.0), flow(0.2), r"covers .*1\.0.*got .*0\.2"),
    "another flow": (
        flow(1.0),
        flow(1.0, dist.transforms.affine_autoregressive(2)),
        "guide's .* is unknown, since Affine",
    ),
    "another inverse flow": (
        flow(1.0, FLOW.inv),
        flow(1.0, dist.transforms.affine_autoregressive(2).inv),
        "guide's .* is unknown, since",
    ),
    "an inverse flow": (flow(1.0), flow(1.0, FLOW.inv), "guide's .* is unknown, since"),
    "fewer integers": (halved(dist.Poisson(1.0)), halved(dist.Binomial(2, torch.tensor(0.5))), "does not cover"),
    "other integers": (
        halved(dist.Poisson(1.0)),
        SHAPED(dist.Poisson(1.0), [t.AffineTransform(1.0, 0.5)]),
        "guide's .* is unknown, since .* moves its discrete values",
    ),
    "integers by numbers": (halved(dist.Poisson(1.0)), TAILS, "does not cover"),
    "smaller components": (apart(1.0, 3.0), apart(1.0, 2.5), "does not cover"),
    "a known support by an unknown one": (
        dist.Uniform(0.0, 3.0),
        apart(1.0, 3.0),
        "guide's .* is unknown, since its components",
    ),
    "a part of less": (apart(1.0, 3.0), dist.Uniform(0.0, 2.0), "does not cover"),
    "pieces": (
        dist.Normal(torch.zeros(2), 1.0).to_event(1),
        SHAPED(dist.Normal(torch.zeros(2), 1.0).to_event(1), [t.CatTransform([REAL, EXP], -1)]),
        r"covers Real.*got MixedInterval\(lower_bound=tensor\(\[-inf, 0",
    ),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_guides_that_may_not_cover_an_unknown_support(name):
    model, guide, message = UNLIKE[name]
    with pytest.raises(pv.PyroVAEError, match=rf"(?s){message}"):
        same(model, guide)


FIXED = dist.transforms.affine_autoregressive(2).requires_grad_(False)
LEAF = torch.tensor([1.5, 0.5], requires_grad=True)
TRAINED = {
    "a trained flow": (flow(1.0), True),
    "a fixed flow": (flow(1.0, FIXED), False),
    "trained ends under a fixed flow": (flow(LEAF, FIXED), True),
    "components apart": (apart(1.0, 3.0), False),
    "trained components apart": (
        mixture(dist.Uniform(torch.tensor([0.0, 2.0]), LEAF + torch.tensor([0.0, 2.0]))),
        True,
    ),
    "trained weights": (
        dist.MixtureSameFamily(dist.Categorical(logits=LEAF), dist.Uniform(torch.zeros(2), torch.tensor([1.0, 2.0]))),
        False,
    ),
    "a trained scale of a half-line": (SHAPED(dist.Gamma(1.0, 1.0), [t.AffineTransform(0.0, LEAF)]), False),
    "a trained scale of a flipped one": (SHAPED(dist.Gamma(1.0, 1.0), [t.AffineTransform(0.0, -LEAF)]), False),
    "a trained place of a half-line": (SHAPED(dist.Gamma(1.0, 1.0), [t.AffineTransform(LEAF, 1.0)]), True),
    "a trained place under a permutation": (
        SHAPED(uniform([0.0, 0.0], LEAF), [dist.transforms.Permute(torch.tensor([1, 0]))]),
        True,
    ),
}


@pytest.mark.parametrize("name", TRAINED)
def test_which_supports_parameters_move(name):
    distribution, moves = TRAINED[name]
    message = r"guide site 'z' .* has a support that depends on parameters"
    with pytest.raises(pv.PyroVAEError, match=message) if moves else nullcontext():
        check_fixed_supports({"z": {"fn": distribution}})


@pytest.mark.parametrize(
    ("prior", "reason"),
    [(flow(1.0), "unknown, since AffineAutoregressive"), (KNOWN["flipped in part"][0], "MixedInterval")],
    ids=["unknown", "mixed"],
)
def test_annealing_is_told_why_it_has_no_transform(prior, reason):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=x)

    with pytest.raises(pv.PyroVAEError, match=f"model site 'z' .*has the support .*{reason}"):
        pv.ais(model, None, X, num_steps=10, num_chains=4, seed=0, progress=False)


VECTORS = {
    name: SHAPED(uniform(torch.zeros(number), 1.0), [spline])
    for name, number, spline in (("spline", 2, SPLINES[2]), ("permutation", 3, TURN))
} | {
    "pieces": SHAPED(dist.Normal(torch.zeros(2), 1.0).to_event(1), [t.CatTransform([REAL, EXP], -1)]),
}


@pytest.mark.parametrize("name", slow_but(["permutation"], VECTORS))
def test_annealing_under_transforms_of_vectors(name):
    prior = VECTORS[name]

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", prior).sum(-1), 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", prior)

    found = pv.ais(model, None, X, num_steps=50, num_chains=32, seed=0, progress=False)
    exact = pv.log_likelihood(model, guide, X, 20_000, seed=0, progress=False)
    error = (found.per_datum_error**2 + exact.per_datum_error**2).sqrt()
    assert float(((found.per_datum - exact.per_datum) / error).abs().max()) < 4
