"""Every likelihood is a normalised density with the documented moments, support, masks and gradients."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pytest
import scipy.stats
import torch
from helpers.programs import z_score
from pyro import poutine
from pyro.infer import Predictive
from torch import nn

import pyro_vae as pv
from pyro_vae.likelihoods import BY_NAME


def grid(levels):
    return lambda *shape: torch.randint(levels, shape).double() / (levels - 1)


def codes(categories):
    return lambda *shape: torch.randint(categories, shape).double()


def reals(*shape):
    return torch.randn(*shape).double()


CASES = {
    "bernoulli": ("bernoulli", {}, codes(2)),
    "continuous bernoulli": ("continuous_bernoulli", {}, lambda *shape: torch.rand(*shape).double()),
    "gaussian": ("gaussian", {"scale": 0.5}, reals),
    "gaussian, learned": ("gaussian", {"scale": "learned"}, reals),
    "gaussian, per column": ("gaussian", {"scale": "per_column"}, reals),
    "gaussian, per pixel": ("gaussian", {"scale": "per_pixel"}, reals),
    "student t": ("student_t", {"df": 6.0}, reals),
    "student t, learned": ("student_t", {"df": "learned", "scale": "learned"}, reals),
    "student t, per pixel": ("student_t", {"df": 6, "scale": "per_pixel"}, reals),
    "categorical": ("categorical", {"categories": 5}, codes(5)),
    "logistic": ("discretized_logistic", {}, grid(256)),
    "logistic, 5 levels": ("discretized_logistic", {"levels": 5}, grid(5)),
    "logistic, mixture": ("discretized_logistic", {"components": 3, "levels": 16}, grid(16)),
    "poisson": ("poisson", {}, codes(7)),
    "negative binomial": ("negative_binomial", {}, codes(7)),
    "low rank": ("low_rank_gaussian", {"rank": 2}, reals),
    "low rank, not shared": ("low_rank_gaussian", {"rank": 2, "shared": False}, reals),
}
every = pytest.mark.parametrize("case", CASES)


def build(case, event_shape=(2, 3), by_name=True):
    name, options, draw = CASES[case]
    family = name if by_name else BY_NAME[name]
    vae = pv.mlp_vae(event_shape, latent_dim=2, hidden_dims=(8,), likelihood=family, **options).double()
    return vae, draw(6, *event_shape)


def pixels(case, spread=1.0, size=5):
    """The distribution of the elements of a vector, under a likelihood with random parameters and features."""
    vae, _ = build(case, (size,))
    likelihood = vae.likelihood
    for name, parameter in likelihood.named_parameters():
        if "decoder" not in name:
            parameter.data += 0.5 * torch.randn_like(parameter)
    features = spread * torch.randn(likelihood.num_features, size, dtype=torch.float64)
    return likelihood.pixel_distribution(*features)


def test_every_name_has_a_case():
    assert {name for name, _, _ in CASES.values()} == BY_NAME.keys()
    assert {family.__name__ for family in BY_NAME.values()} <= set(pv.__all__)


DISCRETE = ["bernoulli", "categorical", "logistic", "logistic, 5 levels", "logistic, mixture", "poisson"]


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("case", [*DISCRETE, "negative binomial"])
def test_probabilities_sum_to_one(case, spread):
    name, options, _ = CASES[case]
    pixel = pixels(case, spread if name not in ("poisson", "negative_binomial") else min(spread, 1.0))
    if name == "discretized_logistic":
        levels = options.get("levels", 256)
        values = torch.arange(levels) / torch.tensor(levels - 1.0, dtype=torch.float64)
    else:
        values = torch.arange({"bernoulli": 2, "categorical": 5}.get(name, 2000), dtype=torch.float64)
    total = torch.stack([pixel.log_prob(value.expand(5)) for value in values]).logsumexp(0)
    torch.testing.assert_close(total, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", ["gaussian, per pixel", "student t", "student t, learned", "student t, per pixel"])
def test_densities_of_real_pixels_integrate_to_one(case):
    t, pixel = torch.linspace(-40, 40, 8001, dtype=torch.float64), pixels(case)
    integrand = (pixel.log_prob(t.sinh()[:, None].expand(-1, 5)) + t.cosh().log()[:, None]).exp()
    torch.testing.assert_close(integrand.sum(0) * 0.01, torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "logit", [-2000, -90, -20, -3, -0.31, -0.29, -1e-3, 0, 1e-5, 0.1, 0.29, 0.31, 1, 16, 20, 90, 2000]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_continuous_bernoulli_is_a_truncated_exponential(logit, dtype):
    pixel = pv.ContinuousBernoulli(nn.Identity(), (1,)).pixel_distribution(torch.tensor([logit], dtype=dtype))
    nodes, weights = np.polynomial.legendre.leggauss(400)
    x, weights = torch.tensor((nodes + 1) / 2).to(dtype), torch.tensor(weights / 2)
    # the probability mass is near one end, so the nodes are at fifth powers from that end
    near = x**5 if logit <= 0 else 1 - x**5
    tolerance = 1e-3 if dtype is torch.float32 else 1e-7  # at logit 2000, float32 rounds 1 - x^5 to almost 1
    log_prob = pixel.log_prob(near)
    moments = [(log_prob.exp() * near**power * 5 * x**4).double() @ weights for power in range(3)]
    assert moments[0].item() == pytest.approx(1, abs=tolerance)
    assert pixel.mean.item() == pytest.approx(moments[1].item(), abs=tolerance)
    assert pixel.variance.item() == pytest.approx((moments[2] - moments[1] ** 2).item(), abs=tolerance)
    quantiles = pixel.icdf(x)
    assert ((quantiles >= 0) & (quantiles <= 1)).all()
    if logit != 0:
        exponential = scipy.stats.truncexpon(b=abs(logit), scale=1 / abs(logit))
        from_end = (lambda x: 1 - x) if logit > 0 else (lambda x: x)
        expected = exponential.logpdf(from_end(x.double()).numpy())
        small = (
            {"rtol": 1e-5, "atol": 1e-5 + 1e-6 * abs(logit)} if dtype is torch.float32 else {"rtol": 1e-8, "atol": 1e-8}
        )
        np.testing.assert_allclose(pixel.log_prob(x).double().numpy(), expected, **small)
        np.testing.assert_allclose(exponential.cdf(from_end(quantiles.double())), from_end(x.double()), atol=2e-4)


def test_continuous_bernoulli_moments_are_derivatives():
    """The mean and the variance are the derivatives of log Z(l), also where the series meets the formula."""
    logits = torch.linspace(-40, 40, 801, dtype=torch.float64).requires_grad_()
    pixel = pv.ContinuousBernoulli(nn.Identity(), (801,)).pixel_distribution(logits)
    (slope,) = torch.autograd.grad(pixel.log_prob(torch.zeros_like(logits)).sum(), logits)
    torch.testing.assert_close(pixel.mean, -slope, rtol=1e-6, atol=1e-8)
    (curvature,) = torch.autograd.grad(pixel.mean.sum(), logits)
    torch.testing.assert_close(pixel.variance, curvature, rtol=1e-6, atol=1e-7)


def test_agreement_with_scipy():
    x = torch.randn(5, dtype=torch.float64)
    for case in ("student t", "student t, learned", "student t, per pixel"):
        pixel = pixels(case)
        expected = scipy.stats.t(*(p.detach().numpy() for p in (pixel.df, pixel.loc, pixel.scale))).logpdf(x)
        np.testing.assert_allclose(pixel.log_prob(x).detach(), expected, rtol=1e-10)
    counts = torch.tensor([0.0, 1, 5, 20, 300], dtype=torch.float64)
    log_mean = torch.randn(5, dtype=torch.float64)
    poisson = pv.Poisson(nn.Identity(), (5,)).pixel_distribution(log_mean)
    np.testing.assert_allclose(poisson.log_prob(counts), scipy.stats.poisson(log_mean.exp()).logpmf(counts), rtol=1e-10)
    likelihood = pv.NegativeBinomial(nn.Identity(), (5,)).double()
    likelihood.raw_total_count.data += torch.randn(5)
    r, mean = likelihood.total_count.detach(), log_mean.exp()
    pixel = likelihood.pixel_distribution(log_mean)
    expected = scipy.stats.nbinom(r, r / (r + mean)).logpmf(counts)
    np.testing.assert_allclose(pixel.log_prob(counts).detach(), expected, rtol=1e-10)
    np.testing.assert_allclose(pixel.mean.detach(), mean, rtol=1e-10)
    np.testing.assert_allclose(pixel.variance.detach(), mean + mean**2 / r, rtol=1e-10)
    level, loc, log_scale = torch.arange(16.0).double(), torch.tensor(0.4).double(), torch.tensor(-2.0).double()
    edges = scipy.stats.logistic(loc, log_scale.exp()).cdf(np.r_[-np.inf, (np.arange(1, 16) - 0.5) / 15, np.inf])
    pixel = pv.DiscretizedLogistic(nn.Identity(), (), levels=16).pixel_distribution(loc, log_scale)
    np.testing.assert_allclose(pixel.log_prob(level / 15).exp(), np.diff(edges), rtol=1e-10)


@pytest.mark.parametrize("case", [case for case in CASES if case != "categorical" and "low rank" not in case])
def test_samples_have_the_mean_and_the_variance(case):
    pixel = pixels(case, spread=0.5)
    with torch.no_grad():
        x = pixel.sample((20_000,))
        assert (z_score(x, pixel.mean) < 4.5).all()
        assert (z_score((x - pixel.mean).square(), pixel.variance) < 4.5).all()


def test_categorical_samples_have_its_probabilities():
    pixel = pixels("categorical")
    x = pixel.sample((20_000,))
    assert x.dtype == torch.float64
    assert (z_score(nn.functional.one_hot(x.long(), 5).double(), pixel.probs) < 4).all()


def test_logistic_samples_have_its_probabilities():
    pixel = pixels("logistic, 5 levels", spread=0.5)
    values = torch.arange(5).double() / 4
    x = pixel.sample((20_000,))
    expected = torch.stack([pixel.log_prob(value.expand(5)) for value in values]).exp()
    assert (z_score((x[:, None] == values[:, None]).double(), expected) < 4).all()


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_in_extreme_tails(case, dtype):
    vae, x = build(case, (4,))
    likelihood = vae.likelihood.to(dtype)
    x = x.to(dtype)
    ends = torch.stack([x.amin().expand(4), x.amax().expand(4), x[0]])
    for size in (0.0, 1.0, 30.0, 85.0, 1e3, 1e6):
        if "low rank" in case and size > 1e3:
            continue  # beyond float64: parallel columns, 10^8 times as large as the scale
        for signs in torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * min(likelihood.num_features, 4)):
            signs = signs.reshape(-1).repeat(likelihood.num_features)[: likelihood.num_features]
            features = (size * signs.to(dtype))[:, None, None].expand(-1, 3, 4).clone().requires_grad_()
            log_prob = likelihood.event_distribution(*features, mask=None).log_prob(ends)
            assert log_prob.isfinite().all(), (size, signs)
            parameters = [p for name, p in likelihood.named_parameters() if "decoder" not in name]
            gradients = torch.autograd.grad(log_prob.sum(), [features, *parameters], allow_unused=True)
            assert all(g is None or g.isfinite().all() for g in gradients), (size, signs)


def test_logistic_far_from_its_cell_keeps_its_slope():
    """Where a difference of two cdfs rounds to 0, log p falls linearly with the distance divided by the scale."""
    loc = torch.tensor([-3.0, 3.0], requires_grad=True)
    pixel = pv.DiscretizedLogistic(nn.Identity(), (2,)).pixel_distribution(loc, torch.full((2,), -5.0))
    (slope,) = torch.autograd.grad(pixel.log_prob(torch.tensor([127 / 255, 127 / 255])).sum(), loc)
    torch.testing.assert_close(slope, torch.tensor([1.0, -1.0]) * math.exp(5))


@pytest.mark.parametrize(
    ("case", "value", "message"),
    [
        (
            "bernoulli",
            0.5,
            r"zeros and ones, got values from 0.5 to 0.5, such as 0.5. Binarise .* ContinuousBernoulli .* Gaussian",
        ),
        ("continuous bernoulli", 255.0, r"ContinuousBernoulli likelihood expected x in \[0, 1\], got 255. Rescale it"),
        ("continuous bernoulli", -0.1, r"in \[0, 1\], got -0.1"),
        ("categorical", 5.0, r"Categorical likelihood expected x of codes 0, \.\.\., 4, got 5. Number"),
        ("categorical", 0.5, r"got 0.5"),
        (
            "logistic",
            0.5,
            r"DiscretizedLogistic likelihood expected x on the grid 0, 1/255, ..., 1, got 0.5. Pass bytes",
        ),
        ("logistic", 255.0, r"got 255. Pass bytes as x / 255"),
        ("logistic, mixture", -1 / 15, r"1/15, ..., 1, got -0.0666667"),
        ("poisson", 0.5, r"Poisson likelihood expected x of counts 0, 1, 2, ..., got 0.5. Pass the counts"),
        ("poisson", -1.0, r"got -1"),
        ("negative binomial", math.inf, r"NegativeBinomial likelihood expected x of counts 0, 1, 2, ..., got inf"),
    ],
)
def test_data_outside_the_support_are_refused(case, value, message):
    vae, x = build(case)
    vae.model(x)
    with pytest.raises(ValueError, match=message):
        vae.model(torch.full_like(x, value))


@pytest.mark.parametrize("value", [0.5, -1 / 255, 256 / 255, math.nan])
def test_the_logistics_support_is_its_grid(value):
    pixel = pixels("logistic")
    pixel._validate_args = True
    pixel.log_prob(torch.arange(0, 255, 51).double() / 255)
    with pytest.raises(ValueError, match="support"):
        pixel.log_prob(torch.full((5,), value).double())


def test_bytes_of_any_precision_are_on_the_grid():
    for levels in (2, 256, 65536):
        likelihood = pv.DiscretizedLogistic(nn.Identity(), (levels,), levels=levels)
        likelihood.check(torch.arange(levels).float()[None] / (levels - 1))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gaussian", {"min_scale": -1}, r"expected min_scale to be a number of at least 0, got -1"),
        ("student_t", {"df": 1}, r"expected df to be a number above 1 and up to 1e30, or 'learned', got 1"),
        ("student_t", {"df": 1e39}, r"expected df .*, got 1e\+39"),
        ("student_t", {"df": "fixed"}, r"expected df .*, got 'fixed'"),
        ("student_t", {"scale": 0}, r"expected scale to be a positive number.*, got 0"),
        ("categorical", {}, r"expected categories to be an integer of at least 2, got None. Pass categories="),
        ("categorical", {"categories": 1}, r"got 1"),
        ("discretized_logistic", {"levels": 1}, r"expected levels to be an integer of at least 2, got 1"),
        ("discretized_logistic", {"components": 0}, r"expected components to be an integer of at least 1, got 0"),
        ("low_rank_gaussian", {"rank": 0}, r"expected rank to be a positive integer, got 0. .*Gaussian"),
        ("low_rank_gaussian", {"shared": "no"}, r"expected shared to be True or False, got 'no'"),
        ("poisson", {"rate": 1}, r"an option of Poisson \(it has no options\), got rate=1"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        pv.mlp_vae((4,), latent_dim=2, likelihood=name, **options)


def test_a_likelihood_without_a_distribution():
    class Empty(pv.Likelihood):
        pass

    with pytest.raises(NotImplementedError, match="expected Empty to define pixel_distribution or event_distr"):
        pv.mlp_vae((4,), latent_dim=2, likelihood=Empty).decode(torch.zeros(1, 2))


@every
@pytest.mark.parametrize("objective", [pv.ELBO(), pv.IWAE(3)], ids=repr)
def test_objectives_reach_every_parameter(case, objective):
    vae, x = build(case, (1, 2, 3))
    loss = objective.loss_and_grads(vae.model, vae.guide, x)
    assert math.isfinite(loss)
    for name, parameter in vae.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name


@every
def test_a_likelihood_by_name_and_by_class_agree(case):
    by_name, x = build(case)
    by_class, _ = build(case, by_name=False)
    by_class.load_state_dict(by_name.state_dict())
    values = []
    for vae in (by_name, by_class):
        pyro.set_rng_seed(3)
        values.append(pv.IWAE(2).bound(vae.model, vae.guide, x))
    torch.testing.assert_close(*values)


@every
def test_decode_and_convolutions(case):
    vae, _ = build(case)
    z = torch.randn(3, 6, 2, dtype=torch.float64)
    decoded = vae.decode(z)
    assert decoded.shape == (3, 6, 2, 3)
    p = vae.likelihood(z)
    if case == "categorical":
        assert (vae.likelihood(z).base_dist.log_prob(decoded) >= vae.likelihood(z).base_dist.logits.amax(-1)).all()
    else:
        torch.testing.assert_close(decoded, p.mean)
    name, options, draw = CASES[case]
    convolutional = pv.conv_vae((2, 6, 5), latent_dim=2, channels=(3,), likelihood=name, **options).double()
    images = draw(4, 2, 6, 5)
    assert convolutional.reconstruct(images).shape == images.shape
    assert convolutional.likelihood(convolutional.embed(images)).log_prob(images).shape == (4,)


@every
@pytest.mark.parametrize("batch", [(6,), (3, 6)])
def test_a_mask_gives_the_density_of_observed_elements(case, batch):
    """Against the sum over observed elements; test_correlated.py has correlated elements."""
    vae, x = build(case)
    z, mask = torch.randn(*batch, 2, dtype=torch.float64), torch.rand(6, 2, 3) > 0.4
    masked = vae.likelihood(z, mask=mask)
    log_prob = masked.log_prob(x)
    assert log_prob.shape == batch
    full = torch.ones(6, 2, 3, dtype=torch.bool)
    torch.testing.assert_close(vae.likelihood(z, mask=full).log_prob(x), vae.likelihood(z).log_prob(x))
    other = torch.where(mask, x, CASES[case][2](6, 2, 3))
    torch.testing.assert_close(masked.log_prob(other), log_prob)
    if "low rank" not in case:
        alone = vae.likelihood(z).base_dist.log_prob(x)
        torch.testing.assert_close(log_prob, (alone * mask).sum((-1, -2)))
    assert pv.ELBO().bound(lambda: vae.model(x, mask), lambda: vae.guide(x, mask)).isfinite().all()


@every
def test_samples_are_data(case):
    vae, x = build(case)
    drawn = Predictive(poutine.uncondition(vae.model), num_samples=3)(x)["x"]
    assert drawn.shape == (3, *x.shape)
    assert drawn.dtype == x.dtype
    vae.likelihood.check(drawn)
    assert pv.IWAE(2).bound(vae.model, vae.guide, drawn[0]).isfinite().all()
    wider = vae.likelihood(torch.zeros(6, 2).double()).expand((4, 6))
    assert wider.sample().shape == (4, 6, 2, 3)
    assert wider.log_prob(x).shape == (4, 6)


def test_learned_parameters_have_the_documented_initial_values():
    low_rank = pv.LowRankGaussian(nn.Identity(), (4,), rank=3)
    noise = low_rank.event_distribution(torch.zeros(4), mask=None).variance - low_rank.factor.square().sum(-1)
    torch.testing.assert_close(noise, torch.full((4,), 1.01**2))
    for df, expected in (("learned", 4.0), (6.0, 6.0)):
        pixel = pv.StudentT(nn.Identity(), (4,), df=df, scale=0.5).pixel_distribution(torch.zeros(4))
        torch.testing.assert_close(pixel.variance, torch.full((4,), 0.5**2 * expected / (expected - 2)))
    torch.testing.assert_close(pv.NegativeBinomial(nn.Identity(), (4,)).total_count, torch.ones(4))


@pytest.mark.parametrize("log_rate", [-35.0, -20.0, 20.0])
def test_a_poisson_has_a_gradient_at_any_rate(log_rate):
    features = torch.full((1, 1), log_rate, dtype=torch.float64, requires_grad=True)
    likelihood = pv.Poisson(torch.nn.Linear(1, 1), (1,))
    likelihood.pixel_distribution(features).log_prob(torch.tensor([[3.0]], dtype=torch.float64)).sum().backward()
    assert features.grad.item() == pytest.approx(3 - math.exp(max(log_rate, -30)), rel=1e-6)
