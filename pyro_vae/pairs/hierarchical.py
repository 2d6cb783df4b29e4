"""The hierarchical VAE, with one latent site for each layer, and its two guides: bottom-up and ladder."""

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from pyro_vae.checks import Whole
from pyro_vae.errors import PyroVAEError
from pyro_vae.likelihoods import Likelihood
from pyro_vae.networks import apply_batched
from pyro_vae.pairs.base import Pair, in_evaluation_mode, on_own_device

Draw = Callable[[str, Any], Tensor]  # maps the name and distribution of a site to its value


class BottomUp(nn.Module):
    r"""A guide that samples from the bottom layer to the top layer, each given the layer below.

    .. math:: q(z_1, \dots, z_L \mid x) = q(z_1 \mid x) \prod_{l=2}^L q(z_l \mid z_{l-1})

    The model samples in the opposite order, so the KL has no closed form: use ``pv.ELBO(kl="monte_carlo")``.

    Arguments:
        posteriors: a module from x to the distribution of ``z1``, one from ``z1`` to the distribution of ``z2``, and so
            on, such as :class:`DiagonalNormal`.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.mlp_hierarchical_vae((5,), latent_dims=(4, 2), hidden_dims=(8,), guide="bottom_up")
        >>> len(vae.posterior.posteriors)
        2

    References:
        Rezende, Mohamed and Wierstra (2014), *Stochastic Backpropagation and Approximate Inference in Deep Generative
        Models*, ICML.
        Burda, Grosse and Salakhutdinov (2016), *Importance Weighted Autoencoders*, ICLR.
    """

    def __init__(self, posteriors: Sequence[nn.Module]) -> None:
        super().__init__()
        self.posteriors = nn.ModuleList(posteriors)

    def forward(self, x: Tensor, layers: nn.ModuleList, draw: Draw) -> list[Tensor]:
        """The list of latents from ``z1`` to the top layer, where `draw` returns the value of each site."""
        latents = [x]
        for layer, posterior in enumerate(self.posteriors, 1):
            latents.append(draw(f"z{layer}", posterior(latents[-1])))
        return latents[1:]


class Ladder(nn.Module):
    r"""A guide that samples from the top layer to the bottom layer, from products of its normals and the model's.

    .. math:: q(z_l \mid x, z_{l+1}) \propto
        \mathcal N\bigl(z_l; \hat\mu_l(x), \hat\sigma_l(x)^2\bigr) \, p(z_l \mid z_{l+1}),
        \qquad q(z_L \mid x) = \mathcal N\bigl(z_L; \hat\mu_L(x), \hat\sigma_L(x)^2\bigr)

    A deterministic network computes all :math:`\hat\mu_l` and :math:`\hat\sigma_l` from the bottom to the top. The
    model's layers are independent normals (:class:`DiagonalNormal`). Model and guide sample in the same order, so each
    KL has a closed form.

    Arguments:
        encoders: one network for each layer: from x (N, *event) to features, from these to the features of the next
            layer, and so on.
        heads: one network for each layer, from its encoder's features to (N, 2 Z_l): the means, then the logs of the
            scales.
        event_shape: the shape of one datum.

    Raises:
        ValueError: different numbers of encoders and heads. When it runs: a layer of the model is not an independent
            normal, or its size differs from its head's.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.mlp_hierarchical_vae((5,), latent_dims=(4, 2), hidden_dims=(8,), guide="ladder")
        >>> len(vae.posterior.heads)
        2

    References:
        Sønderby, Raiko, Maaløe, Sønderby and Winther (2016), *Ladder Variational Autoencoders*, NeurIPS.
    """

    def __init__(self, encoders: Sequence[nn.Module], heads: Sequence[nn.Module], event_shape: tuple[int, ...]) -> None:
        super().__init__()
        if len(encoders) != len(heads):
            got = f"{len(encoders)} encoders and {len(heads)} heads"
            raise PyroVAEError(f"expected a head for each encoder, got {got}. Pass one of each per layer.")
        self.encoders = nn.ModuleList(encoders)
        self.heads = nn.ModuleList(heads)
        self.event_shape = tuple(event_shape)

    def forward(self, x: Tensor, layers: nn.ModuleList, draw: Draw) -> list[Tensor]:
        """The list of latents from ``z1`` to the top layer, where `draw` returns the value of each site."""
        features, event_dim, parameters = x, len(self.event_shape), []
        for encoder, head in zip(self.encoders, self.heads, strict=True):
            features, event_dim = apply_batched(encoder, features, event_dim), 1
            loc, log_scale = apply_batched(head, features, 1).chunk(2, -1)
            parameters.append((loc, log_scale.exp()))
        top = len(parameters)
        latents = [draw(f"z{top}", dist.Normal(*parameters[-1]).to_event(1))]
        for layer in range(top - 1, 0, -1):
            loc, scale = parameters[layer - 1]
            down = _independent_normal(layers[layer - 1](latents[0]), loc.shape[-1], layer)
            precision, down_precision = scale**-2, down.scale**-2
            variance = 1 / (precision + down_precision)
            mean = variance * (precision * loc + down_precision * down.loc)
            latents.insert(0, draw(f"z{layer}", dist.Normal(mean, variance.sqrt()).to_event(1)))
        return latents


