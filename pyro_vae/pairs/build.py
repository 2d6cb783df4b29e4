"""Pairs of the common networks, each in one call."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from math import prod
from typing import Any

from torch import nn

from pyro_vae.likelihoods import BY_NAME, Likelihood
from pyro_vae.networks import conv_decoder, conv_encoder, mlp
from pyro_vae.pairs.vae import VAE
from pyro_vae.posteriors import DiagonalNormal, Posterior
from pyro_vae.priors import StandardNormal


def mlp_vae(
    event_shape: Sequence[int],
    *,
    latent_dim: int,
    hidden_dims: Sequence[int] = (400,),
    likelihood: str | type[Likelihood] = "bernoulli",
    posterior: type[Posterior] = DiagonalNormal,
    prior: nn.Module | None = None,
    **options: Any,
) -> VAE:
    """A VAE whose encoder and decoder are fully connected networks with tanh.

    Arguments:
        event_shape: the shape of one datum, (C, H, W) or (D,).
        latent_dim: Z, the number of latent dimensions.
        hidden_dims: the widths of the encoder's hidden layers; the decoder has them in reverse.
        likelihood: ``"bernoulli"`` for binary data, ``"gaussian"`` for real data, or any other of
            :mod:`pyro_vae.likelihoods` by name or class, or a subclass of :class:`Likelihood`.
        posterior: the guide's family, a subclass of :class:`Posterior`.
        prior: a module that returns the distribution of one z; None is :class:`StandardNormal`.
        options: the likelihood's own, such as the `scale` of :class:`Gaussian`.

    Raises:
        ValueError: an unknown likelihood, an option that it has not, a size that is not positive.

    Example:
        >>> mlp_vae((1, 28, 28), latent_dim=20, hidden_dims=(400,)).generate(3).shape
        torch.Size([3, 1, 28, 28])
    """
    _check_sizes(event_shape=event_shape, latent_dim=[latent_dim], hidden_dims=hidden_dims)
    size, family = prod(event_shape), find_likelihood(likelihood, options)
    encoder = mlp(size, hidden_dims, posterior.features_for(latent_dim))
    decoder = mlp(latent_dim, list(hidden_dims)[::-1], family.features_for(**options) * size)
    shape = tuple(event_shape)
    return VAE(
        prior=StandardNormal(latent_dim) if prior is None else prior,
        likelihood=family(decoder, shape, **options),
        posterior=posterior(encoder, shape),
    )


def conv_vae(
    event_shape: Sequence[int],
    *,
    latent_dim: int,
    channels: Sequence[int] = (32, 64),
    residual_blocks: int = 0,
    likelihood: str | type[Likelihood] = "bernoulli",
    posterior: type[Posterior] = DiagonalNormal,
    prior: nn.Module | None = None,
    **options: Any,
) -> VAE:
    """A VAE of images whose encoder halves them, and whose decoder doubles them, by convolutions.

    Arguments:
        event_shape: (C, H, W).
        latent_dim: Z, the number of latent dimensions.
        channels: the encoder's channels after each halving; the decoder has them in reverse.
        residual_blocks: how many residual blocks follow each halving, and precede each doubling.
        likelihood: as in :func:`mlp_vae`.
        posterior: as in :func:`mlp_vae`.
        prior: as in :func:`mlp_vae`.
        options: the likelihood's own, such as the `scale` of :class:`Gaussian`.

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
    family, shape = find_likelihood(likelihood, options), tuple(event_shape)
    out_channels = family.features_for(**options) * event_shape[0]
    encoder = conv_encoder(shape, channels, posterior.features_for(latent_dim), residual_blocks)
    decoder = conv_decoder(latent_dim, list(channels)[::-1], out_channels, shape, residual_blocks)
    return VAE(
        prior=StandardNormal(latent_dim) if prior is None else prior,
        likelihood=family(decoder, shape, **options),
        posterior=posterior(encoder, shape),
    )


def find_likelihood(likelihood: str | type[Likelihood], options: dict[str, Any]) -> type[Likelihood]:
    """The class of a likelihood by its name, if these are options of it."""
    family = BY_NAME.get(likelihood) if isinstance(likelihood, str) else likelihood
    if not (isinstance(family, type) and issubclass(family, Likelihood)):
        names = ", ".join(map(repr, BY_NAME))
        raise ValueError(
            f"expected likelihood to be one of {names}, or a subclass of pv.Likelihood, got {likelihood!r}."
        )
    known = [name for name in inspect.signature(family).parameters if name not in ("decoder", "event_shape")]
    for name, value in options.items():
        if name not in known:
            has = ", ".join(known) if known else "none"
            raise ValueError(
                f"expected options of {family.__name__} (it has {has}), got {name}={value!r}. Drop it, or pass another likelihood."
            )
    return family


def _check_sizes(**sizes: Sequence[int]) -> None:
    for name, values in sizes.items():
        empty = isinstance(values, Sequence) and len(values) == 0 and name == "event_shape"
        if empty or not isinstance(values, Sequence) or not all(isinstance(v, int) and v > 0 for v in values):
            raise ValueError(f"expected {name} of positive integers, got {values!r}.")
