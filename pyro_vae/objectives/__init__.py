r"""Variational bounds on log p(x): each is one reduction of the log-weights, and a :class:`pyro.infer.ELBO`.

With log-weights log w[k, n] = log p(x_n, z_kn) - log q(z_kn | x_n), of shape (K particles, N data), and LME the log of
the mean of exponentials over k,

=========================  ==============================================  ============================================
objective                  reduction of a datum's log-weights              what its mean bounds
=========================  ==============================================  ============================================
ELBO(K)                    mean of log w                                   log p(x) - KL(q || p(z | x))
IWAE(K)                    LME of log w                                    below log p(x), rising with K
Renyi(alpha, K)            LME of (1 - alpha) log w, over (1 - alpha)      below log p(x) at alpha >= 0; else any side
MIWAE(M, K)                mean over M groups of LME of log w              that of IWAE(K)
PIWAE(M, K)                LME for the model, MIWAE(M, K) for the guide    that of IWAE(M K)
CIWAE(beta, K)             beta mean + (1 - beta) LME                      between ELBO and IWAE
TVO(K, T)                  Riemann sum of means weighted by w^beta         between ELBO and IWAE
JVI(K, order)              jackknife of LME over subsets                   nothing: it estimates log p(x)
RWS(K)                     LME for the model; phi: KL(p(z | x) || q)       that of IWAE(K)
=========================  ==============================================  ============================================

How each is differentiated is an argument, `gradient`; see :class:`Objective`. A bound that is missing here is a
subclass with a `reduce` of its own.
"""

from pyro_vae.objectives.base import Objective
from pyro_vae.objectives.elbo import ELBO, NoClosedFormError
from pyro_vae.objectives.importance import CIWAE, IWAE, JVI, MIWAE, PIWAE, Renyi
from pyro_vae.objectives.thermodynamic import TVO
from pyro_vae.objectives.wake_sleep import RWS

__all__ = ["CIWAE", "ELBO", "IWAE", "JVI", "MIWAE", "PIWAE", "RWS", "TVO", "NoClosedFormError", "Objective", "Renyi"]