class HierarchicalVAE(Pair):
    r"""A VAE with L layers of latents, from ``z1`` next to x up to ``zL``.

    .. math:: p(x, z_1, \dots, z_L) = p(z_L) \prod_{l=1}^{L-1} p(z_l \mid z_{l+1}) \; p(x \mid z_1)

    Arguments:
        prior: a module that returns the distribution of one ``zL``.
        layers: L - 1 modules: from ``z2`` to the distribution of ``z1``, from ``z3`` to the distribution of ``z2``, and
            so on, such as :class:`DiagonalNormal`.
        likelihood: a module from ``z1`` to the distribution of x.
        posterior: the guide, a :class:`BottomUp` or :class:`Ladder`.

    Raises:
        ValueError: model and guide have different numbers of layers. When it runs: data of another shape or type.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.mlp_hierarchical_vae((5,), latent_dims=(4, 2), hidden_dims=(16, 8), likelihood="gaussian")
        >>> history = pv.fit(vae, torch.randn(100, 5), pv.ELBO(), epochs=1)
        >>> [z.shape[-1] for z in vae.embed(torch.randn(3, 5))]
        [4, 2]

    References:
        The papers of :class:`BottomUp` and :class:`Ladder`.
    """

    layers: nn.ModuleList

    def __init__(
        self, *, prior: nn.Module, layers: Sequence[nn.Module], likelihood: Likelihood, posterior: BottomUp | Ladder
    ) -> None:
        given = len(posterior.posteriors if isinstance(posterior, BottomUp) else posterior.encoders)
        if given != len(layers) + 1:
            expected = f"a guide of {len(layers) + 1} layers, for the prior and {len(layers)} layers below it"
            raise PyroVAEError(f"expected {expected}, got {given}. Give the guide one layer more than layers.")
        super().__init__(prior=prior, layers=nn.ModuleList(layers), likelihood=likelihood, posterior=posterior)

    @on_own_device
    def model(self, x: Tensor, mask: Tensor | None = None, *, subsample_size: int | None = None) -> Tensor:
        """The generative model, as a Pyro function with the arguments of :meth:`VAE.model`."""
        self._register("prior", "layers", "likelihood")
        with self._data(x, mask, subsample_size) as (x, mask):
            z = self._down(pyro.sample)
            return pyro.sample("x", self.likelihood(z, mask=mask), obs=x)

    @on_own_device
    def guide(self, x: Tensor, mask: Tensor | None = None, *, subsample_size: int | None = None) -> list[Tensor]:
        """The approximate posterior, as a Pyro function of the model's arguments. It returns the list of latents."""
        self._register("posterior")
        if isinstance(self.posterior, Ladder):
            self._register("layers")
        with self._data(x, mask, subsample_size) as (x, _):
            return self.posterior(x, self.layers, pyro.sample)

    def check_data(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Raise ValueError for data of the wrong shape or type. `fit` calls this before it trains on the data."""
        self._observed(x, mask)

    @in_evaluation_mode
    def embed(self, x: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """The guide's means of ``z1``, ``z2``, ..., each given the means that it depends on: a list of (N, Z_l)."""
        return self.posterior(self._observed(x, mask), self.layers, lambda _, distribution: distribution.mean)

    @in_evaluation_mode
    def reconstruct(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The mean of p(x|z1) at the ``z1`` of :meth:`embed`: (N, *event) to (N, *event)."""
        return self.decode(self.embed(x, mask)[0])

    @in_evaluation_mode
    def generate(self, n: Whole) -> Tensor:
        """The means of p(x|z1) at n samples of ``z1`` from the model, of shape (n, *event)."""
        return self.decode(self._down(lambda _, distribution: distribution.sample(), (n,)))

    def _down(self, draw: Draw, shape: tuple[int, ...] = ()) -> Tensor:
        """The value of ``z1``, after all layers from the top down."""
        prior = self.prior()
        z = draw(f"z{len(self.layers) + 1}", prior.expand(shape) if shape else prior)
        for layer in range(len(self.layers), 0, -1):
            z = draw(f"z{layer}", self.layers[layer - 1](z))
        return z


def _independent_normal(distribution: Any, size: int, layer: int) -> Any:
    """The normal distribution of each dimension of a layer. Raises ValueError for another distribution or size."""
    normal = getattr(distribution, "base_dist", None)
    if not isinstance(normal, dist.Normal):
        raise PyroVAEError(
            f"a Ladder multiplies densities of normals: expected layers of independent normals at z{layer}, got "
            f"{type(distribution).__name__}. Use pv.DiagonalNormal as the layer, or pv.BottomUp as the guide."
        )
    if normal.loc.shape[-1] != size:
        got = f"a layer of {normal.loc.shape[-1]} dimensions and a head of {size}"
        fix = "Give the head 2 outputs for each dimension of the layer."
        raise PyroVAEError(f"expected z{layer} to have one size in model and guide, got {got}. {fix}")
    return normal
