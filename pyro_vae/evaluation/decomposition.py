"""The parts of the ELBO: reconstruction, mutual information, and the KL of the aggregate posterior to the prior."""

import math
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae.engine import rng
from pyro_vae.engine.arguments import takes_program
from pyro_vae.engine.modules import PyroFunction
from pyro_vae.engine.program import Program
from pyro_vae.engine.weights import log_density, terms
from pyro_vae.errors import PyroVAEError
from pyro_vae.evaluation.defaults import DECOMPOSITION_SAMPLES
from pyro_vae.evaluation.estimate import Estimate
from pyro_vae.evaluation.families import by_dimension, refuse_masks, same_for_all_particles, univariate
from pyro_vae.evaluation.pieces import Args, arguments, check_count, checked, rows_at_once

DENSITIES_AT_ONCE = 2**21  # log-densities in memory: samples times data times dimensions
DATA_AT_ONCE = 512  # data in one run of the guide on a block of samples


@dataclass(frozen=True)
class Decomposition:
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

    def __str__(self) -> str:
        parts = "unknown" if self.dimension_wise_kl is None else str(self.dimension_wise_kl)
        return (
            f"ELBO {self.elbo} = reconstruction {self.reconstruction} - mutual information {self.mutual_information} "
            f"(at most log N = {math.log(self.num_data):.2f}) - marginal KL {self.marginal_kl} (dimension-wise "
            f"{parts}), nats per datum"
        )


@takes_program
def decompose_elbo(
    model: PyroFunction,
    guide: PyroFunction,
    x: Any,
    num_samples: int = DECOMPOSITION_SAMPLES,
    *,
    seed: int | None = None,
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
    number of data, not the distance of q(z) from p(z).

    Arguments:
        model: a Pyro model with a batch plate. A model/guide pair, or a tuple `(model, guide)`, may stand in place of
            `model` and `guide`.
        guide: its guide. It must be a density of the model's latents alone.
        x: data (N, ...), a split of :mod:`pyro_vae.data`, or a tuple of tensors that are passed as several arguments.
        num_samples: S, the number of samples from each q(z|x_n), at least 2.
        seed: the seed of the random numbers; None continues from the generators' state.
        progress: whether to show a progress bar, in a terminal.

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
    check_count("num_samples", num_samples, 2, ", to have an error bar")
    args = arguments(x)
    program = Program(model, guide, args)
    with checked(program) as data, rng.seeded(seed):
        batches = data.minibatches(rows_at_once(args) // num_samples)
        program = program.on(batches[0]).with_nesting()
        samples = [_Samples.draw(program.on(batch), num_samples) for batch in batches]
        only_guide = replace(program, model=guide, guide=None)
        dimensions = samples[0].dimensions
        number, size = len(args[0]), max(1, dimensions)
        columns = data.minibatches(min(DATA_AT_ONCE, DENSITIES_AT_ONCE // size))
        step = max(1, DENSITIES_AT_ONCE // (size * len(columns[0][0])))
        total = sum(-(-s.number // step) for s in samples) * len(columns)
        mixed = []
        with tqdm(total=total, leave=False, disable=None if progress else True, unit="block", desc="q(z)") as bar:
            for drawn in samples:
                mixed += [_mixture(only_guide, columns, drawn, rows, number, bar) for rows in drawn.blocks(step)]
    log_mixture = torch.cat([joint for joint, _ in mixed])
    marginals = torch.cat([each for _, each in mixed]) if dimensions else None
    # The samples of a minibatch are ordered by particle first.
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
    plate_dims: dict[str, int]  # the dimension of n, counted from the left
    log_likelihood: Tensor
    log_prior: Tensor
    log_guide: Tensor
    prior_by_dimension: Tensor  # (S, n, D), with D = 0 where the marginals are not known
    number: int

    @property
    def dimensions(self) -> int:
        return self.prior_by_dimension.shape[-1]

    @classmethod
    def draw(cls, program: Program, num_samples: int) -> Self:
        run = program.run(num_samples)
        refuse_masks(run)
        latent = {name: site for name, site in run.model.items() if not site["is_observed"]}
        for name in run.guide:
            if name not in latent:
                raise PyroVAEError(
                    f"guide site '{name}' is auxiliary: expected a guide with a density at the model's latents alone, "
                    "since the aggregate posterior of an auxiliary variable is not known. Drop the site."
                )
        observed = {name: site for name, site in run.model.items() if site["is_observed"]}
        known = all(_known(run.guide[name]) and _known(site) for name, site in latent.items())
        each = (
            [by_dimension(run, s, univariate(s["fn"]).log_prob(s["value"])) for s in latent.values()] if known else []
        )
        shape = (num_samples, len(program.args[0]))
        return cls(
            {name: site["value"] for name, site in run.guide.items()},
            {n: s["value"].dim() - s["fn"].event_dim + run.batch_plate.dim for n, s in run.guide.items()},
            log_density(run, terms(observed)).double(),
            log_density(run, terms(latent)).double(),
            log_density(run, terms(run.guide)).double(),
            torch.cat(each, -1).double() if each else torch.zeros(*shape, 0, dtype=torch.float64),
            num_samples * len(program.args[0]),
        )

    def blocks(self, step: int) -> list[Tensor]:
        """The indices of this minibatch's S n samples, in blocks of `step`."""
        return list(torch.arange(self.number).split(step))

    def at(self, rows: Tensor) -> dict[str, Tensor]:
        """The samples at these indices as particles (rows, ..., 1, ...), which broadcast over other data."""
        taken = {}
        for name, value in self.values.items():
            dim = self.plate_dims[name]
            flat = value.movedim(dim, 1).flatten(0, 1)[rows.to(value.device)]
            taken[name] = flat.unsqueeze(dim)
        return taken


def _known(site: Any) -> bool:
    return univariate(site["fn"]) is not None and same_for_all_particles(site)


def _mixture(
    guide: Program, columns: list[Args], drawn: _Samples, rows: Tensor, number: int, bar: Any
) -> tuple[Tensor, Tensor]:
    """The log-densities of samples under q(z), (rows,), and under each marginal q(z_j), (rows, D)."""
    values = drawn.at(rows)
    joint, each = [], []
    for column in columns:
        wide = {
            name: value.expand(
                *value.shape[: drawn.plate_dims[name]], len(column[0]), *value.shape[drawn.plate_dims[name] + 1 :]
            )
            for name, value in values.items()
        }
        run = guide.on(column).run_at(wide, len(rows))
        joint.append(log_density(run, terms(run.guide)).double().logsumexp(1))
        if drawn.dimensions:
            marginals = [(site, univariate(site["fn"]).log_prob(site["value"])) for site in run.guide.values()]
            by_site = torch.cat([by_dimension(run, site, log_prob) for site, log_prob in marginals], -1)
            each.append(by_site.double().logsumexp(1))
        bar.update()
    log_joint = torch.stack(joint).logsumexp(0) - math.log(number)
    log_each = torch.stack(each).logsumexp(0) - math.log(number) if each else log_joint.new_zeros(len(rows), 0)
    return log_joint, log_each


def _stratified(values: Tensor) -> Estimate:
    """The mean of S independent values for each datum, (S, N), with its Monte Carlo standard error for these data."""
    samples, number = values.shape
    error = (values.var(0).sum() / samples).sqrt() / number
    return Estimate(values.mean().item(), error.item())
