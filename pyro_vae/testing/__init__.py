r"""Checks of parts that you write yourself: objectives, likelihoods, posteriors and priors, each in one call.

Each check compares a part with an exact value: a sum or an integral by quadrature, or a finite difference. A random
estimate is compared by a z-test at five of its own standard errors, on a fixed seed. A deterministic value is compared
within the roundings of its arithmetic. A failed check raises an AssertionError. Its message gives the name of the
check, the expected value, the value found, and the likely cause::

    import pyro_vae as pv

    pv.testing.check_objective(MyBound(num_particles=3))
    pv.testing.check_likelihood(MyLikelihood)
    pv.testing.check_posterior(MyPosterior)
    pv.testing.check_prior(MyPrior(2))
"""

from pyro_vae.testing.latents import check_posterior, check_prior
from pyro_vae.testing.likelihoods import check_likelihood
from pyro_vae.testing.objectives import check_objective
from pyro_vae.testing.programs import SmallProgram

__all__ = ["SmallProgram", "check_likelihood", "check_objective", "check_posterior", "check_prior"]
