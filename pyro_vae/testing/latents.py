"""Checks of a posterior q(z|x) and of a prior p(z): density, samples, moments, gradients, precision and shapes."""

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.errors import PyroVAEError
from pyro_vae.likelihoods import Gaussian
from pyro_vae.networks import mlp
from pyro_vae.objectives import ELBO
from pyro_vae.pairs import VAE
from pyro_vae.posteriors import DiagonalNormal, Posterior
from pyro_vae.priors import StandardNormal
from pyro_vae.testing.compiled import check_compiled
from pyro_vae.testing.densities import (
    SAMPLES,
    check_density,
    check_float32,
    check_moments,
    check_samples,
    moments,
)
from pyro_vae.testing.quadrature import Rule, over_events
from pyro_vae.testing.reports import Report, reproducible
from pyro_vae.testing.slopes import check_slopes, derivatives

EVENT_SHAPE = (2, 2)
CALLS, ROWS = 50, 400  # of the pathwise derivative: as many means of as many samples


def check_posterior(
    posterior: type[Posterior] | nn.Module,
    *,
    latent_dim: int = 2,
    event_shape: tuple[int, ...] | None = None,
    compiled: bool = False,
    seed: int = 0,
    **options: Any,
) -> None:
    r"""Check an approximate posterior q(z|x) with one or two latent dimensions, at random x and random weights.

    The checks by name:

    ``shapes``
        for x of shape (*batch, *event), the distribution has batch shape `batch` and a vector as event, also with no
        batch dimension and with two. Samples and `embed` have these shapes. Each datum's density is that of the datum
        alone.
    ``density``
        :math:`\int q(z \mid x)\, \mathrm d z = 1`, by quadrature.
    ``samples``
        20,000 samples against integrals of the density, by a z-test at five standard errors.
    ``mean``, ``variance``
        those that the distribution states, where finite, against those of the density.
    ``log_prob``
        a distribution gives its own samples the density that a new distribution gives equal values.
    ``slope``
        the gradient of log q(z|x) at a fixed z by the parameters and by x, against finite differences.
    ``path``
        where it has `rsample`, the pathwise derivative against the score function's, by a z-test: for a bounded
        function f,
        :math:`\mathbb E\, \nabla f(z) = \mathbb E\, f(z)\, \nabla \log q(z \mid x)`.
    ``float32``
        the log-density in float32 against float64, within the roundings of its terms.
    ``compiled``
        a compiled step of a VAE with it gives the loss and the gradient of an uncompiled one.

    Arguments:
        posterior: a subclass of :class:`pyro_vae.Posterior`, which gets a small encoder; or a module from x to a
            distribution, which is copied.
        latent_dim: the number of latent dimensions of a class, one or two.
        event_shape: the shape of one datum. None is the module's `event_shape`.
        compiled: whether to compile a step, which takes seconds and needs a C++ compiler.
        seed: where the random numbers start. The state of the random number generator is left as it was.
        **options: the arguments of the class besides `encoder`, `event_shape` and `latent_dim`.

    Raises:
        AssertionError: a check fails. The message gives its name, the expected value, the value found, and the likely
            cause.
        ValueError: an argument is invalid, or the latent has too many dimensions for a grid.

    Example:
        >>> import pyro.distributions as dist, pyro_vae as pv
        >>> class Laplace(pv.Posterior):
        ...     @classmethod
        ...     def features_for(cls, latent_dim, **options):
        ...         return 2 * latent_dim
        ...
        ...     def latent_distribution(self, features):
        ...         loc, log_scale = features.chunk(2, -1)
        ...         return dist.Laplace(loc, log_scale.exp()).to_event(1)
        >>> pv.testing.check_posterior(Laplace)
    """
    with reproducible(seed):
        if isinstance(posterior, type):
            event_shape = EVENT_SHAPE if event_shape is None else event_shape
            module: nn.Module = _built(posterior, latent_dim, event_shape, options)
        else:
            if options:
                raise PyroVAEError(
                    f"expected no options next to an instance, got {options}. Pass the class, or drop them."
                )
            module = _copied(posterior, "a posterior")
            event_shape = getattr(module, "event_shape", None) if event_shape is None else event_shape
            if event_shape is None:
                raise PyroVAEError(
                    f"expected {type(module).__name__} to have an event_shape, got none. Pass event_shape=(...)."
                )
        report = Report(type(module).__name__)
        x = torch.randn(*event_shape).double().requires_grad_()
        _check_batches(report, module, tuple(event_shape))
        _check_latent(report, module, lambda part, x: part(x), {"x": x})
        if compiled:
            likelihood = Gaussian(mlp(_size(module(x)), [4], math.prod(event_shape)), tuple(event_shape))
            vae = VAE(prior=StandardNormal(_size(module(x))), likelihood=likelihood, posterior=module).double()
            objective = ELBO(1, "monte_carlo", "pathwise" if module(x).has_rsample else "score")
            data = torch.randn(5, *event_shape, dtype=torch.float64)
            check_compiled(report, vae.model, vae.guide, objective, list(vae.parameters()), data)


