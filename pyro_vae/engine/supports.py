"""Where a distribution has mass: its support as an interval, whether parameters move it, whether a guide covers it."""

import math
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from pyro_vae.engine.sites import Sites, family, unwrapped
from pyro_vae.errors import PyroVAEError


def check_fixed_supports(guide: Sites) -> None:
    """Refuse a site whose support depends on parameters: the mean of its score is not zero."""
    for name, site in guide.items():
        bounds = _moving_bounds(site["fn"], site["unscaled_log_prob"])
        if any(bound.requires_grad and bool(bound.isfinite().any()) for bound in bounds):
            raise PyroVAEError(
                f"guide site '{name}' ({family(site['fn'])}) has a support that depends on parameters: expected a "
                "fixed support, since the score function omits what moving bounds add to the gradient. Use "
                "gradient='pathwise', or a family with a fixed support."
            )


def _moving_bounds(distribution: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """The bounds of a distribution's support, in the dtype of `like`; those that parameters move carry a gradient."""
    fn = unwrapped(distribution)
    if isinstance(fn, td.MixtureSameFamily):
        return _moving_bounds(fn.component_distribution, like)
    if type(fn).support is not td.TransformedDistribution.support:
        return _bounds(support_of(fn), like)
    # PyTorch gives the whole codomain of the last transform as the support: of a shifted Uniform, the real line.
    shape = fn.base_dist.batch_shape + fn.base_dist.event_shape
    low, high = (bound.expand(shape) for bound in _moving_bounds(fn.base_dist, like))
    for transform in fn.transforms:
        domain = _bounds(transform.domain, like)
        if all(bool((bound == limit).all()) for bound, limit in zip((low, high), domain, strict=True)):
            low, high = _bounds(transform.codomain, like)
        else:
            low, high = (_image(transform, bound) for bound in (low, high))
            low, high = (high, low) if bool((low > high).any()) else (low, high)
    return low, high


def _image(transform: td.Transform, bound: Tensor) -> Tensor:
    scaling = isinstance(transform, td.AffineTransform) and not torch.as_tensor(transform.loc).requires_grad
    stays = scaling and not bound.requires_grad and bool((bound == 0).all())
    image: Tensor = transform(bound)
    return image.detach() if stays else image


def _bounds(constraint: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    # A support that is not an interval, such as a simplex, gets finite bounds, since any transform may move it.
    low, high = interval(constraint) or (-1.0, 1.0)
    return torch.as_tensor(low).to(like), torch.as_tensor(high).to(like)


def plain(support: Any) -> Any:
    """The support of one dimension, without what ``to_event`` adds."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def interval(support: Any) -> tuple[Any, Any] | None:
    """The ends of an interval of numbers; None for any other support."""
    support = plain(support)
    if support is td.constraints.boolean:
        return 0.0, 1.0
    bounded = hasattr(support, "lower_bound") or hasattr(support, "upper_bound")
    if not bounded and not isinstance(support, type(td.constraints.real)):
        return None
    return getattr(support, "lower_bound", -math.inf), getattr(support, "upper_bound", math.inf)


def support_of(distribution: Any) -> Any:
    """A distribution's support; the real line if its family does not define one."""
    try:
        return distribution.support
    except NotImplementedError:  # a user's family without a support
        return td.constraints.real


def check_covers(name: str, model: Any, guide: Any) -> bool:
    """Whether a latent has the same support in model and guide; refuse a guide that does not cover the model.

    The weights would miss the mass of p(x, z) outside, and no diagnostic could show it.
    """
    own, base = plain(model.support), plain(guide.support)
    here, there = _ends(own), _ends(base)
    if here is None or there is None:
        same = whole = type(own) is type(base)
    else:
        covered = bool((there[0] <= here[0]).all() and (there[1] >= here[1]).all())
        whole = covered and own.is_discrete == base.is_discrete
        same = whole and bool((there[0] == here[0]).all() and (there[1] == here[1]).all())
    if not whole:
        raise PyroVAEError(
            f"the guide does not cover the model's support at site '{name}': expected a support that covers {own}, got "
            f"{base}. The mass of p(x, z) outside would be missing from log p(x). Choose a guide on {own}."
        )
    return same


def same_support(first: Any, second: Any) -> bool:
    """Whether one transform maps unconstrained space to both; open and closed bounds count as equal."""
    return _same_transform(td.biject_to(first), td.biject_to(second))


def _same_transform(first: Any, second: Any) -> bool:
    # IndependentTransform defines no equality.
    if isinstance(first, td.IndependentTransform) and isinstance(second, td.IndependentTransform):
        return _same_transform(first.base_transform, second.base_transform)
    if type(first).__eq__ in (object.__eq__, td.Transform.__eq__):
        return type(first) is type(second)
    return bool(first == second)


def _ends(support: Any) -> tuple[Tensor, Tensor] | None:
    ends = interval(support)
    return ends and (torch.as_tensor(ends[0], dtype=torch.float64), torch.as_tensor(ends[1], dtype=torch.float64))
