"""Active units: which latent dimensions a model uses, and their KL (a report of posterior collapse)."""

import math
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pyro_vae.checks import Seed
from pyro_vae.defaults import ACTIVE_SAMPLES, ACTIVE_THRESHOLD
from pyro_vae.devices import wide
from pyro_vae.engine.arguments import takes_program
from pyro_vae.engine.modules import PyroFunction
from pyro_vae.engine.program import Program, Run
from pyro_vae.engine.sites import family
from pyro_vae.errors import PyroVAEError, require_count
from pyro_vae.evaluation.families import by_dimension, refuse_masks, univariate
from pyro_vae.evaluation.moments import Moments
from pyro_vae.evaluation.parts import checked_parts
from pyro_vae.evaluation.runs import run
from pyro_vae.evaluation.sharing import sharing
from pyro_vae.objectives.elbo import NoClosedFormError, closed_form


@takes_program
def active_units(
    model: PyroFunction,
    guide: PyroFunction,
    x: Any,
    num_samples: int = ACTIVE_SAMPLES,
    *,
    threshold: float = ACTIVE_THRESHOLD,
    vectorize_particles: bool = True,
    seed: Seed | None = None,
    distributed: bool | None = None,
) -> pd.DataFrame:
    r"""The variance and KL of each latent dimension, to detect posterior collapse: a table with one row for each.

    Rows are by site and dimension of its flattened value; ``table.active.sum()`` is the number of active units.

    - ``variance``: :math:`A_j = \operatorname{var}_n \mathbb E_{q(z \mid x_n)} z_j`, the variance of the posterior mean
      over data; ``variance_se``: its standard error over data, by the delta method.
    - ``kl``: :math:`\frac1N \sum_n \mathrm{KL}\bigl(q(z_j \mid x_n) \,\|\, p(z_j)\bigr)` in nats. Where a dimension
      depends on earlier sites' samples, it is the conditional KL, averaged over those samples. NaN where a dimension
      has no marginal in closed form (flows, Pyro's AutoGuides). ``kl_se``: its standard error over data.
    - ``active``: whether :math:`A_j` is above the threshold. A collapsed dimension has neither variance nor KL.

    Arguments:
        model, guide, x, vectorize_particles, seed, distributed: see :func:`pyro_vae.log_likelihood`.
        num_samples: the number of samples to average over, at least 2. It matters only where means or KL depend on
            samples.
        threshold: the variance above which a dimension is active, in the squared units of z.

    Raises:
        ValueError: `threshold` is negative, fewer than 2 data, a guide without a finite mean, or an error of
            :func:`pyro_vae.log_likelihood`.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.mlp_vae((5,), latent_dim=2, hidden_dims=(16,), likelihood="gaussian")
        >>> pv.active_units(vae, torch.randn(32, 5)).index.tolist()
        [('z', 0), ('z', 1)]

    References:
        Burda, Grosse and Salakhutdinov (2016), *Importance Weighted Autoencoders*, ICLR.
    """
    settings = {"num_samples": num_samples, "threshold": threshold, "vectorize_particles": vectorize_particles}
    moments: dict[str, list[Moments]] = {}
    with sharing(distributed, "pv.active_units", seed, settings) as share:
        require_count("num_samples", num_samples, least=2)
        if not threshold >= 0:
            raise PyroVAEError(
                f"expected a threshold of at least 0, got {threshold!r}. Burda et al. took {ACTIVE_THRESHOLD}."
            )

        def of(program: Program) -> dict[str, list[Moments]]:
            found = _read(run(program, num_samples, vectorize_particles))
            return {name: [Moments.of(values) for values in each] for name, each in found.items()}

        with checked_parts(model, guide, x, None, least=2) as parts:
            for data in share.parts(parts):
                for found in share.each(data.programs(num_samples, vectorize_particles), of, data.device):
                    for name, each in found.items():
                        for kept, new in zip(moments.setdefault(name, [Moments() for _ in each]), each, strict=True):
                            kept.merge(new)
    rows: dict[tuple[str, int], tuple[Any, ...]] = {}
    for name, (means, noise, kl) in moments.items():
        # The Monte Carlo variance of a mean is not variance over data.
        variance = means.variance - noise.mean
        columns = variance, means.variance_error, kl.mean, kl.standard_error, variance > threshold
        rows |= {(name, j): each for j, each in enumerate(zip(*(c.tolist() for c in columns), strict=True))}
    index = pd.MultiIndex.from_tuples(rows, names=["site", "dimension"])
    return pd.DataFrame(list(rows.values()), index, ["variance", "variance_se", "kl", "kl_se", "active"])


def _read(run: Run) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """For each latent site: posterior means, their squared Monte Carlo errors, and KL, each (N, dimensions)."""
    refuse_masks(run)
    found = {}
    for name, site in run.model.items():
        if site["is_observed"]:
            continue
        guide = run.guide[name]
        q, p = univariate(guide["fn"]), univariate(site["fn"])
        means = wide(by_dimension(run, guide, _means(guide, q)))
        if not bool(means.isfinite().all()):
            raise PyroVAEError(
                f"guide site '{name}' ({family(guide['fn'])}) has no finite mean: expected one for each datum, whose "
                "variance over data tells the active units. Choose another family, or use pv.decompose_elbo, whose KL "
                "needs no mean."
            )
        found[name] = means.mean(0), means.var(0) / len(means), wide(_kl(run, name, q, p)).mean(0)
    return found


def _means(guide: Any, q: Any) -> Tensor:
    """The means of q(z|x), or samples with that mean where it is not known."""
    if q is None or q.has_enumerate_support:  # PyTorch gives NaN as a categorical's mean
        return wide(guide["value"])
    try:
        return q.mean.expand(guide["value"].shape)
    except NotImplementedError:
        return guide["value"]


def _kl(run: Run, name: str, q: Any, p: Any) -> Tensor:
    guide = run.guide[name]
    value = guide["value"]
    if q is None or p is None:
        return by_dimension(run, guide, torch.full_like(value, math.nan))
    try:
        kl = closed_form(q, p, name)
    except NoClosedFormError:  # so samples estimate it
        kl = q.log_prob(value) - p.log_prob(value)
    return by_dimension(run, guide, kl.expand(value.shape))
