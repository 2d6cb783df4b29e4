"""Checks that likelihoods, posteriors and priors share: of a density, its samples, moments and precision."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_vae.testing.quadrature import Rule
from pyro_vae.testing.reports import Report
from pyro_vae.testing.slopes import derivatives

SAMPLES = 20_000
ROUNDINGS = 64  # that a summand of a log-density may take, of float32
RARE = 25.0  # the expected count below which a value's frequency is not nearly normal
LARGEST_ERROR = 0.2  # of a quadrature that still tells a density from another function
FEW_VALUES = 64


def check_density(report: Report, rule: Rule, log_prob: Tensor) -> Tensor:
    """Check that a density (S, *batch) sums or integrates to one; returns it."""
    mass = log_prob.detach().exp()
    total, error = rule.integral(mass)
    cause = "A normaliser or a Jacobian is missing or wrong, or the support is another one: then pass `support`."
    rough = bool((error > LARGEST_ERROR).any()) and bool(((total - 1).abs() < 1).all())
    report.require(
        not rough,
        "density",
        "a density that is smooth on the scale of its samples",
        f"an error of {error.max():.1g}",
        cause,
    )
    tolerance = 1e-9 if rule.grids == 1 else 1e-6 + error  # a sum only rounds; a grid's ends are not at infinity
    report.close("density", total, torch.ones_like(total), tolerance, cause, "a total of")
    return mass


def check_samples(report: Report, rule: Rule, mass: Tensor, draws: Tensor) -> None:
    """Check draws (n, *batch, D) against a density at points (S, *batch, D), by means of bounded functions.

    Bounded functions have a variance under any density, also under one without moments.
    """
    cause = "`sample` draws from another distribution than `log_prob` has: look at its location, its scale, its shape."
    centre, spread, _ = moments(rule, mass, rule.points)

    def functions(z: Tensor) -> Tensor:
        u = (z - centre) / spread
        both = [u.tanh().prod(-1, keepdim=True)] if u.shape[-1] > 1 else []
        return torch.cat([u.tanh(), 1 / (1 + u.square()), *both], -1)

    at_points = functions(rule.points)
    means, error = rule.integral(mass.unsqueeze(-1) * at_points)
    squares, _ = rule.integral(mass.unsqueeze(-1) * at_points.square())
    variance = (squares - means.square()).clamp(min=0)
    report.z_test(
        "samples",
        functions(draws),
        means,
        cause,
        slack=error + 1e-6,
        variance=variance,
        what=lambda index: "the mean of a bounded function,",
    )
    if rule.grids == 1 and len(rule.points) <= FEW_VALUES:
        _check_frequencies(report, rule.points, mass, draws, cause)


def _check_frequencies(report: Report, points: Tensor, mass: Tensor, draws: Tensor, cause: str) -> None:
    for value, probability in zip(points, mass, strict=True):
        variance = probability * (1 - probability)
        found = ((draws - value).abs() < 1e-6).all(-1).double()
        common = len(draws) * variance >= RARE
        report.z_test(
            "samples",
            found[:, common],
            probability[common],
            cause,
            variance=variance[common],
            what=lambda index: "the probability of a value,",
        )


def moments(rule: Rule, mass: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean, the standard deviation and the error of the mean, each (*batch, D), of points (S, *batch, D)."""
    total, _ = rule.integral(mass)
    mean, error = rule.integral(_weighed(mass, points))
    mean = mean / total.unsqueeze(-1)
    variance, _ = rule.integral(_weighed(mass, (points - mean).square()))
    spread = (variance / total.unsqueeze(-1)).sqrt()
    usable = spread.isfinite() & (spread > 1e-9 * (1 + mean.abs()))
    return mean, torch.where(usable, spread, 1.0), error


def _weighed(mass: Tensor, values: Tensor) -> Tensor:
    """Values (S, *batch, D) times a density, also where they overflow far from it."""
    return torch.where(mass.unsqueeze(-1) > 0, mass.unsqueeze(-1) * values, 0.0)


def check_moments(report: Report, rule: Rule, mass: Tensor, points: Tensor, distribution: Any) -> None:
    """Check the mean and the variance that a distribution states, where they are finite, at points (S, *batch, D)."""
    mean, spread, error = moments(rule, mass, points)
    stated = _stated(distribution, "mean", mean)
    if stated is not None:
        cause = "`mean` is of another distribution than `log_prob`."
        report.close("mean", stated, mean, 1e-7 * (mean.abs() + spread) + error, cause, "the mean of the density,")
    variance, error = rule.integral(_weighed(mass, (points - mean).square()))
    stated = _stated(distribution, "variance", mean)
    if stated is not None:
        cause = "`variance` is of another distribution than `log_prob`."
        rounding = 1e-12 * (1 + mean.square())
        report.close(
            "variance", stated, variance, 1e-6 * variance + rounding + error, cause, "the variance of the density,"
        )


def _stated(distribution: Any, name: str, like: Tensor) -> Tensor | None:
    """A moment that a distribution states; None where it states none, or not a finite one."""
    try:
        value: Tensor = getattr(distribution, name)
    except (NotImplementedError, AttributeError):
        return None
    return value.detach().reshape(like.shape) if bool(value.isfinite().all()) else None


def check_float32(
    report: Report, narrow: Callable[[], Tensor], wide: Callable[[], Tensor], tensors: Mapping[str, Tensor], size: int
) -> None:
    """Check a log-density (*batch,) in float32 against float64, from inputs that float32 holds exactly.

    A stable computation gives the exact result of inputs that were rounded a few times. The tolerance is that many
    roundings of the inputs, passed on by the derivatives, and of the sum of `size` terms.
    """
    expected = wide()
    gradients = zip(derivatives(expected.sum(), list(tensors.values())), tensors.values(), strict=True)
    passed_on = sum((gradient * tensor.detach()).abs().sum().item() for gradient, tensor in gradients)
    found = narrow()
    cause = "Digits cancel: subtract nothing that is large and almost equal, and make tensors in the features' type."
    report.require(found.dtype == torch.float32, "float32", "a log-density of float32", found.dtype, cause)
    unit = torch.finfo(torch.float32).eps / 2
    tolerance = ROUNDINGS * unit * (size + expected.detach().abs() + passed_on)
    report.close("float32", found, expected, tolerance, cause, "the log-density in float64,")
