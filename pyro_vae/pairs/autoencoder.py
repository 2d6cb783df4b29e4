"""The autoencoder, a baseline without latent variables."""

import pyro
from torch import Tensor, nn

from pyro_vae.likelihoods import Likelihood
from pyro_vae.networks import apply_batched
from pyro_vae.pairs.base import Pair, in_evaluation_mode, on_own_device


class Autoencoder(Pair):
    r"""A deterministic autoencoder, whose code is a function of x without a prior.

    .. math:: x_n \sim p\bigl(x \mid z = f(x_n)\bigr)

    There is no latent site, so every objective is the reconstruction term :math:`\log p(x_n \mid f(x_n))`. For a
    Gaussian of fixed scale it is minus a scaled squared error, and for a Bernoulli minus the cross-entropy. It is
    **not a bound** on :math:`\log p(x)`. Unlike in a VAE, the codes have no distribution to sample from.

    Arguments:
        encoder: a network from (N, *event) to (N, Z).
        likelihood: a module from z to the distribution of x. Its `event_shape` is the shape of one datum.

    Example:
        >>> import torch, pyro_vae as pv
        >>> autoencoder = pv.mlp_autoencoder((5,), latent_dim=2, hidden_dims=(16,), likelihood="gaussian")
        >>> history = pv.fit(autoencoder, torch.randn(100, 5), pv.ELBO(), epochs=1)
        >>> autoencoder.reconstruct(torch.randn(3, 5)).shape
        torch.Size([3, 5])

    References:
        Hinton and Salakhutdinov (2006), *Reducing the Dimensionality of Data with Neural Networks*, Science.
    """

    def __init__(self, *, encoder: nn.Module, likelihood: Likelihood) -> None:
        super().__init__()
        self.encoder = encoder
        self.likelihood = likelihood

    @on_own_device
    def model(self, x: Tensor, *, subsample_size: int | None = None) -> Tensor:
        """The model p(x | z = f(x)), as a Pyro function with these arguments of :meth:`VAE.model`. It returns x."""
        self._register("encoder", "likelihood")
        with self._data(x, None, subsample_size) as (x, _):
            return pyro.sample("x", self.likelihood(self._code(x)), obs=x)

    def guide(self, x: Tensor, *, subsample_size: int | None = None) -> None:
        """An empty guide, since the model has no latent site."""

    def check_data(self, x: Tensor) -> None:
        """Raise ValueError for data of the wrong shape or type. `fit` calls this before it trains on the data."""
        self._check(x)

    @in_evaluation_mode
    def embed(self, x: Tensor) -> Tensor:
        """The codes f(x): (N, *event) to (N, Z)."""
        self._check(x)
        return self._code(x)

    @in_evaluation_mode
    def reconstruct(self, x: Tensor) -> Tensor:
        """The mean of p(x | z = f(x)): (N, *event) to (N, *event)."""
        return self.decode(self.embed(x))

    def _code(self, x: Tensor) -> Tensor:
        return apply_batched(self.encoder, x, len(self.event_shape))
