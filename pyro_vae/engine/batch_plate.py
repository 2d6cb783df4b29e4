"""Finds the batch plate: the :class:`pyro.plate` around every sample site, whose rows are the data.

A bound per datum exists only if each term of the log-density belongs to one row of one plate. Where that fails, Pyro's
own multi-particle objectives silently bound another quantity. Here each failure has its own message.
"""

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.engine.sites import PARTICLE_PLATE, Plate, Site, Sites, being_recorded, plates
from pyro_vae.errors import PyroVAEError


def find_batch_plate(sites: Sites) -> Plate:
    """The outermost plate that holds every site; `sites` has them under their labels, such as "model site 'x'"."""
    if not sites:
        raise PyroVAEError(
            "no sample sites: expected a program whose log-density has terms, got none in model and guide. Call it "
            "with the data that it observes."
        )
    stacks = {words: plates(site) for words, site in sites.items()}
    common = set.intersection(*map(set, stacks.values()))
    if not common:
        raise PyroVAEError(_why_none(sites, stacks))
    batch = next(plate for plate in next(iter(stacks.values())) if plate in common)
    if batch.size < 0:  # pyro.plate("data") has no size: the sites have one
        shapes = [site["unscaled_log_prob"].shape for site in sites.values()]
        size = max((shape[batch.dim] for shape in shapes if len(shape) >= -batch.dim), default=1)
        batch = batch._replace(size=size, full_size=size)
        for words, shape in zip(sites, shapes, strict=True):
            if size > 1 and (len(shape) < -batch.dim or shape[batch.dim] != size):
                raise PyroVAEError(
                    f"{words} has no value for each row of the batch plate '{batch.name}', which was made without a "
                    f"size: expected a batch shape with {size} at dim {batch.dim}, got {tuple(shape)}, so that all "
                    f"data share one value. Give the plate its size, pyro.plate('{batch.name}', {size}), or expand the "
                    "distribution to it."
                )
    for words, site in sites.items():
        if _swallows(site, batch):
            raise PyroVAEError(_to_event(words, site, f"the batch plate '{batch.name}'"))
        for frame in site["cond_indep_stack"]:
            if frame.name not in (batch.name, PARTICLE_PLATE) and frame.full_size != frame.size:
                raise PyroVAEError(
                    f"plate '{frame.name}', inside the batch plate '{batch.name}', is subsampled ({frame.size} of "
                    f"{frame.full_size}): expected whole data, since a log-weight of a part of a datum gives no bound. "
                    f"Subsample '{batch.name}' alone, or use pv.ELBO's pathwise loss, which is linear and stays "
                    "unbiased."
                )
    return batch


def check_rows(plate: Plate, number: int) -> None:
    """Refuse a batch plate that does not have one row for each of `number` rows of x."""
    if plate.size != number:
        raise PyroVAEError(
            f"the batch plate '{plate.name}' has {plate.size} rows and x has {number}: expected a plate over all rows "
            "of x. Pass data along the first dimension of x, and no subsample_size. If two plates hold every site, the "
            "data are the rows of the outer one."
        )


def check_order(plate: Plate, trace: Trace) -> None:
    """Refuse a batch plate with a subsample that has all data in another order: results belong to the rows of x."""
    index = trace.nodes[plate.name]["value"] if plate.name in trace else None
    if not isinstance(index, Tensor) or len(index) != plate.full_size:  # a part of the data has its rows in x
        return
    if not torch.equal(index.cpu(), torch.arange(len(index))):
        raise PyroVAEError(
            f"the batch plate '{plate.name}' has the rows of x in another order, {index[:5].tolist()} ...: expected "
            "them in order, since results belong to the rows of x. Drop the plate's subsample, and reorder x before "
            "the call."
        )


def _why_none(sites: Sites, stacks: dict[str, list[Plate]]) -> str:
    all_plates = [plate for stack in stacks.values() for plate in stack]
    if not all_plates:
        return _why_no_plate_at_all(sites)
    main = max(all_plates, key=lambda plate: sum(plate in stack for stack in stacks.values()))
    inside = next(words for words, stack in stacks.items() if main in stack)
    words = next(words for words, stack in stacks.items() if main not in stack)
    site = sites[words]
    if stacks[words]:
        other = stacks[words][0]
        return (
            f"two different batch plates: expected one plate around every sample site, got {_shown(main)} around "
            f"{inside} and {_shown(other)} around {words}. Give both the same plate, or nest '{other.name}' in "
            f"'{main.name}'."
        )
    if site["fn"].event_dim and site["fn"].event_shape[0] == main.size:
        return _to_event(words, site, f"the batch plate '{main.name}'")
    if not site["is_observed"]:
        name = site["name"]
        return (
            f"{words} is a latent site outside the batch plate '{main.name}': expected all latent sites inside, since "
            "data that share a latent have no log-weight of their own. If each datum has its own, sample it inside the "
            "plate. If all data share it, train with pv.ELBO's loss, which serves global latents; or make it a "
            f"parameter. For log p(x) at one value of '{name}', wrap the model, and likewise the guide: "
            f"poutine.block(poutine.condition(model, {{{name!r}: value}}), hide=[{name!r}])."
        )
    return (
        f"{words} is a factor or observation outside the batch plate '{main.name}': expected every term of the "
        "log-density inside, since a term outside belongs to no datum. Move it into the plate (a factor there has "
        f"shape ({main.size},)), or use pv.ELBO's pathwise loss."
    )


def _why_no_plate_at_all(sites: Sites) -> str:
    sequential = sorted({f.name for s in sites.values() for f in s["cond_indep_stack"] if not f.vectorized})
    batched = any(_has_own_batch(site) for site in sites.values())
    for words, site in sites.items():
        if site["is_observed"] and site["fn"].event_dim and not batched and not sequential:
            return _to_event(words, site, "the batch plate")
    got = f"only the sequential plate {sequential}" if sequential else "no plate at all"
    return (
        f"no batch plate: expected one vectorised plate around every sample site, got {got}. Put the sites of model "
        "and guide inside `with pyro.plate('data', len(x)):`."
    )


def _has_own_batch(site: Site) -> bool:
    """Whether the batch shape has a dimension that no plate takes."""
    taken, shape = {f.dim for f in site["cond_indep_stack"]}, site["fn"].batch_shape
    return any(size > 1 and i - len(shape) not in taken for i, size in enumerate(shape))


def _swallows(site: Site, plate: Plate) -> bool:
    """Whether an observation's event holds the rows of the plate, so that every row counts all of them."""
    event = site["fn"].event_shape
    holds = site["is_observed"] and event and event[0] in (plate.size, plate.full_size) and plate.size > 1
    if not holds or being_recorded():
        return False
    log_prob = site["unscaled_log_prob"]
    return site["value"].dim() == len(event) and bool((log_prob == log_prob.narrow(plate.dim, 0, 1)).all())


def _to_event(words: str, site: Site, plate: str) -> str:
    shape = tuple(site["fn"].event_shape)
    return (
        f"{words} uses to_event in place of {plate}: expected the data to be rows of a plate, got all data, of shape "
        f"{shape}, as one event with a single log-density. Use `with pyro.plate('data', {shape[0]}):` around it and "
        f".to_event({len(shape) - 1})."
    )


def _shown(plate: Plate) -> str:
    return f"'{plate.name}' (dim {plate.dim}, size {plate.size})"
