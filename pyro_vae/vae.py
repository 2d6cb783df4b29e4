"""The model/guide pair: p(z) p(x|z) and q(z|x) as Pyro functions. It knows no loss."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal

import pyro
import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

from pyro_vae.likelihoods import Bernoulli, Gaussian, Likelihood
from pyro_vae.networks import conv_decoder, conv_encoder, mlp
from pyro_vae.posteriors import DiagonalNormal
from pyro_vae.priors import StandardNormal


class VAE(nn.Module):
    r"""A variational autoencoder: a Pyro model and a Pyro guide that share a latent site ``z``.

    .. math::
        \text{model:}\quad z_n \sim p(z),\ x_n \sim p(x \mid z_n) \qquad\qquad
        \text{guide:}\quad z_n \sim q(z \mid x_n)

    Both have one plate, ``data``, around the sites ``z`` and ``x``, and work with everything in Pyro.

    Arguments:
        prior: a module that returns the distribution of one z, such as :class:`StandardNormal`.
        likelihood: a module from z to the distribution of x, such as :class:`Bernoulli`; its `event_shape`
            is the shape of one datum.
        posterior: a module from x to the distribution of z, such as :class:`DiagonalNormal`.

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
    """

    def __init__(self, *, prior: nn.Module, likelihood: Likelihood, posterior: nn.Module) -> None:
        super().__init__()
        self.prior = prior
        self.likelihood = likelihood
        self.posterior = posterior

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one datum."""
        return self.likelihood.event_shape

    def model(self, x: Tensor, subsample_size: int | None = None) -> Tensor:
        """The generative model p(z) p(x|z), as a Pyro function.

        Arguments:
            x: data of shape (N, *event), observed at site ``x``; ``poutine.uncondition`` samples it instead.
            subsample_size: how many of the N data to use, drawn anew at each call; None uses all.

        Returns:
            The value at site ``x``.

        Raises:
            ValueError: x has another shape or is not of floating point, or the likelihood gives it no density.
        """
        self._check(x, subsample_size)
        _register("prior", self.prior)
        _register("likelihood", self.likelihood)
        with pyro.plate("data", len(x), subsample_size=subsample_size):
            x = pyro.subsample(x, event_dim=len(self.event_shape))
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x: Tensor, subsample_size: int | None = None) -> Tensor:
        """The approximate posterior q(z|x), as a Pyro function of the model's arguments; returns z."""
        self._check(x, subsample_size)
        _register("posterior", self.posterior)
        with pyro.plate("data", len(x), subsample_size=subsample_size):
            x = pyro.subsample(x, event_dim=len(self.event_shape))
            return pyro.sample("z", self.posterior(x))

    @torch.no_grad()
    def embed(self, x: Tensor) -> Tensor:
        """The mean of q(z|x): (N, *event) to (N, Z)."""
        self._check(x)
        return self.posterior(x).mean

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """The mean of p(x|z): (*batch, Z) to (*batch, *event)."""
        return self.likelihood(z).mean

    def reconstruct(self, x: Tensor) -> Tensor:
        """The mean of p(x|z) at the mean of q(z|x): (N, *event) to (N, *event)."""
        return self.decode(self.embed(x))

    @torch.no_grad()
    def generate(self, n: int) -> Tensor:
        """The means of p(x|z) at n draws of z from the prior: (n, *event)."""
        return self.decode(self.prior().sample((n,)))

    def _check(self, x: Tensor, subsample_size: int | None = None) -> None:
        if not isinstance(x, Tensor):
            raise ValueError(f"expected x to be a tensor, got {type(x).__name__}. Pass split.x, or torch.as_tensor(x).")
        if x.dim() == 0 or tuple(x.shape[1:]) != self.event_shape:
            shape = ", ".join(map(str, self.event_shape))
            if tuple(x.shape) == self.event_shape:
                fix = "For one datum, pass x[None]."
            elif x.dim() > 1 and prod(x.shape[1:]) == prod(self.event_shape):
                fix = f"Reshape it: x.reshape(-1, {shape})."
            else:
                fix = "Build the VAE with the event_shape of your data, or pass data of that shape."
            raise ValueError(f"expected x of shape (N, {shape}), got {tuple(x.shape)}. {fix}")
        if not x.is_floating_point():
            raise ValueError(f"expected x of floating point, got {x.dtype}. Convert it: x.float().")
        own = next((parameter.dtype for parameter in self.parameters()), x.dtype)
        if x.dtype != own:
            raise ValueError(f"expected x of {own}, as the networks are, got {x.dtype}. Convert it: x.to({own}).")
        if subsample_size is not None and not isinstance(subsample_size, int):
            raise ValueError(
                f"expected subsample_size to be an integer or None, got {type(subsample_size).__name__}. The model takes x "
                "alone: if these are labels that a DataLoader gives, leave them out of it."
            )
        if is_validation_enabled():
            self.likelihood.check(x)


