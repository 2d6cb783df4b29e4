"""Angles, probabilities of 0, and families with a density of their own: whether a guide counts the mass once."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal

import pyro_vae as pv

X = torch.tensor([0.3, -2.0, 3.0])
NODES = torch.linspace(-math.pi, math.pi, 4001, dtype=torch.float64)[:-1]


def angles(prior, guided):
    """Noisy directions: x ~ Normal(cos z, 0.5), with a prior of z and a guide made of x."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior(x))
            pyro.sample("x", dist.Normal(z.cos(), 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", guided(x))

    return model, guide


def von_mises(x):
    return dist.VonMises(torch.full_like(x, 2.5), 1.0)


def exact(x):
    """The integral over a period by the trapezoidal rule, whose error for a smooth periodic function is rounding."""
    log_p = dist.VonMises(torch.tensor(2.5, dtype=torch.float64), 1.0).log_prob(NODES)
    log_p = log_p + dist.Normal(NODES.cos(), 0.5).log_prob(x.double()[:, None])
    return log_p.logsumexp(-1) + math.log(2 * math.pi / len(NODES))


ONE_PERIOD = {
    "von Mises": lambda x: dist.VonMises(torch.full_like(x, 1.5), 0.5),
    "uniform": lambda x: dist.Uniform(torch.full_like(x, -math.pi), math.pi),
    "another turn": lambda x: dist.Uniform(torch.full_like(x, 1.0), 1.0 + 2 * math.pi),
}


@pytest.mark.parametrize("name", ONE_PERIOD)
def test_a_guide_on_one_period_gives_log_p(name):
    result = pv.log_likelihood(*angles(von_mises, ONE_PERIOD[name]), X, 20_000, seed=0)
    assert ((result.per_datum.double() - exact(X)).abs() < 4 * result.per_datum_error).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda *p: pv.ELBO(kl="monte_carlo").loss(*p, X),
        lambda *p: pv.IWAE(5).bound(*p, X),
        lambda *p: pv.log_weights(*p, X, num_particles=2),
        lambda *p: pv.log_likelihood(*p, X, 10),
    ],
)
@pytest.mark.parametrize(
    "prior",
    [
        von_mises,
        lambda x: dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.VonMises(torch.tensor([0.0, 1.0]), 1.0)),
        lambda x: dist.TransformedDistribution(von_mises(x), dist.transforms.AffineTransform(1.0, 2.0)),
    ],
    ids=["angle", "mixture", "affine"],
)
def test_a_guide_on_many_periods_is_refused(prior, call):
    with pytest.raises(pv.PyroVAEError, match=r"'z' is an angle .* expected a guide on one period, such as .*VonMises"):
        call(*angles(prior, lambda x: dist.Normal(x, 1.0)))


@pytest.mark.slow
def test_a_guide_on_a_part_of_a_period_bounds_log_p_and_does_not_estimate_it():
    parts = angles(von_mises, lambda x: dist.Uniform(torch.zeros_like(x), 1.0))
    bound = torch.stack([pv.IWAE(50).bound(*parts, X) for _ in range(100)]).double()
    assert (bound.mean(0) < exact(X) + 4 * bound.std(0) / 10).all()
    with pytest.raises(pv.PyroVAEError, match="expected a guide on one period"):
        pv.log_likelihood(*parts, X, 10)


def test_an_angle_does_not_cover_the_real_line():
    parts = angles(lambda x: dist.Normal(torch.zeros_like(x), 1.0), von_mises)
    with pytest.raises(pv.PyroVAEError, match="does not cover the model's support at site 'z'"):
        pv.log_likelihood(*parts, X, 10)


def test_autoguides_of_an_angle():
    """AutoNormal puts a density on the real line; AutoDelta a point, which is a maximum a posteriori estimate."""
    model, _ = angles(von_mises, von_mises)
    assert pv.ELBO(kl="monte_carlo").loss(model, AutoDelta(model), X) < math.inf
    pyro.clear_param_store()
    with pytest.raises(pv.PyroVAEError, match="expected a guide on one period"):
        pv.ELBO(kl="monte_carlo").loss(model, AutoNormal(model), X)


def test_observed_angles_may_be_of_any_turn():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.VonMises(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))

    history = pv.fit(model, guide, torch.linspace(0.0, 6.0, 20), pv.ELBO(), epochs=1, batch_size=10, progress=False)
    assert history["train_bound"].notna().all()


def classes(probabilities):
    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(len(x), 3) / 3))
            pyro.sample("x", dist.Normal(y + pyro.param("m", torch.tensor(0.0)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(torch.tensor(probabilities).expand(len(x), 3)))

    return model, guide


@pytest.mark.parametrize(
    "evaluate",
    [
        lambda *parts: pv.log_likelihood(*parts, 20, seed=0),
        lambda *parts: pv.compare(*parts, pv.IWAE(2, "score"), repeats=2, seed=0),
    ],
)
def test_a_probability_of_zero_is_said(evaluate):
    with pytest.warns(UserWarning, match="the guide gives probability 0 to a value of site 'y'"):
        evaluate(*classes([0.5, 0.5, 0.0]), X)


def switches(number, effect):
    """Some Bernoulli latents as one event, always 0 in the guide, and x ~ N(effect of their sum, 1)."""

    def body(x, probability, *, observe):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((len(x), number), probability)).to_event(1))
            if observe:
                pyro.sample("x", dist.Normal(effect * z.sum(-1), 1.0), obs=x)

    return functools.partial(body, probability=0.5, observe=True), functools.partial(
        body, probability=0.0, observe=False
    )


