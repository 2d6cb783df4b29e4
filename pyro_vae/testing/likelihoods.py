"""Checks of a likelihood p(x|z): density, samples, moments, gradients, masks, precision, shapes and refusals."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.errors import PyroVAEError
from pyro_vae.likelihoods import Likelihood
from pyro_vae.objectives import ELBO
from pyro_vae.pairs import VAE
from pyro_vae.posteriors import DiagonalNormal
from pyro_vae.priors import StandardNormal
from pyro_vae.testing.compiled import check_compiled
from pyro_vae.testing.densities import (
    SAMPLES,
    check_density,
    check_float32,
    check_moments,
    check_samples,
)
from pyro_vae.testing.quadrature import (
    DRAWS,
    Rule,
    Support,
    contains,
    element_constraint,
    line,
    over_elements,
    over_events,
)
from pyro_vae.testing.reports import Report, reproducible
from pyro_vae.testing.slopes import check_slopes

LATENT_DIM = 2
FAR = 10.0  # a feature that a decoder may well give
OUTSIDE = (-1.5, 0.31, 1.5, 1e6)  # of which those outside the support have to be refused


def check_likelihood(
    likelihood: type[Likelihood] | Likelihood,
    *,
    event_shape: tuple[int, ...] | None = None,
    support: Support = None,
    spread: float = 1.0,
    compiled: bool = False,
    seed: int = 0,
    **options: Any,
) -> None:
    r"""Check a likelihood, at random features in place of a decoder's.

    Where elements are independent given z, the density of each element is checked. Where they are not, the joint
    density of an event of two elements is checked. The checks by name:

    ``shapes``
        for z of shape (*batch, Z), the distribution has batch shape `batch` and event shape `event`, also with no batch
        dimension and with two; so do its log-density, its samples and `decode`.
    ``density``
        :math:`\sum_x p(x \mid z) = 1`, or :math:`\int p(x \mid z)\, \mathrm d x = 1`, by quadrature.
    ``samples``
        20,000 samples against sums over the density, by a z-test at five standard errors. They lie in the support.
    ``mean``, ``variance``
        those that the distribution states, where finite, against those of the density, unless the likelihood has a
        `from_statistic` of its own.
    ``slope``
        the gradient of the log-density by the features and by the likelihood's parameters, against finite differences.
    ``finite``
        the log-density and its gradient are finite at features of ±10, in float32 and float64.
    ``float32``
        the log-density in float32 against float64, within the roundings of its terms, at a `spread` of at most 1.
    ``mask``
        the density with a mask is the density of the elements where the mask is True. A likelihood of dependent
        elements may refuse masks.
    ``check``
        `check` accepts samples. If the likelihood has a `check` of its own, it refuses values outside the support. The
        support contains `filler`.
    ``compiled``
        a compiled step of a VAE with it gives the loss and the gradient of an uncompiled one.

    Arguments:
        likelihood: a subclass of :class:`pyro_vae.Likelihood`, or an instance. An instance is copied with its
            parameters, and gets another decoder.
        event_shape: the shape of one datum of a class. None is (2, 3), and (2, 1) for the joint density of dependent
            elements.
        support: the support of an element, where its distribution does not state it: (low, high), or its values as a
            tensor.
        spread: the standard deviation of the features.
        compiled: whether to compile a step, which takes seconds and needs a C++ compiler.
        seed: where the random numbers start. The state of the random number generator is left as it was.
        **options: the arguments of the class besides `decoder` and `event_shape`.

    Raises:
        AssertionError: a check fails. The message gives its name, the expected value, the value found, and the likely
            cause.
        ValueError: an argument is invalid, or no grid covers the support.

    Example:
        >>> import pyro.distributions as dist, pyro_vae as pv
        >>> class Laplace(pv.Likelihood):
        ...     def pixel_distribution(self, loc):
        ...         return dist.Laplace(loc, 1.0)
        >>> pv.testing.check_likelihood(Laplace)
    """
    with reproducible(seed):
        made = _Made(likelihood, event_shape, options)
        report = Report(made.name)
        module, features = made.module(made.event), made.features((4,), made.event, spread)
        distribution = module.event_distribution(*features, mask=None)
        with torch.no_grad():
            x = distribution.sample()
        constraint = element_constraint(distribution, support)
        _check_support(report, module, constraint, x)
        _check_shapes(report, module, x)
        small = module if made.independent else made.module(made.small)
        _check_values(report, small, made, support, spread)
        _check_slopes(report, module, features, x)
        _check_finite(report, module, made, x)
        _check_float32(report, module, features / max(spread, 1.0))
        _check_masks(report, module, small, made, features, x, spread)
        _check_refusals(report, module, constraint, x)
        if compiled:
            _check_step(report, module, x)


class _Made:
    """Makes float64 likelihoods of a class, or copies of an instance, with parameters that float32 holds exactly."""

    def __init__(
        self,
        likelihood: type[Likelihood] | Likelihood,
        event_shape: tuple[int, ...] | None,
        options: dict[str, Any],
    ) -> None:
        of_class = isinstance(likelihood, type) and issubclass(likelihood, Likelihood)
        if not of_class and not isinstance(likelihood, Likelihood):
            raise PyroVAEError(f"expected a subclass of pyro_vae.Likelihood or an instance, got {likelihood!r}.")
        given = options if event_shape is None else {"event_shape": event_shape, **options}
        if given and not of_class:
            raise PyroVAEError(f"expected no options next to an instance, got {given}. Pass the class, or drop them.")
        self.likelihood, self.options = likelihood, options
        self.family: type[Likelihood] = likelihood if of_class else type(likelihood)  # type: ignore[assignment]
        shown = ", ".join(f"{name}={value!r}" for name, value in options.items())
        self.name = f"{self.family.__name__}({shown})" if shown else self.family.__name__
        self.independent = self.family.event_distribution is Likelihood.event_distribution
        shape = likelihood.event_shape if isinstance(likelihood, Likelihood) else event_shape
        self.event = (2, 3) if shape is None else shape
        self.small = (2, 1) if shape is None else shape
        if not self.independent and math.prod(self.small) > 2:
            raise PyroVAEError(
                f"expected an event of at most two elements, whose joint density a grid can integrate, got {shape} "
                "of dependent elements. Pass the class, or event_shape=(2,)."
            )

    def module(self, event_shape: tuple[int, ...]) -> Likelihood:
        """A likelihood of events of this shape, or of the instance's."""
        if isinstance(self.likelihood, Likelihood):
            module = copy.deepcopy(self.likelihood).to("cpu").eval()
        else:
            number = self.family.features_for(**self.options) * math.prod(event_shape)
            module = self.family(nn.Linear(LATENT_DIM, number), event_shape, **self.options).eval()
            for parameter in module.parameters():
                parameter.data += 0.3 * torch.randn_like(parameter)
            if module.num_features != number // math.prod(event_shape):
                Report(self.name).fail(
                    "shapes",
                    f"features_for to give num_features, {module.num_features}",
                    f"{number // math.prod(event_shape)}",
                    "A decoder of another width is built from it.",
                )
        module.decoder = nn.Linear(LATENT_DIM, module.num_features * math.prod(module.event_shape))
        return module.float().double()

    def features(self, batch: tuple[int, ...], event_shape: tuple[int, ...], spread: float) -> Tensor:
        """Random features, (num_features, *batch, *event), to differentiate by."""
        module = self.module(event_shape)
        features = spread * torch.randn(module.num_features, *batch, *module.event_shape)
        return features.double().requires_grad_()


