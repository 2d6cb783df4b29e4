"""The parts of the ELBO: reconstruction, mutual information, and the KL of the aggregate posterior to the prior."""

import math
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from pyro_vae.checks import Seed
from pyro_vae.defaults import DECOMPOSITION_SAMPLES
from pyro_vae.devices import wide
from pyro_vae.engine.arguments import takes_program
from pyro_vae.engine.modules import PyroFunction
from pyro_vae.engine.program import Program, Run
from pyro_vae.engine.sites import Sites
from pyro_vae.engine.weights import log_density, terms
from pyro_vae.errors import PyroVAEError, require_count
from pyro_vae.evaluation import runs
from pyro_vae.evaluation.estimate import Estimate
from pyro_vae.evaluation.families import by_dimension, refuse_masks, require_latents, same_for_all_particles, univariate
from pyro_vae.evaluation.parts import checked_parts
from pyro_vae.evaluation.pieces import Pieces, progress_bar
from pyro_vae.evaluation.sharing import sharing
from pyro_vae.printed import Printed

DENSITIES_AT_ONCE = 2**21  # log-densities in memory: samples times data times dimensions
DATA_AT_ONCE = 512  # data in one run of the guide on a block of samples


@dataclass(frozen=True, repr=False)
class Decomposition(Printed):
    r"""The result of :func:`pyro_vae.decompose_elbo`, in nats per datum, with Monte Carlo standard errors.

    Attributes:
        elbo: the ELBO, which is reconstruction - mutual information - marginal KL.
        reconstruction: :math:`\mathbb E_q \log p(x \mid z)`.
        mutual_information: the mutual information between the datum's index and z, from 0 to log N.
        marginal_kl: KL(q(z) || p(z)), where the aggregate posterior q(z) is the mixture of all q(z|x_n).
        dimension_wise_kl: :math:`\sum_j \mathrm{KL}(q(z_j) \,\|\, p(z_j))`, the part of the marginal KL that is not due
            to dependence between dimensions. None where the marginals of q(z|x) or p(z) are not known: latents that
            depend on one another's samples, and flows.
        num_data: N.
    """

    elbo: Estimate
    reconstruction: Estimate
    mutual_information: Estimate
    marginal_kl: Estimate
    dimension_wise_kl: Estimate | None
    num_data: int

    def _statement(self) -> str:
        parts = "unknown" if self.dimension_wise_kl is None else str(self.dimension_wise_kl)
        return (
            f"ELBO {self.elbo} = reconstruction {self.reconstruction} - mutual information {self.mutual_information} "
            f"(at most log N = {math.log(self.num_data):.2f}) - marginal KL {self.marginal_kl} (dimension-wise "
            f"{parts}), nats per datum"
        )

    def _rows(self) -> dict[str, object]:
        return {
            "ELBO, nats per datum": self.elbo,
            "reconstruction": self.reconstruction,
            f"mutual information, at most {math.log(self.num_data):.2f}": self.mutual_information,
            "marginal KL": self.marginal_kl,
            "dimension-wise KL": "unknown" if self.dimension_wise_kl is None else self.dimension_wise_kl,
            "data N": self.num_data,
        }


