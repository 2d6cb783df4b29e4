"""What model and guide must agree on: sites, shapes, masks. Each disagreement has its own message.

Where they disagree, a density counts twice, or on one side only, and the result is not a bound.
"""

import math
from typing import Any

import torch
from pyro import distributions as dist
from pyro.distributions import Delta
from torch import Tensor
from torch import distributions as td
from torch.distributions import biject_to

from pyro_vae.engine.sites import (
    Plate,
    Site,
    Sites,
    family,
    is_factor,
    kept,
    labelled,
    masks,
    not_reparameterised,
    plates,
    same_masks,
    unwrapped,
)
from pyro_vae.engine.supports import support_of
from pyro_vae.errors import PyroVAEError


def check_sites(model: Sites, guide: Sites, *, factors: bool) -> None:
    """Every latent site is in both, sampled by the guide; auxiliary sites, and `factors`, may be the guide's alone."""
    latent = sorted(name for name, site in model.items() if not site["is_observed"])
    for name, site in guide.items():
        if site["is_observed"] and not is_factor(site):
            raise PyroVAEError(
                f"guide site '{name}' is observed in the guide: expected a latent site, since no bound contains a "
                "density of data under the guide. Drop it from the guide; or, if the guide runs the model, hide it: "
                "poutine.block(guide, hide_fn=lambda site: site['is_observed'])."
            )
        if is_factor(site) and not factors:
            raise PyroVAEError(
                f"guide site '{name}' is a factor: expected a guide that is a density of the latents, since a factor "
                "is a term of a loss, and weights with it have another mean than p(x). Hide it here: "
                f"poutine.block(guide, hide=[{name!r}])."
            )
        if is_factor(site) and name in model:
            raise PyroVAEError(
                f"site '{name}' is a factor of the guide and a site of the model: expected another name in the guide, "
                "which must not count the model's densities. Rename it; or, if the guide runs the model, hide it: "
                "poutine.block(guide, hide_fn=lambda site: site['is_observed'])."
            )
        if site["is_observed"] or site["infer"].get("is_auxiliary"):
            continue
        if name not in model:
            raise PyroVAEError(
                f"guide site '{name}' is missing in the model: expected every latent site of the guide to be one of "
                f"the model's, {latent}. Rename it, or drop it."
            )
        if model[name]["is_observed"]:
            raise PyroVAEError(
                f"guide site '{name}' is observed in the model: expected a latent site. Drop it from the guide, or "
                "drop obs= from the model."
            )
    for name in latent:
        if name not in guide:
            raise PyroVAEError(
                f"model site '{name}' is latent and missing in the guide: expected a guide site for every latent site "
                f"of the model, got {sorted(guide)}. Sample '{name}' in the guide too, or observe it."
            )


def check_shapes(model: Sites, guide: Sites, particle_dim: int) -> None:
    """A latent site has one shape in model and guide, and every mask and scale broadcasts to its site."""
    for name in model.keys() & guide.keys():
        shapes = []
        for site in (model[name], guide[name]):
            batch = tuple(site["fn"].batch_shape)
            plated = ((1,) * (-particle_dim - 1) + batch)[len(batch) :]
            shapes.append((plated, tuple(site["fn"].event_shape)))
        if shapes[0] != shapes[1]:
            raise PyroVAEError(
                f"model and guide disagree on the shape of site '{name}': expected one batch shape and one event "
                f"shape, got {shapes[0][0]} and {shapes[0][1]} in the model, {shapes[1][0]} and {shapes[1][1]} in the "
                "guide. Put it in the same plates in both, with the same to_event."
            )
    for words, site in labelled(model, guide).items():
        shape = site["unscaled_log_prob"].shape if "unscaled_log_prob" in site else site["fn"].batch_shape
        for what in ("mask", "scale"):
            if isinstance(site[what], Tensor) and torch.broadcast_shapes(site[what].shape, shape) != shape:
                raise PyroVAEError(
                    f"the {what} at {words} does not fit it: expected one that broadcasts to the site's batch shape "
                    f"{tuple(shape)}, got {tuple(site[what].shape)}. Put it around no other sites than those of its "
                    "own shape."
                )


