"""Points and weights over the support of a distribution, which make sums and integrals of its density weighted sums."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_vae.errors import PyroVAEError
from pyro_vae.testing.reports import most_z

DRAWS = 4000  # that place the points
GRIDS = 32  # each shifted at random, so that their spread tells the error, also of a density with kinks
LINE = (25.0, 625)  # how far a line's points go, as sinh of it times the spread, and how many each grid has
PLANE = (6.0, 56)  # the same along each axis of a plane
MOST_VALUES = 2**17  # of a discrete distribution
Support = Tensor | tuple[float, float] | None


@dataclass(frozen=True)
class Rule:
    """Points of a support with their weights.

    Attributes:
        points: (S, *batch, *event).
        weights: (S, *batch), or (S,) for all of a batch.
        grids: of how many grids the points are, one after another; 1 for a sum over a discrete support, which is exact.
    """

    points: Tensor
    weights: Tensor
    grids: int

    def integral(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The integral of values (S, *batch), or (S, *batch, F), and its error by the spread of the grids.

        A regular grid, shifted at random, is unbiased. It is next to exact where a density is smooth.
        """
        weights = self.weights.reshape(*self.weights.shape, *[1] * (values.dim() - self.weights.dim()))
        # A point that was left out has weight 0, and may have any density.
        terms = torch.where(weights > 0, values * weights, 0.0)
        totals = terms.reshape(self.grids, -1, *terms.shape[1:]).sum(1)
        if self.grids == 1:
            return totals[0], torch.zeros_like(totals[0])
        return totals.mean(0), most_z(self.grids) * totals.std(0) / self.grids**0.5


def element_constraint(distribution: Any, support: Support) -> Any:
    """The support of one element, which is a constraint, or a tensor of its values."""
    if isinstance(support, Tensor):
        return support
    if support is not None:
        low, high = support
        return constraints.interval(low, high)
    constraint = distribution.support
    while hasattr(constraint, "base_constraint"):  # of an event, or of a mixture
        constraint = constraint.base_constraint
    return constraint


def contains(constraint: Any, values: Tensor) -> Tensor:
    """Which values a constraint, or a tensor of values, contains."""
    if isinstance(constraint, Tensor):
        return (values.unsqueeze(-1) - constraint.to(values)).abs().amin(-1) < 1e-6
    return constraint.check(values)


def over_elements(distribution: Any, support: Support = None) -> Rule:
    """A rule for each element of a batch of scalars."""
    constraint = element_constraint(distribution, support)
    values = _values(distribution, constraint)
    if values is not None:
        points = values.reshape(-1, *[1] * len(distribution.batch_shape)).expand(-1, *distribution.batch_shape)
        return Rule(points, torch.ones_like(points), 1)
    return line(constraint, distribution.sample((DRAWS,)).double())


def line(constraint: Any, draws: Tensor) -> Rule:
    """A rule for scalars of a continuous support, placed by draws (n, *batch).

    Its points are T(centre + spread sinh t), with t on regular grids and T from the real line onto the support.
    """
    onto = _onto(constraint)
    centre, spread = _middle(onto.inv(draws))
    t, step = _grids(*LINE, 1)
    t = t.reshape(-1, *[1] * centre.dim())
    u = centre + spread * t.sinh()
    points = onto(u)
    log_weights = onto.log_abs_det_jacobian(u, points) + (spread * t.cosh() * step).log()
    valid = points.isfinite() & log_weights.isfinite() & constraint.check(points) & (log_weights.abs() < 700)
    points = torch.where(valid, points, draws[0])
    return Rule(points, torch.where(valid, log_weights.exp(), 0.0), GRIDS)


