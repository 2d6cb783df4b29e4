"""pv.ais and pv.bdmc against exact log p(x): unbiased weights, both bounds, constrained latents, refusals."""

from __future__ import annotations

import math
from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.programs import MODELS, LinearGaussian, wide
from helpers.quick import slow_but

import pyro_vae as pv

QUICK = {"num_steps": 40, "num_chains": 8, "num_leapfrog": 4, "progress": False}


CASES = list(enumerate(MODELS))


def exact_of(size, seed, x):
    program = wide(size, seed)
    program.x = x
    return program.log_evidence()


@pytest.mark.parametrize(("seed", "size"), slow_but(CASES[::4], CASES))
def test_both_sides_are_exact_within_their_errors(seed, size):
    program = wide(size, seed)
    # With few steps, the ratios of the large sizes are so skewed that 30 of them often miss the large ones.
    settings = QUICK | ({"num_steps": 300} if size[0] >= 10 else {})
    annealed = pv.ais(program.model, None, program.x, seed=seed, **settings)
    # The weights are unbiased for p(x), not their logarithms, so the ratio has mean 1.
    ratio = (annealed.log_weights - program.log_evidence()).exp().mean(0)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(len(ratio))

    sandwich = pv.bdmc(program.model, None, program.x, seed=seed, **settings)
    exact = exact_of(size, seed, sandwich.x)
    reverse = (exact - sandwich.upper_per_datum).exp()  # unbiased for 1
    assert abs(reverse.mean() - 1) < 4 * reverse.std() / math.sqrt(len(reverse))
    lower, upper = pv.Estimate.of(sandwich.lower.per_datum - exact), pv.Estimate.of(sandwich.upper_per_datum - exact)
    assert lower.value < 4 * lower.standard_error
    assert upper.value > -4 * upper.standard_error


def test_forward_is_below_and_reverse_above():
    """With few steps and chains the lower bound is far below log p(x), and the upper bound far above."""
    program = wide((10, 4, 200))
    few = QUICK | {"num_steps": 8, "num_chains": 2}
    sandwich = pv.bdmc(program.model, None, program.x, seed=0, **few)
    exact = exact_of((10, 4, 200), 0, sandwich.x)
    for estimate, sign in ((sandwich.lower.per_datum, -1), (sandwich.upper_per_datum, 1)):
        off = pv.Estimate.of(sign * (estimate - exact))
        assert off.value > 4 * off.standard_error
    assert sandwich.gap.value == pytest.approx(sandwich.upper.value - sandwich.lower.mean)
    assert sandwich.lower.mean < exact.mean() < sandwich.upper.value


def test_more_steps_close_the_gap():
    program = wide((10, 4, 60))
    gaps = [
        pv.bdmc(program.model, None, program.x, seed=0, **QUICK | {"num_steps": steps}).gap for steps in (5, 20, 80)
    ]
    for wider, closer in pairwise(gaps):
        assert wider.value - closer.value > 4 * math.hypot(wider.standard_error, closer.standard_error)


@pytest.mark.parametrize("schedule", ["sigmoid", "linear", torch.linspace(0, 1, 41) ** 2])
@pytest.mark.parametrize("start", ["prior", "guide"])
def test_every_start_and_schedule(start, schedule):
    program = wide((4, 2, 60), factor=1.5)
    annealed = pv.ais(program.model, program.guide, program.x, start=start, schedule=schedule, seed=1, **QUICK)
    ratio = (annealed.log_weights - program.log_evidence()).exp().mean(0)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(len(ratio))
    if start == "guide":
        assert ratio.std() < 0.5


def test_from_the_exact_posterior_nothing_is_left_to_anneal():
    program = LinearGaussian(3, 2, 10)
    annealed = pv.ais(program.model, program.guide, program.x, start="guide", **QUICK)
    torch.testing.assert_close(annealed.per_datum, program.log_evidence(), rtol=0, atol=1e-9)
    assert (annealed.per_datum_error < 1e-9).all()


@pytest.mark.parametrize("step_size", slow_but([0.01], [0.01, 0.3, 5.0]))
def test_the_step_size_adapts_from_anywhere(step_size):
    program = wide((6, 3, 30))
    settings = QUICK | {"num_steps": 200}
    annealed = pv.ais(program.model, None, program.x, step_size=step_size, seed=0, **settings)
    assert 0.5 < annealed.acceptance[100:].mean() < 0.85


def beta_gamma(x):
    """Three constrained latents with exact p(x): Beta-Bernoulli in a nested plate, Gamma-Poisson, and Dirichlet."""
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.5))
        share = pyro.sample("share", dist.Beta(2.0, 3.0))
        weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)))
        pyro.sample("class", dist.Categorical(weights), obs=x[:, 5].long() % 3)
        pyro.sample("count", dist.Poisson(rate), obs=x[:, 4])
        with pyro.plate("flips", 4):
            pyro.sample("flip", dist.Bernoulli(share), obs=x[:, :4].T)


