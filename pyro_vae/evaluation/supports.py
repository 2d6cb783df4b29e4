"""Where distributions have mass: whether a guide reaches all of a model's support, and whether two are the same."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.distributions import IndependentTransform, Transform, biject_to, constraints


def check_covers(name: str, model: Any, guide: Any) -> bool:
    """Whether the supports of a latent in model and guide are the same; refuse a guide that leaves out a part of it.

    Raises:
        ValueError: where the guide has no samples the average of the weights misses what p(x, z) has there, and no
            diagnostic can tell.
    """
    own, base = _plain(model.support), _plain(guide.support)
    here, there = _bounds(own), _bounds(base)
    if here is None or there is None:
        same = whole = type(own) is type(base)
    else:
        whole = (
            bool((there[0] <= here[0]).all() and (there[1] >= here[1]).all()) and own.is_discrete == base.is_discrete
        )
        same = whole and bool((there[0] == here[0]).all() and (there[1] == here[1]).all())
    if not whole:
        raise ValueError(
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


def _plain(support: Any) -> Any:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _bounds(support: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The ends of an interval of numbers; None where the support is none."""
    if support is constraints.real:
        ends: tuple[Any, Any] = (-math.inf, math.inf)
    elif support is constraints.boolean:
        ends = (0.0, 1.0)
    elif hasattr(support, "lower_bound") or hasattr(support, "upper_bound"):
        ends = (getattr(support, "lower_bound", -math.inf), getattr(support, "upper_bound", math.inf))
    else:
        return None
    low, high = (torch.as_tensor(end, dtype=torch.float64) for end in ends)
    return low, high
