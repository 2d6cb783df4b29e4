"""pv.log_likelihood against exact log p(x), and what it says about its own weights."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.programs import LinearGaussian, z_score

import pyro_vae as pv
from pyro_vae.evaluation import likelihood

MODELS = [
    (1, 1, 30),
    (2, 1, 30),
    (1, 2, 30),
    (3, 2, 30),
    (2, 3, 30),
    (5, 2, 30),
    (4, 4, 30),
    (8, 3, 30),
    (10, 5, 30),
    (20, 6, 30),
]


def wide(size, seed=0, factor=1.2):
    """A program whose guide is the posterior with a larger spread, so that weights are bounded; a little off, too."""
    program = LinearGaussian(*size, seed=seed)
    program.L = factor * program.L
    program.c = program.c + 0.1 * program.L.diagonal()
    return program


@pytest.mark.parametrize(("seed", "size"), list(enumerate(MODELS)))
def test_log_likelihood_is_exact_within_its_error(seed, size):
    program = wide(size, seed)
    result = pv.log_likelihood(program.model, program.guide, program.x, 2000, seed=seed)
    exact = program.log_evidence()
    assert abs(result.mean - exact.mean().item()) < 4 * result.monte_carlo_error
    # Each datum's error is that of its estimate: the mean square of the scaled errors is 1.
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
    """One seed, and one piece: the same weights, reduced by the formulas of the docstring."""
    program = wide((3, 2, 20))
    result = pv.log_likelihood(program.model, program.guide, program.x, 100, seed=3)
    pyro.set_rng_seed(3)
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


def narrow(spread):
    """A normal posterior of deviation 1, a guide of deviation `spread`: weights with the tail 1 - spread^2."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 2**0.5))
            pyro.sample("x", dist.Normal(z, 2**0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, spread))

    return model, guide


@pytest.mark.parametrize("spread", [0.4, 0.5, 0.6, 0.7, 0.8])
def test_pareto_k_follows_the_tail_of_a_narrow_guide(spread):
    """A normal's tail approaches a power law slowly, hence many samples and a margin of the fit's own error."""
    model, guide = narrow(spread)
    log_w = pv.log_weights(model, guide, torch.zeros(40, dtype=torch.float64), num_particles=20_000)
    shapes = pv.pareto_k(log_w)
    tail = math.ceil(3 * math.sqrt(20_000))
    k = 1 - spread**2
    assert abs(shapes.mean().item() - k) < 2 * (1 + k) / math.sqrt(tail)
    assert shapes.std().item() == pytest.approx((1 + k) / math.sqrt(tail), rel=0.6)


def test_pareto_k_is_the_same_on_both_lines_of_arviz():
    """Values of ArviZ 0.23 and 1.3 differ by 0.01: they cut the tail off one sample apart, and turn the sign."""
    generator = torch.Generator().manual_seed(0)
    log_w = -0.8 * torch.rand(4000, 3, generator=generator, dtype=torch.float64).log()
    log_w[:, 1] *= 0.5
    log_w[:, 2] = -log_w[:, 2]  # bounded above: as if the sign were not turned
    shapes = pv.pareto_k(log_w)
    torch.testing.assert_close(
        shapes[:2], torch.tensor([0.8, 0.4], dtype=torch.float64), rtol=0, atol=4 * 1.8 / math.sqrt(190)
    )
    assert shapes[2] < 0


def test_pareto_k_takes_weights_as_log_weights_gives_them():
    """With their gradients."""
    log_w = torch.randn(100, 2, requires_grad=True)
    torch.testing.assert_close(pv.pareto_k(log_w), pv.pareto_k(log_w.detach()))


def test_pareto_k_that_cannot_be_computed_is_nan():
    log_w = torch.randn(100, 4, dtype=torch.float64)
    log_w[:, 0] = 1.5
    log_w[:, 1] = -math.inf
    log_w[3, 2] = math.nan
    shapes = pv.pareto_k(log_w)
    assert shapes.isnan().tolist() == [True, True, True, False]
    assert pv.pareto_k(torch.randn(10, 2)).isnan().all()


def test_zero_weights_count_and_are_reported():
    """Half of the guide's samples have no density under the model: p(x) is still the mean of all weights."""

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


def test_high_k_is_warned_of_with_what_to_do():
    model, guide = narrow(0.3)
    with pytest.warns(UserWarning, match=r"of the data have a Pareto k-hat above 0\.7.*more flexible guide.*pv\.ais"):
        result = pv.log_likelihood(model, guide, torch.zeros(20), 2000)
    assert result.share_high_k > 0.5


