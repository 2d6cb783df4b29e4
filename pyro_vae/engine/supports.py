"""Where a distribution has mass: its support as an interval, and whether parameters move it.

PyTorch declares the codomain of the last transform as the support: of a shifted Uniform, the real line. Here the ends
of the base's support go through the transforms, in the shape and dtype of a sample.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from pyro.distributions import SineBivariateVonMises, SineSkewed
from pyro.distributions.transforms import Permute
from torch import Tensor
from torch import distributions as td
from torch.distributions.utils import lazy_property

from pyro_vae.devices import wide
from pyro_vae.engine.sites import Sites, equal, family, unwrapped
from pyro_vae.errors import PyroVAEError

CIRCULAR = (td.VonMises, SineBivariateVonMises, SineSkewed)  # which declare real support, and have periodic densities
PIECES = (td.constraints.cat, td.constraints.stack)
INVERSE = type(td.ExpTransform().inv)
REARRANGING = (Permute, td.ReshapeTransform)
ROUNDING = 4  # in eps: low + (high - low) in a sample's dtype is off by at most 2.5 eps of the larger end


class Unknown(td.constraints.Constraint):
    """A support of which only a constraint is known that it lies in, the reason, and whether parameters move it."""

    def __init__(self, within: Any, reason: str, is_discrete: bool, moves: Callable[[], bool]) -> None:
        self.within, self.reason, self.is_discrete, self.moves = plain(within), reason, is_discrete, moves

    def __repr__(self) -> str:
        return f"a part of {self.within} that is unknown, since {self.reason}"


class MixedInterval(td.constraints.interval):
    """Intervals of which some have an end where others have none, so that no one transform of PyTorch's leads there."""

    def __repr__(self) -> str:
        return f"MixedInterval(lower_bound={self.lower_bound}, upper_bound={self.upper_bound})"


def check_fixed_supports(guide: Sites) -> None:
    """Refuse a site whose support depends on parameters: the mean of its score is not zero."""
    for name, site in guide.items():
        if _moves(support_of(site["fn"])):
            raise PyroVAEError(
                f"guide site '{name}' ({family(site['fn'])}) has a support that depends on parameters: expected a "
                "fixed support, since the score function omits what moving bounds add to the gradient. Use "
                "gradient='pathwise', or a family with a fixed support."
            )


def _moves(support: Any) -> bool:
    if isinstance(plain(support), Unknown):
        return bool(plain(support).moves())
    ends = [end for end in interval(support) or () if isinstance(end, Tensor)]
    return any(end.requires_grad and bool(end.isfinite().any()) for end in ends)


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
    """A distribution's true support; the real line if its family does not define one.

    A mixture's support has a type of its own in PyTorch; here it is the union of those of its components.
    """
    fn = unwrapped(distribution)
    if isinstance(fn, td.MixtureSameFamily):
        found = _of_mixture(fn.component_distribution)
    elif isinstance(fn, CIRCULAR):
        found = td.constraints.interval(-math.pi, math.pi)
    elif is_transformed(fn):
        shape = fn.base_dist.batch_shape + fn.base_dist.event_shape
        found = _through(fn.transforms, support_of(fn.base_dist), shape, _dtype(fn.base_dist))
    else:
        try:
            found = fn.support
        except NotImplementedError:  # a user's family without a support
            found = td.constraints.real
        ends = ends_of(found) if isinstance(found, td.constraints.interval) else None
        if ends is not None and not all(bool(end.isfinite().all()) for end in ends):
            found = _between(*ends)  # a generalised Pareto distribution's is an interval up to infinity
    more = len(distribution.event_shape) - found.event_dim
    return td.constraints.independent(found, more) if more > 0 else found


def is_transformed(fn: Any) -> bool:
    """Whether a distribution is transformed, and does not declare a support of its own."""
    return isinstance(fn, td.TransformedDistribution) and type(fn).support is td.TransformedDistribution.support