@pytest.mark.slow
def test_constrained_latents():
    x = torch.tensor([[1, 0, 1, 1, 3, 0], [0, 0, 0, 1, 0, 2], [1, 1, 1, 1, 5, 1]], dtype=torch.float64).repeat(20, 1)
    annealed = pv.ais(beta_gamma, None, x, seed=0, **QUICK | {"num_steps": 60})
    ones, count = x[:, :4].sum(1), x[:, 4]
    flips = (
        torch.lgamma(2 + ones)
        + torch.lgamma(7 - ones)
        - math.lgamma(9)
        - math.lgamma(2)
        - math.lgamma(3)
        + math.lgamma(5)
    )
    counts = (
        torch.lgamma(2 + count)
        - math.lgamma(2)
        - torch.lgamma(count + 1)
        + 2 * math.log(1.5 / 2.5)
        - count * math.log(2.5)
    )
    exact = flips + counts + torch.tensor([1.0, 2.0, 3.0]).double()[x[:, 5].long()].div(6).log()
    ratio = (annealed.log_weights - exact).exp().mean(0)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(len(ratio))
    assert ratio.std() < 0.5


class UpToInfinity(dist.Exponential):
    """With the support that PyTorch states for a generalised Pareto distribution of positive concentration."""

    @dist.constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self):
        return dist.constraints.interval(0 * self.rate, math.inf + self.rate)


def test_an_interval_up_to_infinity():
    """z ~ Exponential(1) and x ~ Poisson(z): p(x) = 2^-(x + 1)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", UpToInfinity(torch.ones(len(x), dtype=torch.float64)))
            pyro.sample("x", dist.Poisson(z), obs=x)

    x = torch.arange(4.0, dtype=torch.float64).repeat(15)
    annealed = pv.ais(model, None, x, seed=0, **QUICK)
    ratio = (annealed.log_weights + (x + 1) * math.log(2)).exp().mean(0)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(len(ratio))
    assert ratio.std() < 0.5


def test_nested_plates_move_datum_by_datum():
    """Latents of shape (3, N): energies are summed over the nested plate, but not over data."""

    def model(x):
        with pyro.plate("data", len(x)), pyro.plate("parts", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x.T)

    x = 1.2 * torch.randn(50, 3, dtype=torch.float64)
    annealed = pv.ais(model, None, x, seed=0, **QUICK)
    exact = dist.Normal(0.0, 1.25**0.5).log_prob(x).sum(1)
    ratio = (annealed.log_weights - exact).exp().mean(0)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(len(ratio))


def test_a_diverging_trajectory_is_rejected():
    """Long steps reach the region beyond 3 where the density is NaN; the estimate is that of the truncated density."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            beyond = torch.where(z.abs() > 3, math.nan, 0.0)
            pyro.sample("x", dist.Normal(z + beyond, 0.5), obs=x)

    x = torch.linspace(-1, 1, 20, dtype=torch.float64)
    with pyro.validation_enabled(False):
        annealed = pv.ais(model, wide_start, x, start="guide", seed=0, step_size=2.0, **QUICK)
    exact = dist.Normal(0.0, 1.25**0.5).log_prob(x)
    ratio = (annealed.log_weights - exact).exp().mean(0)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(len(ratio)) + 0.01


def wide_start(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.4))


def test_labels_stay_and_data_are_simulated():
    """In a conditional model, bdmc replaces x by simulated data of the same shape and keeps y."""

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(y, 1.0))
            pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 4), 0.5).to_event(1), obs=x.reshape(-1, 4))

    x, y = torch.full((300, 2, 2), 99.0), torch.randint(2, (300,)).double()
    x = x.double() + torch.arange(300.0).double()[:, None, None]
    sandwich = pv.bdmc(model, None, (x, y), seed=0, **QUICK)
    simulated, labels = sandwich.x
    assert simulated.shape == x.shape
    assert torch.equal(labels, y)
    mean = simulated.flatten(1).mean(1) - y  # of variance 1 + 0.25 / 4
    assert abs(mean.mean()) < 4 * math.sqrt(1.0625 / 300)
    assert mean.var() == pytest.approx(1.0625, rel=4 * math.sqrt(2 / 300))


def test_lines_to_quote():
    program = wide((3, 2, 10))
    assert str(pv.ais(program.model, None, program.x, **QUICK)).startswith("log p(x) >= -")
    assert "<= log p(x) <= -" in str(pv.bdmc(program.model, None, program.x, **QUICK))


def refused(match, model=None, guide=None, x=None, function=pv.ais, **settings):
    program = wide((2, 1, 4))
    with pytest.raises(ValueError, match=match):
        function(model or program.model, guide, program.x if x is None else x, **QUICK | settings)


