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
from torch.distributions import Independent

from pyro_vae.batch_plate import Site, Sites


def check_sites(model: Sites, guide: Sites) -> None:
    """Every latent site is in both, sampled by the guide; auxiliary sites and factors may be the guide's alone."""
    latent = sorted(name for name, site in model.items() if not site["is_observed"])
    for name, site in guide.items():
        if site["is_observed"] and not _is_factor(site):
            raise ValueError(
                f"guide site '{name}' is observed in the guide: expected a latent site, since the density of data under "
                "the guide belongs to no bound. Drop it from the guide."
            )
        if site["is_observed"] or site["infer"].get("is_auxiliary"):
            continue
        if name not in model:
            raise ValueError(
                f"guide site '{name}' is missing in the model: expected every latent site of the guide to be one of the "
                f"model's, {latent}. Rename it, or drop it."
            )
        if model[name]["is_observed"]:
            raise ValueError(
                f"guide site '{name}' is observed in the model: expected a latent site. Drop it from the guide, or drop "
                "obs= from the model."
            )
    for name in latent:
        if name not in guide:
            raise ValueError(
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
            raise ValueError(
                f"model and guide disagree on the shape of site '{name}': expected one batch shape and one event shape, "
                f"got {shapes[0][0]} and {shapes[0][1]} in the model, {shapes[1][0]} and {shapes[1][1]} in the guide. "
                "Put it in the same plates in both, with the same to_event."
            )
    for sites, where in ((model, "model"), (guide, "guide")):
        for name, site in sites.items():
            shape = site["unscaled_log_prob"].shape
            for what in ("mask", "scale"):
                if isinstance(site[what], Tensor) and torch.broadcast_shapes(site[what].shape, shape) != shape:
                    raise ValueError(
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
        raise ValueError(
            f"guide site '{name}' can't be reparameterised: expected a distribution with rsample, got "
            f"{family(guide[name]['fn'])}, through which no whole pathwise gradient flows. Use an objective with "
            "gradient='score', or, with two particles or more, gradient='vimco'; or a reparameterised family; or, for "
            "values alone, torch.no_grad()."
        )


def check_densities(model: Sites, guide: Sites) -> None:
    """The guide is a density over the model's latents, masked where the model's is: its weights then average p(x)."""
    auxiliary = [n for n, site in guide.items() if site["infer"].get("is_auxiliary") and not site["is_observed"]]
    latent = [name for name in guide if name in model]
    points = [name for name in latent if isinstance(unwrapped(guide[name]["fn"]), Delta)]
    if auxiliary and len(points) < len(latent):
        raise ValueError(
            f"guide site '{auxiliary[0]}' is auxiliary beside sampled latent sites: expected auxiliary sites only where "
            "every latent is a function of them (a Delta, as in Pyro's autoguides), since the model has no density for "
            "them. Drop it, or use pv.ELBO's pathwise loss."
        )
    if points and not auxiliary:
        raise ValueError(
            f"guide site '{points[0]}' is a point (Delta): expected a density, since log p(x, z) - log q(z|x) at a point "
            "bounds nothing. Use a guide with a spread, or pv.ELBO(kl='monte_carlo')'s loss for a maximum a posteriori fit."
        )
    for name in latent:
        if not same_masks(model[name], guide[name]):
            raise ValueError(
                f"masks differ at site '{name}': expected model and guide to mask the same data, since elsewhere only "
                "one of two densities counts. Put one mask around both programs, or use pv.ELBO's pathwise loss."
            )


def check_masked_latents(model: Sites, guide: Sites) -> None:
    """Where a latent is masked, so is an observation: a masked density is no score of a sample that still counts."""
    observed = [site for site in model.values() if site["is_observed"]]
    for name, site in guide.items():
        if masks(site) and not any(same_masks(site, other) for other in observed):
            raise ValueError(
                f"guide site '{name}' is masked and no observation is masked alike: expected the data that its sample "
                "explains to be masked with it, since the score of a masked density is not the sample's. Mask whole data, "
                "or use gradient='pathwise'."
            )


def same_masks(first: Site, second: Site) -> bool:
    """Whether two sites are masked alike, by handlers and by their distributions."""
    first, second = masks(first), masks(second)
    return len(first) == len(second) and all(map(equal, first, second))


def masks(site: Site) -> list[Any]:
    """What masks a site, by handlers and by its distributions."""
    found = [_batch_mask(layer, site["fn"].event_dim) for layer in _layers(site["fn"])] + [site["mask"]]
    return [mask for mask in found if mask is not None and mask is not True]


def _batch_mask(layer: Any, event_dim: int) -> Any:
    """A layer's mask, without the dimensions that a later ``to_event`` takes where it is constant along them."""
    mask, inner = getattr(layer, "_mask", None), event_dim - layer.event_dim
    if not isinstance(mask, Tensor) or not inner:
        return mask
    events = mask.expand(layer.batch_shape).flatten(-inner)
    return events.all(-1) if torch.equal(events.all(-1), events.any(-1)) else mask


def equal(first: Any, second: Any) -> bool:
    """Whether two scales or two masks, each a number or a tensor, are the same but for rounding."""
    if first is second:
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