def _dtype(distribution: Any) -> torch.dtype:
    """The dtype of a distribution's samples: that of its parameters."""
    values = vars(unwrapped(distribution)).values()
    found = [value.dtype for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    found += [_dtype(value) for value in values if isinstance(value, td.Distribution)]
    return functools.reduce(torch.promote_types, found) if found else torch.get_default_dtype()


def _of_mixture(components: Any) -> Any:
    """The union of the components' supports; they lie along the last batch dimension."""
    event_dim = len(components.event_shape)
    support = as_intervals(support_of(components), components.batch_shape + components.event_shape)
    ends = ends_of(support)
    if ends is None or all(end.dim() <= event_dim for end in ends):
        return support
    low, high = torch.broadcast_tensors(*ends)
    low, high = (end.movedim(-1 - event_dim, 0) for end in (low, high))
    order = low.argsort(0)
    reach = high.gather(0, order).cummax(0).values
    gaps = low.gather(0, order)[1:] > reach[:-1]
    whole = _with_ends(support, low.amin(0), high.amax(0))
    if bool(gaps.any()):
        return Unknown(whole, "its components leave gaps", support.is_discrete, lambda: _moves(whole))
    return whole


def _through(transforms: Iterable[Any], support: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """The image of a support of samples of this shape and dtype under transforms."""
    for transform in _parts(transforms):
        support = _image(transform, support, shape, dtype)
        shape = transform.forward_shape(shape)
        tensors = (value for value in vars(transform).values() if isinstance(value, Tensor))
        dtypes = (value.dtype for value in tensors if value.is_floating_point())
        dtype = functools.reduce(torch.promote_types, dtypes, dtype)
    return support


def _parts(transforms: Iterable[Any]) -> Iterator[Any]:
    """The transforms, each without the wrappers that join several, or that sum over events."""
    for transform in transforms:
        if isinstance(transform, td.ComposeTransform):
            yield from _parts(transform.parts)
        elif isinstance(transform, td.IndependentTransform):
            yield from _parts([transform.base_transform])
        else:
            yield transform


def _image(transform: Any, support: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    support, domain, name = as_intervals(support, shape), transform.domain, type(transform).__name__
    ends, limits = ends_of(support), ends_of(domain, shape)
    forward = transform.inv if isinstance(transform, INVERSE) else transform
    if isinstance(forward, REARRANGING) and ends is not None:
        return _with_ends(support, *(transform(end.expand(shape)) if end.dim() else end for end in ends))
    if not support.is_discrete and contains(support, shape, domain, shape):
        return transform.codomain
    if isinstance(support, Unknown):
        reason = support.reason
    elif support.is_discrete:
        reason = f"{name} moves its discrete values"
    elif not transform.bijective:
        reason = f"{name} is not one-to-one"
    elif ends is None or limits is None or not _is_elementwise(transform):
        reason = f"{name} mixes elements, and gets only a part of its domain"
    else:
        low, high = _image_of_ends(transform, *(end.to(dtype).expand(shape) for end in ends))
        if not bool((low.isnan() | high.isnan()).any()):
            return _between(low, high)
        reason = f"{name} has no value at an end of its domain"

    def moves() -> bool:
        # A transform whose parameters have a gradient has a value with one anywhere.
        value = transform(torch.ones(shape, dtype=dtype)) if limits is not None else None
        return _moves(support) or value is None or value.requires_grad

    return Unknown(transform.codomain, reason, support.is_discrete, moves)


def _is_elementwise(transform: Any) -> bool:
    pieces = transform.transforms if isinstance(transform, td.CatTransform | td.StackTransform) else [transform]
    return all(isinstance(piece, td.AffineTransform) or not piece.domain.event_dim for piece in pieces)


def _image_of_ends(transform: Any, *ends: Tensor) -> tuple[Tensor, Tensor]:
    """The ends of an interval's image under a monotone transform of each element."""
    images = [_value_at(transform, end) for end in ends]
    falls = images[0] > images[1]
    limits, bounds = (ends_of(each, images[0].shape) for each in (transform.domain, transform.codomain))
    if limits is not None and bounds is not None and not any(bool(image.isnan().any()) for image in images):
        # PyTorch clips values near an end of the codomain.
        bottom, top = (bound.to(images[0]) for bound in bounds)
        at_limit = zip(_reached(ends, limits), ((bottom, top), (top, bottom)), strict=True)
        for i, (reached, (rising, falling)) in enumerate(at_limit):
            if bool(reached.any()):
                images[i] = torch.where(reached, torch.where(falls, falling, rising), images[i])
    first, last = images
    if bool(falls.all()) or not bool(falls.any()):  # each end keeps a gradient of its own alone
        return (last, first) if bool(falls.all()) else (first, last)
    return torch.where(falls, last, first), torch.where(falls, first, last)


def _value_at(transform: Any, end: Tensor) -> Tensor:
    value: Tensor = transform(end)
    # Zero times a scale stays where it is, whoever trains the scale.
    scaling = isinstance(transform, td.AffineTransform) and not torch.as_tensor(transform.loc).requires_grad
    return value.detach() if scaling and not end.requires_grad and bool((end == 0).all()) else value


def as_intervals(support: Any, shape: tuple[int, ...]) -> Any:
    """The support of one dimension, as intervals where it is one of pieces that are intervals."""
    support = plain(support)
    ends = ends_of(support, shape) if isinstance(support, PIECES) else None
    return support if ends is None else _between(*ends)


def _between(low: Tensor, high: Tensor) -> Any:
    """The numbers between two ends."""
    low, high = _common(low), _common(high)
    lower, upper = low.isfinite(), high.isfinite()
    if bool(lower.any() != lower.all() or upper.any() != upper.all()):
        return MixedInterval(low, high)
    if bool(lower.all() & upper.all()):
        return td.constraints.interval(low, high)
    if bool(lower.all()):
        return td.constraints.positive if bool((low == 0).all()) else td.constraints.greater_than(low)
    return td.constraints.less_than(high) if bool(upper.all()) else td.constraints.real


def _with_ends(support: Any, low: Tensor, high: Tensor) -> Any:
    """A support of the same kind, discrete or not, whose ends that are tensors are others."""
    found = copy.copy(support)
    for name, end in (("lower_bound", low), ("upper_bound", high)):
        if isinstance(getattr(support, name, None), Tensor):
            setattr(found, name, _common(end))
    return found


def _common(end: Tensor) -> Tensor:
    """The end of all elements as one number, if they share it; else without dimensions that it is constant along."""
    while end.dim() and len(end) and bool((end == end[:1]).all()):
        end = end[0]
    return end


def ends_of(support: Any, shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor] | None:
    """The ends as tensors, of numbers in float64; those of a support in pieces need the shape of a sample."""
    support = plain(support)
    if isinstance(support, PIECES):
        return _ends_of_pieces(support, shape)
    ends = interval(support)
    if ends is None:
        return None
    low, high = (end if isinstance(end, Tensor) else torch.tensor(end, dtype=torch.float64) for end in ends)
    return low, high


def _ends_of_pieces(support: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
    whole = torch.empty(shape, device="meta")
    stacks = isinstance(support, td.constraints.stack)
    pieces = whole.unbind(support.dim) if stacks else whole.split(support.lengths, support.dim)
    found = [(ends_of(part, piece.shape), piece.shape) for part, piece in zip(support.cseq, pieces, strict=True)]
    expanded = [[end.expand(size) for end in ends] for ends, size in found if ends is not None]
    if len(expanded) < len(found):
        return None
    join = torch.stack if stacks else torch.cat
    low, high = (join(each, support.dim) for each in zip(*expanded, strict=True))
    return low, high


def _reached(ends: Any, limits: Any) -> tuple[Tensor, Tensor]:
    """Whether an interval's ends reach these limits, up to the rounding of the ends' dtype."""
    dtypes = {end.dtype for end in (*ends, *limits) if end.is_floating_point()} or {torch.float64}
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    (low, high), (bottom, top) = ((wide(end.detach()) for end in pair) for pair in (ends, limits))
    size = torch.maximum(*(torch.where(end.isfinite(), end.abs(), 0.0) for end in (bottom, top)))
    # An end at zero is exact. Much mass may lie near it, since numbers near it have a finer rounding.
    slack = [torch.where(end == 0, 0.0, ROUNDING * eps * size) for end in (bottom, top)]
    return low <= bottom + slack[0], high >= top - slack[1]


def contains(outer: Any, outer_shape: tuple[int, ...], inner: Any, inner_shape: tuple[int, ...]) -> bool:
    """Whether the first support contains the second, up to rounding; unless both are intervals, if they are equal."""
    if isinstance(plain(outer), type(td.constraints.real)) and interval(inner) is not None:
        return True  # of a flow, by no tensor's value, which compiled code can't read
    ends, limits = ends_of(outer, outer_shape), ends_of(inner, inner_shape)
    if ends is None or limits is None:
        return alike(plain(outer), plain(inner))
    return all(bool(reached.all()) for reached in _reached(ends, limits))


def alike(first: Any, second: Any) -> bool:
    """Whether two transforms or constraints, or values that they hold, are equal."""
    if first is second:
        return True
    if isinstance(first, Tensor | int | float) and isinstance(second, Tensor | int | float):
        return equal(first, second)
    if type(first) is not type(second):
        return False
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(alike, first, second))
    if isinstance(first, td.Transform | td.constraints.Constraint):
        return alike(*([*_held(each)] for each in (first, second)))
    return bool(first == second)


def _held(value: Any) -> Iterator[tuple[str, Any]]:
    """What a transform or constraint is made of, without what it has cached."""
    if isinstance(value, INVERSE):
        yield "inverse of", value.inv
    is_module = isinstance(value, torch.nn.Module)
    if is_module:
        yield from sorted(value.state_dict().items())
    for name, each in sorted(vars(value).items()):
        derived = name == "_inv" or "cache" in name or isinstance(getattr(type(value), name, None), lazy_property)
        if not derived and not (is_module and name.startswith("_")):
            yield name, each
