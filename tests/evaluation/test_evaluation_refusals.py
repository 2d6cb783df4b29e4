"""Every evaluation refuses invalid data and programs before it starts, with a message that names the fix."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv

EVALUATIONS = {
    "log_likelihood": lambda model, guide, x: pv.log_likelihood(model, guide, x, 30),
    "ais": lambda model, guide, x: pv.ais(model, guide, x, 5, 2),
    "ais from the guide": lambda model, guide, x: pv.ais(model, guide, x, 5, 2, start="guide"),
    "bdmc": lambda model, guide, x: pv.bdmc(model, guide, x, 5, 2),
    "inference_gaps": lambda model, guide, x: pv.inference_gaps(model, guide, x, 10, num_steps=3),
    "decompose_elbo": lambda model, guide, x: pv.decompose_elbo(model, guide, x, 3),
    "active_units": lambda model, guide, x: pv.active_units(model, guide, x, 3),
    "compare": lambda model, guide, x: pv.compare(model, guide, x, [pv.IWAE(2)], repeats=2),
    "to_arviz": lambda model, guide, x: pv.to_arviz(SimpleNamespace(model=model, guide=guide), x, 5),
}
everywhere = pytest.mark.parametrize("evaluation", EVALUATIONS.values(), ids=EVALUATIONS)


def binary():
    return (torch.rand(6, 1, 4, 4) > 0.5).float()


@everywhere
@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda x: x / 2, "zeros and ones, got values from 0 to 0.5, such as 0.5. Binarise it"),
        (
            lambda x: torch.where(x > 0, math.nan, x),
            "x to be finite, got NaN. Drop those rows; or, where they are missing",
        ),
        (lambda x: torch.where(x > 0, math.inf, x), "x to be finite, got infinity. Drop those rows, or correct them"),
        (lambda x: torch.where(x > 0, math.inf, math.nan), "got NaN and infinity. Drop those rows, or correct them"),
        (lambda x: x[:, 0], r"x of shape \(N, 1, 4, 4\), got \(6, 4, 4\). Reshape it"),
        (lambda x: x.long(), "x of floating point, got torch.int64"),
        (lambda x: x[:0], "a datum|datum or more|at least 2 data"),
    ],
    ids=["support", "nan", "infinity", "both", "shape", "integers", "none"],
)
def test_data_that_a_vae_refuses(evaluation, spoil, match):
    vae = pv.mlp_vae((1, 4, 4), latent_dim=2, hidden_dims=(8,))
    x = spoil(binary())
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=match):
        evaluation(vae.model, vae.guide, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(part.training for part in vae.modules())
    evaluation(vae.model, vae.guide, binary())


def poisson(x):
    shift = pyro.param("shift", torch.zeros(()))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(shift, 1.0))
        pyro.sample("x", dist.Poisson(z.exp()), obs=x)


def normal(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))


@everywhere
@pytest.mark.parametrize("validation", [True, False])
def test_data_outside_the_support_of_any_program(evaluation, validation):
    """The 3,000th datum is a negative count. Evaluations check all data, whether Pyro's validation is on or off."""
    x = torch.ones(3000)
    x[-1] = -2.0
    if evaluation in (EVALUATIONS["compare"], EVALUATIONS["to_arviz"]) and not validation:
        pytest.skip("leaves validation as it is set")
    with pyro.validation_enabled(validation), pytest.raises(ValueError, match="log_prob at site 'x'"):
        evaluation(poisson, normal, x)