def check_reparameterised(guide: Sites) -> None:
    """A complete pathwise gradient flows through every site of the guide."""
    for name in not_reparameterised(guide):
        lacks = "samples by rejection, so its pathwise gradient is incomplete"
        raise PyroVAEError(
            f"guide site '{name}' can't be reparameterised: expected a distribution with rsample, got "
            f"{family(guide[name]['fn'])}, which "
            f"{lacks if guide[name]['fn'].has_rsample else 'has no pathwise gradient'}. Use an objective with "
            "gradient='score', or gradient='vimco' with at least 2 particles; or a reparameterised family; or "
            "torch.no_grad(), if you need only values."
        )


def check_densities(model: Sites, guide: Sites) -> None:
    """The guide is a density of the model's latents with the model's masks, so that the mean weight is p(x)."""
    auxiliary = [n for n, site in guide.items() if site["infer"].get("is_auxiliary") and not site["is_observed"]]
    latent = [name for name in guide if name in model]
    points = [name for name in latent if isinstance(unwrapped(guide[name]["fn"]), Delta)]
    if auxiliary and len(points) < len(latent):
        raise PyroVAEError(
            f"guide site '{auxiliary[0]}' is auxiliary beside sampled latent sites: expected auxiliary sites only "
            "where every latent is a function of them (a Delta, as in Pyro's autoguides), since the model has no "
            "density for them. Drop it, or use pv.ELBO's pathwise loss."
        )
    if points and not auxiliary:
        raise PyroVAEError(
            f"guide site '{points[0]}' is a point (Delta): expected a density, since log p(x, z) - log q(z|x) at a "
            "point is not a bound. Use a guide with a spread. For a maximum a posteriori fit, use the loss of "
            "pv.ELBO(kl='monte_carlo')."
        )
    sizes = [sum(_size(guide[n], guide[n]) for n in auxiliary), sum(_size(guide[n], model[n]) for n in points)]
    if sizes[0] != sizes[1]:
        raise PyroVAEError(
            f"auxiliary guide sites {auxiliary} and the points (Delta) {points} differ in size: expected as many "
            f"dimensions in both, got {sizes[0]} and {sizes[1]}, since a density over other dimensions is not a "
            "density of the latents. Sample the latents themselves, or use pv.ELBO's pathwise loss."
        )
    check_draws(labelled({}, guide))
    for name in latent:
        if not same_masks(model[name], guide[name]):
            raise PyroVAEError(
                f"masks differ at site '{name}': expected model and guide to mask the same data, since only one of the "
                "two densities counts elsewhere. Put one mask around both programs, or use pv.ELBO's pathwise loss."
            )


def check_draws(sites: Sites) -> None:
    """Refuse draws of a family whose samples have another density than the one that it states."""
    for words, site in sites.items():
        if draws_otherwise(site["fn"]):
            raise PyroVAEError(
                f"{words} draws from {family(_base(site['fn']))}, whose sampler in PyTorch or Pyro does not sample its "
                "own log_prob: expected a family with the right sampler. Use another one (in place of LKJCholesky, a "
                "normal under CorrCholeskyTransform(), say)."
            )


def draws_otherwise(fn: Any) -> bool:
    """Whether the draws of a family of PyTorch or Pyro have another density than the one that it states.

    `tests/engine/test_draws.py` compares the draws of many families with their densities.
    """
    fn = _base(fn)
    if isinstance(fn, td.MixtureSameFamily):
        return draws_otherwise(fn.component_distribution)
    if isinstance(fn, dist.SineSkewed):
        return draws_otherwise(fn.base_dist)
    if isinstance(fn, td.LKJCholesky):
        return bool(fn.dim > 2)
    if isinstance(fn, dist.CoalescentTimes):  # its draws have rate 1
        return not bool((fn.rate == 1).all())
    return isinstance(fn, dist.SineBivariateVonMises | dist.TruncatedPolyaGamma)


