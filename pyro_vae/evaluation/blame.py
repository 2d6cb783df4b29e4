"""Which site of a guide costs what: the gap between log p(x) and the ELBO, split over the guide's sites."""

import math
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import pandas as pd
import torch
from torch import Tensor

from pyro_vae.checks import Between, Seed
from pyro_vae.defaults import BLAME_SAMPLES, NUM_SAMPLES
from pyro_vae.devices import wide
from pyro_vae.engine.arguments import takes_program
from pyro_vae.engine.modules import PyroFunction
from pyro_vae.engine.program import Program, Run
from pyro_vae.engine.weights import log_weights_of, per_datum
from pyro_vae.errors import PyroVAEError
from pyro_vae.evaluation.diagnostics import FEWEST_SAMPLES, warn_of_high_k, warn_of_zero_weights
from pyro_vae.evaluation.draws import draw_weights, in_portions
from pyro_vae.evaluation.estimate import Estimate
from pyro_vae.evaluation.evidence import LogLikelihood
from pyro_vae.evaluation.parts import checked_parts
from pyro_vae.evaluation.pieces import Pieces, progress_bar, rows_at_once
from pyro_vae.evaluation.proposals.search import Search, Settings

ADVICE = "So (rest) is too low for them. Take more num_samples."
REST = "(rest)"
SEEN = 4.0  # Monte Carlo errors from which a gap has shares


@takes_program
def blame(
    model: PyroFunction,
    guide: PyroFunction,
    x: Any,
    num_draws: Annotated[int, Between(2)] = BLAME_SAMPLES,
    *,
    num_samples: Annotated[int, Between(FEWEST_SAMPLES)] = NUM_SAMPLES,
    vectorize_particles: bool = True,
    seed: Seed | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    r"""Which site of the guide is far from the posterior: a table with one row for each site, in the guide's order.

    .. math:: \log p(x) - \mathrm{ELBO} = \mathrm{KL}\bigl(q(z \mid x) \,\|\, p(z \mid x)\bigr) = \sum_s \mathbb E_q
        \log \frac{q(z_s \mid z_{<s}, x)}{p(z_s \mid z_{<s}, x)}

    The sites :math:`z_s` may be layers, time steps or parts of a scene. Each is blamed for its own conditional, given
    the guide's draws of the sites before it. The posterior's conditionals are taken from a normal with correlations,
    which is fitted to each posterior as :func:`pyro_vae.refine` does. The row ``(rest)`` is the part of the gap that
    this normal does not explain. It is large where posteriors are far from normal.

    - ``kl``: the site's term in nats, averaged over data; ``kl_se``: its standard error over data. As an estimate, the
      term of an exact site may be a little below 0.
    - ``share``: its share of the gap; NaN if the gap of these data is less than four Monte Carlo errors above 0.

    Arguments:
        model, guide, x, vectorize_particles, seed, progress: see :func:`pyro_vae.log_likelihood`.
        num_draws: the number of the guide's draws of each datum that the terms are averaged over, at least 2.
        num_samples: the number of samples for the estimate of log p(x) by refined proposals, at least 30.

    Raises:
        ValueError: the guide's sites are not the model's latents, or have no density, as with Pyro's autoguides; or an
            error of :func:`pyro_vae.refine`.

    Warns:
        UserWarning: k-hat of the refined proposals is above 0.7 for some data.

    Example:
        The guide is exact for a, and too wide for b.

        >>> import torch, pyro, pyro.distributions as dist, pyro_vae as pv
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         a = pyro.sample("a", dist.Normal(0.0, 1.0))
        ...         b = pyro.sample("b", dist.Normal(a, 1.0))
        ...         pyro.sample("x", dist.Normal(b, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         a = pyro.sample("a", dist.Normal(x / 3, (2 / 3) ** 0.5))
        ...         pyro.sample("b", dist.Normal((a + x) / 2, 1.5))
        >>> table = pv.blame(model, guide, torch.randn(50), seed=0, progress=False)
        >>> bool(table.share["b"] > 0.9), table.index.tolist()
        (True, ['a', 'b', '(rest)'])

    References:
        Cremer, Li and Duvenaud (2018), *Inference Suboptimality in Variational Autoencoders*, ICML (the gap).
    """
    found: list[tuple[Tensor, ...]] = []
    with checked_parts(model, guide, x, seed, least=2, progress=progress) as parts:
        for data in parts:
            names, of_part = _blamed(data, num_draws, num_samples, vectorize_particles, progress)
            found += of_part
    terms, noise, shapes, zeros = (torch.cat(column, -1) for column in zip(*found, strict=True))
    warn_of_zero_weights(zeros, num_samples, ADVICE)
    warn_of_high_k(shapes, ADVICE)
    gap = terms.sum(0).mean().item()
    seen = gap > SEEN * noise.sum().sqrt().item() / len(noise)
    estimates = [Estimate.of(term) for term in terms]
    table = [(each.value, each.standard_error, each.value / gap if seen else math.nan) for each in estimates]
    return pd.DataFrame(table, pd.Index([*names, REST], name="site"), ["kl", "kl_se", "share"])


def _blamed(
    data: Pieces, num_draws: int, num_samples: int, vectorize: bool, progress: bool
) -> tuple[list[str], list[tuple[Tensor, ...]]]:
    """The names of the sites; and the terms of sites and rest, the gap's noise, k-hat and zeros of each minibatch."""
    found: list[tuple[Tensor, ...]] = []
    search = Search(data, Settings(vectorize=vectorize))
    names = [part.name for part in search.layout.parts]
    if not search.has_guide:
        raise PyroVAEError(
            f"expected a guide whose sites are the model's latents {names} and have densities at any "
            "value, got auxiliary sites, or a flow without an inverse. Compare pv.log_likelihood with and without "
            "refine=True instead."
        )
    rows = rows_at_once(data.program.args) // num_samples
    with progress_bar(2 * len(search.programs) * search.settings.num_steps, "step", "blaming", progress) as bar:
        for program in search.programs:
            proposals = search.proposals(program, bar)
            near = replace(program, guide=search.normal(program, proposals, bar))
            portions = in_portions(program, num_draws, vectorize, partial(_terms, near=near))
            drawn = [each for portion in portions for each in portion]
            terms = torch.cat([wide(each) for each, _ in drawn], 1).mean(1)  # (sites, N)
            log_w = torch.cat([wide(each) for _, each in drawn])
            evidence = LogLikelihood.together(
                [
                    LogLikelihood.from_weights(draw_weights(each, num_samples, vectorize))
                    for each in search.parts(program, proposals.mixture, rows)
                ]
            )
            rest = evidence.per_datum - log_w.mean(0) - terms.sum(0)
            noise = evidence.per_datum_error.square() + log_w.var(0) / len(log_w)  # of the gap, over draws
            found.append((torch.cat([terms, rest[None]]), noise, evidence.pareto_k, evidence.zero_weights))
    return names, found


def _terms(drawn: Run, near: Program) -> tuple[Tensor, Tensor]:
    """Log-ratios of the guide and of what is near the posterior, by site, (sites, K, N); and log-weights (K, N)."""
    latent = [name for name, site in drawn.guide.items() if not site["is_observed"]]
    values = {name: drawn.guide[name]["value"] for name in latent}
    there = near.run_at(values, drawn.num_particles if drawn.num_particles > 1 else None)

    def density(run: Run, name: str) -> Tensor:
        return per_datum(run, run.guide[name], run.guide[name]["unscaled_log_prob"])

    return torch.stack([density(drawn, name) - density(there, name) for name in latent]), log_weights_of(drawn)
