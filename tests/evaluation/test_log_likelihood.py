"""pv.log_likelihood against exact log p(x), with its errors and warnings."""

from __future__ import annotations

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.programs import MODELS, LinearGaussian, wide, z_score

import pyro_vae as pv
from pyro_vae.distributed import mixed
from pyro_vae.evaluation import likelihood


@pytest.mark.parametrize(("seed", "size"), list(enumerate(MODELS)))
def test_log_likelihood_is_exact_within_its_error(seed, size):
    program = wide(size, seed)
    result = pv.log_likelihood(program.model, program.guide, program.x, 2000, seed=seed)
    exact = program.log_evidence()
    assert abs(result.mean - exact.mean().item()) < 4 * result.monte_carlo_error
    # The reported error of each datum is right: the scaled errors have mean square 1.
    scaled = (result.per_datum - exact) / result.per_datum_error
    assert abs(scaled.square().mean().item() - 1) < 4 * math.sqrt(2 / len(scaled))
    assert (result.per_datum_error < 0.1).all()
    assert result.share_high_k == 0


def test_exact_posterior_has_no_error():
    program = LinearGaussian(3, 2, 20)
    result = pv.log_likelihood(program.model, program.guide, program.x, 50)
    torch.testing.assert_close(result.per_datum, program.log_evidence(), rtol=0, atol=1e-9)
    assert (result.per_datum_error < 1e-9).all()
    torch.testing.assert_close(result.ess, torch.full_like(result.ess, 50))
    assert abs(result.kl_to_posterior.value) < 1e-9


def test_numbers_are_those_of_the_weights():
    """The same seed gives the same weights, and the docstring's formulas give the same numbers."""
    program = wide((3, 2, 20))
    result = pv.log_likelihood(program.model, program.guide, program.x, 100, seed=3)
    pyro.set_rng_seed(mixed(3, 0, 0))  # of the first piece of the first part
    with torch.no_grad():
        log_w = pv.log_weights(program.model, program.guide, program.x, num_particles=100)
    w = log_w.exp()
    torch.testing.assert_close(result.per_datum, w.mean(0).log())
    torch.testing.assert_close(result.per_datum_error, w.std(0) / (10 * w.mean(0)))
    torch.testing.assert_close(result.ess, w.sum(0) ** 2 / (w**2).sum(0))
    torch.testing.assert_close(result.elbo, log_w.mean(0))
    torch.testing.assert_close(result.pareto_k, pv.pareto_k(log_w))
    assert result.mean == pytest.approx(w.mean(0).log().mean().item())
    assert result.standard_error == pytest.approx(w.mean(0).log().std().item() / math.sqrt(20))
    assert result.monte_carlo_error == pytest.approx(math.sqrt((result.per_datum_error**2).sum()) / 20)


@pytest.mark.parametrize("elements", [8, 64, 1000])
@pytest.mark.parametrize("vectorize", [True, False])
def test_pieces_change_nothing_but_the_noise(monkeypatch, elements, vectorize):
    from pyro_vae.evaluation import pieces

    program = wide((2, 1, 7))
    monkeypatch.setattr(pieces, "ELEMENTS_AT_ONCE", elements)
    monkeypatch.setattr(likelihood, "WEIGHTS_AT_ONCE", 500)
    result = pv.log_likelihood(
        program.model, program.guide, program.x, 150, vectorize_particles=vectorize, progress=False
    )
    assert result.per_datum.shape == (7,)
    assert abs(result.mean - program.log_evidence().mean().item()) < 4 * result.monte_carlo_error


@pytest.mark.slow
def test_delta_method_error_is_the_deviation_of_repeats():
    program = wide((2, 2, 3))
    results = [pv.log_likelihood(program.model, program.guide, program.x, 200) for _ in range(150)]
    estimates = torch.stack([r.per_datum for r in results])
    errors = torch.stack([r.per_datum_error for r in results]).mean(0)
    torch.testing.assert_close(errors, estimates.std(0), rtol=0.25, atol=0)


