"""Where a distribution has mass: its support as an interval, whether parameters move it, whether a guide covers it."""

import math
from collections.abc import Iterable, Iterator
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


class Unknown(td.constraints.Constraint):
    """The support of a distribution whose transforms leave out a part of their codomain that can't be computed."""

    def __init__(self, event_dim: int) -> None:
        self.event_dim = event_dim

    def __repr__(self) -> str:
        return "an unknown part of the transform's codomain"


def support_of(distribution: Any) -> Any:
    """A distribution's true support; the real line if its family does not define one.

    PyTorch gives the codomain of the last transform: of a shifted Uniform, the real line. A mixture's support has a
    type of its own there; here it is that of its components.
    """
    fn = unwrapped(distribution)
    try:
        found = fn.support
    except NotImplementedError:  # a user's family without a support
        found = td.constraints.real
    if isinstance(fn, td.MixtureSameFamily):
        found = _of_mixture(support_of(fn.component_distribution))
    elif isinstance(fn, td.TransformedDistribution) and type(fn).support is td.TransformedDistribution.support:
        found = support_of(fn.base_dist)
        for transform in _parts(fn.transforms):
            found = _through(transform, found)
    return _with_event_dim(found, len(distribution.event_shape))


def _of_mixture(components: Any) -> Any:
    """The support of a mixture, whose components lie along the last batch dimension; unknown if theirs differ."""
    ends = [torch.as_tensor(end) for end in interval(components) or ()]
    dim = -1 - components.event_dim
    if all(end.dim() < -dim for end in ends):
        return components
    if any(end.dim() >= -dim and bool((end != end.narrow(dim, 0, 1)).any()) for end in ends):
        return Unknown(components.event_dim)
    low, high = (end.select(dim, 0) if end.dim() >= -dim else end for end in ends)
    return _with_event_dim(_between(low, high), components.event_dim)


def _parts(transforms: Iterable[Any]) -> Iterator[Any]:
    """The transforms, each without the wrappers that join several, or that sum over events."""
    for transform in transforms:
        if isinstance(transform, td.ComposeTransform):
            yield from _parts(transform.parts)
        elif isinstance(transform, td.IndependentTransform):
            yield from _parts([transform.base_transform])
        else:
            yield transform


def _through(transform: Any, support: Any) -> Any:
    """The image of a support under a transform."""
    here, domain = _ends(support), _ends(transform.domain)
    if domain is None:
        whole = type(plain(support)) is type(plain(transform.domain))
    else:
        whole = here is not None and bool((here[0] <= domain[0]).all() and (here[1] >= domain[1]).all())
    if whole:
        return transform.codomain
    moves = not transform.domain.event_dim and transform.bijective and not support.is_discrete
    if here is None or not moves:
        return Unknown(max(plain(support).event_dim, transform.codomain.event_dim))
    dtypes = [value.dtype for value in vars(transform).values() if isinstance(value, Tensor)]
    first, last = (transform(end.to(dtypes[0] if dtypes else torch.get_default_dtype())) for end in here)
    return _between(torch.minimum(first, last), torch.maximum(first, last))


def _between(low: Tensor, high: Tensor) -> Any:
    """The numbers between two bounds, of which each is finite everywhere or nowhere; else unknown."""
    lower, upper = low.isfinite(), high.isfinite()
    if bool((low.isnan() | high.isnan()).any() or lower.any() != lower.all() or upper.any() != upper.all()):
        return Unknown(0)
    if bool(lower.all()):
        if bool(upper.all()):
            return td.constraints.interval(low, high)
        return td.constraints.positive if bool((low == 0).all()) else td.constraints.greater_than(low)
    return td.constraints.less_than(high) if bool(upper.all()) else td.constraints.real


def _with_event_dim(support: Any, event_dim: int) -> Any:
    """A support whose last `event_dim` dimensions are one event."""
    more = event_dim - support.event_dim
    return td.constraints.independent(support, more) if more > 0 else support


def check_covers(name: str, model: Any, guide: Any) -> bool:
    """Whether a latent has the same support in model and guide; refuse a guide that does not cover the model.

    The weights would miss the mass of p(x, z) outside, and no diagnostic could show it.
    """
    own, base = plain(support_of(model)), plain(support_of(guide))
    if isinstance(base, Unknown) and not isinstance(own, Unknown):
        raise PyroVAEError(
            f"the support of the guide's {family(guide)} at site '{name}' is unknown, since its transforms get only a "
            f"part of their domain: expected a support that covers {own}. Choose a base distribution on the whole "
            "domain."
        )
    here, there = _ends(own), _ends(base)
    if isinstance(own, Unknown) and there is not None:
        here = torch.tensor(-math.inf), torch.tensor(math.inf)  # only the whole line certainly covers it
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