def _own(module: Likelihood) -> dict[str, Tensor]:
    """The parameters besides the decoder's."""
    return {name: value for name, value in module.named_parameters() if not name.startswith("decoder.")}


def _check_shapes(report: Report, module: Likelihood, x: Tensor) -> None:
    event = module.event_shape
    for batch in ((), (5,), (4, 5)):
        distribution = module(torch.randn(*batch, LATENT_DIM, dtype=torch.float64))
        found = distribution.batch_shape, distribution.event_shape
        cause = "`pixel_distribution` gives one distribution for each element, from features of shape (*batch, *event)."
        report.require(found == (batch, event), "shapes", f"batch shape {batch} and event shape {event}", found, cause)
        with torch.no_grad():
            drawn = distribution.sample((2,))
            shapes = {
                "samples": drawn.shape,
                "log-densities": (*distribution.log_prob(drawn).shape, *event),
                "decoded means": (2, *module.decode(torch.randn(*batch, LATENT_DIM, dtype=torch.float64)).shape),
            }
        for name, shape in shapes.items():
            expected = (2, *batch, *event)
            report.require(tuple(shape) == expected, "shapes", f"{name} for the shape {expected}", tuple(shape), cause)
    report.require(
        x.dtype == torch.float64, "samples", "samples of the features' type, torch.float64", x.dtype, "Convert."
    )