@everywhere
def test_a_plate_that_is_not_over_the_rows_of_x(evaluation):
    """The plate holds a random half of the data, or the data lie along another dimension."""

    def half(x):
        scale = pyro.param("scale", torch.ones(()))
        with pyro.plate("data", len(x), subsample_size=len(x) // 2):
            batch = pyro.subsample(x, event_dim=0)
            z = pyro.sample("z", dist.Normal(torch.zeros(()), scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=batch)

    def half_guide(x):
        with pyro.plate("data", len(x), subsample_size=len(x) // 2):
            pyro.sample("z", dist.Normal(pyro.subsample(x, event_dim=0), 1.0))

    with pytest.raises(ValueError, match="the batch plate 'data' has 20 rows and x has 40"):
        evaluation(half, half_guide, torch.randn(40))

    def series(x):
        scale = pyro.param("scale", torch.ones(()))
        with pyro.plate("data", x.shape[1]):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), scale))
            for t in pyro.markov(range(len(x))):
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[t])

    def series_guide(x):
        with pyro.plate("data", x.shape[1]):
            pyro.sample("z", dist.Normal(x.mean(0), 0.5))

    with pytest.raises(ValueError, match="the batch plate 'data' has 3 rows and x has 8"):
        evaluation(series, series_guide, torch.randn(8, 3))


@everywhere
def test_rows_in_another_order(evaluation):
    order = torch.tensor([2, 0, 1])

    def model(x):
        with pyro.plate("data", 3, subsample=order) as rows:
            z = pyro.sample("z", dist.Normal(pyro.param("m", torch.zeros(())), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(x):
        with pyro.plate("data", 3, subsample=order) as rows:
            pyro.sample("z", dist.Normal(x[rows] / 2, 0.5**0.5))

    with pytest.raises(pv.PyroVAEError, match=r"the rows of x in another order, \[2, 0, 1\]"):
        evaluation(model, guide, torch.zeros(3))


def test_a_part_of_the_data_has_its_rows_in_x():
    """As for parameters of each datum: x is a minibatch, and the index says which rows it has."""

    def model(x, index):
        with pyro.plate("data", 1000, subsample=index):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def guide(x, index):
        with pyro.plate("data", 1000, subsample=index):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    x = torch.tensor([1.0, -1.0, 0.5, 2.0])
    found = pv.log_likelihood(model, guide, (x, torch.tensor([5, 6, 7, 100])), 10).per_datum
    torch.testing.assert_close(found, dist.Normal(0.0, 2**0.5).log_prob(x).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["log_likelihood", "inference_gaps"])
def test_a_guide_on_another_support(name):
    """A guide that misses a part of the support is refused; outside the support Pyro refuses the first sample."""

    def positive(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Exponential(3.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def real(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def normal_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(1.0 + 0 * x, 0.6))

    def positive_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(0 * x, 0.6))

    x = torch.ones(4)
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=r"log_prob at site 'z'|within the support"):
        EVALUATIONS[name](positive, normal_guide, x)
    with pytest.raises(ValueError, match="the guide does not cover the model's support at site 'z'"):
        EVALUATIONS[name](real, positive_guide, x)


@pytest.mark.parametrize("name", ["decompose_elbo", "active_units"])
def test_masked_latents_have_no_posterior(name):
    def model(x):
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=x > 0):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=x > 0):
            pyro.sample("z", dist.Normal(x, 0.5))

    with pytest.raises(ValueError, match="site 'z' is masked: expected latents that count for every datum"):
        EVALUATIONS[name](model, guide, torch.randn(20))


def test_modules_in_a_closure_evaluate_too():
    """Batch norm in a plain function is in evaluation mode: its statistics are used and do not change."""
    norm = torch.nn.BatchNorm1d(1).double()
    norm.running_mean.fill_(0.5)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=norm(x[:, None])[:, 0])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(norm(x[:, None])[:, 0] / 2, 0.5**0.5))

    x = torch.randn(20, dtype=torch.float64)
    result = pv.log_likelihood(model, guide, x, 30)
    exact = dist.Normal(torch.zeros((), dtype=torch.float64), 2**0.5).log_prob((x - 0.5) / math.sqrt(1 + 1e-5))
    torch.testing.assert_close(result.per_datum, exact, rtol=0, atol=1e-9)
    assert norm.running_mean.item() == 0.5
    assert norm.training


def shared(x):
    s = pyro.sample("s", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(s, 1.0), obs=x)


def shared_guide(x):
    pyro.sample("s", dist.Normal(0.0, 1.0))


