"""Models compared on one set of data: exact differences, their errors, and what can't be compared."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv

QUIET = {"seed": 0, "progress": False}
N = 1000
X = 2**0.5 * torch.randn(N, generator=torch.Generator().manual_seed(0))


def program(scale, noise=dist.Normal, seen=lambda x: x, mask=None):
    """A model whose data have a normal log p(x) of variance 1 + scale^2, with a guide that is near the posterior."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.poutine.mask(mask=True if mask is None else mask[: len(x)]):
                pyro.sample("x", noise(z, scale), obs=seen(x))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / (1 + scale**2), 1.1 * scale / (1 + scale**2) ** 0.5))

    return model, guide


def exact(scale):
    return dist.Normal(0.0, (1 + scale**2) ** 0.5).log_prob(X.double())


SCALES = {"narrow": 0.5, "true": 1.0, "wide": 2.0}


@pytest.mark.slow
@pytest.mark.parametrize("refine", [False, True])
def test_differences_are_exact_within_their_errors(refine):
    models = {name: program(scale) for name, scale in SCALES.items()}
    table = pv.compare_models(models, X, 500, refine=refine, **QUIET)
    best = exact(1.0)
    assert table.index.tolist() == sorted(SCALES, key=lambda name: -exact(SCALES[name]).mean())
    for name, row in table.iterrows():
        own = exact(SCALES[name])
        difference = (own - best).mean().item()
        if name == "true":
            assert row.difference == row.difference_se == row.difference_mc == 0
        else:
            assert abs(row.difference - difference) < 4.5 * row.difference_mc
            spread = (own - best).std().item() / N**0.5
            assert row.difference_se == pytest.approx(math.hypot(spread, row.difference_mc), rel=0.05)
            assert row.difference_se < row.log_likelihood_se * 1.6  # far less than of two means apart
        assert row.share_high_k == 0
        assert row.ess > 250


def test_a_claim_says_what_it_takes():
    models = {"true": program(1.0), "wide": program(2.0)}
    row = pv.compare_models(models, X, 500, claim=0.1, refine=False, **QUIET).loc["wide"]
    # So many data, and so many samples, have the errors that the claim needs.
    assert row.difference_se * (N / row.data_needed) ** 0.5 == pytest.approx(0.05)
    assert row.difference_mc * (500 / row.samples_needed) ** 0.5 == pytest.approx(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("refine", [False, True])
def test_a_stated_error_is_that_of_the_difference(refine):
    models = {"true": program(1.0), "wide": program(2.0)}
    table = pv.compare_models(models, X, error=4e-4, refine=refine, **QUIET)
    assert 2e-4 < table.difference_mc["wide"] < 4e-4


def test_an_error_of_the_mean_takes_samples_where_the_weights_vary():
    sd = torch.where(X.abs() < 1, 0.9, 2.5)  # of the guide; the posterior's is 0.71

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, sd[(x[:, None] == X).int().argmax(1)]))

    model = program(1.0)[0]
    found = pv.log_likelihood(model, guide, X, error=3e-4, error_of="mean", **QUIET)
    assert 1.5e-4 < found.monte_carlo_error < 3e-4
    assert abs(found.mean - exact(1.0).mean()) < 4.5 * found.monte_carlo_error
    easy, hard = found.drawn[X.abs() < 1].double().mean(), found.drawn[X.abs() >= 1].double().mean()
    v = [w.exp().var(0).mean() for w in (_weights(0.9), _weights(2.5))]
    # In proportion to the root of the variance, but for numbers that are powers of the root of two.
    assert hard / easy == pytest.approx((v[1] / v[0]).sqrt().item(), rel=0.5)
    # All of these data with the error of the mean's goal would take more.
    same = found.per_datum_error.square() * found.drawn / (3e-4**2 * N)
    assert found.drawn.sum() < same.sum()


def _weights(sd):
    z = 2.0**-0.5 * torch.zeros(1) + sd * torch.randn(100_000, 1, generator=torch.Generator().manual_seed(1))
    return dist.Normal(0.0, 0.5**0.5).log_prob(z) - dist.Normal(0.0, sd).log_prob(z)


@pytest.mark.parametrize("descending", [False, True])
def test_the_order_of_the_data_does_not_decide_their_samples(descending):
    x = X.abs().sort(descending=descending).values

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, torch.where(x > 3.0, 20.0, 0.8)))  # few data are hard

    found = pv.log_likelihood(program(1.0)[0], guide, x, error=1e-3, error_of="mean", **QUIET)
    assert 0.4e-3 < found.monte_carlo_error < 1e-3
    exact_of_x = dist.Normal(0.0, 2**0.5).log_prob(x.double())
    assert (found.per_datum - exact_of_x).abs().max() < 1.0  # in the data's own order
    assert abs((found.per_datum - exact_of_x).mean()) < 4.5 * found.monte_carlo_error


@pytest.mark.parametrize("of", ["datum", "mean"])
def test_an_exact_guide_takes_the_fewest_samples(of):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    found = pv.log_likelihood(program(1.0)[0], guide, X, error=1e-3, error_of=of, **QUIET)
    assert (found.drawn == 100).all()


def test_an_error_that_is_out_of_reach_is_said():
    with pytest.warns(UserWarning, match="the mean has a Monte Carlo error of .*, above the 1e-06 that was asked for"):
        pv.log_likelihood(*program(1.0), X[:50], 100, error=1e-6, error_of="mean", **QUIET)