def _check_values(report: Report, module: Likelihood, made: _Made, support: Support, spread: float) -> None:
    """Density, samples and moments of each element, or of a small event."""
    with torch.no_grad():
        if made.independent:
            distribution = module.pixel_distribution(*made.features((4,), made.event, spread))
            rule = over_elements(distribution, support)
            points = rule.points.unsqueeze(-1)
            draws = distribution.sample((SAMPLES,)).unsqueeze(-1)
        else:
            distribution = module.event_distribution(*made.features((), made.small, spread), mask=None)
            rule = over_events(distribution)
            points = rule.points.flatten(1)
            draws = distribution.sample((SAMPLES,)).flatten(1)
        mass = check_density(report, rule, distribution.log_prob(rule.points))
        check_samples(report, Rule(points, rule.weights, rule.grids), mass, draws)
        if made.family.from_statistic is Likelihood.from_statistic:  # else the mean is not what it decodes to
            check_moments(report, rule, mass, points, distribution)


def _check_slopes(report: Report, module: Likelihood, features: Tensor, x: Tensor) -> None:
    def log_prob() -> Tensor:
        return module.event_distribution(*features, mask=None).log_prob(x).sum()

    check_slopes(report, log_prob, {"features": features, **_own(module)})


def _check_finite(report: Report, module: Likelihood, made: _Made, x: Tensor) -> None:
    cause = "Something overflows, or divides by what underflows: clamp it, or work in logarithms."
    for dtype in (torch.float32, torch.float64):
        other = copy.deepcopy(module).to(dtype)
        number = min(other.num_features, 4)
        for signs in torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * number).reshape(-1, number):
            repeated = signs.repeat(other.num_features)[: other.num_features]
            size = (FAR * repeated.to(dtype)).reshape(-1, *[1] * x.dim())
            features = size.expand(-1, *x.shape).clone().requires_grad_()
            value = other.event_distribution(*features, mask=None).log_prob(x.to(dtype))
            gradients = torch.autograd.grad(value.sum(), [features, *_own(other).values()], allow_unused=True)
            finite = all(t is None or bool(t.isfinite().all()) for t in (value, *gradients))
            where = f"finite values and gradients at features {(FAR * signs).tolist()} in {dtype}"
            report.require(finite, "finite", where, "others", cause)


def _check_float32(report: Report, module: Likelihood, features: Tensor) -> None:
    narrow = copy.deepcopy(module).float()
    features = features.detach().float().double().requires_grad_()
    with torch.no_grad():
        x = module.event_distribution(*features, mask=None).sample()
    x = x.float().double().requires_grad_()

    def log_prob(likelihood: Likelihood, features: Tensor, x: Tensor) -> Tensor:
        return likelihood.event_distribution(*features, mask=None).log_prob(x)

    check_float32(
        report,
        lambda: log_prob(narrow, features.float(), x.float()),
        lambda: log_prob(module, features, x),
        {"features": features, "x": x, **_own(module)},
        math.prod(module.event_shape),
    )


