"""Supports of distributions: whether a guide's covers the model's, and whether two are the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import IndependentTransform, Transform, biject_to

from pyro_vae.engine.agreement import interval, plain
from pyro_vae.errors import PyroVAEError


def check_covers(name: str, model: Any, guide: Any) -> bool:
    """Whether a latent has the same support in model and guide.

    Raises:
        ValueError: the guide's support does not cover the model's. The weights would miss the mass of p(x, z) outside,
            and no diagnostic could show it.
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
            f"the guide does not cover the model's support at site '{name}': expected a support that covers {own}, got "
            f"{base}. The mass of p(x, z) outside would be missing from log p(x). Choose a guide on {own}."
        )
    return same


def same_support(first: Any, second: Any) -> bool:
    """Whether one transform maps unconstrained space to both; open and closed bounds count as equal."""
    return _same_transform(biject_to(first), biject_to(second))


def _same_transform(first: Any, second: Any) -> bool:
    # IndependentTransform defines no equality.
    if isinstance(first, IndependentTransform) and isinstance(second, IndependentTransform):
        return _same_transform(first.base_transform, second.base_transform)
    if type(first).__eq__ in (object.__eq__, Transform.__eq__):
        return type(first) is type(second)
    return bool(first == second)


def _ends(support: Any) -> tuple[Tensor, Tensor] | None:
    ends = interval(support)
    return ends and (torch.as_tensor(ends[0], dtype=torch.float64), torch.as_tensor(ends[1], dtype=torch.float64))
