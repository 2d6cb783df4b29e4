"""Whether a guide has mass wherever the model has some, and counts it once: else its weights miss a part of p(x)."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from pyro.distributions import Delta
from torch import Tensor
from torch import distributions as td
from torch.nn.functional import one_hot

from pyro_vae.engine.agreement import has_few_values
from pyro_vae.engine.sites import Plate, Sites, family, unwrapped
from pyro_vae.engine.supports import (
    CIRCULAR,
    ROUNDING,
    Unknown,
    alike,
    as_intervals,
    contains,
    ends_of,
    is_transformed,
    plain,
    support_of,
)
from pyro_vae.errors import PyroVAEError

MOST_CHANGES = 8  # of single values of a datum that `missed` tries


def _coverage(model: Any, guide: Any) -> tuple[bool, bool]:
    """Whether the support of a guide's distribution covers that of a model's, and whether the two are the same."""
    own, base = plain(support_of(model)), plain(support_of(guide))
    shapes = [each.batch_shape + each.event_shape for each in (guide, model)]
    covered = not isinstance(base, Unknown) and own.is_discrete == base.is_discrete
    covered = covered and contains(base, shapes[0], own.within if isinstance(own, Unknown) else own, shapes[1])
    return covered, covered and contains(own, shapes[1], base, shapes[0])


def check_covers(name: str, model: Any, guide: Any) -> bool:
    """Whether a latent has the same support in model and guide; refuse a guide that does not cover the model.

    The weights would miss the mass of p(x, z) outside, and no diagnostic could show it.
    """
    if is_circular(model):
        if any(_periods(model, guide)):
            raise PyroVAEError(_not_one_period(name, model, guide))
        return True
    model, guide = _without_common_layers(model, guide)
    own, base = (as_intervals(support_of(each), each.batch_shape + each.event_shape) for each in (model, guide))
    if isinstance(base, Unknown):
        raise PyroVAEError(
            f"the support of the guide's {family(guide)} at site '{name}' is unknown, since {base.reason}: expected a "
            f"support that covers {own}. Choose a base distribution on the whole domain of its transforms, or the "
            "model's own transforms and components."
        )
    covered, same = _coverage(model, guide)
    if not covered:
        raise PyroVAEError(
            f"the guide does not cover the model's support at site '{name}': expected a support that covers {own}, got "
            f"{base}. The mass of p(x, z) outside would be missing from log p(x). Choose a guide on {own}."
        )
    return same


def same_support(first: Any, second: Any) -> bool:
    """Whether two distributions have the same support, up to rounding; open and closed ends count as equal."""
    return _coverage(first, second)[1]


def _without_common_layers(model: Any, guide: Any) -> tuple[Any, Any]:
    """The distributions under transforms and mixtures that both have, while their supports are unknown.

    A guide that covers the model there covers it under the same transforms too, whatever these do.
    """
    if not all(isinstance(plain(support_of(each)), Unknown) for each in (model, guide)):
        return model, guide
    first, second = unwrapped(model), unwrapped(guide)
    if isinstance(first, td.MixtureSameFamily) and isinstance(second, td.MixtureSameFamily):
        parts = [each.component_distribution for each in (first, second)]
        if len({part.batch_shape[-1] for part in parts}) == 1:
            return _without_common_layers(*parts)
    elif is_transformed(first) and is_transformed(second) and alike(first.transforms, second.transforms):
        return _without_common_layers(first.base_dist, second.base_dist)
    return model, guide


def is_circular(distribution: Any) -> bool:
    """Whether a distribution is one of angles: its density is periodic, and any one period has all its mass."""
    fn = unwrapped(distribution)
    if isinstance(fn, td.MixtureSameFamily):
        return is_circular(fn.component_distribution)
    return isinstance(fn, CIRCULAR) or (is_transformed(fn) and is_circular(fn.base_dist))


def check_periods(model: Sites, guide: Sites) -> None:
    """Refuse a guide on more than one period of a model's angle, which would count the model's mass several times."""
    for name in (name for name in guide if name in model and is_circular(model[name]["fn"])):
        own, fn = model[name]["fn"], guide[name]["fn"]
        # A point alone is a maximum a posteriori estimate; one that depends on an auxiliary site stands for a density.
        alone = not any(site["infer"].get("is_auxiliary") for site in guide.values())
        if not (alone and isinstance(unwrapped(fn), Delta)) and _periods(own, fn)[1]:
            raise PyroVAEError(_not_one_period(name, own, fn))


def _periods(model: Any, guide: Any) -> tuple[bool, bool]:
    """Whether the guide's support is shorter, and whether it is longer, than the period of the model's angle."""
    (low, high), ends = ends_of(support_of(model)) or (-math.inf, math.inf), ends_of(support_of(guide))
    if ends is None:
        return True, True
    period, slack = high - low, ROUNDING * torch.finfo(torch.float32).eps * (high - low)
    length = ends[1] - ends[0]
    return bool((length < period - slack).any()), bool((length > period + slack).any())


def _not_one_period(name: str, model: Any, guide: Any) -> str:
    what = "an autoguide's values" if isinstance(unwrapped(guide), Delta) else family(guide)
    return (
        f"the latent '{name}' is an angle ({family(model)}), whose density is periodic: expected a guide on one "
        f"period, such as {plain(support_of(model))}, got {what} on {plain(support_of(guide))}. Choose "
        "dist.VonMises, or dist.Uniform(-math.pi, math.pi)."
    )


def missed(model: Any, guide: Any, value: Tensor, plate: Plate) -> Iterator[tuple[Tensor, Tensor]]:
    """Other draws, of values to which the guide gives probability 0 and the prior does not; each with the data changed.

    The first one changes all such values of a datum, and each of the others a single one, up to :data:`MOST_CHANGES`.
    """
    own, base = unwrapped(model), unwrapped(guide)
    if not (has_few_values(own) and has_few_values(base)):
        return
    p, q = (torch.stack([1 - f.probs, f.probs], -1) if isinstance(f, td.Bernoulli) else f.probs for f in (own, base))
    most, index = torch.where(q == 0, p, 0.0).max(-1)
    of_event = isinstance(base, td.OneHotCategorical)
    rows = plate.dim - guide.event_dim + of_event  # the dimension of the data among those of the elements
    shape = value.shape[:-1] if of_event else value.shape
    shape = torch.Size((1,) * (-rows - len(shape))) + shape  # of one datum in a plate without a size
    found, index = (most > 0).expand(shape).movedim(rows, 0), index.expand(shape)
    each = found.reshape(len(found), -1)
    order = each.cumsum(1) * each  # of a datum's elements, from 1; 0 for the others
    singles = int(order.max())
    changes = [order > 0, *((order == k) for k in range(1, min(singles, MOST_CHANGES) + 1) if singles > 1)]
    for change in changes if singles else ():
        here = change.reshape(found.shape).movedim(0, rows)
        other = one_hot(index, q.shape[-1]) if of_event else index
        yield torch.where(here[..., None] if of_event else here, other.to(value), value), change.any(1)
