"""Small Pyro programs whose outcomes can be listed, so that the mean of any bound is a finite sum."""

import copy
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

#: The two data of every small program.
X = torch.tensor([0.4, -1.3], dtype=torch.float64)
Parameters = dict[str, Tensor]


class SmallProgram:
    """A model p(z) p(x|z) and a guide q(z|x) whose latents are scalars, each normal or Bernoulli given those before it.

    A subclass gives the names of the latents, the parameters, and three distributions. Each of the three takes the
    parameters `p` as an argument, so that the model and the guide can be differentiated separately.

    Attributes:
        latents: the latent sites, in the order in which model and guide sample them.
        model_parameters: the model's parameters with their values. The guide may use them too.
        guide_parameters: the parameters that only the guide has.
        p: the parameters as tensors.

    Example:
        >>> import pyro.distributions as dist, pyro_vae as pv
        >>> class Laplace(pv.testing.SmallProgram):
        ...     latents = ("z",)
        ...     model_parameters = {"slope": 1.2}
        ...     guide_parameters = {"gain": 0.4, "log_scale": -0.3}
        ...
        ...     def prior(self, p, name, z):
        ...         return dist.Laplace(p["slope"].new_zeros(()), 1.0)
        ...
        ...     def likelihood(self, p, z):
        ...         return dist.Normal(p["slope"] * z["z"], 0.7)
        ...
        ...     def posterior(self, p, name, z, x):
        ...         return dist.Normal(p["gain"] * x, p["log_scale"].exp())
        >>> pv.testing.check_objective(pv.IWAE(2), programs=[Laplace()])
    """

    latents: tuple[str, ...]
    model_parameters: dict[str, float]
    guide_parameters: dict[str, float]

    def __init__(self) -> None:
        values = self.model_parameters | self.guide_parameters
        self.p = {name: torch.tensor(value, dtype=X.dtype, requires_grad=True) for name, value in values.items()}

    def prior(self, p: Parameters, name: str, z: dict[str, Tensor]) -> Any:
        """The distribution of a latent given the latents before it."""
        raise NotImplementedError

    def likelihood(self, p: Parameters, z: dict[str, Tensor]) -> Any:
        """The distribution of x."""
        raise NotImplementedError

    def posterior(self, p: Parameters, name: str, z: dict[str, Tensor], x: Tensor) -> Any:
        """The guide's distribution of a latent given x and the latents before it: normal or Bernoulli."""
        raise NotImplementedError

    def model(self, x: Tensor) -> None:
        """The model, as a Pyro function of x of shape (N,)."""
        z: dict[str, Tensor] = {}
        with pyro.plate("data", len(x)):
            for name in self.latents:
                z[name] = pyro.sample(name, self.prior(self.p, name, z))
            pyro.sample("x", self.likelihood(self.p, z), obs=x)

    def guide(self, x: Tensor) -> None:
        """The guide, as a Pyro function of x of shape (N,)."""
        z: dict[str, Tensor] = {}
        with pyro.plate("data", len(x)):
            for name in self.latents:
                z[name] = pyro.sample(name, self.posterior(self.p, name, z, x))

    def parameters(self) -> list[Tensor]:
        """The parameters as a list."""
        return list(self.p.values())

    def with_parameters(self, size: int, dtype: torch.dtype = X.dtype) -> Self:
        """The same program with its own parameters for each of `size` data: one call then gives as many gradients."""
        other = copy.copy(self)
        other.p = leaves(self.p, size, dtype)
        return other


def leaves(p: Parameters, size: int, dtype: torch.dtype = X.dtype) -> Parameters:
    """Copies of scalar parameters, each of shape (size,), to differentiate by."""
    return {name: value.detach().to(dtype).expand(size).clone().requires_grad_() for name, value in p.items()}


class NormalProgram(SmallProgram):
    """One normal latent and a normal datum."""

    latents = ("z",)
    model_parameters = {"mean": 0.3, "slope": 1.2, "offset": -0.2}  # noqa: RUF012
    guide_parameters = {"gain": 0.4, "bias": 0.2, "log_scale": -0.3}  # noqa: RUF012

    def prior(self, p: Parameters, name: str, z: dict[str, Tensor]) -> Any:
        """Normal."""
        return dist.Normal(p["mean"], 1.0)

    def likelihood(self, p: Parameters, z: dict[str, Tensor]) -> Any:
        """Normal, with a mean that is linear in z."""
        return dist.Normal(p["slope"] * z["z"] + p["offset"], 0.7)

    def posterior(self, p: Parameters, name: str, z: dict[str, Tensor], x: Tensor) -> Any:
        """Normal, with a mean that is linear in x."""
        return dist.Normal(p["gain"] * x + p["bias"], p["log_scale"].exp())