def test_kl_to_the_posterior_is_the_gap_of_the_elbo():
    program = wide((3, 2, 50))
    result = pv.log_likelihood(program.model, program.guide, program.x, 2000)
    exact = (program.log_evidence() - program.exact_elbo()).mean().item()
    noise = 4 * result.monte_carlo_error + 4 * 1 / math.sqrt(2000 * 50)
    assert abs(result.kl_to_posterior.value - exact) < noise


def test_zero_weights_count_and_are_reported():
    """Half of the guide's samples have zero density under the model; p(x) is still the mean of all weights."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(0.0, 1.0, validate_args=False))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(-1.0, 1.0))

    x = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    with pyro.validation_enabled(False):
        exact = (dist.Normal(0.0, 1.0).cdf(x) - dist.Normal(0.0, 1.0).cdf(x - 1)).log()
    result = pv.log_likelihood(model, guide, x, 4000)
    assert (((result.per_datum - exact) / result.per_datum_error).abs() < 4).all()
    assert ((result.zero_weights - 2000).abs() < 4 * math.sqrt(1000)).all()
    assert "weights of zero at 3 data" in str(result)

    def elsewhere(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(-1e9, 1.0))

    with pytest.warns(UserWarning, match=r"100\.0% of the data have only weights of zero"):
        lost = pv.log_likelihood(model, elsewhere, x, 50)
    assert (lost.per_datum == -math.inf).all()
    assert lost.pareto_k.isnan().all()
    assert lost.share_no_k == 1
    assert "all of them at 3" in str(lost)


def test_one_statement_to_quote():
    program = wide((3, 2, 20))
    said = str(pv.log_likelihood(program.model, program.guide, program.x, 500))
    assert said.startswith("log p(x) = -")
    for words in (" ± ", "K = 500", "N = 20", "Monte Carlo error", "median ESS", "k-hat > 0.7: 0.0%"):
        assert words in said


def test_leaves_the_random_state_where_a_seed_is_given():
    program = wide((2, 1, 5))
    before = torch.get_rng_state()
    first = pv.log_likelihood(program.model, program.guide, program.x, 50, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    second = pv.log_likelihood(program.model, program.guide, program.x, 50, seed=1)
    assert torch.equal(first.per_datum, second.per_datum)


def test_overall_error_is_over_data():
    program = wide((3, 2, 400))
    result = pv.log_likelihood(program.model, program.guide, program.x, 500)
    assert z_score(program.log_evidence(), result.mean) < 1
    assert result.standard_error == pytest.approx(program.log_evidence().std().item() / 20, rel=0.05)


def test_the_advice_for_a_latent_that_all_data_share():
    """The message's program gives log p(x) at a value of the latent."""

    def model(x):
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), s), obs=x)

    def guide(x):
        pyro.sample("s", dist.LogNormal(0.0, 0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 5, 0.8**0.5))  # the posterior where s is 2

    x = torch.randn(5)
    with pytest.raises(pv.PyroVAEError, match="model site 's' is a latent site outside") as refusal:
        pv.log_likelihood(model, guide, x, 10)
    advice = re.search(r"poutine\.block\(.*\]\)", str(refusal.value)).group()
    names = {"poutine": pyro.poutine, "value": torch.tensor(2.0)}
    program = tuple(eval(advice, names | {"model": each}) for each in (model, guide))
    found = pv.log_likelihood(program, x, 10, progress=False).per_datum.float()
    torch.testing.assert_close(found, dist.Normal(0.0, 5**0.5).log_prob(x), rtol=0, atol=8 * 2**-23)


def test_the_upper_estimate_is_above_by_the_divergence_from_the_posterior():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + 0.3, 1.0))

    found = pv.log_likelihood(model, guide, torch.full((400,), 0.5), 4000, seed=0, progress=False)
    kl = torch.distributions.kl_divergence(dist.Normal(0.25, 0.5**0.5), dist.Normal(0.55, 1.0))
    above = pv.Estimate.of(found.upper - found.per_datum)
    # The bias of self-normalised weights is of order 1 / K.
    assert abs(above.value - kl) < 4.5 * above.standard_error + 2 / 4000
    assert (found.upper > found.per_datum).all()
    lost = pv.LogLikelihood.from_weights(torch.tensor([[-torch.inf, 0.0], [-torch.inf, -torch.inf]]))
    assert lost.upper.tolist() == [-torch.inf, 0.0]
