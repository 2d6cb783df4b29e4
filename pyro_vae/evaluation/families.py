"""What is known of a site's distribution: its parameters, its dimensions one by one, whether it hangs on other samples."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from torch import Tensor

from pyro_vae.engine.agreement import masks, unwrapped
from pyro_vae.engine.batch_plate import Site
from pyro_vae.engine.program import Run
from pyro_vae.errors import PyroVAEError

# Of constructor arguments that say the same thing twice, those to drop.
REDUNDANT = {"covariance_matrix", "precision_matrix", "probs"}


def constructor_arguments(fn: Any) -> dict[str, Tensor]:
    """The tensors that a distribution is made from, by the names its constructor has; none if they are not known."""
    base = unwrapped(fn)
    names = [name for name in base.arg_constraints if name not in REDUNDANT]
    if "probs" in base.arg_constraints and "logits" not in names:
        names.append("probs")
    values: dict[str, Any] = {name: getattr(base, name, None) for name in names}
    return values if all(isinstance(value, Tensor) for value in values.values()) else {}


def same_for_all_particles(site: Site) -> bool:
    """Whether a site of a run with several particles has one distribution, whatever the samples before it."""
    values = constructor_arguments(site["fn"])
    return bool(values) and all(bool((value == value[:1]).all()) for value in values.values())


def refuse_masks(run: Run) -> None:
    """Refuse latents that are masked for some data: these have no posterior to speak of."""
    for name, site in run.model.items():
        if not site["is_observed"] and (masks(site) or masks(run.guide[name])):
            raise PyroVAEError(
                f"site '{name}' is masked: expected latents that count for every datum, since a masked one has no posterior. "
                "Pass the data that are not masked, without the mask."
            )


def univariate(fn: Any) -> Any:
    """The marginal distribution of each dimension: batch and event alike as the batch; None if it is not known."""
    base = unwrapped(fn)
    if isinstance(base, dist.MultivariateNormal | dist.LowRankMultivariateNormal):
        return dist.Normal(base.loc, base.variance.sqrt())
    return None if base.event_dim else base


def by_dimension(run: Run, site: Site, value: Tensor) -> Tensor:
    """A tensor of the shape of the site's value as (K, N, dimensions): nested plates and events flattened together."""
    outer = value.dim() - site["fn"].event_dim
    columns = value.movedim((outer + run.particle_dim, outer + run.batch_plate.dim), (0, 1))
    return columns.reshape(*columns.shape[:2], -1)
