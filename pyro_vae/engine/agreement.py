"""What a model and its guide must agree on: sites, shapes, masks; each disagreement has its own message.

Where they disagree, a density is counted twice, or on one side only, and the number that comes out is no bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from pyro.distributions import Delta, Distribution, ExpandedDistribution, MaskedDistribution, Unit
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    Independent,
    MixtureSameFamily,
    Transform,
    TransformedDistribution,
    biject_to,
    constraints,
)

from pyro_vae.compiled.tracing import being_traced
from pyro_vae.engine.batch_plate import Plate, Site, Sites, plates
from pyro_vae.errors import PyroVAEError


def check_sites(model: Sites, guide: Sites) -> None:
    """Every latent site is in both, sampled by the guide; auxiliary sites and factors may be the guide's alone."""
    latent = sorted(name for name, site in model.items() if not site["is_observed"])
    for name, site in guide.items():
        if site["is_observed"] and not _is_factor(site):
            raise PyroVAEError(
                f"guide site '{name}' is observed in the guide: expected a latent site, since the density of data under "
                "the guide belongs to no bound. Drop it from the guide."
            )
        if site["is_observed"] or site["infer"].get("is_auxiliary"):
            continue
        if name not in model:
            raise PyroVAEError(
                f"guide site '{name}' is missing in the model: expected every latent site of the guide to be one of the "
                f"model's, {latent}. Rename it, or drop it."
            )
        if model[name]["is_observed"]:
            raise PyroVAEError(
                f"guide site '{name}' is observed in the model: expected a latent site. Drop it from the guide, or drop "
                "obs= from the model."
            )
    for name in latent:
        if name not in guide:
            raise PyroVAEError(
                f"model site '{name}' is latent and missing in the guide: expected a guide site for every latent site of "
                f"the model, got {sorted(guide)}. Sample '{name}' in the guide too, or observe it."
            )


def check_shapes(model: Sites, guide: Sites, particle_dim: int) -> None:
    """A latent site has one shape in both, and no mask or scale is wider than its site."""
    for name in model.keys() & guide.keys():
        shapes = []
        for site in (model[name], guide[name]):
            batch = tuple(site["fn"].batch_shape)
            plated = ((1,) * (-particle_dim - 1) + batch)[len(batch) :]
            shapes.append((plated, tuple(site["fn"].event_shape)))
        if shapes[0] != shapes[1]:
            raise PyroVAEError(
                f"model and guide disagree on the shape of site '{name}': expected one batch shape and one event shape, "
                f"got {shapes[0][0]} and {shapes[0][1]} in the model, {shapes[1][0]} and {shapes[1][1]} in the guide. "
                "Put it in the same plates in both, with the same to_event."
            )
    for sites, where in ((model, "model"), (guide, "guide")):
        for name, site in sites.items():
            for what in ("mask", "scale"):
                if not isinstance(site[what], Tensor):
                    continue
                shape = site["unscaled_log_prob"].shape if "unscaled_log_prob" in site else site["fn"].batch_shape
                if torch.broadcast_shapes(site[what].shape, shape) != shape:
                    raise PyroVAEError(
                        f"the {what} at {where} site '{name}' does not fit it: expected one that broadcasts to the site's "
                        f"batch shape {tuple(shape)}, got {tuple(site[what].shape)}. Put it around the sites it is meant "
                        "for alone."
                    )


def not_reparameterised(guide: Sites) -> list[str]:
    """The sites through whose samples no whole pathwise gradient flows."""
    # Families that sample by rejection have an rsample, and a score_parts of their own for what it leaves out.
    return [
        name
        for name, site in guide.items()
        if not site["fn"].has_rsample or type(unwrapped(site["fn"])).score_parts is not Distribution.score_parts
    ]


def check_reparameterised(guide: Sites) -> None:
    """A pathwise gradient flows through every site of the guide."""
    for name in not_reparameterised(guide):
        raise PyroVAEError(
            f"guide site '{name}' can't be reparameterised: expected a distribution with rsample, got "
            f"{family(guide[name]['fn'])}, through which no whole pathwise gradient flows. Use an objective with "
            "gradient='score', or, with two particles or more, gradient='vimco'; or a reparameterised family; or, for "
            "values alone, torch.no_grad()."
        )


def check_supports(guide: Sites) -> None:
    """No site's support depends on parameters: where it does, the mean of the score is not zero."""
    for name, site in guide.items():
        ends = _ends(site["fn"], site["unscaled_log_prob"])
        if any(end.requires_grad and bool(end.isfinite().any()) for end in ends):
            raise PyroVAEError(
                f"guide site '{name}' ({family(site['fn'])}) has a support that depends on parameters: expected one that is "
                "the same for all of them, since the score leaves out what bounds that move add to a gradient. Use "
                "gradient='pathwise', or a family whose support is fixed."
            )


