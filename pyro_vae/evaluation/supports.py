"""Where distributions have mass: whether a guide reaches all of a model's support, and whether two are the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import IndependentTransform, Transform, biject_to

from pyro_vae.engine.agreement import interval, plain
from pyro_vae.errors import PyroVAEError


def check_covers(name: str, model: Any, guide: Any) -> bool:
    """Whether the supports of a latent in model and guide are the same; refuse a guide that leaves out a part of it.

    Raises:
        ValueError: where the guide has no samples the average of the weights misses what p(x, z) has there, and no
            diagnostic can tell.
    """
    own, base = plain(model.support), plain(guide.support)
    here, there = _ends(own), _ends(base)
    if here is None or there is None:
        same = whole = type(own) is type(base)
    else:
        whole = (
            bool((there[0] <= here[0]).all() and (there[1] >= here[1]).all()) and own.is_discrete == base.is_discrete
        )
        same = whole and bool((there[0] == here[0]).all() and (there[1] == here[1]).all())
    if not whole:
        raise PyroVAEError(
            f"the guide does not reach the model's whole support at site '{name}': expected one that covers {own}, got "
            f"{base}. What p(x, z) has elsewhere would be missing from log p(x). Choose a guide on {own}."
        )
    return same


def same_support(first: Any, second: Any) -> bool:
    """Whether one transform makes both from unconstrained space: whether their edges belong to them is no matter."""
    return _same_transform(biject_to(first), biject_to(second))


def _same_transform(first: Any, second: Any) -> bool:
    if isinstance(first, IndependentTransform) and isinstance(second, IndependentTransform):  # which has no equality
        return _same_transform(first.base_transform, second.base_transform)
    if type(first).__eq__ in (object.__eq__, Transform.__eq__):
        return type(first) is type(second)
    return bool(first == second)


def _ends(support: Any) -> tuple[Tensor, Tensor] | None:
    ends = interval(support)
    return ends and (torch.as_tensor(ends[0], dtype=torch.float64), torch.as_tensor(ends[1], dtype=torch.float64))