def _check_masks(
    report: Report, module: Likelihood, small: Likelihood, made: _Made, features: Tensor, x: Tensor, spread: float
) -> None:
    mask = torch.rand(x.shape) > 0.4
    with torch.no_grad():
        whole = module.event_distribution(*features, mask=None)
        try:
            masked = module.event_distribution(*features, mask=mask).log_prob(x)
        except ValueError:
            return  # it refuses masks, which a likelihood of dependent elements may do
        cause = "The density of a missing element is left in, or that of an observed one is left out."
        hidden = torch.where(mask, x, whole.sample())
        other = module.event_distribution(*features, mask=mask).log_prob(hidden)
        tolerance = 1e-9 * (1 + masked.abs())
        report.close("mask", other, masked, tolerance, cause, "with other values where elements are missing,")
        full = module.event_distribution(*features, mask=torch.ones_like(mask)).log_prob(x)
        expected = whole.log_prob(x)
        report.close("mask", full, expected, 1e-9 * (1 + expected.abs()), cause, "with nothing missing,")
        if made.independent:
            alone = module.pixel_distribution(*features).log_prob(x)
            expected = torch.where(mask, alone, 0.0).flatten(1).sum(1)
            report.close(
                "mask", masked, expected, 1e-9 * (1 + expected.abs()), cause, "the sum over observed elements,"
            )
        elif math.prod(small.event_shape) == 2:
            _check_marginal(report, small, made, spread, cause)


def _check_marginal(report: Report, module: Likelihood, made: _Made, spread: float, cause: str) -> None:
    """With the second of two dependent elements missing, the density is the integral over it."""
    features = made.features((), made.small, spread)
    whole = module.event_distribution(*features, mask=None)
    draws = whole.sample((DRAWS,)).flatten(1)
    seen = draws[0, 0]
    rule = line(element_constraint(whole, None), draws[:, 1])
    points = torch.stack([seen.expand_as(rule.points), rule.points], -1).reshape(-1, *module.event_shape)
    integral, error = rule.integral(whole.log_prob(points).exp())
    mask = torch.tensor([True, False]).reshape(module.event_shape)
    found = module.event_distribution(*features, mask=mask).log_prob(draws[0].reshape(module.event_shape)).exp()
    report.close(
        "mask", found, integral, 1e-6 * (1 + integral) + error, cause, "the integral over the missing element,"
    )


def _check_support(report: Report, module: Likelihood, constraint: Any, x: Tensor) -> None:
    inside = contains(constraint, x)
    if not bool(inside.all()):
        cause = "The distribution's `support` and `sample` have to agree."
        report.fail("check", "samples in the support", f"others, such as {x[~inside][0]:.6g}", cause)
    filler = torch.full_like(x, module.filler)
    cause = "Set `filler` to a value in the support: it stands for missing elements."
    report.require(bool(contains(constraint, filler).all()), "check", "filler in the support", module.filler, cause)


def _check_refusals(report: Report, module: Likelihood, constraint: Any, x: Tensor) -> None:
    cause = "The support, `check` and `sample` have to agree."
    try:
        module.check(x)
    except ValueError as error:
        report.fail("check", "samples to be accepted", f"the refusal: {error}", cause)
    if type(module).check is Likelihood.check:
        return
    for value in OUTSIDE:
        bad = torch.full_like(x, value)
        if bool(contains(constraint, bad).any()):
            continue
        try:
            module.check(bad)
        except ValueError:
            continue
        report.fail("check", f"a refusal of {value:g}, which is outside the support", "none", cause)


def _check_step(report: Report, module: Likelihood, x: Tensor) -> None:
    size = math.prod(module.event_shape)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(size, 2 * LATENT_DIM))
    posterior = DiagonalNormal(encoder, module.event_shape)
    vae = VAE(prior=StandardNormal(LATENT_DIM), likelihood=module, posterior=posterior).double()
    check_compiled(report, vae.model, vae.guide, ELBO(), list(vae.parameters()), x)