class BernoulliProgram(SmallProgram):
    """One Bernoulli latent and a normal datum."""

    latents = ("z",)
    model_parameters = {"logit": 0.3, "slope": 1.2, "offset": -0.9}  # noqa: RUF012
    guide_parameters = {"gain": 0.7, "bias": -0.2}  # noqa: RUF012

    def prior(self, p: Parameters, name: str, z: dict[str, Tensor]) -> Any:
        """Bernoulli."""
        return dist.Bernoulli(logits=p["logit"])

    def likelihood(self, p: Parameters, z: dict[str, Tensor]) -> Any:
        """Normal, with a mean that is linear in z."""
        return dist.Normal(p["slope"] * z["z"] + p["offset"], 0.8)

    def posterior(self, p: Parameters, name: str, z: dict[str, Tensor], x: Tensor) -> Any:
        """Bernoulli, with a logit that is linear in x."""
        return dist.Bernoulli(logits=p["gain"] * x + p["bias"])


class Outcomes:
    """All outcomes of one particle: both values of each Bernoulli latent, times Gauss-Hermite nodes of each normal one.

    The matrices have shape (S outcomes, N data). They differentiate through the samples.

    Arguments:
        program: the program.
        num_nodes: how many nodes a normal latent has.
        x: the data, shape (N,).
        model_parameters: the parameters in the model; None takes the program's.
        guide_parameters: the parameters in the guide; None takes the program's.

    Attributes:
        probability: the probability of each outcome under the guide.
        log_likelihood: log p(x | z).
        log_prior: log p(z).
        log_q: log q(z | x).
        fixed: the three log-densities at samples through which no gradient flows.
    """

    def __init__(
        self,
        program: SmallProgram,
        num_nodes: int,
        x: Tensor = X,
        model_parameters: Parameters | None = None,
        guide_parameters: Parameters | None = None,
    ) -> None:
        self.program, self.x = program, x
        self.p_model = program.p if model_parameters is None else model_parameters
        self.p_guide = program.p if guide_parameters is None else guide_parameters
        nodes, weights = map(torch.tensor, np.polynomial.hermite_e.hermegauss(num_nodes))
        z: dict[str, Tensor] = {}
        probability: Tensor = torch.ones((), dtype=x.dtype)
        for i, name in enumerate(program.latents):
            q = program.posterior(self.p_guide, name, z, x)
            along = [1] * (len(program.latents) + 1)
            if isinstance(q, dist.Normal):
                along[i] = num_nodes
                z[name] = q.loc + q.scale * nodes.reshape(along)
                probability = probability * (weights / weights.sum()).reshape(along)
            else:
                along[i] = 2
                z[name] = torch.arange(2.0, dtype=x.dtype).reshape(along)
                probability = probability * q.log_prob(z[name]).exp()
        moving = self._densities(z)
        shape = torch.broadcast_shapes(probability.shape, *(value.shape for value in moving))
        self.probability, self.log_likelihood, self.log_prior, self.log_q = (
            value.expand(shape).reshape(-1, len(x)) for value in (probability, *moving)
        )
        at_fixed = self._densities({name: value.detach() for name, value in z.items()})
        self.fixed = [value.expand(shape).reshape(-1, len(x)) for value in at_fixed]

    def _densities(self, z: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        program = self.program
        priors = [program.prior(self.p_model, name, z).log_prob(z[name]) for name in program.latents]
        guides = [program.posterior(self.p_guide, name, z, self.x).log_prob(z[name]) for name in program.latents]
        return (
            program.likelihood(self.p_model, z).log_prob(self.x),
            sum(priors[1:], priors[0]),
            sum(guides[1:], guides[0]),
        )

    @property
    def log_w(self) -> Tensor:
        """The log-weights, (S, N)."""
        return self.log_likelihood + self.log_prior - self.log_q

    def log_evidence(self) -> Tensor:
        """log p(x), the log of the mean weight, (N,)."""
        return (self.probability * self.log_w.exp()).sum(0).log()

    def mean(self, function: Callable[..., Tensor], count: int, *matrices: Tensor) -> Tensor:
        """The mean over `count` particles of a function of matrices (count, M), by default the log-weights: (N,)."""
        inputs = [_tuples(matrix, count).flatten(1) for matrix in matrices or (self.log_w,)]
        probability = _tuples(self.probability, count).prod(0)
        return (probability * function(*inputs).reshape(probability.shape)).sum(0)


def _tuples(value: Tensor, count: int) -> Tensor:
    """A matrix (S, N) at each choice of `count` outcomes: (count, S^count, N)."""
    index = torch.cartesian_prod(*[torch.arange(len(value))] * count).reshape(-1, count)
    return value[index.T]