def test_warnings_name_the_model():
    model = program(1.0)[0]

    def narrow(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.1))

    with pytest.warns(UserWarning, match="model 'narrow': .* Pareto k-hat"):
        table = pv.compare_models({"narrow": (model, narrow), "true": program(1.0)}, X, 200, refine=False, **QUIET)
    assert table.share_high_k["narrow"] > 0.5


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (program(1.0, seen=lambda x: x / 2), "observe different things: .* other numbers"),
        (program(1.0, mask=torch.arange(N) > 3), "observe different things"),
        (program(1.0, seen=lambda x: x.flip(0).flip(0) * 2), "observe different things: .* other numbers"),
        (program(1.0, noise=lambda z, _: dist.Poisson(z.exp()), seen=torch.abs), "observe different things"),
    ],
)
def test_other_observations_are_refused(other, words):
    with pytest.raises(ValueError, match=words):
        pv.compare_models({"A": program(1.0), "B": other}, X.round(), 50, **QUIET)


def test_densities_beside_probabilities_are_refused():
    x = (torch.rand(12, 5) > 0.5).float()
    pairs = {
        name: pv.mlp_vae((5,), latent_dim=2, hidden_dims=(4,), likelihood=name)
        for name in ("bernoulli", "continuous_bernoulli")
    }
    with pytest.raises(ValueError, match="probabilities of 5 and 0 of 5 numbers"):
        pv.compare_models(pairs, x, 50, **QUIET)


def test_sites_of_both_kinds_may_have_equal_values_in_any_order():
    x = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, -2.0], [0.0, 5.0]])

    def model(order):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                for i in order:
                    pyro.sample(f"x_{i}", (dist.Bernoulli(logits=z), dist.Normal(z, 1.0))[i], obs=x[:, i])

        return model

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    models = {"01": (model((0, 1)), guide), "10": (model((1, 0)), guide)}
    assert len(pv.compare_models(models, x, 200, refine=False, **QUIET)) == 2


def columns(*observed, masks=None):
    """A model that observes some columns of x, each in a site, and no other; with masks of these."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            for place, i in enumerate(observed):
                with pyro.poutine.mask(mask=True if masks is None else masks[place]):
                    pyro.sample(f"x_{place}", dist.Normal(z, 1.0), obs=x[:, i])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    return model, guide


EQUAL = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]])  # columns that values can't tell apart


@pytest.mark.filterwarnings("ignore:.*Pareto k-hat above")
@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (columns(0), columns(1), False),
        (columns(0, 0), columns(0, 1), False),
        (columns(0, 1), columns(1, 0), True),
        (columns(0, 1, masks=(True, False)), columns(0), True),
        (columns(0, 1, masks=(True, False)), columns(0, 1, masks=(False, True)), False),
    ],
)
def test_elements_are_told_by_their_place_and_not_by_their_values(first, second, same):
    if same:
        assert len(pv.compare_models({"A": first, "B": second}, EQUAL, 100, refine=False, **QUIET)) == 2
        return
    with pytest.raises(ValueError, match="observe different things"):
        pv.compare_models({"A": first, "B": second}, EQUAL, 100, refine=False, **QUIET)


def test_factors_are_refused():
    model, guide = program(1.0)

    def better(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("bonus", torch.full((len(x),), 5.0))

    with pytest.raises(ValueError, match="model 'B': model site 'bonus' is a factor"):
        pv.compare_models({"A": (model, guide), "B": (better, guide)}, X[:9], 100, refine=False, **QUIET)


def test_a_split_that_is_drawn_anew_is_read_once():
    digits = pv.data.load("digits", binarize="dynamic")
    vae = pv.mlp_vae(digits.event_shape, latent_dim=2, hidden_dims=(4,))
    table = pv.compare_models({"A": vae, "B": vae}, digits.train[:20], 50, refine=False, **QUIET)
    assert 0 < table.difference_se.iloc[1] < 1.6 * table.difference_mc.iloc[1]  # only the samples differ
    few = pv.data.load("digits", binarize="dynamic").train
    assert len(pv.compare_models({"A": vae, "B": vae}, few, 30, refine=False, **QUIET)) == 2


def test_discrete_latents_are_told_to_leave_refine_out():
    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(y, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(0.5 + 0 * x))

    with pytest.raises(ValueError, match=r"model 'A': .*discrete.*Or pass refine=False"):
        pv.compare_models({"A": (model, guide), "B": (model, guide)}, X[:5], 50, **QUIET)


def test_the_same_data_in_other_sites_are_accepted():
    x = torch.randn(20, 2)

    def together(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None], 1.0).expand([*z.shape, 2]).to_event(1), obs=x)

    def apart(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            for i in (1, 0):
                pyro.sample(f"column {i}", dist.Normal(z, 1.0), obs=x[:, i])

    def guide_in(plate):
        def guide(x):
            with pyro.plate(plate, len(x)):
                pyro.sample("z", dist.Normal(x.sum(1) / 3, 0.6))

        return guide

    models = {"together": (together, guide_in("data")), "apart": (apart, guide_in("rows"))}
    table = pv.compare_models(models, x, 2000, refine=False, **QUIET)
    assert abs(table.difference.iloc[1]) <= 4.5 * table.difference_mc.iloc[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"models": {"A": program(1.0)}}, "at least two models"),
        ({"models": [program(1.0)] * 2}, "dictionary of at least two models by name, got .*Pass {'A': a, 'B': b}"),
        ({"models": {"A": program(1.0), "B": None}}, r"model 'B': .*Pass a pair, or a tuple \(model, guide\)"),
        ({"claim": 0.0}, "claim to be a positive number"),
        ({"error": -1.0}, "error to be a positive number of nats, got -1.0"),
    ],
)
def test_arguments_that_are_refused(arguments, words):
    models = {"A": program(1.0), "B": program(2.0)}
    with pytest.raises(ValueError, match=words):
        pv.compare_models(**{"models": models, "x": X, "num_samples": 50, **QUIET, **arguments})