def over_events(distribution: Any) -> Rule:
    """A rule for one event, whose support has one or two dimensions: a vector, or three numbers on a simplex."""
    constraint = distribution.support
    if hasattr(constraint, "base_constraint") and type(constraint).__name__.startswith("Mixture"):
        constraint = constraint.base_constraint
    if constraint.is_discrete:
        element = element_constraint(distribution, None)
        values = _values(distribution, element)
        size = distribution.event_shape.numel()
        if values is None or len(values) ** size > MOST_VALUES:
            raise PyroVAEError(f"expected a discrete support of few values, got {constraint}. Use fewer dimensions.")
        points = torch.cartesian_prod(*[values] * size).reshape(-1, *distribution.event_shape)
        return Rule(points, torch.ones(len(points), dtype=torch.float64), 1)
    onto = _onto(constraint)
    draws = onto.inv(distribution.sample((DRAWS,)).double())
    shape = draws.shape[1:]
    draws = draws.flatten(1)
    size = draws.shape[1]
    if size not in (1, 2):
        raise PyroVAEError(
            f"expected one or two dimensions, whose density a grid can integrate, got {size}. Check a part with "
            "latent_dim=2."
        )
    centre, spread = _middle(draws)
    root = torch.diag(spread)
    if size == 2:
        standard = ((draws - centre) / spread).clamp(-5, 5)
        root = root @ torch.linalg.cholesky(torch.cov(standard.T) + 1e-9 * torch.eye(2, dtype=torch.float64))
    grid, step = _grids(*(LINE if size == 1 else PLANE), size)
    u = (centre + grid.sinh() @ root.T).reshape(-1, *shape)
    points = onto(u)
    jacobian = onto.log_abs_det_jacobian(u, points).reshape(len(u), -1).sum(-1)
    log_weights = jacobian + root.diagonal().log().sum() + (grid.cosh() * step).log().sum(-1)
    valid = points.flatten(1).isfinite().all(-1) & log_weights.isfinite() & (log_weights.abs() < 700)
    valid = valid & constraint.check(points)
    points = torch.where(valid.reshape(-1, *[1] * (points.dim() - 1)), points, points[len(points) // 2])
    return Rule(points, torch.where(valid, log_weights.exp(), 0.0), GRIDS)


def _onto(constraint: Any) -> Any:
    try:
        return biject_to(constraint)
    except NotImplementedError:
        raise PyroVAEError(
            f"expected a support onto which PyTorch maps the real numbers, got {constraint}. Pass support=(low, high), "
            "or the values as a tensor."
        ) from None


def _middle(draws: Tensor) -> tuple[Tensor, Tensor]:
    """The median of draws (n, ...), and half the width of their central 68 %, which heavy tails leave as they are."""
    low, centre, high = draws.nan_to_num(posinf=1e3, neginf=-1e3).quantile(
        torch.tensor([0.16, 0.5, 0.84], dtype=torch.float64), 0
    )
    spread = (high - low) / 2
    return centre, torch.where(spread > 0, spread, 1.0)


def _grids(farthest: float, number: int, size: int) -> tuple[Tensor, float]:
    """Regular grids from -farthest to farthest along `size` axes, each shifted at random, (S, size); and their step."""
    step = 2 * farthest / number
    axis = torch.arange(number, dtype=torch.float64) * step - farthest
    grid = torch.cartesian_prod(*[axis] * size).reshape(1, -1, size)
    shifts = step * torch.rand(GRIDS, 1, size, dtype=torch.float64)
    return (grid + shifts).flatten(0, 1), step


def _values(distribution: Any, constraint: Any) -> Tensor | None:
    """The values of a discrete support, with enough of an infinite one; None of a continuous support."""
    if isinstance(constraint, Tensor):
        return constraint.double().flatten()
    if not constraint.is_discrete:
        return None
    if constraint is constraints.boolean:
        return torch.arange(2, dtype=torch.float64)
    if not hasattr(constraint, "lower_bound"):
        raise PyroVAEError(
            f"expected a discrete support of integers, got {constraint}. Pass the values: support=torch.tensor([...])."
        )
    low = int(constraint.lower_bound)
    if hasattr(constraint, "upper_bound"):
        return torch.arange(low, int(torch.as_tensor(constraint.upper_bound).max()) + 1, dtype=torch.float64)
    size = 64 + 2 * int(distribution.sample((DRAWS,)).max()) - low
    while size <= MOST_VALUES:
        values = torch.arange(low, low + size, dtype=torch.float64)
        upper = values[size // 2 :].reshape(-1, *[1] * len(distribution.batch_shape))
        if bool((distribution.log_prob(upper.expand(-1, *distribution.batch_shape)).exp().sum(0) < 1e-13).all()):
            return values
        size *= 2
    raise PyroVAEError(f"expected probabilities that add up below {MOST_VALUES}, got more. Use a smaller spread.")