def check_prior(prior: nn.Module, *, compiled: bool = False, seed: int = 0) -> None:
    r"""Check a prior p(z) with one or two latent dimensions, at its parameters.

    The checks are those of :func:`check_posterior` without x: ``shapes``, ``density``, ``samples``, ``mean``,
    ``variance``, ``log_prob``, ``slope``, ``path`` (where the prior has `rsample`), ``float32`` and ``compiled``. Under
    ``shapes``, the prior has no batch dimension, and it gives independent samples when it is expanded over data.

    Arguments:
        prior: a module that returns a distribution when called without arguments. It is copied.
        compiled: whether to compile a step, which takes seconds and needs a C++ compiler.
        seed: where the random numbers start. The state of the random number generator is left as it was.

    Raises:
        AssertionError: a check fails. The message gives its name, the expected value, the value found, and the likely
            cause.
        ValueError: an argument is invalid, or the latent has too many dimensions for a grid.

    Example:
        >>> import pyro.distributions as dist, torch, pyro_vae as pv
        >>> class Laplace(torch.nn.Module):
        ...     def __init__(self, latent_dim):
        ...         super().__init__()
        ...         self.log_scale = torch.nn.Parameter(torch.zeros(latent_dim))
        ...
        ...     def forward(self):
        ...         return dist.Laplace(0.0, self.log_scale.exp()).to_event(1)
        >>> pv.testing.check_prior(Laplace(2))
    """
    with reproducible(seed):
        module = _copied(prior, "a prior")
        report = Report(type(module).__name__)
        _check_expanded(report, module)
        _check_latent(report, module, lambda part: part(), {})
        if compiled:
            size = _size(module())
            likelihood = Gaussian(mlp(size, [4], 3), (3,))
            posterior = DiagonalNormal(mlp(3, [4], 2 * size), (3,))
            vae = VAE(prior=module, likelihood=likelihood, posterior=posterior).double()
            data = torch.randn(5, 3, dtype=torch.float64)
            check_compiled(report, vae.model, vae.guide, ELBO(1, "monte_carlo"), list(vae.parameters()), data)


def _built(family: type[Any], latent_dim: int, event_shape: tuple[int, ...], options: dict[str, Any]) -> nn.Module:
    if not issubclass(family, Posterior):
        raise PyroVAEError(f"expected a subclass of pyro_vae.Posterior or a module, got {family!r}. Pass an instance.")
    encoder = mlp(math.prod(event_shape), [8], family.features_for(latent_dim, **options))
    takes_dim = "latent_dim" in inspect.signature(family.__init__).parameters
    own = {"latent_dim": latent_dim} if takes_dim else {}
    module = (
        family(encoder, event_shape, **own, **options) if options else family.build(encoder, event_shape, latent_dim)
    )
    for parameter in module.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return module.eval().float().double()


def _copied(module: object, what: str) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise PyroVAEError(f"expected {what} to be a torch.nn.Module, got {module!r}.")
    return copy.deepcopy(module).to("cpu").eval().float().double()


def _size(distribution: Any) -> int:
    return int(distribution.event_shape.numel())


def _check_batches(report: Report, module: nn.Module, event_shape: tuple[int, ...]) -> None:
    cause = "q(z|x) has the leading dimensions of x, and a vector as event: use to_event(1)."
    for batch in ((), (5,), (4, 5)):
        x = torch.randn(*batch, *event_shape, dtype=torch.float64)
        q = module(x)
        found = q.batch_shape, len(q.event_shape)
        report.require(found == (batch, 1), "shapes", f"batch shape {batch} and one event dimension", found, cause)
        z = q.sample((3,))
        expected = (3, *batch, *q.event_shape)
        report.require(z.shape == expected, "shapes", f"samples of shape {expected}", tuple(z.shape), cause)
        report.require(z.dtype == torch.float64, "shapes", "samples of x's type, torch.float64", z.dtype, cause)
        report.require(not z.requires_grad, "shapes", "samples without gradients from `sample`", "some", cause)
        if q.has_rsample:
            shape = q.rsample((3,)).shape
            report.require(shape == expected, "shapes", f"shape {expected} from `rsample`", tuple(shape), cause)
        embedded = _embedded(module, x)
        if embedded is not None:
            wanted = (*batch, *q.event_shape)
            report.require(
                embedded.shape == wanted, "shapes", f"shape {wanted} from `embed`", tuple(embedded.shape), cause
            )
        log_prob = q.log_prob(z.clone())
        rows = x.reshape(-1, *event_shape)
        by_row = z.reshape(3, len(rows), -1)
        alone = [module(rows[n : n + 1]).log_prob(by_row[:, n : n + 1])[:, 0] for n in range(len(rows))]
        expected_log_prob = torch.stack(alone, 1).reshape(3, *batch)
        tolerance = 1e-8 * (1 + expected_log_prob.abs())
        report.close("shapes", log_prob, expected_log_prob, tolerance, cause, "each datum's log-density alone,")


