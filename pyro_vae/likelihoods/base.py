"""The base class of likelihoods p(x|z)."""

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.checks import Count, checked, refuse_invalid_parameters
from pyro_vae.errors import PyroVAEError
from pyro_vae.networks import apply_batched


class Likelihood(nn.Module):
    """Base class of likelihoods: a decoder, and the distribution of x that the decoder's outputs parametrise.

    A subclass defines `num_features` and :meth:`pixel_distribution`, for elements that are independent given z. For
    other likelihoods it defines :meth:`event_distribution`. It may define :meth:`check`. Further arguments of its
    `__init__` are its options.

    Arguments:
        decoder: a network from (N, Z) to (N, ...), with `num_features` outputs for each element of a datum. The outputs
            are in the order of (N, num_features, *event). Further arguments of the network are conditions such as
            labels.
        event_shape: the shape of one datum.

    Raises:
        ValueError: `decoder` is not a module, or `event_shape` is not a tuple. When a model runs: x is outside the
            support, as :meth:`check` says.

    Example:
        >>> import pyro.distributions as dist, torch, pyro_vae as pv
        >>> class Laplace(pv.Likelihood):
        ...     def pixel_distribution(self, loc):
        ...         return dist.Laplace(loc, 1.0)
        >>> Laplace(torch.nn.Linear(2, 4), (4,))(torch.zeros(5, 2)).event_shape
        torch.Size([4])
    """

    #: The number of decoder outputs for each element of a datum.
    num_features: int = 1
    #: The value that replaces missing elements. It must be in the support.
    filler: float = 0.0
    #: The smallest scale that the decoder or a parameter can give; None if there is no such bound.
    floor: float | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "check" in vars(cls):
            cls.check = checked(cls.check)  # type: ignore[method-assign]

    @checked
    def __init__(self, decoder: nn.Module, event_shape: Sequence[Count]) -> None:
        super().__init__()
        self.decoder = decoder
        self.event_shape = tuple(event_shape)

    @classmethod
    def features_for(cls, **options: Any) -> int:
        """`num_features` under these options, before a decoder exists. Raises ValueError for invalid options."""
        return cls.num_features

    def forward(self, z: Tensor, *given: Tensor, mask: Tensor | None = None) -> dist.TorchDistribution:
        """The distribution of x given z, with batch shape `batch` and event shape `event`.

        Arguments:
            z: latents of shape (*batch, Z).
            given: further arguments of the decoder, such as labels.
            mask: booleans that broadcast to (*batch, *event), True where an element is observed. The density
                includes only the observed elements. None is True everywhere.

        Raises:
            ValueError: the decoder has another number of outputs than `num_features` for each element.
        """
        features = apply_batched(self.decoder, z, 1, *given)
        expected = self.num_features * math.prod(self.event_shape)
        batch = torch.broadcast_shapes(z.shape[:-1], *(y.shape[:-1] for y in given))
        if features.numel() != expected * math.prod(batch):
            raise PyroVAEError(
                f"expected a decoder with {expected} outputs for each datum ({self.num_features} for each element of "
                f"{self.event_shape}), got outputs of shape {tuple(features.shape)} for z of shape {tuple(z.shape)}. "
                "Change its last layer."
            )
        features = features.reshape(*batch, self.num_features, *self.event_shape)
        try:
            return self.event_distribution(*features.unbind(len(batch)), mask=mask)
        except ValueError as error:
            refuse_invalid_parameters(error)
            raise

    def event_distribution(self, *features: Tensor, mask: Tensor | None) -> dist.TorchDistribution:
        """The distribution of one datum, given `num_features` tensors of shape (*batch, *event).

        Here the elements are independent, with the distribution :meth:`pixel_distribution`.
        """
        pixels = self.pixel_distribution(*features)
        if pixels.event_shape or pixels.batch_shape != features[0].shape:
            raise PyroVAEError(
                f"expected {type(self).__name__}.pixel_distribution to return a distribution of batch shape "
                f"{tuple(features[0].shape)} and event shape (), got {tuple(pixels.batch_shape)} and "
                f"{tuple(pixels.event_shape)}. Drop to_event from it."
            )
        return (pixels if mask is None else pixels.mask(mask)).to_event(len(self.event_shape))

    def pixel_distribution(self, *features: Tensor) -> dist.TorchDistribution:
        """The distribution of each element of x, given `num_features` tensors of shape (*batch, *event)."""
        raise NotImplementedError(
            f"expected {type(self).__name__} to define pixel_distribution or event_distribution, got neither. "
            "Define one."
        )

    def decode(self, z: Tensor, *given: Tensor) -> Tensor:
        """The mean of p(x|z), or its replacement in a subclass: (*batch, Z) to (*batch, *event)."""
        return self.from_statistic(self.statistic(self(z, *given)))

    def statistic(self, distribution: Any, x: Tensor | None = None) -> Tensor:
        """The statistic of p(x|z) that :meth:`VAE.impute` averages over z. Here it is the mean, (*batch, *event).

        Arguments:
            distribution: the result of :meth:`forward`.
            x: data of a distribution with a mask. The statistic is then conditional on the observed elements of x.
        """
        return distribution.mean

    def from_statistic(self, statistic: Tensor) -> Tensor:
        """The prediction of x, (*batch, *event), from a statistic or its average. Here it is the statistic."""
        return statistic

    @property
    def has_learned_scale(self) -> bool:
        """Whether a scale is a parameter that :meth:`fit_scale` moves. Here there is none."""
        return False

    def fit_scale(self, mean: Tensor, x: Tensor, weights: Tensor, rate: float = 1.0) -> None:
        """Move a learned scale towards the residuals' own; :func:`pyro_vae.fit_scale` calls this without gradients.

        Arguments:
            mean: means of p(x|z) at samples of z, of shape (R, *event).
            x: the data that belong to them, of that shape.
            weights: how much each element counts, at least 0, of that shape; 0 where it is missing.
            rate: how far to go, from 0 (nowhere) to 1 (all the way).
        """

    def check(self, x: Tensor) -> None:
        """Raise ValueError for x outside the support. Pairs call this while Pyro's validation is on."""

    def _refuse_unless(self, valid: Tensor, x: Tensor, expected: str, fix: str) -> None:
        if not bool(valid.all()):
            got = f"{x[~valid].flatten()[0].item():.6g}"
            fix = "For missing values, pass a mask that is True where x is observed." if got == "nan" else fix
            raise PyroVAEError(f"a {type(self).__name__} likelihood expected x {expected}, got {got}. {fix}")
