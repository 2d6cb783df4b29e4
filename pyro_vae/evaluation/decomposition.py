"""The ELBO's parts: reconstruction, what z says about which datum it was, and how far the aggregate posterior is off."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae.engine import rng
from pyro_vae.engine.modules import Program
from pyro_vae.engine.program import Run, draw, find_max_plate_nesting, run_at
from pyro_vae.engine.weights import log_density, terms
from pyro_vae.errors import PyroVAEError
from pyro_vae.evaluation.defaults import DECOMPOSITION_SAMPLES
from pyro_vae.evaluation.estimate import Estimate
from pyro_vae.evaluation.families import by_dimension, refuse_masks, same_for_all_particles, univariate
from pyro_vae.evaluation.pieces import Args, arguments, check_count, checked, rows_at_once

PAIRS_AT_ONCE = 2**21  # of samples, data and dimensions, whose log-densities are in memory
DATA_AT_ONCE = 512  # whose guide is run for a block of samples


@dataclass(frozen=True)
class Decomposition:
    r"""What :func:`pyro_vae.decompose_elbo` returns; all in nats per datum, each with its Monte Carlo standard error.

    Attributes:
        elbo: reconstruction - mutual information - marginal KL.
        reconstruction: :math:`\mathbb E_q \log p(x \mid z)`.
        mutual_information: of the datum's index and z, between 0 and log N.
        marginal_kl: KL(q(z) || p(z)), of the aggregate posterior q(z), the mixture of all q(z|x_n), to the prior.
        dimension_wise_kl: the sum over dimensions of KL(q(z_j) || p(z_j)): what of the marginal KL is no dependence
            between dimensions. None where the marginals of q(z|x) or p(z) are not known: latents that depend on one
            another's samples, flows.
        num_data: N.
    """

    elbo: Estimate
    reconstruction: Estimate
    mutual_information: Estimate
    marginal_kl: Estimate
    dimension_wise_kl: Estimate | None
    num_data: int

    def __str__(self) -> str:
        parts = "unknown" if self.dimension_wise_kl is None else str(self.dimension_wise_kl)
        return (
            f"ELBO {self.elbo} = reconstruction {self.reconstruction} - mutual information {self.mutual_information} (at most "
            f"log N = {math.log(self.num_data):.2f}) - marginal KL {self.marginal_kl} (dimension-wise {parts}), nats per datum"
        )


def decompose_elbo(
    model: Program,
    guide: Program,
    x: Any,
    num_samples: int = DECOMPOSITION_SAMPLES,
    *,
    seed: int | None = None,
    progress: bool = True,
) -> Decomposition:
    r"""Take the ELBO, averaged over data, apart.

    .. math:: \frac1N \sum_n \mathrm{ELBO}(x_n) = \underbrace{\frac1N \sum_n \mathbb E_{q(z \mid x_n)} \log p(x_n \mid z)}
        _{\text{reconstruction}} - \underbrace{\frac1N \sum_n \mathrm{KL}\bigl(q(z \mid x_n) \,\|\, q(z)\bigr)}
        _{\text{mutual information}} - \underbrace{\mathrm{KL}\bigl(q(z) \,\|\, p(z)\bigr)}_{\text{marginal KL}},
        \qquad q(z) = \frac1N \sum_n q(z \mid x_n)

    q(z) is the mixture over all N data that are passed, so nothing is left out; its cost is the density of each of the
    N S samples under each of the N components. All three parts depend on N, and the standard errors are those of the
    samples, for these data. Mutual information is at most log N: near that, every datum has a part of the latent space to
    itself, and the two KL parts say how few data there are rather than how q(z) lies to p(z).

    Arguments:
        model: a Pyro model with a batch plate.
        guide: its guide, a density of the model's latents.
        x: data (N, ...), a split of :mod:`pyro_vae.data`, or a tuple of tensors that are passed as several arguments.
        num_samples: S, from each q(z|x_n); at least 2.
        seed: where the random numbers start; None goes on from the generators' state.
        progress: whether to show a progress bar, in a terminal.

    Raises:
        ValueError: the guide has auxiliary sites, or as :func:`pyro_vae.log_likelihood`.

    Example:
        >>> import torch, pyro, pyro_vae as pv
        >>> pyro.set_rng_seed(0)
        >>> vae = pv.mlp_vae((5,), latent_dim=2, hidden_dims=(16,), likelihood="gaussian")
        >>> parts = pv.decompose_elbo(vae.model, vae.guide, torch.randn(32, 5), seed=0)
        >>> bool(0 < parts.mutual_information.value < math.log(32))
        True

    References:
        Hoffman and Johnson (2016), *ELBO Surgery*, NIPS workshop on advances in approximate Bayesian inference.
        Chen, Li, Grosse and Duvenaud (2018), *Isolating Sources of Disentanglement in Variational Autoencoders*, NeurIPS.
    """
    check_count("num_samples", num_samples, 2, ", to have an error bar")
    args = arguments(x)
    with checked(model, guide, args) as data, rng.seeded(seed):
        batches = data.minibatches(rows_at_once(args) // num_samples)
        nesting = find_max_plate_nesting(model, guide, batches[0], {}, in_plate=True)
        samples = [_Samples.draw(model, guide, batch, num_samples, nesting) for batch in batches]
        dimensions = samples[0].dimensions
        number, size = len(args[0]), max(1, dimensions)
        columns = data.minibatches(min(DATA_AT_ONCE, PAIRS_AT_ONCE // size))
        step = max(1, PAIRS_AT_ONCE // (size * len(columns[0][0])))
        total = sum(-(-s.number // step) for s in samples) * len(columns)
        mixed = []
        with tqdm(total=total, leave=False, disable=None if progress else True, unit="block", desc="q(z)") as bar:
            for drawn in samples:
                mixed += [_mixture(guide, columns, drawn, rows, nesting, number, bar) for rows in drawn.blocks(step)]
    log_mixture = torch.cat([joint for joint, _ in mixed])
    marginals = torch.cat([each for _, each in mixed]) if dimensions else None
    # Samples of a minibatch come particle by particle.
    shaped = [part.reshape(num_samples, -1, *part.shape[1:]) for part in log_mixture.split([s.number for s in samples])]
    log_q = torch.cat(shaped, 1)

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(s, name) for s in samples], 1)

    likelihood, own, prior = joined("log_likelihood"), joined("log_guide"), joined("log_prior")
    dimension_wise = None
    if marginals is not None:
        split_marginals = marginals.split([s.number for s in samples])
        each = torch.cat([part.reshape(num_samples, -1, dimensions) for part in split_marginals], 1)
        dimension_wise = _stratified((each - joined("prior_by_dimension")).sum(-1))
    return Decomposition(
        _stratified(likelihood + prior - own),
        _stratified(likelihood),
        _stratified(own - log_q),
        _stratified(log_q - prior),
        dimension_wise,
        number,
    )


@dataclass(frozen=True)
class _Samples:
    """S samples for each datum of a minibatch, with their log-densities (S, n)."""

    values: dict[str, Tensor]  # by site, (S, ..., n, ...)
    plate_dims: dict[str, int]  # where n is, from the left
    log_likelihood: Tensor
    log_prior: Tensor
    log_guide: Tensor
    prior_by_dimension: Tensor  # (S, n, D), D = 0 where the marginals are not known
    number: int

    @property
    def dimensions(self) -> int:
        return self.prior_by_dimension.shape[-1]

    @classmethod
    def draw(cls, model: Program, guide: Program, batch: Args, num_samples: int, nesting: int) -> _Samples:
        run = draw(model, guide, batch, num_samples, nesting)
        refuse_masks(run)
        latent = {name: site for name, site in run.model.items() if not site["is_observed"]}
        for name in run.guide:
            if name not in latent:
                raise PyroVAEError(
                    f"guide site '{name}' is auxiliary: expected a guide with a density at the model's latents alone, since "
                    "the aggregate posterior of another is not known."
                )
        observed = {name: site for name, site in run.model.items() if site["is_observed"]}
        known = all(_known(run.guide[name]) and _known(site) for name, site in latent.items())
        each = (
            [by_dimension(run, s, univariate(s["fn"]).log_prob(s["value"])) for s in latent.values()] if known else []
        )
        shape = (num_samples, len(batch[0]))
        return cls(
            {name: site["value"] for name, site in run.guide.items()},
            {n: s["value"].dim() - s["fn"].event_dim + run.batch_plate.dim for n, s in run.guide.items()},
            log_density(run, terms(observed)).double(),
            log_density(run, terms(latent)).double(),
            log_density(run, terms(run.guide)).double(),
            torch.cat(each, -1).double() if each else torch.zeros(*shape, 0, dtype=torch.float64),
            num_samples * len(batch[0]),
        )

    def blocks(self, step: int) -> list[Tensor]:
        """All samples, some at a time, by their place among the S n of this minibatch."""
        return list(torch.arange(self.number).split(step))

    def at(self, rows: Tensor) -> dict[str, Tensor]:
        """Samples as particles (rows, ..., 1, ...), to be held against all data."""
        taken = {}
        for name, value in self.values.items():
            dim = self.plate_dims[name]
            flat = value.movedim(dim, 1).flatten(0, 1)[rows.to(value.device)]
            taken[name] = flat.unsqueeze(dim)
        return taken


def _known(site: Any) -> bool:
    return univariate(site["fn"]) is not None and same_for_all_particles(site)


def _mixture(
    guide: Program, columns: list[Args], drawn: _Samples, rows: Tensor, nesting: int, number: int, bar: Any
) -> tuple[Tensor, Tensor]:
    """The log-density of samples under q(z), (rows,), and that of each dimension, (rows, D)."""
    values = drawn.at(rows)
    joint, each = [], []

    def read(run: Run) -> tuple[Tensor, Tensor | None]:
        by_site = []
        if drawn.dimensions:
            for site in run.guide.values():
                log_prob = univariate(site["fn"]).log_prob(site["value"])
                by_site.append(by_dimension(run, site, log_prob))
        return log_density(run, terms(run.guide)), torch.cat(by_site, -1) if by_site else None

    for column in columns:
        wide = {
            name: value.expand(
                *value.shape[: drawn.plate_dims[name]], len(column[0]), *value.shape[drawn.plate_dims[name] + 1 :]
            )
            for name, value in values.items()
        }
        both, single = run_at(guide, None, column, wide, len(rows), nesting, read=read)
        joint.append(both.double().logsumexp(1))
        if single is not None:
            each.append(single.double().logsumexp(1))
        bar.update()
    log_joint = torch.stack(joint).logsumexp(0) - math.log(number)
    log_each = torch.stack(each).logsumexp(0) - math.log(number) if each else log_joint.new_zeros(len(rows), 0)
    return log_joint, log_each


def _stratified(values: Tensor) -> Estimate:
    """The mean of (S, N) values, S independent ones for each datum, with the standard error for these data."""
    samples, number = values.shape
    error = (values.var(0).sum() / samples).sqrt() / number
    return Estimate(values.mean().item(), error.item())
