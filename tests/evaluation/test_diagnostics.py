"""Pareto k-hat against known tails and against ArviZ, and the warning of a high k-hat."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv


def narrow(spread):
    """A posterior and a guide that are normal, of standard deviations 1 and `spread`: the tail is 1 - spread^2."""

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


def test_pareto_k_of_known_tails():
    """Of weights with the Pareto tails 0.8 and 0.4; and of weights that are bounded above."""
    generator = torch.Generator().manual_seed(0)
    log_w = -0.8 * torch.rand(4000, 3, generator=generator, dtype=torch.float64).log()
    log_w[:, 1] *= 0.5
    log_w[:, 2] = -log_w[:, 2]
    shapes = pv.pareto_k(log_w)
    torch.testing.assert_close(
        shapes[:2], torch.tensor([0.8, 0.4], dtype=torch.float64), rtol=0, atol=4 * 1.8 / math.sqrt(190)
    )
    assert shapes[2] < 0


def test_pareto_k_takes_weights_as_log_weights_gives_them():
    """Log-weights may require gradients."""
    log_w = torch.randn(100, 2, requires_grad=True)
    torch.testing.assert_close(pv.pareto_k(log_w), pv.pareto_k(log_w.detach()))


def test_pareto_k_that_cannot_be_computed_is_nan():
    log_w = torch.randn(100, 4, dtype=torch.float64)
    log_w[:, 0] = 1.5
    log_w[:, 1] = -math.inf
    log_w[3, 2] = math.nan
    shapes = pv.pareto_k(log_w)
    assert shapes.isnan().tolist() == [True, True, True, False]
    assert pv.pareto_k(torch.randn(29, 2)).isnan().all()
    assert pv.pareto_k(torch.randn(30, 2)).isfinite().all()


@pytest.mark.parametrize("kind", ["one weight is all", "three weights", "far apart"])
def test_pareto_k_of_weights_without_a_tail_is_infinite(kind):
    """The worst of weights counts as bad, and not as unknown."""
    log_w = torch.full((1000, 2), -math.inf, dtype=torch.float64)
    log_w[: 1 if kind == "one weight is all" else 3] = 0.0
    if kind == "far apart":
        log_w = 1e4 * torch.arange(1000.0, dtype=torch.float64).expand(2, -1).T
    assert pv.pareto_k(log_w).tolist() == [math.inf, math.inf]


@pytest.mark.parametrize("above", [6, 20, 80, 200, 700])
def test_weights_of_zero_do_not_hide_the_tail_of_the_others(above):
    """Of 4,000 weights, the 189 largest are the tail. Fewer above zero are a tail by themselves."""
    generator = torch.Generator().manual_seed(0)
    log_w = (torch.rand(4000, 40, generator=generator, dtype=torch.float64) ** -0.8 - 1).log()  # generalised Pareto
    log_w[above:] = -math.inf
    number = min(above, 189)
    k = (0.8 * number + 0.5 * 10) / (number + 10)  # ArviZ's prior: ten samples of 0.5
    error = 1.8 * number**0.5 / (number + 10)  # asymptotic; the fit's mean is off by less than one of them
    shapes = pv.pareto_k(log_w)
    assert abs(shapes.mean().item() - k) < error * (1 + 4 / 40**0.5)
    log_w[above:] = -1e4
    assert torch.equal(pv.pareto_k(log_w), shapes)


def test_pareto_k_of_weights_that_rounding_alone_tells_apart_is_nan():
    log_w = torch.zeros(1000, 1, dtype=torch.float64)
    log_w[:3] = 2**-50
    assert pv.pareto_k(log_w).isnan().all()


def test_weights_without_a_tail_are_warned_of():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1e-4), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.warns(UserWarning, match=r"100\.0% of the data have a Pareto k-hat above 0\.7"):
        result = pv.log_likelihood(model, guide, torch.zeros(20), 1000, seed=0)
    assert (result.share_high_k, result.share_no_k) == (1, 0)


def test_high_k_is_warned_of_with_what_to_do():
    model, guide = narrow(0.3)
    with pytest.warns(UserWarning, match=r"of the data have a Pareto k-hat above 0\.7.*Pass refine=True.*pv\.ais"):
        result = pv.log_likelihood(model, guide, torch.zeros(20), 2000)
    assert result.share_high_k > 0.5


@pytest.mark.filterwarnings("ignore::FutureWarning:arviz")
@pytest.mark.parametrize("number", [30, 100, 225, 226, 230, 400, 1000, 2500, 5000, 20_001])
@pytest.mark.parametrize("spread", [0.3, 2.0, 20.0])
def test_pareto_k_is_that_of_arviz(number, spread):
    log_w = spread * torch.randn(number, 3, dtype=torch.float64)
    rows = log_w.T.numpy()
    try:
        from arviz_stats.base import array_stats  # ArviZ 1.x, which takes log-ratios of the opposite sign
    except ImportError:
        arviz = pytest.importorskip("arviz")
        expected = arviz.psislw(rows)[1]
    else:
        if 3 * number**0.5 % 1 and number > 225:
            pytest.skip("ArviZ 1.x rounds the number of weights in the tail down")
        expected = array_stats.psislw(-rows, axis=-1)[1]
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(pv.pareto_k(log_w).numpy(), expected, rtol=1e-9)


def test_pareto_k_of_a_tail_of_equal_weights_is_nan():
    log_w = torch.zeros(30, 2, dtype=torch.float64)
    log_w[:5, 0], log_w[:6, 1] = 1.0, 1.0  # the tail of 30 has six places
    assert pv.pareto_k(log_w).isnan().all()