def _embedded(module: nn.Module, x: Tensor) -> Tensor | None:
    """The embedding of x; None where there is none, as of a distribution without a mean."""
    try:
        embedded: Tensor | None = module.embed(x) if hasattr(module, "embed") else None  # type: ignore[operator]
    except NotImplementedError:
        return None
    return embedded


def _check_expanded(report: Report, module: nn.Module) -> None:
    cause = "p(z) is the distribution of one datum's latent: a vector as event, by to_event(1), and no batch."
    p = module()
    found = p.batch_shape, len(p.event_shape)
    report.require(found == ((), 1), "shapes", "no batch dimension and one event dimension", found, cause)
    wide = p.expand((4, 3))
    z = wide.sample()
    expected = (4, 3, *p.event_shape)
    report.require(z.shape == expected, "shapes", f"samples of shape {expected}", tuple(z.shape), cause)
    report.require(z.dtype == torch.float64, "shapes", "samples of the parameters' type, torch.float64", z.dtype, cause)
    rows = z.flatten(0, 1)
    if not p.support.is_discrete:
        different = len(rows.unique(dim=0))
        report.require(
            different == 12, "shapes", "12 independent samples of 12 data", f"{different} different ones", cause
        )
    alone = torch.stack([module().log_prob(row) for row in rows]).reshape(4, 3)
    report.close("shapes", wide.log_prob(z), alone, 1e-8 * (1 + alone.abs()), cause, "each sample's log-density alone,")


def _check_latent(report: Report, module: nn.Module, call: Callable[..., Any], inputs: dict[str, Tensor]) -> None:
    """What posteriors and priors share: `call` gives the distribution of a module at the inputs."""
    values = list(inputs.values())
    rule = over_events(call(module, *values))
    with torch.no_grad():
        distribution = call(module, *values)
        mass = check_density(report, rule, distribution.log_prob(rule.points))
        draws = distribution.sample((SAMPLES,))
        check_samples(report, rule, mass, draws)
        check_moments(report, rule, mass, rule.points, distribution)
        z = distribution.sample((5,))
        cause = "What the distribution remembers of its samples is wrong, such as a transform's cache."
        fresh = call(module, *values).log_prob(z.clone())
        own = distribution.log_prob(z)
        report.close("log_prob", own, fresh, 1e-7 * (1 + fresh.abs()), cause, "the log-density of fresh values,")
    tensors = {**inputs, **{name: p for name, p in module.named_parameters() if p.is_floating_point()}}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    check_slopes(report, lambda: call(module, *values).log_prob(z).sum(), tensors)
    if call(module, *values).has_rsample:
        _check_path(report, lambda: call(module, *values), rule, mass, tensors)
    narrow = copy.deepcopy(module).float()
    z = z.float().double()
    continuous = not call(module, *values).support.is_discrete
    z = z.requires_grad_(continuous)
    check_float32(
        report,
        lambda: call(narrow, *[value.float() for value in values]).log_prob(z.float()),
        lambda: call(module, *values).log_prob(z),
        {**tensors, **({"z": z} if continuous else {})},
        z.shape[-1],
    )


def _check_path(report: Report, make: Callable[[], Any], rule: Rule, mass: Tensor, tensors: dict[str, Tensor]) -> None:
    """The mean of pathwise derivatives against that of the score function's, which needs no path."""
    centre, spread, _ = moments(rule, mass, rule.points)

    def function(z: Tensor) -> Tensor:
        u = (z - centre) / spread
        turned = u[..., 0] + 0.5 * u[..., -1] + 0.3
        return turned.cos() + 0.3 * u.tanh().prod(-1) + torch.sigmoid(4 * u[..., -1])

    leaves = list(tensors.values())
    if not leaves:
        return
    baseline, _ = rule.integral(mass * function(rule.points))

    differences = []
    for _ in range(CALLS):
        z = make().rsample((ROWS,))
        fixed = z.detach().clone()
        by_path, by_score = function(z).mean(), ((function(fixed) - baseline) * make().log_prob(fixed)).mean()
        parts = derivatives(by_path - by_score, leaves)
        differences.append(torch.cat([part.flatten() for part in parts]))
    names = [name for name, tensor in tensors.items() for _ in range(tensor.numel())]
    draws = torch.stack(differences)
    report.z_test(
        "path",
        draws,
        torch.zeros_like(draws[0]),
        "`rsample` is detached, or it has another derivative than `log_prob`. Without a path, set has_rsample = False.",
        what=lambda index: (
            f"by {names[index[0]]}, a difference between the pathwise and the score function's derivative of"
        ),
    )
