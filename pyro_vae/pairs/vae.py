"""The model/guide pair: p(z) p(x|z) and q(z|x) as Pyro functions. It knows no loss."""

from __future__ import annotations

import math

import pyro
import torch
from torch import Tensor, nn

from pyro_vae.likelihoods import Likelihood
from pyro_vae.pairs.base import Pair, register

SAMPLES_AT_ONCE = 4096  # data times samples, of which the decoder's outputs are in memory


class VAE(Pair):
    r"""A variational autoencoder: a Pyro model and a Pyro guide that share a latent site ``z``.

    .. math::
        \text{model:}\quad z_n \sim p(z),\ x_n \sim p(x \mid z_n) \qquad\qquad
        \text{guide:}\quad z_n \sim q(z \mid x_n)

    Both have one plate, ``data``, around the sites ``z`` and ``x``, and work with everything in Pyro. Data with elements
    that are missing come with a `mask`, and the likelihood is of those that are observed:
    :math:`p(x_\text{obs} \mid z)` in place of :math:`p(x \mid z)`.

    Arguments:
        prior: a module that returns the distribution of one z, such as :class:`StandardNormal`.
        likelihood: a module from z to the distribution of x, such as :class:`Bernoulli`; its `event_shape`
            is the shape of one datum.
        posterior: a module from x to the distribution of z, such as :class:`DiagonalNormal`.

    Raises:
        ValueError: when it runs: data of another shape or type, or that the likelihood gives no density.

    Example:
        >>> import torch, pyro, pyro_vae as pv
        >>> from pyro_vae.networks import mlp
        >>> vae = pv.VAE(
        ...     prior=pv.StandardNormal(2),
        ...     likelihood=pv.Gaussian(mlp(2, [16], 5), (5,), scale="learned"),
        ...     posterior=pv.DiagonalNormal(mlp(5, [16], 2 * 2), (5,)),
        ... )
        >>> svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss=pv.ELBO())
        >>> loss = svi.step(torch.randn(100, 5))

    References:
        Kingma and Welling (2014), *Auto-Encoding Variational Bayes*, ICLR.
        Rezende, Mohamed and Wierstra (2014), *Stochastic Backpropagation and Approximate Inference in Deep
        Generative Models*, ICML.
        Mattei and Frellsen (2019), *MIWAE: Deep Generative Modelling and Imputation of Incomplete Data Sets*, ICML (the mask).
    """

    def __init__(self, *, prior: nn.Module, likelihood: Likelihood, posterior: nn.Module) -> None:
        super().__init__()
        self.prior = prior
        self.likelihood = likelihood
        self.posterior = posterior

    def model(self, x: Tensor, mask: Tensor | None = None, *, subsample_size: int | None = None) -> Tensor:
        """The generative model p(z) p(x|z), as a Pyro function.

        Arguments:
            x: data of shape (N, *event), observed at site ``x``; ``poutine.uncondition`` samples it instead.
            mask: booleans of x's shape, True where an element is observed; None is everywhere. What x has elsewhere is not read.
            subsample_size: how many of the N data to use, drawn anew at each call; None uses all.

        Returns:
            The value at site ``x``.

        Raises:
            ValueError: x or mask has another shape or type, or the likelihood gives x no density.
        """
        x = self._observed(x, mask, subsample_size)
        register("prior", self.prior)
        register("likelihood", self.likelihood)
        with pyro.plate("data", len(x), subsample_size=subsample_size):
            x, mask = self._subsampled(x, mask)
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.likelihood(z, mask=mask), obs=x)

    def guide(self, x: Tensor, mask: Tensor | None = None, *, subsample_size: int | None = None) -> Tensor:
        """The approximate posterior q(z|x), as a Pyro function of the model's arguments; returns z.

        The encoder sees zeros where an element is missing.
        """
        x = self._observed(x, mask, subsample_size)
        register("posterior", self.posterior)
        with pyro.plate("data", len(x), subsample_size=subsample_size):
            x, _ = self._subsampled(x, mask)
            return pyro.sample("z", self.posterior(x))

    @torch.no_grad()
    def embed(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The mean of q(z|x): (N, *event) to (N, Z)."""
        x = self._observed(x, mask)
        embed = getattr(self.posterior, "embed", None)
        return self.posterior(x).mean if embed is None else embed(x)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """The mean of p(x|z): (*batch, Z) to (*batch, *event)."""
        return self.likelihood.decode(z)

    def reconstruct(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The mean of p(x|z) at the mean of q(z|x): (N, *event) to (N, *event)."""
        return self.decode(self.embed(x, mask))

    @torch.no_grad()
    def generate(self, n: int) -> Tensor:
        """The means of p(x|z) at n draws of z from the prior: (n, *event)."""
        return self.decode(self.prior().sample((n,)))

    @torch.no_grad()
    def impute(self, x: Tensor, mask: Tensor, num_samples: int = 1000) -> Tensor:
        r"""Fill missing elements in by their mean given those that are observed, by importance weights.

        .. math:: \mathbb E[x_\text{mis} \mid x_\text{obs}] \approx \sum_k \frac{w_k}{\sum_j w_j}
            \mathbb E[x_\text{mis} \mid z_k], \qquad
            w_k = \frac{p(x_\text{obs} \mid z_k)\, p(z_k)}{q(z_k \mid x_\text{obs})}, \quad z_k \sim q(z \mid x_\text{obs})

        Arguments:
            x: data (N, *event).
            mask: booleans of x's shape, True where an element is observed.
            num_samples: K, for each datum; one sees what a single reconstruction costs.

        Returns:
            x with its missing elements filled in, (N, *event).

        References:
            Mattei and Frellsen (2019), *MIWAE*, ICML.
        """
        if not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"expected num_samples to be a positive integer, got {num_samples!r}.")
        x = self._observed(x, mask)
        q, prior = self.posterior(x), self.prior()
        at_once = max(1, SAMPLES_AT_ONCE // len(x))
        top = x.new_full((len(x),), -math.inf)
        total, mean = torch.zeros_like(top), torch.zeros_like(x)
        for start in range(0, num_samples, at_once):
            z = q.sample((min(at_once, num_samples - start),))
            log_w = prior.log_prob(z) + self.likelihood(z, mask=mask).log_prob(x) - q.log_prob(z)
            highest = torch.maximum(top, log_w.amax(0))
            kept, weights = (top - highest).exp(), (log_w - highest).exp()
            total = total * kept + weights.sum(0)
            decoded = self.decode(z)
            by_datum = (-1, *[1] * len(self.event_shape))
            mean = mean * kept.reshape(by_datum) + (decoded * weights.reshape(len(z), *by_datum)).sum(0)
            top = highest
        return torch.where(mask, x, mean / total.reshape(by_datum))

    def _observed(self, x: Tensor, mask: Tensor | None, subsample_size: int | None = None) -> Tensor:
        """The data, with zeros where they are missing."""
        if mask is None:
            self._check(x, subsample_size)
            return x
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != x.shape:
            got = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"expected mask to be booleans of x's shape {tuple(x.shape)}, True where an element is observed, got {got}. If these "
                "are labels that a DataLoader gives, leave them out of it, or use pv.ConditionalVAE."
            )
        x = torch.where(mask, x, 0.0)
        self._check(x, subsample_size)
        return x

    def _subsampled(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        dims = len(self.event_shape)
        return pyro.subsample(x, event_dim=dims), None if mask is None else pyro.subsample(mask, event_dim=dims)
