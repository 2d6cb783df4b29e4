"""Properties of a site's distribution: its parameters, its marginals, whether it depends on other sites' samples."""

import inspect
from typing import Any

import pyro.distributions as dist
from torch import Tensor

from pyro_vae.engine.program import Run
from pyro_vae.engine.sites import Site, layers, masks, unwrapped
from pyro_vae.errors import PyroVAEError

OF_ONE_PARTICLE = "_of_one_particle"  # an attribute of a distribution that stands for those of several particles
# Constructor arguments that repeat another one, so that only the other is kept.
REDUNDANT = {"covariance_matrix", "precision_matrix", "probs"}


def constructor_arguments(fn: Any) -> dict[str, Tensor]:
    """The tensors to construct a distribution from, by argument name, with its batch; empty if they are not known."""
    base = unwrapped(fn)
    try:
        names = [name for name in base.arg_constraints if name not in REDUNDANT]
    except NotImplementedError:  # a user's family that names none
        return {}
    if "probs" in base.arg_constraints and "logits" not in names:
        names.append("probs")
    values: dict[str, Any] = {name: getattr(base, name, None) for name in names}
    # Families without an expand of their own keep the parameters of one row for all rows.
    wider = (layer.batch_shape for layer in layers(fn) if isinstance(layer, dist.ExpandedDistribution))
    own, batch = base.batch_shape, next(wider, base.batch_shape)
    if not all(isinstance(value, Tensor) and value.shape[: len(own)] == own for value in values.values()):
        return {}
    return {name: value.expand(*batch, *value.shape[len(own) :]) for name, value in values.items()}


def suffices(values: dict[str, Tensor], fn: Any) -> bool:
    """Whether a distribution can be constructed from these arguments alone: others have their default values."""
    base = unwrapped(fn)
    for argument in inspect.signature(type(base)).parameters.values():
        named = argument.kind in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY)
        # One of several parametrisations is given; the others are in the family's constraints too.
        known = argument.name in values or argument.name == "validate_args"
        if not named or known or (argument.default is None and argument.name in base.arg_constraints):
            continue
        own = getattr(base, argument.name, getattr(base, f"_{argument.name}", argument.empty))
        if argument.default is argument.empty or isinstance(own, Tensor) or own != argument.default:
            return False
    return bool(values)


def same_for_all_particles(site: Site) -> bool:
    """Whether all particles of a run have the same distribution at a site, so that it depends on no earlier sample."""
    values = constructor_arguments(site["fn"])
    return bool(values) and all(bool((value == value[:1]).all()) for value in values.values())


def require_latents(run: Run) -> None:
    """Raise an error if the model has no latent site."""
    if all(site["is_observed"] for site in run.model.values()):
        raise PyroVAEError(
            "the model has no latent site: expected one, which has a posterior. Use pv.log_likelihood, which is exact."
        )


def refuse_masks(run: Run) -> None:
    """Raise an error if a latent site is masked, since a masked latent has no posterior."""
    for name, site in run.model.items():
        if not site["is_observed"] and (masks(site) or masks(run.guide[name])):
            raise PyroVAEError(
                f"site '{name}' is masked: expected latents that count for every datum, since a masked latent has no "
                "posterior. Pass only the unmasked data, without the mask."
            )


def univariate(fn: Any) -> Any:
    """The marginal distribution of each dimension, all as batch dimensions; None if it is not known."""
    base = unwrapped(fn)
    if isinstance(base, dist.MultivariateNormal | dist.LowRankMultivariateNormal):
        return dist.Normal(base.loc, base.variance.sqrt())
    # A point's spread is that of the auxiliary sites that it depends on.
    known = not base.event_dim and not isinstance(base, dist.Delta) and not hasattr(base, OF_ONE_PARTICLE)
    return base if known else None


def by_dimension(run: Run, site: Site, value: Tensor) -> Tensor:
    """A tensor of the shape of a site's value as (K, N, dimensions), with nested plates and events flattened."""
    outer = value.dim() - site["fn"].event_dim
    columns = value.movedim((outer + run.particle_dim, outer + run.batch_plate.dim), (0, 1))
    return columns.reshape(*columns.shape[:2], -1)
