"""Pyro's traces: how one is made, in float32 at least, and the sample sites that it has."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

from pyro_vae.devices import is_out_of_memory
from pyro_vae.engine import precision
from pyro_vae.engine.failures import explain, refuse_elsewhere, shapes_apart
from pyro_vae.engine.modules import PyroFunction, find_modules, transforms_called
from pyro_vae.engine.ownership import OwnParameters, names_in_store
from pyro_vae.engine.sites import PARTICLE_PLATE, Sites, being_recorded, family, layers
from pyro_vae.errors import NoDensityError, PyroVAEError, without_shapes


def traced(function: PyroFunction, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Trace:
    """The trace of a run, whose draws and distributions are of float32 at least.

    A program with tensors in half precision runs again, with its arithmetic in float32.

    Raises:
        ValueError: a site is of half precision in the second run too; or arguments are on another device than the
            parameters, so that the run fails.
    """
    modules, kwargs, before = find_modules(function), kwargs or {}, names_in_store()
    for again in (False, True):
        for module in modules:
            if isinstance(module, EasyGuide):
                module.plates.clear()  # a run that failed has left its plates there, with their sizes
        handler = poutine.trace(function)
        try:
            with precision.promoting() if again else nullcontext(), OwnParameters(modules), transforms_called():
                trace: Trace = handler.get_trace(*args, **kwargs)
        except Exception as error:
            refuse_elsewhere(error, handler.trace, function, before)
            # Such as a product of float32 draws and weights in half precision.
            of_types = isinstance(error, RuntimeError) and any(w in str(error) for w in ("BFloat16", "Half", "dtype"))
            if again or not of_types:
                explain(error, function, args, kwargs)
                raise
        else:
            trace.nodes["_INPUT"]["fn"] = function
            half = _half_sites(trace)
            if not half:
                return trace
    raise PyroVAEError(
        f"site '{half[0]}' is of half precision: expected draws and densities of float32 at least, got "
        f"{trace.nodes[half[0]]['fn']}. Call .float() on the parameters of its distribution."
    )


def _half_sites(trace: Trace) -> list[str]:
    """The names of the sites with a draw, or a distribution, of half precision; data may be."""
    return [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        if _is_half(site["fn"]) or (precision.is_half(site["value"]) and not site["is_observed"])
    ]


def _is_half(distribution: Any) -> bool:
    """Whether a parameter of a distribution is of half precision."""
    for layer in layers(distribution):  # a loop, since each step runs it for each site
        for value in vars(layer).values():
            if precision.is_half(value):
                return True
    return False


class OwnSubsamples(Messenger):
    """Refuses a model with an explicit subsample that is not the guide's, by which replaying replaces it."""

    def __init__(self, guide: Trace) -> None:
        super().__init__()
        self.guide = guide

    def _pyro_sample(self, msg: Any) -> None:
        own, name = msg["value"], msg["name"]
        if own is None or not site_is_subsample(msg) or name not in self.guide or being_recorded():
            return
        drawn = self.guide.nodes[name]["value"]
        if not torch.equal(*(torch.as_tensor(rows).cpu() for rows in (own, drawn))):
            raise PyroVAEError(
                f"plate '{name}' has other rows in the model than in the guide: expected one subsample in both, got "
                f"rows {torch.as_tensor(own)[:5].tolist()} ... in the model and {torch.as_tensor(drawn)[:5].tolist()} "
                "... in the guide. Pass the same subsample= to both plates."
            )


def prior(model: PyroFunction) -> PyroFunction:
    """The model's own latent sites, as a guide."""
    hidden: PyroFunction = poutine.block(model, hide_fn=lambda site: site["type"] == "sample" and site["is_observed"])
    return hidden


def sample_sites(trace: Trace, *, latent: bool = True) -> Sites:
    """The sites with a density of their own: no parameters, no indices of plates, no ``pyro.deterministic``.

    Where `latent` is False, sites that are not observed get no log-density.
    """
    trace = prune_subsample_sites(trace)
    half = False
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and isinstance(value := node["value"], Tensor):
            half = half or precision.is_half(value)
            if value.is_complex():
                raise PyroVAEError(
                    f"expected real numbers at site '{name}', got complex ones. Observe torch.view_as_real(x), or "
                    "x.abs()."
                )
    try:
        with precision.promoting() if half else nullcontext():
            trace.compute_log_prob(lambda _, site: latent or site["is_observed"])
    except (NotImplementedError, KeyError) as error:  # a KeyError is of a flow that keeps its last draw alone
        name, fn = next(
            (name, site["fn"])
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and "log_prob" not in site and (latent or site["is_observed"])
        )
        raise NoDensityError(
            f"site '{name}' ({family(fn)}) has no density: expected a distribution with log_prob, got one whose "
            "family, or one of its transforms, does not compute it, or not at a given value (a flow without an "
            "inverse). Choose another, such as StickBreakingTransform in place of SoftmaxTransform, or "
            f"spline_coupling in place of planar. Its own error is {error!r}."
        ) from error
    except RuntimeError as error:
        given = trace.nodes["_INPUT"]
        refuse_elsewhere(error, trace, given["fn"])
        explain(error, given["fn"], given["args"], given["kwargs"])
        raise
    except ValueError as error:
        own = error.__cause__  # Pyro raises it as a ValueError, with a table of shapes
        if isinstance(own, PyroVAEError):
            raise own from own.__cause__
        if "broadcast" in str(error):
            raise PyroVAEError(shapes_apart(trace, str(error))) from error
        if "must be a Tensor" in str(error):
            raise PyroVAEError(f"expected tensors as the values of sites, got others: {error} Pass tensors.") from error
        if "support" not in str(error):
            raise
        raise PyroVAEError(
            f"{without_shapes(str(error))}\nexpected values in the support of the distribution at that site. Convert "
            "those data, drop them, or choose another distribution."
        ) from error
    sites: Sites = dict(trace.nodes)
    return {n: s for n, s in sites.items() if s["type"] == "sample" and not s["infer"].get("_deterministic")}


def given(values: dict[str, Tensor]) -> Trace:
    """A trace to replay values from."""
    trace = Trace()
    for name, value in values.items():
        trace.add_node(name, name=name, type="sample", is_observed=False, value=value, infer={})
    return trace


class At(Messenger):
    """Gives latent sites their values; unlike a replay, it leaves them the notes that a guide made there."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


@contextmanager
def at_once(number: int) -> Iterator[None]:
    """Says beside an error of the program that it ran for so many particles, and what to do."""
    try:
        yield
    except (RuntimeError, IndexError) as error:
        noted = any("particles at once" in note for note in getattr(error, "__notes__", []))
        if number > 1 and not noted and not is_out_of_memory(error):
            error.add_note(
                f"pyro_vae ran the program for {number} particles at once, so latent values have a leading dimension "
                f"of {number}. Expand x to it, x.expand(*z.shape[:-1], -1), say. Wrap a network that takes none in "
                "pyro_vae.networks.apply_batched. Or pass vectorize_particles=False to the objective or the evaluation."
            )
        raise


def in_particles(function: PyroFunction, number: int, particle_dim: int | None) -> Any:
    """The function in a plate of particles; itself, if there is no dimension for one."""
    return function if particle_dim is None else pyro.plate(PARTICLE_PLATE, number, dim=particle_dim)(function)
