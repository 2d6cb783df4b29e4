"""The VAE, the basic pair: model p(z) p(x|z) and guide q(z|x)."""

import pyro
from torch import Tensor, nn

from pyro_vae.checks import Count, Whole
from pyro_vae.likelihoods import Likelihood
from pyro_vae.pairs.base import Pair, in_evaluation_mode, mean_of, on_own_device
from pyro_vae.pairs.imputation import impute


class VAE(Pair):
    r"""A variational autoencoder: a Pyro model and a Pyro guide with a latent site ``z``.

    .. math::
        \text{model:}\quad z_n \sim p(z),\ x_n \sim p(x \mid z_n) \qquad\qquad
        \text{guide:}\quad z_n \sim q(z \mid x_n)

    Both have one plate, ``data``, around the sites ``z`` and ``x``, and work with all of Pyro. Data with elements
    missing at random come with a `mask`. The likelihood then includes only the observed elements,
    :math:`p(x_\text{obs} \mid z)` in place of :math:`p(x \mid z)`.

    Arguments:
        prior: a module that returns the distribution of one z, such as :class:`StandardNormal`.
        likelihood: a module from z to the distribution of x, such as :class:`Bernoulli`. Its `event_shape` is the shape
            of one datum.
        posterior: a module from x to the distribution of z, such as :class:`DiagonalNormal`.

    Raises:
        ValueError: parts of the wrong type or of different event shapes. When it runs: x or mask of another shape or
            type, or x outside the support of the likelihood.

    Example:
        >>> import torch, pyro, pyro_vae as pv
        >>> vae = pv.VAE(
        ...     prior=pv.StandardNormal(2),
        ...     likelihood=pv.Gaussian(pv.networks.mlp(2, [16], 5), (5,), scale="learned"),
        ...     posterior=pv.DiagonalNormal(pv.networks.mlp(5, [16], 2 * 2), (5,)),
        ... )
        >>> svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss=pv.ELBO())
        >>> loss = svi.step(torch.randn(100, 5))

    References:
        Kingma and Welling (2014), *Auto-Encoding Variational Bayes*, ICLR.
        Rezende, Mohamed and Wierstra (2014), *Stochastic Backpropagation and Approximate Inference in Deep
        Generative Models*, ICML.
        Mattei and Frellsen (2019), *MIWAE: Deep Generative Modelling and Imputation of Incomplete Data Sets*, ICML
        (the mask, and imputation).
    """

    def __init__(self, *, prior: nn.Module, likelihood: Likelihood, posterior: nn.Module) -> None:
        super().__init__(prior=prior, likelihood=likelihood, posterior=posterior)

    @on_own_device
    def model(self, x: Tensor, mask: Tensor | None = None, *, subsample_size: int | None = None) -> Tensor:
        """The generative model p(z) p(x|z), as a Pyro function. It returns the value at site ``x``.

        Arguments:
            x: data of shape (N, *event), observed at site ``x``. Under ``poutine.uncondition`` the site is sampled.
            mask: booleans of x's shape, True where an element is observed; None is True everywhere. Values of missing
                elements are not read.
            subsample_size: the size of a random minibatch of the N data, drawn at each call; None uses all data.
        """
        self._register("prior", "likelihood")
        with self._data(x, mask, subsample_size) as (x, mask):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.likelihood(z, mask=mask), obs=x)

    @on_own_device
    def guide(self, x: Tensor, mask: Tensor | None = None, *, subsample_size: int | None = None) -> Tensor:
        """The approximate posterior q(z|x), as a Pyro function of the model's arguments. It returns z.

        The encoder's input has the likelihood's `filler`, which is 0 for most likelihoods, at missing elements.
        """
        self._register("posterior")
        with self._data(x, mask, subsample_size) as (x, _):
            return pyro.sample("z", self.posterior(x))

    def check_data(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Raise ValueError for data of the wrong shape or type. `fit` calls this before it trains on the data."""
        self._observed(x, mask)

    @in_evaluation_mode
    def embed(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The mean of q(z|x): (N, *event) to (N, Z)."""
        return mean_of(self.posterior, self._observed(x, mask))

    @in_evaluation_mode
    def reconstruct(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The mean of p(x|z) at the mean of q(z|x): (N, *event) to (N, *event)."""
        return self.decode(self.embed(x, mask))

    @in_evaluation_mode
    def generate(self, n: Whole) -> Tensor:
        """The means of p(x|z) at n samples of z from the prior, of shape (n, *event)."""
        return self.decode(self.prior().sample((n,)))

    @in_evaluation_mode
    def impute(self, x: Tensor, mask: Tensor, num_samples: Count = 1000) -> Tensor:
        r"""Replace missing elements of x by their mean given the observed elements, or by the most probable category.

        .. math:: \mathbb E[x_\text{mis} \mid x_\text{obs}] \approx \sum_k \frac{w_k}{\sum_j w_j}
            \mathbb E[x_\text{mis} \mid z_k], \qquad
            w_k = \frac{p(x_\text{obs} \mid z_k)\, p(z_k)}{q(z_k \mid x_\text{obs})},
            \quad z_k \sim q(z \mid x_\text{obs})

        Arguments:
            x, mask: as in :meth:`model`.
            num_samples: K, the number of importance samples for each datum.

        Raises:
            ValueError: `num_samples` is not a positive integer, or all importance weights of a datum are zero.
        """
        observed = self._observed(x, mask)
        return impute(self.prior(), self.likelihood, self.posterior(observed), observed, mask, num_samples)