@takes_program
def decompose_elbo(
    model: PyroFunction,
    guide: PyroFunction,
    x: Any,
    num_samples: int = DECOMPOSITION_SAMPLES,
    *,
    vectorize_particles: bool = True,
    seed: Seed | None = None,
    distributed: bool | None = None,
    progress: bool = True,
) -> Decomposition:
    r"""Decompose the ELBO, averaged over data, into reconstruction, mutual information and marginal KL.

    .. math:: \frac1N \sum_n \mathrm{ELBO}(x_n) =
        \underbrace{\frac1N \sum_n \mathbb E_{q(z \mid x_n)} \log p(x_n \mid z)}_{\text{reconstruction}}
        - \underbrace{\frac1N \sum_n \mathrm{KL}\bigl(q(z \mid x_n) \,\|\, q(z)\bigr)}_{\text{mutual information}}
        - \underbrace{\mathrm{KL}\bigl(q(z) \,\|\, p(z)\bigr)}_{\text{marginal KL}},
        \qquad q(z) = \frac1N \sum_n q(z \mid x_n)

    q(z) is the exact mixture over the N data of x. Its cost is the density of each of the N S samples under each of the
    N components. All three parts depend on N, and the standard errors are those of the samples, for these data. Mutual
    information is at most log N. Near that limit the components hardly overlap: the two KL terms then reflect the small
    number of data, not the distance of q(z) from p(z). Of one datum, q(z) is q(z|x), and mutual information is zero.

    Arguments:
        model, x, vectorize_particles, seed, distributed, progress: see :func:`pyro_vae.log_likelihood`. A
            ``DataLoader`` and arrays in files are read twice, since each sample is compared with all data. The samples
            of z are in memory; each process of a group has some of them, and compares those with all data.
        guide: its guide. It must be a density of the model's latents alone.
        num_samples: S, the number of samples from each q(z|x_n), at least 2.

    Raises:
        ValueError: the guide has auxiliary sites, or an error of :func:`pyro_vae.log_likelihood`.

    Example:
        >>> import torch, pyro, pyro_vae as pv
        >>> pyro.set_rng_seed(0)
        >>> vae = pv.mlp_vae((5,), latent_dim=2, hidden_dims=(16,), likelihood="gaussian")
        >>> parts = pv.decompose_elbo(vae, torch.randn(32, 5), seed=0)
        >>> bool(0 < parts.mutual_information.value < math.log(32))
        True

    References:
        Hoffman and Johnson (2016), *ELBO Surgery*, NIPS workshop on advances in approximate Bayesian inference.
        Chen, Li, Grosse and Duvenaud (2018), *Isolating Sources of Disentanglement in Variational Autoencoders*,
        NeurIPS.
    """
    settings = {"num_samples": num_samples, "vectorize_particles": vectorize_particles}
    with sharing(distributed, "pv.decompose_elbo", seed, settings, progress) as share:
        require_count("num_samples", num_samples, least=2, why=", to have an error bar")
        numbers, own = list[int](), list[list[_Mixture]]()  # by part, the minibatches and this process's own ones
        with checked_parts(model, guide, x, None, progress=share.progress) as parts:
            for data in share.parts(parts):
                programs = data.programs(num_samples, vectorize_particles)
                numbers.append(len(programs))
                own.append([])
                for i in share.own(len(programs)):
                    share.seed(i)
                    own[-1].append(_Mixture.of(_Samples.draw(programs[i], num_samples, vectorize_particles)))
            device, mixtures = data.device, [mixture for of_part in own for mixture in of_part]
            with closing(parts.again()) as once_more:
                for data in once_more if mixtures else ():
                    _add(data, programs[0], mixtures, vectorize_particles, share.progress)
        densities = [[mixture.densities(parts.seen) for mixture in of_part] for of_part in own]
        columns = [
            each
            for number, of_part in zip(numbers, densities, strict=True)
            for each in share.in_order(of_part, number, device)
        ]
    likelihood, prior, own_q, log_q, dimension_wise = (torch.cat(column, 1) for column in zip(*columns, strict=True))
    elbo, reconstruction = _stratified(likelihood + prior - own_q), _stratified(likelihood)
    mutual_information, marginal_kl = _stratified(own_q - log_q), _stratified(log_q - prior)
    known = None if bool(dimension_wise.isnan().all()) else _stratified(dimension_wise)
    return Decomposition(elbo, reconstruction, mutual_information, marginal_kl, known, log_q.shape[1])


@dataclass(frozen=True)
class _Samples:
    """S samples for each datum of a minibatch, particle first, with their log-densities (S, n)."""

    values: dict[str, tuple[int, Tensor]]  # by site, the dimension of n from the left, and samples (S n, ...)
    log_likelihood: Tensor
    log_prior: Tensor
    log_guide: Tensor
    prior_by_dimension: Tensor  # (S, n, D), with D = 0 where the marginals are not known

    @classmethod
    def draw(cls, program: Program, num_samples: int, vectorize: bool) -> Self:
        run = runs.run(program, num_samples, vectorize)
        require_latents(run)
        refuse_masks(run)
        latent = {name: site for name, site in run.model.items() if not site["is_observed"]}
        observed = {name: site for name, site in run.model.items() if site["is_observed"]}
        values = {}
        for name, site in run.guide.items():
            if name not in latent:
                raise PyroVAEError(
                    f"guide site '{name}' is auxiliary: expected a guide with a density at the model's latents alone, "
                    "since the aggregate posterior of an auxiliary variable is not known. Drop the site."
                )
            dim = site["value"].dim() - site["fn"].event_dim + run.batch_plate.dim
            values[name] = dim, site["value"].movedim(dim, 1).flatten(0, 1)
        log_likelihood, log_prior, log_guide = (
            wide(log_density(run, terms(sites))) for sites in (observed, latent, run.guide)
        )
        sites = (*latent.values(), *run.guide.values())
        known = all(univariate(site["fn"]) is not None and same_for_all_particles(site) for site in sites)
        marginals = _marginals(run, latent) if known else log_prior.new_zeros(*log_prior.shape, 0)
        return cls(values, log_likelihood, log_prior, log_guide, marginals)

    def at(self, rows: Tensor, number: int) -> dict[str, Tensor]:
        """The samples at these indices as particles (rows, ..., number, ...), the same for each of `number` data."""
        taken = {}
        for name, (dim, value) in self.values.items():
            some = value[rows.to(value.device)]
            taken[name] = some.unsqueeze(dim).expand(*some.shape[:dim], number, *some.shape[dim:])
        return taken