def test_refusals_of_settings():
    refused("num_steps to be an integer, at least 2", num_steps=1)
    refused("num_chains to be an integer, at least 2, to have an error bar", num_chains=1)
    refused("start to be 'prior' or 'guide', got 'middle'", start="middle")
    refused("a guide to start from, got None", start="guide")
    refused("schedule to be 'sigmoid', 'linear' or temperatures", schedule="cosine")
    refused(r"num_steps \+ 1 = 41 increasing temperatures from 0 to 1", schedule=[0.0, 0.5, 1.0])
    refused(r"increasing temperatures from 0 to 1", schedule=torch.linspace(1, 0, 41))
    refused("positive step_size", step_size=0.0)
    refused("num_leapfrog", num_leapfrog=0)
    refused("a datum", x=torch.zeros(0, 2, dtype=torch.float64))
    refused("x to be finite", x=torch.tensor([[0.0, math.nan], [1.0, 2.0]], dtype=torch.float64))


def test_refusals_of_programs():
    x = torch.zeros(4, dtype=torch.float64)

    def discrete(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    refused("model site 'z' is discrete", discrete, x=x)

    def moving(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(0.0, 1.0))
            u = pyro.sample("u", dist.Uniform(0.0, z))
            pyro.sample("x", dist.Normal(u, 1.0), obs=x)

    refused("model site 'u' has a support that depends on another latent", moving, x=x)

    def positive(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.HalfNormal(1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def normal(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(0.0, 1.0))

    def unit(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(0.0, 1.0))

    pv.ais(positive, normal, x, start="guide", **QUICK)
    refused("does not cover the model's support at site 'z'", positive, unit, x, start="guide")

    def circular(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.VonMises(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.cos(), 1.0), obs=x)

    refused(r"model site 'z' is on a curved or periodic space \(VonMises\)", circular, x=x)

    def sphere(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.ProjectedNormal(torch.tensor([1.0, 2.0])))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    refused(r"model site 'z' is on a curved or periodic space \(ProjectedNormal\)", sphere, x=x)

    def prior_reads(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.5 * x, 0.5))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    refused("model site 'z' has another density, or mask, when", prior_reads, x=torch.randn(4), function=pv.bdmc)

    def masked(x):
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=x > 0):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    refused("has another density, or mask, when", masked, x=torch.randn(40), function=pv.bdmc)

    def factor(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("f", -(z**2))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    pv.ais(factor, None, x, **QUICK)
    refused("model site 'f' is a factor", factor, x=x, function=pv.bdmc)

    def improper(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    for function in (pv.ais, pv.bdmc):
        refused("ImproperUniform does not support sampling: .* start='guide'", improper, x=x, function=function)

    def elsewhere(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x + 1)

    refused("observes something that is no part of an argument", elsewhere, x=x, function=pv.bdmc)

    def forcing(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            before = torch.nn.functional.pad(x, (1, 0))[:, :-1]
            pyro.sample("x", dist.Normal(z[..., None] + before, 1.0).to_event(1), obs=x)

    refused(
        "another density, or mask, when the model is called with its simulated data",
        forcing,
        x=torch.randn(4, 3),
        function=pv.bdmc,
    )


def test_bdmc_puts_copies_of_elements_back():
    """Columns by an index, which are copies, in another order; the others, which the model does not observe, stay."""
    x = torch.randn(40, 4, dtype=torch.float64)
    rows, columns = torch.arange(40), [0, 2, 1]

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("last", dist.Normal(z, 0.5), obs=x[rows, columns[0]])
            pyro.sample(
                "x", dist.Normal(z[..., None] + x.new_tensor([100.0, 200.0]), 0.5).to_event(1), obs=x[:, columns[1:]]
            )

    sandwich = pv.bdmc(model, None, x, seed=0, **QUICK)
    simulated = sandwich.x[:, columns] - x.new_tensor([0.0, 100.0, 200.0])
    assert torch.equal(sandwich.x[:, 3], x[:, 3])
    eye = torch.eye(3, dtype=torch.float64)
    exact = dist.MultivariateNormal(0 * simulated, 0.25 * eye + 1).log_prob(simulated)
    for ratio in ((sandwich.lower.log_weights - exact).exp().mean(0), (exact - sandwich.upper_per_datum).exp()):
        assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(40)


def test_bdmc_of_an_event_that_broadcasts_to_its_data():
    """A density takes three values beside an event of one; a draw has three too."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=x)

    sandwich = pv.bdmc(model, None, torch.zeros(40, 3, dtype=torch.float64), seed=0, **QUICK)
    eye = torch.eye(3, dtype=torch.float64)
    exact = dist.MultivariateNormal(0 * sandwich.x, eye + 1).log_prob(sandwich.x)
    for ratio in ((sandwich.lower.log_weights - exact).exp().mean(0), (exact - sandwich.upper_per_datum).exp()):
        assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(40)
    spread = (sandwich.x[:, 0] - sandwich.x[:, 1]).var() / 2  # of variance 1: each has noise of its own
    assert abs(spread - 1) < 4 * math.sqrt(2 / 39)
