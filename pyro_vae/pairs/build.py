"""Builders of pairs with common networks, such as `mlp_vae` and `conv_vae`."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Any, Literal

from torch import nn

from pyro_vae.checks import Count, Shape, Whole, checked
from pyro_vae.errors import PyroVAEError
from pyro_vae.likelihoods import Likelihood
from pyro_vae.networks import Concatenated, conv_decoder, conv_encoder, mlp
from pyro_vae.pairs.autoencoder import Autoencoder
from pyro_vae.pairs.conditional import ConditionalVAE
from pyro_vae.pairs.hierarchical import BottomUp, HierarchicalVAE, Ladder
from pyro_vae.pairs.options import check_posterior, find_likelihood
from pyro_vae.pairs.semi_supervised import SemiSupervisedVAE
from pyro_vae.pairs.vae import VAE
from pyro_vae.posteriors import DiagonalNormal, Posterior
from pyro_vae.priors import StandardNormal

COLOURS = (1, 3, 4)  # how many channels the images have that come with their channels last


@checked
def mlp_vae(
    event_shape: Shape,
    *,
    latent_dim: Count,
    hidden_dims: Sequence[Count] = (400,),
    likelihood: str | type[Likelihood] = "bernoulli",
    posterior: type[Posterior] = DiagonalNormal,
    posterior_options: Mapping[str, Any] | None = None,
    prior: nn.Module | None = None,
    **options: Any,
) -> VAE:
    """Build a VAE whose encoder and decoder are fully connected networks with tanh activations.

    Arguments:
        event_shape: the shape of one datum, (C, H, W) or (D,).
        latent_dim: Z, the number of latent dimensions.
        hidden_dims: the widths of the encoder's hidden layers. The decoder has them in reverse order.
        likelihood: ``"bernoulli"`` for binary data, ``"gaussian"`` for real data, the name of another class in
            :mod:`pyro_vae.likelihoods`, or a subclass of :class:`Likelihood`.
        posterior: the class of the approximate posterior, a subclass of :class:`Posterior`.
        posterior_options: options of the posterior, such as ``{"rank": 4}`` for :class:`LowRankNormal`; None is no
            options.
        prior: a module that returns the distribution of one z; None is :class:`StandardNormal`.
        options: options of the likelihood, such as `scale` for :class:`Gaussian`.

    Raises:
        ValueError: an unknown likelihood, a posterior that is not a class of :class:`Posterior`, an unknown option of
            either, or a size that is not positive.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.mlp_vae((1, 28, 28), latent_dim=20, posterior=pv.LowRankNormal, posterior_options={"rank": 4})
        >>> vae.generate(3).shape
        torch.Size([3, 1, 28, 28])
    """
    chosen = check_posterior(posterior, posterior_options)
    size, shape, family = prod(event_shape), tuple(event_shape), find_likelihood(likelihood, options, posterior)
    encoder = mlp(size, hidden_dims, posterior.features_for(latent_dim, **chosen))
    decoder = mlp(latent_dim, list(hidden_dims)[::-1], family.features_for(**options) * size)
    return VAE(
        prior=StandardNormal(latent_dim) if prior is None else prior,
        likelihood=family(decoder, shape, **options),
        posterior=posterior.build(encoder, shape, latent_dim, **chosen),
    )


@checked
def conv_vae(
    event_shape: Shape,
    *,
    latent_dim: Count,
    channels: Shape = (32, 64),
    residual_blocks: Whole = 0,
    likelihood: str | type[Likelihood] = "bernoulli",
    posterior: type[Posterior] = DiagonalNormal,
    posterior_options: Mapping[str, Any] | None = None,
    prior: nn.Module | None = None,
    **options: Any,
) -> VAE:
    """Build a VAE of images whose encoder and decoder are convolutional networks.

    Arguments:
        event_shape: (C, H, W).
        latent_dim, likelihood, posterior, posterior_options, prior, options: as in :func:`mlp_vae`.
        channels: the number of the encoder's channels after each halving of height and width. The decoder has them in
            reverse order.
        residual_blocks: the number of residual blocks after each halving and before each doubling.

    Raises:
        ValueError: an `event_shape` that is not (C, H, W), empty `channels`, or any reason of :func:`mlp_vae`.

    Example:
        >>> conv_vae((1, 28, 28), latent_dim=20).generate(3).shape
        torch.Size([3, 1, 28, 28])
    """
    if len(event_shape) != 3:
        raise PyroVAEError(f"expected an event_shape (C, H, W), got {event_shape}. For vectors, use mlp_vae.")
    # A square image with its channels last. Channels first, it would be a stack of stripes.
    if event_shape[0] == event_shape[1] > max(COLOURS) and event_shape[2] in COLOURS:
        raise PyroVAEError(
            f"expected an event_shape (C, H, W), with the channels first, got {tuple(event_shape)}, which has them "
            f"last. Pass {(event_shape[2], *event_shape[:2])}, and x.permute(0, 3, 1, 2)."
        )
    chosen = check_posterior(posterior, posterior_options)
    family, shape = find_likelihood(likelihood, options, posterior), tuple(event_shape)
    out_channels = family.features_for(**options) * event_shape[0]
    encoder = conv_encoder(shape, channels, posterior.features_for(latent_dim, **chosen), residual_blocks)
    decoder = conv_decoder(latent_dim, list(channels)[::-1], out_channels, shape, residual_blocks)
    return VAE(
        prior=StandardNormal(latent_dim) if prior is None else prior,
        likelihood=family(decoder, shape, **options),
        posterior=posterior.build(encoder, shape, latent_dim, **chosen),
    )


@checked
def mlp_conditional_vae(
    event_shape: Shape,
    *,
    latent_dim: Count,
    label_dim: Count,
    hidden_dims: Sequence[Count] = (400,),
    likelihood: str | type[Likelihood] = "bernoulli",
    **options: Any,
) -> ConditionalVAE:
    """Build a :class:`ConditionalVAE` of fully connected networks. Invalid arguments raise the errors of `mlp_vae`.

    Arguments:
        event_shape, latent_dim, hidden_dims, likelihood, options: as in :func:`mlp_vae`.
        label_dim: the number of classes if y is labels, or the length of y if it is vectors.

    Example:
        >>> import torch
        >>> vae = mlp_conditional_vae((1, 28, 28), latent_dim=20, label_dim=10)
        >>> vae.generate(torch.arange(10)).shape
        torch.Size([10, 1, 28, 28])
    """
    family, shape, size = find_likelihood(likelihood, options), tuple(event_shape), prod(event_shape)
    encoder = mlp(size + label_dim, hidden_dims, 2 * latent_dim)
    decoder = mlp(latent_dim + label_dim, list(hidden_dims)[::-1], family.features_for(**options) * size)
    return ConditionalVAE(
        prior=StandardNormal(latent_dim),
        likelihood=family(Concatenated(decoder), shape, **options),
        posterior=DiagonalNormal(Concatenated(encoder), shape),
        num_classes=label_dim,
    )


@checked
def mlp_semi_supervised_vae(
    event_shape: Shape,
    *,
    latent_dim: Count,
    num_classes: Count,
    hidden_dims: Sequence[Count] = (400,),
    classifier_weight: float = 0.0,
    likelihood: str | type[Likelihood] = "bernoulli",
    **options: Any,
) -> SemiSupervisedVAE:
    """Build a :class:`SemiSupervisedVAE` of fully connected networks. Invalid arguments raise the errors of `mlp_vae`.

    Arguments:
        event_shape, latent_dim, likelihood, options: as in :func:`mlp_vae`.
        num_classes, classifier_weight: as in :class:`SemiSupervisedVAE`.
        hidden_dims: the widths of the hidden layers of encoder and classifier. The decoder has them in reverse order.

    Example:
        >>> vae = mlp_semi_supervised_vae((1, 28, 28), latent_dim=20, num_classes=10, classifier_weight=50.0)
        >>> vae.num_classes
        10
    """
    conditional = mlp_conditional_vae(
        event_shape,
        latent_dim=latent_dim,
        label_dim=num_classes,
        hidden_dims=hidden_dims,
        likelihood=likelihood,
        **options,
    )
    return SemiSupervisedVAE(
        prior=conditional.prior,
        likelihood=conditional.likelihood,
        posterior=conditional.posterior,
        classifier=mlp(prod(event_shape), hidden_dims, num_classes),
        num_classes=num_classes,
        classifier_weight=classifier_weight,
    )


@checked
def mlp_hierarchical_vae(
    event_shape: Shape,
    *,
    latent_dims: Shape,
    hidden_dims: Sequence[Count] = (400,),
    guide: Literal["ladder", "bottom_up"] = "ladder",
    likelihood: str | type[Likelihood] = "bernoulli",
    **options: Any,
) -> HierarchicalVAE:
    """Build a :class:`HierarchicalVAE` of fully connected networks with one hidden layer each.

    Arguments:
        event_shape, likelihood, options: as in :func:`mlp_vae`.
        latent_dims: the numbers of latent dimensions of ``z1``, ``z2``, and so on.
        hidden_dims: the widths of the hidden layers between x and ``z1``, between ``z1`` and ``z2``, and so on. One
            width applies to all.
        guide: ``"ladder"`` for :class:`Ladder`, ``"bottom_up"`` for :class:`BottomUp`.

    Raises:
        ValueError: an unknown guide, another number of widths than of layers, or any reason of :func:`mlp_vae`.

    Example:
        >>> mlp_hierarchical_vae((1, 28, 28), latent_dims=(32, 16), hidden_dims=(400, 200)).generate(3).shape
        torch.Size([3, 1, 28, 28])
    """
    widths = list(hidden_dims) * len(latent_dims) if len(hidden_dims) == 1 else list(hidden_dims)
    if len(widths) != len(latent_dims):
        raise PyroVAEError(
            f"expected one hidden width or one for each layer, got latent_dims={latent_dims} and "
            f"hidden_dims={hidden_dims}. Pass as many hidden_dims as "
            "latent_dims."
        )
    family, shape, size = find_likelihood(likelihood, options), tuple(event_shape), prod(event_shape)
    if guide == "bottom_up":
        inputs = [shape, *((z,) for z in latent_dims[:-1])]
        posterior: BottomUp | Ladder = BottomUp(
            [
                DiagonalNormal(mlp(prod(below), [width], 2 * z), below)
                for below, width, z in zip(inputs, widths, latent_dims, strict=True)
            ]
        )
    elif guide == "ladder":
        encoders = [nn.Sequential(*mlp(n, [], width), nn.Tanh()) for n, width in pairwise([size, *widths])]
        heads = [nn.Linear(width, 2 * z) for width, z in zip(widths, latent_dims, strict=True)]
        posterior = Ladder(encoders, heads, shape)
    else:
        raise PyroVAEError(f"expected guide to be 'ladder' or 'bottom_up', got {guide!r}. Pass one of these names.")
    return HierarchicalVAE(
        prior=StandardNormal(latent_dims[-1]),
        layers=[
            DiagonalNormal(mlp(high, [width], 2 * low), (high,))
            for (low, high), width in zip(pairwise(latent_dims), widths[1:], strict=True)
        ],
        likelihood=family(mlp(latent_dims[0], [widths[0]], family.features_for(**options) * size), shape, **options),
        posterior=posterior,
    )


@checked
def mlp_autoencoder(
    event_shape: Shape,
    *,
    latent_dim: Count,
    hidden_dims: Sequence[Count] = (400,),
    likelihood: str | type[Likelihood] = "bernoulli",
    **options: Any,
) -> Autoencoder:
    """Build an :class:`Autoencoder` of fully connected networks. Invalid arguments raise the errors of `mlp_vae`.

    Arguments:
        event_shape, hidden_dims, likelihood, options: as in :func:`mlp_vae`.
        latent_dim: Z, the number of dimensions of the code.

    Example:
        >>> import torch
        >>> mlp_autoencoder((1, 28, 28), latent_dim=20).embed(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 20])
    """
    family, size = find_likelihood(likelihood, options), prod(event_shape)
    decoder = mlp(latent_dim, list(hidden_dims)[::-1], family.features_for(**options) * size)
    return Autoencoder(
        encoder=mlp(size, hidden_dims, latent_dim),
        likelihood=family(decoder, tuple(event_shape), **options),
    )