def _marginals(run: Run, sites: Sites) -> Tensor:
    """The log-density of each dimension, (K, N, D)."""
    densities = ((site, univariate(site["fn"]).log_prob(site["value"])) for site in sites.values())
    return wide(torch.cat([by_dimension(run, site, density) for site, density in densities], -1))


@dataclass(frozen=True)
class _Mixture:
    """The log-densities of samples under the sum of the q(z|x_n) of some data, and under that of each marginal."""

    drawn: _Samples
    joint: Tensor  # (S n,)
    each: Tensor  # (S n, D)

    @classmethod
    def of(cls, drawn: _Samples) -> Self:
        """Of no data yet."""
        joint = torch.full_like(drawn.log_guide.flatten(), -math.inf)
        return cls(drawn, joint, torch.full_like(drawn.prior_by_dimension.flatten(0, 1), -math.inf))

    def add(self, guide: Program, rows: Tensor, vectorize: bool) -> None:
        """Add the data of a program to the sums of these samples."""
        run = runs.run_at(guide, self.drawn.at(rows, len(guide.args[0])), len(rows), vectorize)
        rows = rows.to(self.joint.device)
        joint = wide(log_density(run, terms(run.guide))).logsumexp(1)
        self.joint[rows] = torch.logaddexp(self.joint[rows], joint)
        if self.each.numel():
            self.each[rows] = torch.logaddexp(self.each[rows], _marginals(run, run.guide).logsumexp(1))

    def densities(self, number: int) -> tuple[Tensor, ...]:
        """The log-densities (S, n) of x given z, of prior, guide and q(z); and the dimension-wise log-ratio."""
        drawn, log_number = self.drawn, math.log(number)
        log_q = (self.joint - log_number).reshape(drawn.log_guide.shape)
        marginals = (self.each - log_number).reshape(drawn.prior_by_dimension.shape)
        dimension_wise = (marginals - drawn.prior_by_dimension).sum(-1)
        if not marginals.numel():
            dimension_wise = torch.full_like(log_q, math.nan)  # not known
        return drawn.log_likelihood, drawn.log_prior, drawn.log_guide, log_q, dimension_wise


def _add(data: Pieces, program: Program, mixtures: list[_Mixture], vectorize: bool, progress: bool) -> None:
    """Add some data to the mixtures of all samples, block by block."""
    size = max(1, mixtures[0].each.shape[-1])
    columns = data.minibatches(min(DATA_AT_ONCE, DENSITIES_AT_ONCE // size))
    step = max(1, DENSITIES_AT_ONCE // (size * len(columns[0][0])))
    only_guide = replace(program, model=program.guide_or_prior, guide=None)
    blocks = [torch.arange(len(mixture.joint)).split(step) for mixture in mixtures]
    with progress_bar(sum(map(len, blocks)) * len(columns), "block", "q(z)", progress) as bar:
        for mixture, block in zip(mixtures, blocks, strict=True):
            for column in columns:
                for rows in block:
                    mixture.add(only_guide.on(column), rows, vectorize)
                    bar.update()


def _stratified(values: Tensor) -> Estimate:
    """The mean of S independent values for each datum, (S, N), with its Monte Carlo standard error for these data."""
    samples, number = values.shape
    error = (values.var(0).sum() / samples).sqrt() / number
    return Estimate(values.mean().item(), error.item())