@pytest.mark.parametrize(("number", "effect"), [(1, 0.0), (1, 3.0), (2, 3.0), (4, 3.0), (50, 3.0)])
def test_a_probability_of_zero_of_one_of_many_is_said(number, effect):
    """Also where both values have one density. All 50 at 1 would have none of p(x) at x = 1.5."""
    with pytest.warns(UserWarning, match="the guide gives probability 0 to a value of site 'z'"):
        pv.log_likelihood(*switches(number, effect), torch.full((3,), 1.5), 10, seed=0)


def test_a_probability_of_zero_of_two_that_depend_on_each_other_is_said():
    """Both switches are on or off: a single one has none of p(x)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((len(x), 2), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(99.0 * (z[..., 0] - z[..., 1]) + z[..., 0], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(torch.zeros(len(x), 2)).to_event(1))

    with pytest.warns(UserWarning, match="the guide gives probability 0 to a value of site 'z'"):
        pv.log_likelihood(model, guide, torch.full((3,), 0.5), 10, seed=0)


def test_a_probability_of_zero_of_one_datum_in_a_plate_without_a_size_is_said():
    def program(observe):
        def body(x):
            with pyro.plate("data"):
                y = pyro.sample("y", dist.Categorical(torch.tensor([0.5, 0.5] if observe else [1.0, 0.0])))
                if observe:
                    pyro.sample("x", dist.Normal(y.to(x.dtype), 1.0), obs=x)

        return body

    with pytest.warns(UserWarning, match="the guide gives probability 0 to a value of site 'y'"):
        pv.log_likelihood(program(True), program(False), torch.zeros(1), 10, seed=0)


def test_a_probability_of_zero_where_the_posterior_has_none_is_not(recwarn):
    """At x = -60, the third class has e^-182 of p(x)."""
    pv.log_likelihood(*classes([0.5, 0.5, 0.0]), torch.full((3,), -60.0), 20, seed=0)
    assert not any("probability 0" in str(warning.message) for warning in recwarn)


def test_a_small_probability_is_right(recwarn):
    exact = dist.Normal(torch.arange(3.0), 1.0).log_prob(X[:, None]).logsumexp(-1) - math.log(3)
    result = pv.log_likelihood(*classes([0.4, 0.4, 0.2]), X, 20_000, seed=0)
    assert ((result.per_datum - exact).abs() < 4 * result.per_datum_error).all()
    assert not any("probability 0" in str(warning.message) for warning in recwarn)


class Tempered(dist.Normal):
    """A user's family whose density is not that of the parent."""

    def log_prob(self, value):
        return super().log_prob(value) - value.abs()


def test_a_closed_form_is_not_inherited_by_a_density_of_its_own():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Tempered(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    _, guide = angles(None, lambda x: dist.Normal(x / 2, 0.5))
    with pytest.raises(pv.PyroVAEError, match="has no closed form at site 'z'"):
        pv.ELBO().loss(model, guide, X)
    assert pv.ELBO(kl="monte_carlo").loss(model, guide, X) < math.inf


def test_a_skewed_angle_is_an_angle():
    def prior(x):
        return dist.SineSkewed(dist.VonMises(torch.zeros(len(x), 1), 0.5).to_event(1), torch.tensor([0.5]))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior(x))
            pyro.sample("x", dist.Normal(z[..., 0], 0.7), obs=x)

    nodes = NODES[:, None]
    log_p = dist.SineSkewed(dist.VonMises(torch.zeros(1).double(), 0.5).to_event(1), torch.tensor([0.5]).double())
    log_p = log_p.log_prob(nodes) + dist.Normal(NODES, 0.7).log_prob(X.double()[:, None])
    right = log_p.logsumexp(-1) + math.log(2 * math.pi / len(NODES))
    _, guide = angles(None, lambda x: dist.VonMises(x[:, None], 1.0).to_event(1))
    result = pv.log_likelihood(model, guide, X, 20_000, seed=0)
    assert ((result.per_datum - right).abs() < 4 * result.per_datum_error).all()
    _, normal = angles(None, lambda x: dist.Normal(x[:, None], 1.0).to_event(1))
    with pytest.raises(pv.PyroVAEError, match="'z' is an angle"):
        pv.log_likelihood(model, normal, X, 10)
    with pytest.raises(pv.PyroVAEError, match="periodic"):
        pv.ais(model, None, X, 3, 2)


@pytest.mark.parametrize("turned", [False, True])
def test_a_closed_form_that_pytorch_has_wrong_is_not_taken(turned):
    """PyTorch's KL of a continuous Bernoulli and Uniform(0, 1) is infinite."""
    families = [lambda x: dist.Uniform(torch.zeros_like(x), 1.0), lambda x: dist.ContinuousBernoulli(logits=x)]
    parts = angles(*reversed(families)) if turned else angles(*families)
    with pytest.raises(pv.PyroVAEError, match="has no closed form at site 'z'"):
        pv.ELBO().loss(*parts, X)
    assert pv.active_units(*parts, X, seed=0)["kl"].map(math.isfinite).all()