def test_one_line_to_quote():
    program = wide((3, 2, 20))
    line = str(pv.log_likelihood(program.model, program.guide, program.x, 500))
    assert line.startswith("log p(x) = -")
    assert "\n" not in line
    for words in (" ± ", "K = 500", "N = 20", "Monte Carlo error", "median ESS", "k-hat > 0.7: 0.0%"):
        assert words in line


def test_leaves_the_random_state_where_a_seed_is_given():
    program = wide((2, 1, 5))
    before = torch.get_rng_state()
    first = pv.log_likelihood(program.model, program.guide, program.x, 50, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    second = pv.log_likelihood(program.model, program.guide, program.x, 50, seed=1)
    assert torch.equal(first.per_datum, second.per_datum)


def test_estimate():
    estimate = pv.Estimate.of(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert (estimate.value, estimate.standard_error) == (2.5, pytest.approx(math.sqrt(5 / 3) / 2))
    low, high = estimate.interval(0.95)
    assert (low, high) == (
        pytest.approx(2.5 - 1.959964 * estimate.standard_error),
        pytest.approx(2.5 + 1.959964 * estimate.standard_error),
    )
    assert str(pv.Estimate(-104.9649, 0.2731)) == "-104.96 ± 0.27"
    assert str(pv.Estimate(0.00123, 0.0004)) == "0.0012 ± 0.0004"
    with pytest.raises(ValueError, match="at least 2 values"):
        pv.Estimate.of(torch.zeros(1))
    with pytest.raises(ValueError, match="between 0 and 1"):
        estimate.interval(95)


def test_overall_error_is_over_data():
    program = wide((3, 2, 400))
    result = pv.log_likelihood(program.model, program.guide, program.x, 500)
    assert z_score(program.log_evidence(), result.mean) < 1
    assert result.standard_error == pytest.approx(program.log_evidence().std().item() / 20, rel=0.05)


@pytest.mark.parametrize("kind", ["all rows", "rows by index", "one network"])
def test_guides_with_parameters_for_each_datum_are_run_whole(monkeypatch, kind):
    """Pieces of the data would meet other data's parameters, without an error where the plate's indices pick them."""
    from pyro_vae.evaluation import pieces

    program = wide((3, 2, 12))
    loc = program.x @ program.A.T + program.c

    def guide(x):
        rows = pyro.param("loc", loc)
        with pyro.plate("data", len(x)) as index:
            at = {"all rows": rows, "rows by index": rows[index], "one network": x @ program.A.T + program.c}[kind]
            pyro.sample("z", dist.MultivariateNormal(at, scale_tril=program.L.tril()))

    assert pieces.is_divisible(program.model, guide, (program.x,)) == (kind == "one network")
    monkeypatch.setattr(pieces, "ELEMENTS_AT_ONCE", 2000)
    exact = program.log_evidence()
    result = pv.log_likelihood(program.model, guide, program.x, 500, seed=0)
    assert (((result.per_datum - exact) / result.per_datum_error).abs() < 4.5).all()
    annealed = pv.ais(program.model, guide, program.x, 20, 64, start="guide", seed=0)
    assert (((annealed.per_datum - exact) / annealed.per_datum_error).abs() < 4.5).all()
    parts = pv.decompose_elbo(program.model, guide, program.x, 50, seed=0)
    assert abs(parts.elbo.value - program.exact_elbo().mean().item()) < 4 * parts.elbo.standard_error
    gaps = pv.inference_gaps(program.model, guide, program.x, 100, num_steps=20, seed=0)
    assert gaps.elbo.mean().item() == pytest.approx(program.exact_elbo().mean().item(), abs=0.1)
    table = pv.active_units(program.model, guide, program.x)
    assert table.variance.tolist() == pytest.approx(loc.var(0).tolist())


@pytest.mark.filterwarnings("ignore::FutureWarning:arviz")
@pytest.mark.parametrize("number", [25, 100, 224, 226, 230, 1000, 5000, 20_001])
def test_pareto_k_is_arvizs_of_the_whole_sample(number):
    log_w = 2 * torch.randn(number, 3, dtype=torch.float64)
    rows = log_w.T.numpy()
    try:
        from arviz_stats.base import array_stats

        whole = array_stats.psislw(-rows, axis=-1)[1]
    except ImportError:
        import arviz

        whole = arviz.psislw(rows)[1]
    whole = np.where(np.isfinite(whole), whole, np.nan)
    np.testing.assert_allclose(pv.pareto_k(log_w).numpy(), whole, rtol=1e-9)