def _base(fn: Any) -> Any:
    """The family below all wrappers and transforms."""
    fn = unwrapped(fn)
    return _base(fn.base_dist) if isinstance(fn, td.TransformedDistribution) else fn


def _size(site: Site, constrained: Site) -> int:
    """How many free dimensions a site has under the support of `constrained`: a simplex of three numbers has two."""
    shape = site["fn"].batch_shape + site["fn"].event_shape
    try:
        return math.prod(biject_to(support_of(constrained["fn"])).inverse_shape(shape))
    except NotImplementedError:  # discrete, say
        return math.prod(shape)


def masked_before_unmasked(model: Sites) -> list[tuple[str, str]]:
    """Each masked latent with each later site that counts where it is masked: a weight can't contain such a sample."""
    masked = [name for name, site in model.items() if not site["is_observed"] and masks(site)]
    names, found = list(model) if masked else [], []
    # Later sites are merged by their plates: a long sequence has too many combinations of two sites.
    counts: dict[tuple[Plate, ...], Tensor] = {}
    for i in reversed(range(len(names))):
        name, site = names[i], model[names[i]]
        if name in masked:
            whole = where_it_counts(name, model)
            if any(_counts_outside(whole, plates(site), *each) for each in counts.items()):
                found += [(name, later) for later in names[i + 1 :] if _is_unmasked(site, whole, model[later])]
        around = tuple(plates(site))
        counts[around] = kept(site, in_part=True) | counts.get(around, False)
    return found


def where_it_counts(name: str, model: Sites) -> Tensor:
    """Where a latent's sample counts: where it is not masked, or a datum takes its place."""
    whole = kept(model[name], in_part=False)
    given = model.get(name.removesuffix("_unobserved") + "_observed") if name.endswith("_unobserved") else None
    # pyro.sample(obs_mask=...) drops the latent value where there is a datum.
    return whole if given is None else whole | kept(given, in_part=False)


def has_few_values(fn: Any) -> bool:
    """Whether two draws are often the same."""
    return isinstance(unwrapped(fn), td.Bernoulli | td.Categorical | td.OneHotCategorical)


def another(fn: Any, value: Tensor) -> Tensor:
    """Another value at a site: for few values the next one, since a draw may be the same again."""
    base = unwrapped(fn)
    if isinstance(base, td.Bernoulli):
        return 1 - value
    if isinstance(base, td.Categorical):
        return (value + 1) % base.logits.shape[-1]
    if isinstance(base, td.OneHotCategorical):
        return value.roll(1, -1)
    return fn.sample()


def _is_unmasked(latent: Site, whole: Tensor, site: Site) -> bool:
    alike = plates(latent) == plates(site) and same_masks(latent, site)
    if alike or _in_other_turn(latent, site):
        return False
    return _counts_outside(whole, plates(latent), tuple(plates(site)), kept(site, in_part=True))


def _counts_outside(whole: Tensor, inside: list[Plate], around: tuple[Plate, ...], counts: Tensor) -> bool:
    """Whether later sites count at a place where the latent, reduced over its own plates, is masked."""
    for plate in inside:
        if plate not in around and whole.dim() >= -plate.dim:  # a plate without a size may leave no dimension
            whole = whole.all(plate.dim, keepdim=True)
    return bool((counts & ~whole).any())


def _in_other_turn(first: Site, second: Site) -> bool:
    """Whether two sites are in different turns of one sequential plate, which do not depend on each other."""
    turns = {frame.name: frame.counter for frame in first["cond_indep_stack"] if not frame.vectorized}
    return any(turns.get(frame.name, frame.counter) != frame.counter for frame in second["cond_indep_stack"])
