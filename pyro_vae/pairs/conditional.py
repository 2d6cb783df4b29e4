"""The conditional VAE, given labels or other vectors y: model p(z) p(x|z, y) and guide q(z|x, y)."""

import pyro
from torch import Tensor, nn

from pyro_vae.checks import Count, is_dense
from pyro_vae.likelihoods import Likelihood
from pyro_vae.pairs.base import Labelled, in_evaluation_mode, indicators, mean_of, on_own_device
from pyro_vae.pairs.imputation import impute


class ConditionalVAE(Labelled):
    r"""A VAE conditional on y: a label or a vector for each datum.

    .. math::
        \text{model:}\quad z_n \sim p(z),\ x_n \sim p(x \mid z_n, y_n) \qquad\qquad
        \text{guide:}\quad z_n \sim q(z \mid x_n, y_n)

    Objectives bound :math:`\log p(x \mid y)`. Encoder and decoder take y's vector as their second argument.
    :class:`pyro_vae.networks.Concatenated` adapts a network of one argument.

    Arguments:
        prior, likelihood, posterior: as in :class:`VAE`, where the last two take y as their second argument.
        num_classes: the number of classes if y is integer labels, which the networks get as indicator vectors; None if
            y is vectors.

    Raises:
        ValueError: as in :class:`VAE`. When it runs: y of another shape or type, or labels out of range.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.mlp_conditional_vae((5,), latent_dim=2, label_dim=3, hidden_dims=(16,), likelihood="gaussian")
        >>> x, y = torch.randn(100, 5), torch.randint(3, (100,))
        >>> history = pv.fit(vae, (x, y), pv.ELBO(), epochs=1)
        >>> vae.generate(torch.tensor([0, 1, 2, 2])).shape
        torch.Size([4, 5])

    References:
        Sohn, Lee and Yan (2015), *Learning Structured Output Representation using Deep Conditional Generative Models*,
        NeurIPS.
    """

    def __init__(
        self, *, prior: nn.Module, likelihood: Likelihood, posterior: nn.Module, num_classes: int | None = None
    ) -> None:
        super().__init__(prior=prior, likelihood=likelihood, posterior=posterior)
        self.num_classes = num_classes

    @on_own_device
    def model(self, x: Tensor, y: Tensor, mask: Tensor | None = None, *, subsample_size: int | None = None) -> Tensor:
        """The generative model p(z) p(x|z, y), as a Pyro function. It returns the value at site ``x``.

        Arguments:
            x, mask, subsample_size: as in :meth:`VAE.model`.
            y: integer labels of shape (N,), or vectors of shape (N, Y).
        """
        self._register("prior", "likelihood")
        with self._data(x, mask, subsample_size, self._vectors(y, x)) as (x, y, mask):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.likelihood(z, y, mask=mask), obs=x)

    @on_own_device
    def guide(self, x: Tensor, y: Tensor, mask: Tensor | None = None, *, subsample_size: int | None = None) -> Tensor:
        """The approximate posterior q(z|x, y), as a Pyro function of the model's arguments. It returns z."""
        self._register("posterior")
        with self._data(x, mask, subsample_size, self._vectors(y, x)) as (x, y, _):
            return pyro.sample("z", self.posterior(x, y))

    def check_data(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> None:
        """Raise ValueError for data of the wrong shape or type. `fit` calls this before it trains on the data."""
        self._observed(x, mask)
        self._vectors(y, x)

    @in_evaluation_mode
    def embed(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """The mean of q(z|x, y): (N, *event) to (N, Z)."""
        return mean_of(self.posterior, self._observed(x, mask), self._vectors(y, x))

    @in_evaluation_mode
    def reconstruct(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """The mean of p(x|z, y) at the mean of q(z|x, y): (N, *event) to (N, *event)."""
        return self.decode(self.embed(x, y, mask), y)

    @in_evaluation_mode
    def impute(self, x: Tensor, y: Tensor, mask: Tensor, num_samples: Count = 1000) -> Tensor:
        """Replace missing elements by their mean given y and the observed elements. See :meth:`pyro_vae.VAE.impute`."""
        observed, vectors = self._observed(x, mask), self._vectors(y, x)
        q = self.posterior(observed, vectors)
        return impute(self.prior(), self.likelihood, q, observed, mask, num_samples, vectors)

    def _vectors(self, y: Tensor, x: Tensor) -> Tensor:
        if not is_dense(x) or x.dim() == 0:
            self._check(x)  # refuses it
        return indicators(y, self.num_classes, x.shape[0], x.dtype)
