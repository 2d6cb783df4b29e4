r"""Antithetic pairs of Bernoulli samples: how DisARM draws them, and the score of each latent dimension.

Particle k and its partner k + K/2 come from one uniform u: b = 1[u < p] and b' = 1[u > 1 - p], each Bernoulli(p).
"""

from typing import Any

import torch
from pyro.distributions import Bernoulli
from pyro.distributions.util import sum_rightmost
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.engine.sites import PARTICLE_PLATE, Site, being_recorded, family, layers, unwrapped
from pyro_vae.errors import PyroVAEError


def partner(values: Tensor, dim: int) -> Tensor:
    """The values of each particle's partner, with the particles in dimension `dim`."""
    return values.roll(values.shape[dim] // 2, dim)


class Antithetic(Messenger):
    """Draws the Bernoulli sites of a guide in antithetic pairs; other sites draw as usual."""

    def __init__(self, num_particles: int, particle_dim: int) -> None:
        super().__init__()
        self.num_particles = num_particles  # an even number
        self.particle_dim = particle_dim  # of a batch shape, counted from the right

    def _pyro_sample(self, msg: Any) -> None:
        fn, base = msg["fn"], unwrapped(msg["fn"])
        given = msg["done"] or msg["is_observed"] or msg["value"] is not None
        if given or site_is_subsample(msg) or getattr(fn, "has_rsample", True):
            return
        if not isinstance(base, Bernoulli):
            raise PyroVAEError(
                "DisARM draws Bernoulli sites in antithetic pairs: expected a Bernoulli or a reparameterised family at "
                f"guide site '{msg['name']}', got {family(fn)}. Use gradient='vimco'."
            )
        if any(getattr(layer, "_mask", None) is not None for layer in layers(fn)):
            raise PyroVAEError(
                f"DisARM has a score for each latent dimension: expected no mask in the distribution of guide site "
                f"'{msg['name']}', got one. Mask whole data by a handler, or use gradient='vimco'."
            )
        dim, half = self.particle_dim - fn.event_dim, self.num_particles // 2
        probs = base.probs.expand(fn.batch_shape + fn.event_shape)
        if probs.shape[dim] == 1 or not (being_recorded() or torch.equal(probs, partner(probs, dim))):
            raise PyroVAEError(
                f"DisARM pairs samples of one distribution: expected the probabilities of guide site '{msg['name']}' "
                "to depend on the data alone, got some that depend on other samples. Use gradient='vimco'."
            )
        first = probs.narrow(dim, 0, half)
        uniform = torch.rand_like(first)
        # A partner of the mirrored number, so that neither a 0 nor a 1 is certain where p is neither.
        both = torch.cat([uniform < first, 1 - uniform < first], dim)
        msg["value"], msg["done"] = both.to(probs), True


def score_term(site: Site) -> Tensor:
    """The sum over an event of (b - b') sigma(|alpha|) alpha, with a derivative by the logits alpha only."""
    fn, value = site["fn"], site["value"]
    if not isinstance(unwrapped(fn), Bernoulli):
        raise PyroVAEError(
            "DisARM serves Bernoulli latents: expected a Bernoulli guide site, beside reparameterised ones or alone, "
            f"got '{site['name']}' ({family(fn)}). Use gradient='pathwise', or gradient='vimco'."
        )
    particle_dim = next(f.dim for f in site["cond_indep_stack"] if f.name == PARTICLE_PLATE) - fn.event_dim
    logits = unwrapped(fn).logits
    with torch.no_grad():
        factor = (value - partner(value, particle_dim)) * logits.abs().sigmoid()
    return sum_rightmost(factor * logits, fn.event_dim)
