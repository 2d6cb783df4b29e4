r"""Log-weights per datum, from runs of any Pyro model and guide.

Every variational bound is a function of one matrix,

    log w[k, n] = log p(x_n, z_kn) - log q(z_kn | x_n),    z_kn ~ q(z | x_n),    shape (K particles, N data),

where p is the model, q is the guide, and n runs along the batch plate. The Monte Carlo ELBO is the mean of
log w over k, the IWAE bound its log-mean-exp. This file knows no objective.
"""

from collections.abc import Iterable
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_vae.engine.arguments import takes_program
from pyro_vae.engine.mixing import check_apart
from pyro_vae.engine.modules import PyroFunction
from pyro_vae.engine.particles import Particles
from pyro_vae.engine.program import Program, Run
from pyro_vae.engine.sites import Site, Sites, equal, labelled
from pyro_vae.errors import PyroVAEError

Terms = Iterable[tuple[Site, Tensor]]  # summands of a log-density, each with the site whose scale and mask it takes


@takes_program
def log_weights(
    model: PyroFunction,
    guide: PyroFunction,
    *args: Any,
    num_particles: int,
    vectorize_particles: bool = True,
    max_plate_nesting: int | None = None,
    chunk_size: int | None = None,
    **kwargs: Any,
) -> Tensor:
    r"""Log importance weights of a guide's samples under a model, per particle and datum.

    .. math:: \log w_{kn} = \log p(x_n, z_{kn}) - \log q(z_{kn} \mid x_n), \qquad z_{kn} \sim q(z \mid x_n)

    Each weight contains every density inside the batch plate: all latent sites, summed over nested plates such as
    pixels or time steps. A masked element adds zero. A scale, such as the N / b of a subsampled plate, is left out:
    objectives multiply each datum's finished bound by it. If two plates hold every site, the data are the rows of the
    outer one.

    Arguments:
        model: a Pyro model with one batch plate, of any name, around every sample site. A model/guide pair, or a tuple
            ``(model, guide)``, may stand in place of `model` and `guide`.
        guide: its guide.
        *args: the arguments of both.
        num_particles: K, the number of samples drawn from the guide for each datum.
        vectorize_particles: whether the program runs once, with a leading dimension for the particles. False runs it K
            times, for networks that take no leading dimension. From one seed both draw the same values at sites whose
            noise is normal, Laplace, Cauchy or uniform, or a transform of these.
        max_plate_nesting: how many dimensions the program's plates take; None finds it, by one more run.
        chunk_size: run the model for so many particles at a time, which needs less memory. The guide draws all
            particles at once, so the result is the same. Where gradients are recorded, each chunk runs again in the
            backward pass.
        **kwargs: the keyword arguments of both.

    Returns:
        The log-weights in nats, of shape (K, N), differentiable in the parameters through the samples.

    Raises:
        ValueError: the program has no log-weight per datum: no batch plate, a site outside it, two plates,
            ``to_event`` in place of a plate, a subsampled plate inside it. Or model and guide disagree on sites,
            shapes or masks; or the guide is not a density of the latents; or, while gradients are recorded, a site of
            the guide can't be reparameterised.

    Example:
        If the guide is the posterior, each weight is p(x), for every sample.

        >>> import torch, pyro, pyro.distributions as dist, pyro_vae as pv
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> x = torch.tensor([0.0, 2.0])
        >>> weights = pv.log_weights(model, guide, x, num_particles=3)
        >>> weights.shape
        torch.Size([3, 2])
        >>> torch.allclose(weights, dist.Normal(0.0, 2**0.5).log_prob(x))
        True

    References:
        Burda, Grosse and Salakhutdinov (2016), *Importance Weighted Autoencoders*, ICLR.
    """
    particles = Particles(num_particles, vectorize_particles, chunk_size)
    program = Program(model, guide, args, kwargs, nesting=max_plate_nesting)
    together = num_particles > 1 and vectorize_particles
    if together:
        program = program.with_nesting()
    check_apart(program, together=together)
    return torch.cat(particles.read(program, log_weights_of))


def log_weights_of(run: Run) -> Tensor:
    """The log-weights of a run, (K, N)."""
    return log_density(run, terms(run.model)) - log_density(run, terms(run.guide))


def terms(sites: Sites) -> Terms:
    """The summands of log p(x, z), or of log q(z | x): a site's log-density each."""
    return ((site, site["unscaled_log_prob"]) for site in sites.values())


def total(summands: Terms) -> Tensor:
    """The sum of all terms, each with its site's scale and mask: a tensor without dimensions."""
    sums = [scale_and_mask(value, site["scale"], site["mask"]).sum() for site, value in summands]
    return sum(sums[1:], sums[0]) if sums else torch.zeros(())


def log_density(run: Run, terms: Terms, *, scaled: bool = True) -> Tensor:
    """The sum of terms for each particle and datum, (K, N)."""
    site = next(iter((run.model or run.guide).values()))
    size = 1 if run.batch_plate is None else run.batch_plate.size
    total: Tensor = site["unscaled_log_prob"].new_zeros(run.num_particles, size)
    for site, value in terms:
        total = total + per_datum(run, site, value, scaled=scaled)
    return total


def per_datum(run: Run, site: Site, value: Tensor, *, scaled: bool = True) -> Tensor:
    """A site's term (K, N), with the site's mask, summed over the plates nested in the batch plate.

    Without a batch plate the program is one datum, (K, 1), and each term has its own scale, if `scaled`: a score has
    none.
    """
    plate = run.batch_plate
    value = scale_and_mask(value, site["scale"] if plate is None and scaled else 1.0, site["mask"])
    value = value.reshape((1,) * (-run.particle_dim - value.dim()) + tuple(value.shape))
    if plate is None:
        return value.reshape(len(value), -1).sum(1, keepdim=True).expand(run.num_particles, 1)
    keep = {value.dim() + run.particle_dim, value.dim() + plate.dim}
    nested = [dim for dim in range(value.dim()) if dim not in keep]
    return (value.sum(nested) if nested else value).expand(run.num_particles, plate.size)


def datum_scale(run: Run) -> Tensor | float:
    """The scale that all sites share, such as N / b of a subsampled plate: a number, or a tensor (N,).

    Raises:
        ValueError: sites have different scales, so that no single number scales a datum's bound.
    """
    plate, sites = run.batch_plate, (*run.model.values(), *run.guide.values())
    if plate is None:
        return 1.0
    scale = sites[0]["scale"]
    for other in sites[1:]:
        if not equal(scale, other["scale"]):
            labels = labelled(run.model, run.guide).items()
            first, second = (next(label for label, site in labels if site is one) for one in (sites[0], other))
            raise PyroVAEError(
                f"scales differ between sites: expected one scale for the whole datum, got {scale} at {first} and "
                f"{other['scale']} at {second}. Scale model and guide alike; or, to anneal a KL, use "
                "pv.ELBO(beta=...); or use pv.ELBO's pathwise or STL loss, in which each term may have its own scale."
            )
    if not isinstance(scale, Tensor) or scale.dim() == 0:
        return scale
    if scale.dim() < -plate.dim or scale.numel() != scale.shape[plate.dim]:
        raise PyroVAEError(
            f"a scale varies inside a datum: expected a number or one value for each row of plate '{plate.name}', got "
            f"shape {tuple(scale.shape)}. Scale whole data, or use pv.ELBO's pathwise loss."
        )
    return scale.reshape(-1)
