"""A guide whose proposals are fitted to each row of data."""

from typing import Annotated, Any

import torch

from pyro_vae.checks import Between, Count, Seed, Whole
from pyro_vae.defaults import REFINE_LR, REFINE_PARTICLES, REFINE_PILOT, REFINE_ROUNDS, REFINE_STEPS
from pyro_vae.engine.arguments import takes_program
from pyro_vae.engine.modules import PyroFunction
from pyro_vae.errors import PyroVAEError
from pyro_vae.evaluation.diagnostics import FEWEST_SAMPLES, warn_of_high_k
from pyro_vae.evaluation.pieces import Pieces, checked, progress_bar, require_vectorized
from pyro_vae.evaluation.proposals.guide import Mixture, RefinedGuide
from pyro_vae.evaluation.proposals.search import Search, Settings
from pyro_vae.evaluation.sharing import Sharing

ADVICE = (
    "Take more num_steps, num_pilot or rounds, or anneal from the refined guide: pv.ais(model, refined, x, "
    "start='guide'). Their rows are (refined.pareto_k > 0.7).nonzero()."
)


@takes_program
def refine(
    model: PyroFunction,
    guide: PyroFunction,
    x: Any,
    *,
    num_steps: Count = REFINE_STEPS,
    num_particles: Annotated[int, Between(2)] = REFINE_PARTICLES,
    lr: float = REFINE_LR,
    num_pilot: Annotated[int, Between(FEWEST_SAMPLES)] = REFINE_PILOT,
    rounds: Whole = REFINE_ROUNDS,
    vectorize_particles: bool = True,
    compile: bool = False,
    seed: Seed | None = None,
    progress: bool = True,
) -> RefinedGuide:
    r"""Fit a proposal to the posterior of each row of x, as a guide that everything takes which takes a guide.

    .. math:: q_n(y) = a \, q(y \mid x_n) + (1 - a) \sum_m \pi_{nm}
        \, t_{\nu_m}\bigl(y;\ \mu_{nm},\ \Sigma_{nm}\bigr)

    Here y are all latents of a datum, unconstrained, as one vector, q is the guide, and t is Student's. Adam fits the
    first component as a normal, by the sticking-the-landing gradient of the datum's ELBO. It starts at the moments of
    the guide. It is then made wider, with heavier tails. Where k-hat of pilot draws is high, their weights give more
    components. The share a = 0.05 of the guide itself bounds each weight by 20 times its weight under the guide. The
    guide has no share where its density is not known at any value: where it has auxiliary sites, or a flow without an
    inverse. The result then runs the model for its plates.

    The covariance is full for up to 200 latents of a datum, of rank 16 plus a diagonal for up to 4,000, and diagonal
    for more.

    Where no proposal is better than the guide alone, the guide alone serves.

    The result knows a row by its exact values. So x may come in any order, in minibatches of any size, from a loader,
    and after ``torch.save``. Other rows are refused, and rows that are equal share one proposal. No gradient flows into
    the result.

    Arguments:
        model, guide, x, vectorize_particles, seed, progress: see :func:`pyro_vae.log_likelihood`. All latent sites must
            be continuous, on a space with as many unconstrained numbers: positive numbers or a simplex, not a circle.
        num_steps: the number of steps of Adam.
        num_particles: the number of samples for each gradient of a datum, at least 2.
        lr: Adam's first step size, in standard deviations of the guide.
        num_pilot: the number of draws that show k-hat, and to which further components are fitted, at least 30.
        rounds: how many times two components may be added for a datum.
        compile: whether to run the derivatives of log p(x, z) in the steps as compiled code, see
            :func:`pyro_vae.compile_step`. The proposals are the same up to rounding. Each call compiles anew, which
            pays off where the call takes minutes. Pilot draws are not compiled.

    Returns:
        A guide. Its attribute `pareto_k` has k-hat of each row's pilot draws, (N,).

    Raises:
        ValueError: a latent site is discrete, circular, masked, or has bounds that depend on another latent; or an
            error of :func:`pyro_vae.log_likelihood`; with `compile`, a program that can't be traced, with the line at
            fault.

    Warns:
        UserWarning: k-hat stays above 0.7 for some rows.

    Example:
        The guide is far from the posterior, N(x / 2, 1 / 2).

        >>> import torch, pyro, pyro.distributions as dist, pyro_vae as pv
        >>> pyro.set_rng_seed(0)
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(torch.zeros(len(x)), 0.2))
        >>> x = torch.randn(16)
        >>> refined = pv.refine(model, guide, x, seed=0, progress=False)
        >>> ll = pv.log_likelihood(model, refined, x, 1000, seed=1, progress=False)
        >>> exact = dist.Normal(0.0, 2**0.5).log_prob(x)
        >>> bool(((ll.per_datum - exact).abs() < 5 * ll.per_datum_error).all()), ll.share_high_k
        (True, 0.0)

    References:
        Cremer, Li and Duvenaud (2018), *Inference Suboptimality in Variational Autoencoders*, ICML.
        Roeder, Wu and Duvenaud (2017), *Sticking the Landing*, NeurIPS.
        Cappé, Douc, Guillin, Marin and Robert (2008), *Adaptive Importance Sampling in General Mixture Classes*,
        Statistics and Computing.
        Hesterberg (1995), *Weighted Average Importance Sampling and Defensive Mixture Distributions*, Technometrics.
    """
    if not 0 < lr <= torch.finfo(torch.float32).max:
        raise PyroVAEError(f"expected a positive lr, got {lr!r}. Try {REFINE_LR}.")
    require_vectorized(compile, vectorize_particles)
    settings = Settings(num_steps, num_particles, lr, num_pilot, rounds, vectorize_particles, compile)
    with checked(model, guide, x, seed) as data:
        refined = refined_guide(data, settings, progress)
    warn_of_high_k(refined.pareto_k, ADVICE)
    return refined


def refined_guide(data: Pieces, settings: Settings, progress: bool, share: Sharing | None = None) -> RefinedGuide:
    """The guide with the proposals of all data, which several processes find together if they share their work."""
    search = Search(data, settings)
    with progress_bar(len(search.programs) * settings.num_steps, "step", "refining", progress) as bar:
        if share is None:
            found = [search.proposals(program, bar) for program in search.programs]
        else:
            found = share.each(search.programs, lambda program: search.proposals(program, bar), data.device)
    mixture, shapes = Mixture.joined([each.mixture for each in found]), torch.cat([each.pareto_k for each in found])
    return RefinedGuide(search.base, search.layout, mixture, data.program.args, shapes)