@everywhere
def test_programs_without_a_bound_per_datum(evaluation):
    with pytest.raises(ValueError, match="model site 's' is a latent site outside the batch plate 'data'"):
        evaluation(shared, shared_guide, torch.zeros(4))


@everywhere
@pytest.mark.parametrize(("number", "got"), [(0, "missing a required"), (2, "too many")])
def test_another_number_of_arguments(evaluation, number, got):
    match = f"x to be the arguments of model .* got {number} of them, which the model does not take: {got}"
    with pytest.raises(pv.PyroVAEError, match=match):
        evaluation(poisson, normal, (torch.ones(3),) * number)


def test_the_arguments_of_a_guide():
    with pytest.raises(pv.PyroVAEError, match="got 1 of them, which the guide does not take: missing a required"):
        pv.log_likelihood(poisson, lambda x, y: normal(x), torch.ones(3), 10)


def test_a_decorated_model_shows_the_arguments_of_the_one_inside():
    def scaled(x, scale):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, scale)), 1.0), obs=x)

    @functools.wraps(scaled)
    def model(x):
        scaled(x, 1.0)

    assert pv.log_likelihood(model, normal, torch.ones(3), 10).per_datum.isfinite().all()


@everywhere
def test_a_model_that_observes_nothing(evaluation):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)).expand(len(x)), 1.0))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    if evaluation is EVALUATIONS["to_arviz"]:
        evaluation(model, guide, torch.randn(4))
    else:
        with pytest.raises(pv.PyroVAEError, match=r"the model observes nothing: .* got latent sites \['z'\] alone"):
            evaluation(model, guide, torch.randn(4))


@pytest.mark.parametrize("name", ["ais", "bdmc", "inference_gaps", "decompose_elbo"])
def test_a_model_without_a_latent(name):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with pytest.raises(pv.PyroVAEError, match="the model has no latent site"):
        EVALUATIONS[name](model, lambda x: None, torch.randn(4))


@everywhere
def test_one_datum_has_no_error_over_data(evaluation):
    """An evaluation of each datum takes one; one whose result is over data refuses it."""
    vae = pv.mlp_vae((1, 4, 4), latent_dim=2, hidden_dims=(8,))
    if evaluation is EVALUATIONS["active_units"]:
        with pytest.raises(ValueError, match="at least 2 data, since their spread is the error bar, got 1"):
            evaluation(vae.model, vae.guide, binary()[:1])
    elif evaluation is EVALUATIONS["decompose_elbo"]:  # whose errors are over samples
        assert evaluation(vae.model, vae.guide, binary()[:1]).elbo.standard_error > 0
    elif evaluation is EVALUATIONS["to_arviz"]:
        assert evaluation(vae.model, vae.guide, binary()[:1])["posterior"]["z"].shape == (1, 5, 1, 2)
    elif evaluation is EVALUATIONS["compare"]:
        assert evaluation(vae.model, vae.guide, binary()[:1])[["bound_se", "gap_se"]].isna().all(axis=None)
    else:
        assert "(of a single value, without an error)" in str(evaluation(vae.model, vae.guide, binary()[:1]))


def test_log_likelihood_of_one_datum_is_exact():
    """The guide is the posterior, so that every weight is p(x)."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    x = torch.tensor([0.4])
    found = pv.log_likelihood(model, guide, x, 100, seed=0)
    torch.testing.assert_close(found.per_datum.float(), dist.Normal(0.0, 2**0.5).log_prob(x), rtol=0, atol=4 * 2**-23)
    assert float(found.per_datum_error) < 2**-20


@pytest.mark.parametrize("number", [1, 0, -3, 2.0, True])
def test_too_few_samples(number):
    vae = pv.mlp_vae((1, 4, 4), latent_dim=2, hidden_dims=(8,))
    for evaluation in (pv.log_likelihood, pv.inference_gaps, pv.decompose_elbo, pv.active_units):
        with pytest.raises(ValueError, match="num_samples to be an integer"):
            evaluation(vae.model, vae.guide, binary(), number)
    with pytest.raises(ValueError, match="num_samples to be an integer"):
        pv.to_arviz(vae, binary(), number)
