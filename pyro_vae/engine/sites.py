"""What is known of a sample site: its plates, its distribution's family, its masks, its scale, its dimensions."""

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro.distributions import Delta, Distribution, ExpandedDistribution, MaskedDistribution, Unit
from torch import Tensor
from torch.distributions import Independent

PARTICLE_PLATE = "num_particles_vectorized"  # the name that Pyro's own objectives give it
WRAPPERS = (Independent, MaskedDistribution, ExpandedDistribution)  # what plates, masks and to_event add

Site = Any  # a message of Pyro's, as a trace holds it
Sites = dict[str, Site]  # by name
Plate = Any  # Pyro's frame of a vectorised plate, with its name, dim, size and full_size


def being_recorded() -> bool:
    """Whether the compiler records this run, so that no check may read a tensor's value.

    The run before the recorded one has made every check.
    """
    tracer = sys.modules.get("torch.fx.experimental.proxy_tensor")  # to import it takes half a second
    return tracer is not None and tracer.get_proxy_mode() is not None


def labelled(model: Sites, guide: Sites) -> Sites:
    """All sites, by the words that an error message calls them: "model site 'x'"."""
    programs = (("model", model), ("guide", guide))
    return {f"{where} site '{name}'": site for where, sites in programs for name, site in sites.items()}


def plates(site: Site) -> list[Plate]:
    """The vectorised plates around a site, outermost first, without the plate of the particles."""
    return [f for f in site["cond_indep_stack"] if f.vectorized and f.name != PARTICLE_PLATE]


def size_of(plate: Plate, site: Site) -> int:
    """The size of a plate around a site; one without a size, pyro.plate("data"), has that of the site."""
    shape = site["fn"].batch_shape
    if plate.size >= 0 or not plate.vectorized:
        return plate.size
    return shape[plate.dim] if len(shape) >= -plate.dim else 1


def particle_dim_of(*sites: Sites) -> int:
    """The first dimension left of every plate of these sites, counted from the right."""
    frames = (frame for group in sites for site in group.values() for frame in site["cond_indep_stack"])
    return min((frame.dim for frame in frames if frame.vectorized), default=0) - 1


def layers(distribution: Any) -> Iterator[Any]:
    """The distribution, and each one inside the wrappers that plates, masks and ``to_event`` add."""
    yield distribution
    while isinstance(distribution, WRAPPERS):
        distribution = distribution.base_dist
        yield distribution


def unwrapped(distribution: Any) -> Any:
    """The distribution inside the wrappers that plates, masks and ``to_event`` add."""
    while isinstance(distribution, WRAPPERS):
        distribution = distribution.base_dist
    return distribution


def derived(value: Any, operation: Callable[[Any], Any]) -> Any:
    """A sample's slice, view or copy, with those of the tensors that it carries.

    A straight-through sample of Pyro's carries its soft value in an attribute, at which its density is computed.
    """
    result = operation(value)
    for name, carried in vars(value).items() if isinstance(value, Tensor) else ():
        if isinstance(carried, Tensor):
            setattr(result, name, operation(carried))
    return result


def family(distribution: Any) -> str:
    """The name of a distribution's family, without its wrappers."""
    return type(unwrapped(distribution)).__name__


def is_factor(site: Site) -> bool:
    """Whether the site is a ``pyro.factor`` statement."""
    return isinstance(unwrapped(site["fn"]), Unit)


def is_deterministic(site: Site) -> bool:
    """Whether the site is a ``pyro.deterministic`` statement, which Pyro's reparameterisations make too."""
    point = isinstance(unwrapped(site["fn"]), Delta)
    return site["is_observed"] and point and any(mask is False for mask in masks(site))


def not_reparameterised(guide: Sites) -> list[str]:
    """The names of the latent sites through whose samples no complete pathwise gradient flows."""
    # Families that sample by rejection have an rsample, and score_parts of their own for the part that it leaves out.
    return [
        name
        for name, site in guide.items()
        if not is_factor(site)
        and (not site["fn"].has_rsample or type(unwrapped(site["fn"])).score_parts is not Distribution.score_parts)
    ]


def validates(site: Site) -> bool:
    """Whether a site's distributions check the values whose density they compute."""
    return all(getattr(layer, "_validate_args", True) is not False for layer in layers(site["fn"]))


def masks(site: Site) -> list[Any]:
    """The masks of a site, from handlers and from its distributions."""
    found = [_batch_mask(layer, site["fn"].event_dim) for layer in layers(site["fn"])] + [site["mask"]]
    return [mask for mask in found if mask is not None and mask is not True]


def same_masks(first: Site, second: Site) -> bool:
    """Whether handlers and distributions mask two sites alike."""
    first, second = masks(first), masks(second)
    return len(first) == len(second) and all(map(equal, first, second))


def kept(site: Site, *, in_part: bool) -> Tensor:
    """Which elements of a site's batch are not masked; `in_part` decides about an event that is masked in part."""
    found = torch.ones_like(site["unscaled_log_prob"], dtype=torch.bool)
    for layer in layers(site["fn"]):
        mask, events = _mask_and_events(layer, site["fn"].event_dim)
        if events is not None:
            mask = events.any(-1) if in_part else events.all(-1)
        found = found if mask is None else found & mask
    return found if site["mask"] is None else found & site["mask"]


def element_weights(site: Site) -> Tensor:
    """How often each element of a site's value counts: its scale, and 0 where a mask leaves it out."""
    fn = site["fn"]
    terms = [(site["scale"], fn), (site["mask"], fn), *((getattr(layer, "_mask", None), layer) for layer in layers(fn))]
    found = torch.ones_like(site["value"])
    for term, layer in terms:
        if isinstance(term, Tensor):
            found = found * term.expand(layer.batch_shape).reshape(*layer.batch_shape, *[1] * layer.event_dim)
        elif term is not None:
            found = found * float(term)
    return found


def _mask_and_events(layer: Any, event_dim: int) -> tuple[Any, Tensor | None]:
    """A layer's mask; and the mask with all dimensions that a later ``to_event`` takes as its last one, if any."""
    mask, inner = getattr(layer, "_mask", None), event_dim - layer.event_dim
    return mask, mask.expand(layer.batch_shape).flatten(-inner) if isinstance(mask, Tensor) and inner else None


def _batch_mask(layer: Any, event_dim: int) -> Any:
    """A layer's mask, without the dimensions that a later ``to_event`` takes, if it is constant along them."""
    mask, events = _mask_and_events(layer, event_dim)
    if events is None or being_recorded():
        return mask
    return events.all(-1) if torch.equal(events.all(-1), events.any(-1)) else mask


def equal(first: Any, second: Any) -> bool:
    """Whether two scales or two masks, each a number or a tensor, agree up to rounding.

    While the compiler records a run, no value can be read, and the answer is True.
    """
    if first is second or being_recorded():
        return True
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        a, b = torch.as_tensor(first), torch.as_tensor(second)
        broadcastable = all(m == n or 1 in (m, n) for m, n in zip(a.shape[::-1], b.shape[::-1], strict=False))
        return broadcastable and bool(torch.isclose(a.to(b), b).all())
    return math.isclose(first, second)