def _ends(distribution: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """The bounds of a distribution's support, of the dtype of `like`; a gradient flows into those that parameters move."""
    fn = unwrapped(distribution)
    if isinstance(fn, MixtureSameFamily):
        return _ends(fn.component_distribution, like)
    if type(fn).support is not TransformedDistribution.support:
        return _bounds(support_of(fn), like)
    # The support that PyTorch gives is the last transform's codomain, all of it: of a shifted Uniform, the real line.
    shape = fn.base_dist.batch_shape + fn.base_dist.event_shape
    low, high = (end.expand(shape) for end in _ends(fn.base_dist, like))
    for transform in fn.transforms:
        domain = _bounds(transform.domain, like)
        if all(bool((end == bound).all()) for end, bound in zip((low, high), domain, strict=True)):
            low, high = _bounds(transform.codomain, like)
        else:
            low, high = _image(transform, low), _image(transform, high)
            low, high = (high, low) if bool((low > high).any()) else (low, high)
    return low, high


def _image(transform: Transform, end: Tensor) -> Tensor:
    scaling = isinstance(transform, AffineTransform) and not torch.as_tensor(transform.loc).requires_grad
    stays = scaling and not end.requires_grad and bool((end == 0).all())
    image: Tensor = transform(end)
    return image.detach() if stays else image


def _bounds(constraint: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    # What is no interval (a simplex) is no whole line either, and any transform may move it.
    low, high = interval(constraint) or (-1.0, 1.0)
    return torch.as_tensor(low).to(like), torch.as_tensor(high).to(like)


def plain(support: Any) -> Any:
    """The support of one dimension, without what ``to_event`` adds."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def interval(support: Any) -> tuple[Any, Any] | None:
    """The ends of an interval of numbers; None where the support is none."""
    support = plain(support)
    if support is constraints.boolean:
        return 0.0, 1.0
    bounded = hasattr(support, "lower_bound") or hasattr(support, "upper_bound")
    if not bounded and not isinstance(support, type(constraints.real)):
        return None
    return getattr(support, "lower_bound", -math.inf), getattr(support, "upper_bound", math.inf)


def support_of(distribution: Any) -> Any:
    """A distribution's support; the real line where it does not say."""
    try:
        return distribution.support
    except NotImplementedError:  # a family of one's own that does not say
        return constraints.real


def check_densities(model: Sites, guide: Sites) -> None:
    """The guide is a density over the model's latents, masked where the model's is: its weights then average p(x)."""
    auxiliary = [n for n, site in guide.items() if site["infer"].get("is_auxiliary") and not site["is_observed"]]
    latent = [name for name in guide if name in model]
    points = [name for name in latent if isinstance(unwrapped(guide[name]["fn"]), Delta)]
    if auxiliary and len(points) < len(latent):
        raise PyroVAEError(
            f"guide site '{auxiliary[0]}' is auxiliary beside sampled latent sites: expected auxiliary sites only where "
            "every latent is a function of them (a Delta, as in Pyro's autoguides), since the model has no density for "
            "them. Drop it, or use pv.ELBO's pathwise loss."
        )
    if points and not auxiliary:
        raise PyroVAEError(
            f"guide site '{points[0]}' is a point (Delta): expected a density, since log p(x, z) - log q(z|x) at a point "
            "bounds nothing. Use a guide with a spread, or pv.ELBO(kl='monte_carlo')'s loss for a maximum a posteriori fit."
        )
    sizes = [sum(_size(guide[n], guide[n]) for n in auxiliary), sum(_size(guide[n], model[n]) for n in points)]
    if sizes[0] != sizes[1]:
        raise PyroVAEError(
            f"auxiliary guide sites {auxiliary} and the points (Delta) {points} differ in size: expected as many "
            f"dimensions in both, got {sizes[0]} and {sizes[1]}, since a density over more or fewer is none of the latents. "
            "Sample the latents themselves, or use pv.ELBO's pathwise loss."
        )
    for name in latent:
        if not same_masks(model[name], guide[name]):
            raise PyroVAEError(
                f"masks differ at site '{name}': expected model and guide to mask the same data, since elsewhere only "
                "one of two densities counts. Put one mask around both programs, or use pv.ELBO's pathwise loss."
            )
    _check_masked_latents(model)


def _size(site: Site, constrained: Site) -> int:
    """How many dimensions a site has, without those that the constrained site's support takes away."""
    shape = site["fn"].batch_shape + site["fn"].event_shape
    try:
        return math.prod(biject_to(support_of(constrained["fn"])).inverse_shape(shape))
    except NotImplementedError:  # discrete, say
        return math.prod(shape)


def _check_masked_latents(model: Sites) -> None:
    """Where a latent is masked, so is all that may depend on it: a sample without a density is no part of a weight."""
    masked = [name for name, site in model.items() if not site["is_observed"] and masks(site)]
    names = list(model) if masked else []
    # What counts of the later sites, by their plates, is kept together: a long sequence has too many pairs of sites.
    counts: dict[tuple[Plate, ...], Tensor] = {}
    for i in reversed(range(len(names))):
        name, site = names[i], model[names[i]]
        if name in masked:
            kept = _kept(site, in_part=False)
            given = model.get(name.removesuffix("_unobserved") + "_observed") if name.endswith("_unobserved") else None
            if given is not None:  # pyro.sample(obs_mask=...), which drops the latent value where there is a datum
                kept = kept | _kept(given, in_part=False)
            if any(_counts_outside(kept, plates(site), around, counted) for around, counted in counts.items()):
                _find_unmasked(name, site, kept, {later: model[later] for later in names[i + 1 :]})
        around = tuple(plates(site))
        counts[around] = _kept(site, in_part=True) | counts.get(around, False)


def _find_unmasked(name: str, latent: Site, kept: Tensor, after: Sites) -> None:
    for later, site in after.items():
        alike = plates(latent) == plates(site) and same_masks(latent, site)
        if alike or _in_other_turn(latent, site):
            continue
        if _counts_outside(kept, plates(latent), tuple(plates(site)), _kept(site, in_part=True)):
            raise PyroVAEError(
                f"model site '{name}' is masked where the later site '{later}' is not: expected all that may depend on a "
                f"masked latent to be masked with it, since its sample has no density there. Mask '{later}' too, sample it "
                f"before '{name}' if it does not depend on it, or use pv.ELBO's pathwise loss."
            )


def _counts_outside(kept: Tensor, inside: list[Plate], around: tuple[Plate, ...], counted: Tensor) -> bool:
    """Whether something counts, in the plates around it, where a latent inside its own plates is not all kept."""
    for plate in inside:
        if plate not in around and kept.dim() >= -plate.dim:  # one without a size may leave no dimension
            kept = kept.all(plate.dim, keepdim=True)
    return bool((counted & ~kept).any())


def _in_other_turn(first: Site, second: Site) -> bool:
    """Whether two sites are in different turns of one sequential plate, which do not depend on each other."""
    turns = {frame.name: frame.counter for frame in first["cond_indep_stack"] if not frame.vectorized}
    return any(turns.get(frame.name, frame.counter) != frame.counter for frame in second["cond_indep_stack"])


def _kept(site: Site, *, in_part: bool) -> Tensor:
    """Which of a site's batch is not masked; an event that is masked in part counts as `in_part` says."""
    kept = torch.ones_like(site["unscaled_log_prob"], dtype=torch.bool)
    event_dim = site["fn"].event_dim
    for layer in _layers(site["fn"]):
        mask, inner = getattr(layer, "_mask", None), event_dim - layer.event_dim
        if isinstance(mask, Tensor) and inner:
            events = mask.expand(layer.batch_shape).flatten(-inner)
            mask = events.any(-1) if in_part else events.all(-1)
        kept = kept if mask is None else kept & mask
    return kept if site["mask"] is None else kept & site["mask"]


def same_masks(first: Site, second: Site) -> bool:
    """Whether two sites are masked alike, by handlers and by their distributions."""
    first, second = masks(first), masks(second)
    return len(first) == len(second) and all(map(equal, first, second))


def masks(site: Site) -> list[Any]:
    """What masks a site, by handlers and by its distributions."""
    found = [_batch_mask(layer, site["fn"].event_dim) for layer in _layers(site["fn"])] + [site["mask"]]
    return [mask for mask in found if mask is not None and mask is not True]


def validates(site: Site) -> bool:
    """Whether a site's distributions look at the values that they are asked for the density of."""
    return all(getattr(layer, "_validate_args", True) is not False for layer in _layers(site["fn"]))


def _batch_mask(layer: Any, event_dim: int) -> Any:
    """A layer's mask, without the dimensions that a later ``to_event`` takes where it is constant along them."""
    mask, inner = getattr(layer, "_mask", None), event_dim - layer.event_dim
    if not isinstance(mask, Tensor) or not inner or being_traced():
        return mask
    events = mask.expand(layer.batch_shape).flatten(-inner)
    return events.all(-1) if torch.equal(events.all(-1), events.any(-1)) else mask


def equal(first: Any, second: Any) -> bool:
    """Whether two scales or two masks, each a number or a tensor, are the same but for rounding; under a tracer, which follows
    a run that looked, it does not look.
    """
    if first is second or being_traced():
        return True
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        a, b = torch.as_tensor(first), torch.as_tensor(second)
        return bool(torch.isclose(a.to(b), b).all()) if _broadcastable(a, b) else False
    return math.isclose(first, second)


def _broadcastable(a: Tensor, b: Tensor) -> bool:
    return all(m == n or 1 in (m, n) for m, n in zip(reversed(a.shape), reversed(b.shape), strict=False))


def family(distribution: Any) -> str:
    """The name of a distribution's family, without the wrappers that plates, masks and ``to_event`` add."""
    return type(unwrapped(distribution)).__name__


def unwrapped(distribution: Any) -> Any:
    """The distribution inside the wrappers that plates, masks and ``to_event`` add."""
    return list(_layers(distribution))[-1]


def _layers(distribution: Any) -> Iterator[Any]:
    yield distribution
    while isinstance(distribution, Independent | MaskedDistribution | ExpandedDistribution):
        distribution = distribution.base_dist
        yield distribution


def _is_factor(site: Site) -> bool:
    return isinstance(unwrapped(site["fn"]), Unit)
