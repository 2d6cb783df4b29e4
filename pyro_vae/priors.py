"""Priors p(z): modules that return the distribution of one z when called without arguments."""

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.checks import Count, Shape, checked, shown
from pyro_vae.devices import elsewhere
from pyro_vae.distributions import Mixture, Normal
from pyro_vae.errors import PyroVAEError
from pyro_vae.flows import Flow, Kind

__all__ = ["FlowPrior", "MixturePrior", "StandardNormal", "VampPrior"]


class StandardNormal(nn.Module):
    """A standard normal prior of Z = `latent_dim` dimensions.

    .. math:: p(z) = \\mathcal N(z; 0, I)

    Example:
        >>> StandardNormal(3)().event_shape
        torch.Size([3])
    """

    loc: Tensor
    scale: Tensor

    @checked
    def __init__(self, latent_dim: Count) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(latent_dim), persistent=False)

    def forward(self) -> dist.TorchDistribution:
        """The distribution of one z, with event shape (Z,)."""
        return Normal(self.loc, self.scale).to_event(1)


class MixturePrior(nn.Module):
    r"""A mixture of K = `components` diagonal normals of Z = `latent_dim` dimensions. All its parameters are learned.

    .. math:: p(z) = \sum_{k=1}^K \pi_k\, \mathcal N(z; \mu_k, \operatorname{diag} \sigma_k^2)

    Initially the weights are equal, the scales are 1, and the means are draws from a standard normal. The KL to this
    prior has no closed form: use ``pv.ELBO(kl="monte_carlo")``.

    Example:
        >>> MixturePrior(3, components=10)().event_shape
        torch.Size([3])

    References:
        Dilokthanakul et al. (2016), *Deep Unsupervised Clustering with Gaussian Mixture Variational Autoencoders*.
    """

    @checked
    def __init__(self, latent_dim: Count, components: Count = 10) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(components, latent_dim))
        self.log_scale = nn.Parameter(torch.zeros(components, latent_dim))

    def forward(self) -> dist.TorchDistribution:
        """The distribution of one z, with event shape (Z,)."""
        components = Normal(self.loc, self.log_scale.exp()).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), components)


class VampPrior(nn.Module):
    r"""A mixture of the approximate posteriors at learned pseudo-inputs.

    .. math:: p(z) = \frac1K \sum_{k=1}^K q(z \mid u_k)

    The prior that maximises the ELBO is the aggregate posterior. This prior approximates it by K pseudo-inputs. The KL
    to this prior has no closed form: use ``pv.ELBO(kl="monte_carlo")``.

    Arguments:
        posterior: the posterior module of the pair, such as :class:`DiagonalNormal`. Prior and guide share its
            parameters.
        pseudo_inputs: the initial u_k, of shape (K, *event), for example some of the data.

    Raises:
        ValueError: `pseudo_inputs` is not floating point, its shape does not match the posterior's `event_shape`, or it
            is on another device than the posterior's parameters.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.mlp_vae((4,), latent_dim=3)
        >>> vae.prior = pv.VampPrior(vae.posterior, torch.rand(20, 4).round())
        >>> vae.prior().event_shape
        torch.Size([3])

    References:
        Tomczak and Welling (2018), *VAE with a VampPrior*, AISTATS.
    """

    @checked
    def __init__(self, posterior: nn.Module, pseudo_inputs: Tensor) -> None:
        super().__init__()
        if getattr(getattr(posterior, "forward", None), "__func__", None) is nn.Module.forward:  # a pair has none
            raise PyroVAEError(
                f"expected the posterior of a pair, got a {type(posterior).__name__}. Pass vae.posterior."
            )
        dtype, shape = pseudo_inputs.dtype, tuple(pseudo_inputs.shape)
        event_shape = getattr(posterior, "event_shape", shape[1:])
        if not dtype.is_floating_point:
            raise PyroVAEError(f"expected pseudo_inputs of floating point, got {dtype}. Pass pseudo_inputs.float().")
        if len(shape) < 2 or shape[1:] != event_shape:
            raise PyroVAEError(f"expected pseudo_inputs of shape (K, *{event_shape}), got {shape}. Pass some data.")
        if refusal := elsewhere(posterior.parameters(), type(self), (posterior, pseudo_inputs), {}):
            raise refusal
        self.posterior = posterior
        self.pseudo_inputs = nn.Parameter(pseudo_inputs.detach().clone())

    def forward(self) -> dist.TorchDistribution:
        """The distribution of one z, with event shape (Z,)."""
        uniform = dist.Categorical(logits=self.pseudo_inputs.new_zeros(len(self.pseudo_inputs)))
        q = self.posterior(self.pseudo_inputs)
        if not isinstance(q, torch.distributions.Distribution):
            raise PyroVAEError(
                f"expected a posterior that returns a distribution, got one that returns {shown(q)}. Pass one such as "
                "pv.DiagonalNormal."
            )
        return Mixture(uniform, q)


class FlowPrior(nn.Module):
    r"""A standard normal transformed by a :class:`~pyro_vae.flows.Flow`.

    .. math:: z = T(\epsilon), \qquad \epsilon \sim \mathcal N(0, I)

    The KL to this prior has no closed form: use ``pv.ELBO(kl="monte_carlo")``.

    Arguments:
        latent_dim, length, hidden_dims: as in :class:`~pyro_vae.flows.Flow`.
        flow: the `kind` of the flow, ``"coupling"``, ``"iaf"`` or ``"spline"``. The last two are inverted here, since
            training needs the density of given values. That density costs one pass, and a sample costs Z passes.

    Raises:
        ValueError: an unknown flow, or fewer than 2 latent dimensions.

    Example:
        >>> FlowPrior(3)().event_shape
        torch.Size([3])

    References:
        Chen et al. (2017), *Variational Lossy Autoencoder*, ICLR.
    """

    @checked
    def __init__(
        self, latent_dim: Count, flow: Kind = "coupling", length: Count = 4, hidden_dims: Shape | None = None
    ) -> None:
        super().__init__()
        self.backwards = flow != "coupling"
        self.flow = Flow(latent_dim, flow, length, hidden_dims)
        self.base = StandardNormal(latent_dim)

    def forward(self) -> dist.TorchDistribution:
        """The distribution of one z, with event shape (Z,)."""
        transforms = self.flow()
        if self.backwards:
            transforms = [transform.inv for transform in reversed(transforms)]
        return dist.TransformedDistribution(self.base(), transforms)