def _register(name: str, module: nn.Module) -> None:
    """Register a module's parameters with Pyro, in place of those that an earlier VAE left under its name.

    ``pyro.module`` alone would go on handing the earlier ones to the optimiser, and this VAE would never learn.
    """
    store = pyro.get_param_store()
    for suffix, parameter in module.named_parameters():
        key = f"{name}$$${suffix}"
        if key in store and store[key] is not parameter:
            store[key] = parameter
    pyro.module(name, module)


def mlp_vae(
    event_shape: Sequence[int],
    *,
    latent_dim: int,
    hidden_dims: Sequence[int] = (400,),
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli",
    scale: float | Literal["learned", "per_pixel"] | None = None,
) -> VAE:
    """A VAE whose encoder and decoder are fully connected networks with tanh.

    Arguments:
        event_shape: the shape of one datum, (C, H, W) or (D,).
        latent_dim: Z, the number of latent dimensions.
        hidden_dims: the widths of the encoder's hidden layers; the decoder has them in reverse.
        likelihood: ``"bernoulli"`` for binary data, ``"gaussian"`` for real data.
        scale: the Gaussian's sigma: a number, 1 unless told, ``"learned"`` or ``"per_pixel"``; see :class:`Gaussian`.

    Raises:
        ValueError: an unknown likelihood, a scale for a Bernoulli, a size that is not positive.

    Example:
        >>> mlp_vae((1, 28, 28), latent_dim=20, hidden_dims=(400,)).generate(3).shape
        torch.Size([3, 1, 28, 28])
    """
    _check_sizes(event_shape=event_shape, latent_dim=[latent_dim], hidden_dims=hidden_dims)
    size, features = prod(event_shape), _num_features(likelihood, scale)
    encoder = mlp(size, hidden_dims, 2 * latent_dim)
    decoder = mlp(latent_dim, list(hidden_dims)[::-1], features * size)
    return _assemble(event_shape, latent_dim, encoder, decoder, likelihood, scale)


def conv_vae(
    event_shape: Sequence[int],
    *,
    latent_dim: int,
    channels: Sequence[int] = (32, 64),
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli",
    scale: float | Literal["learned", "per_pixel"] | None = None,
) -> VAE:
    """A VAE of images whose encoder halves them, and whose decoder doubles them, by convolutions.

    Arguments:
        event_shape: (C, H, W).
        latent_dim: Z, the number of latent dimensions.
        channels: the encoder's channels after each halving; the decoder has them in reverse.
        likelihood: ``"bernoulli"`` for binary data, ``"gaussian"`` for real data.
        scale: the Gaussian's sigma: a number, 1 unless told, ``"learned"`` or ``"per_pixel"``; see :class:`Gaussian`.

    Raises:
        ValueError: an event shape that is not (C, H, W), an unknown likelihood, a size that is not positive.

    Example:
        >>> conv_vae((1, 28, 28), latent_dim=20).generate(3).shape
        torch.Size([3, 1, 28, 28])
    """
    _check_sizes(event_shape=event_shape, latent_dim=[latent_dim], channels=channels)
    if len(event_shape) != 3 or len(channels) == 0:
        raise ValueError(
            f"expected an event_shape (C, H, W) and at least one entry in channels, got {tuple(event_shape)} and "
            f"{tuple(channels)}. For vectors, use mlp_vae."
        )
    out_channels = _num_features(likelihood, scale) * event_shape[0]
    encoder = conv_encoder(event_shape, channels, 2 * latent_dim)
    decoder = conv_decoder(latent_dim, list(channels)[::-1], out_channels, event_shape)
    return _assemble(event_shape, latent_dim, encoder, decoder, likelihood, scale)


def _check_sizes(**sizes: Sequence[int]) -> None:
    for name, values in sizes.items():
        empty = isinstance(values, Sequence) and len(values) == 0 and name == "event_shape"
        if empty or not isinstance(values, Sequence) or not all(isinstance(v, int) and v > 0 for v in values):
            raise ValueError(f"expected {name} of positive integers, got {values!r}.")


def _num_features(likelihood: str, scale: float | str | None) -> int:
    if likelihood not in ("bernoulli", "gaussian"):
        raise ValueError(f"expected likelihood to be 'bernoulli' or 'gaussian', got {likelihood!r}.")
    if likelihood == "gaussian":
        return Gaussian.features_for(1.0 if scale is None else scale)
    if scale is not None:
        raise ValueError(f"expected no scale with likelihood='bernoulli', got {scale!r}. Pass likelihood='gaussian'.")
    return Bernoulli.num_features


def _assemble(
    event_shape: Sequence[int],
    latent_dim: int,
    encoder: nn.Module,
    decoder: nn.Module,
    likelihood: str,
    scale: float | Literal["learned", "per_pixel"] | None,
) -> VAE:
    shape = tuple(event_shape)
    gaussian_scale = 1.0 if scale is None else scale
    pixels = Bernoulli(decoder, shape) if likelihood == "bernoulli" else Gaussian(decoder, shape, gaussian_scale)
    return VAE(prior=StandardNormal(latent_dim), likelihood=pixels, posterior=DiagonalNormal(encoder, shape))
