"""The guide that :func:`pyro_vae.refine` gives: a mixture of Student t's for each row of data, which it knows again."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.engine.modules import PyroFunction
from pyro_vae.engine.sites import being_recorded
from pyro_vae.errors import PyroVAEError
from pyro_vae.evaluation.families import OF_ONE_PARTICLE
from pyro_vae.evaluation.proposals.layout import Coordinates, Layout
from pyro_vae.evaluation.proposals.student import Student


class Mixture:
    """A mixture of Student t's for each of N data, and the guide's own density as its first component."""

    def __init__(self, students: Sequence[Student], log_shares: Tensor, has_guide: bool | None = None) -> None:
        self.students, self.log_shares = list(students), log_shares  # (1 + M, N), the guide's first
        self.has_guide = bool((log_shares[0] > -torch.inf).any()) if has_guide is None else has_guide

    def of(self, rows: Tensor) -> "Mixture":
        """Those of some data."""
        return Mixture([student.of(rows) for student in self.students], self.log_shares[:, rows], self.has_guide)

    @classmethod
    def joined(cls, parts: Sequence["Mixture"]) -> "Mixture":
        """Those of consecutive minibatches, of which some may have more components."""
        most = max(len(part.students) for part in parts)
        students = []
        for m in range(most):
            # A component that a minibatch lacks has no share there; its first one stands for it.
            each = [part.students[m] if m < len(part.students) else part.students[0] for part in parts]
            students.append(Student.joined(each))
        shares = [
            torch.cat([log_shares, log_shares.new_full((1 + most - len(log_shares), log_shares.shape[1]), -torch.inf)])
            for log_shares in (part.log_shares for part in parts)
        ]
        return cls(students, torch.cat(shares, 1))

    def with_rows(self, rows: Tensor, others: "Mixture") -> "Mixture":
        """The mixtures with those of some rows replaced, whose first components are the same."""
        own = len(self.students)
        students = [*self.students, *(self.students[0].with_rows(rows, each) for each in others.students[own:])]
        shares = self.log_shares.new_full((1 + len(students), self.log_shares.shape[1]), -torch.inf)
        shares[: 1 + own] = self.log_shares
        shares[:, rows] = others.log_shares
        return Mixture(students, shares, self.has_guide)

    def sample(self, number: int) -> tuple[Tensor, Tensor]:
        """Draws (K, N, D), of which those of the guide are to be replaced; and the component of each, (K, N)."""
        chosen = torch.distributions.Categorical(logits=self.log_shares.T).sample((number,))
        y = self.students[0].sample(number)
        for m, student in enumerate(self.students[1:], 2):
            y = torch.where((chosen == m)[..., None], student.sample(number), y)
        return y, chosen

    def log_prob(self, y: Tensor, of_guide: Tensor | None) -> Tensor:
        """The log-density (K, N) of the first d latents at y (K, N, d), where the guide's own is given."""
        terms = [share + student.log_prob(y) for share, student in zip(self.log_shares[1:], self.students, strict=True)]
        if of_guide is not None:
            terms.append(self.log_shares[0] + of_guide)
        return terms[0] if len(terms) == 1 else torch.stack(terms).logsumexp(0)


class Replacing(Messenger):
    """A handler that gives a program's latent sites the draws and the density of a mixture, in place of their own."""

    def __init__(self, layout: Layout, mixture: Mixture) -> None:
        super().__init__()
        self.layout, self.mixture = layout, mixture
        self._begin()

    def _begin(self) -> None:
        self.done: list[Tensor] = []  # the unconstrained latents of the sites so far, each (K, N, d)
        self.of_guide: Tensor | None = None  # the guide's own density of these, (K, N)
        self.before: Tensor | None = None  # the mixture's
        self.drawn: tuple[Tensor, Tensor] | None = None  # what Mixture.sample gave at the first site
        self.lost: Tensor | None = None  # which of these no value stands for, (K, N)

    def __enter__(self) -> Any:
        self._begin()
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or not any(part.name == msg["name"] for part in self.layout.parts):
            return
        msg["fn"] = FittedSite(self, len(self.done), msg["name"], msg["fn"])

    def _pyro_post_sample(self, msg: Any) -> None:
        site = self._own_site(msg["fn"])
        if site is not None:
            self.done = [*self.done, site.free(msg["value"])[0]]
            if len(self.done) < len(self.layout.parts):
                with torch.set_grad_enabled(torch.is_grad_enabled() and any(y.requires_grad for y in self.done)):
                    self.before, self.of_guide, _ = site.joint(msg["value"])

    def _own_site(self, fn: Any) -> "FittedSite | None":
        """The site that this handler has made, inside of what plates, and a second refinement, put around it."""
        while not (isinstance(fn, FittedSite) and fn.replacing is self):
            fn = fn.own if isinstance(fn, FittedSite) else getattr(fn, "base_dist", None)
            if fn is None:
                return None
        return fn


class FittedSite(TorchDistribution):
    """A site's conditional distribution, given the sites before it, under a mixture over all latents."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True  # its samples are fixed numbers, since the proposal has no parameters

    def __init__(self, replacing: Replacing, place: int, name: str, own: Any) -> None:
        self.replacing, self.own = replacing, own
        self.part, batch_dim = replacing.layout.parts[place], replacing.layout.batch_dim
        if self.part.name != name:
            raise PyroVAEError(
                f"the guide samples site '{name}' where it sampled '{self.part.name}' before: expected the same sites "
                "in the same order in each run."
            )
        number = replacing.mixture.log_shares.shape[1]
        if len(own.batch_shape) >= -batch_dim and own.batch_shape[batch_dim] not in (1, number):
            raise PyroVAEError(
                f"expected a batch plate of the {number} rows that were passed around site '{name}', which is refined, "
                f"got one of {own.batch_shape[batch_dim]}. Pass these rows, without a subsample of the plate."
            )
        self.done, self.before, self.of_guide = replacing.done, replacing.before, replacing.of_guide
        setattr(self, OF_ONE_PARTICLE, True)  # its density is of all elements together
        super().__init__(own.batch_shape, own.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """That of the site's own distribution."""
        return self.own.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> "FittedSite":
        """The same, of another batch shape."""
        found = copy.copy(self)
        found.own = self.own.expand(torch.Size(batch_shape))
        found._batch_shape = found.own.batch_shape
        return found

    def free(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """The unconstrained latents (K, N, d) of a value, and log |dz / dy|, (K, N)."""
        return self.replacing.layout.free(self.part, self.own, value)

    def joint(self, value: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The log-density (K, N) of this site and those before it, the mixture's and the guide's; and log |dz / dy|."""
        y, slope = self.free(value)
        of_guide = None
        layout, mixture = self.replacing.layout, self.replacing.mixture
        if mixture.has_guide:
            own = layout.columns(self.own.log_prob(value), 0).sum(-1) + slope
            of_guide = own if self.of_guide is None else self.of_guide + own
        return mixture.log_prob(torch.cat([*self.done, y], -1), of_guide), of_guide, slope

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density of all elements of a datum's site together, as equal shares of the plates' elements."""
        # A gradient may flow through values that are given, and not to the guide, which has a share of fixed numbers.
        through = torch.is_grad_enabled() and any(each.requires_grad for each in (value, *self.done))
        with torch.set_grad_enabled(through):
            joint, _, slope = self.joint(value)
            found = joint - slope
            if self.before is not None:
                found = found - self.before
            if self.replacing.lost is not None and self.part is self.replacing.layout.parts[-1]:
                found = torch.where(self.replacing.lost, torch.inf, found)  # its weight is zero
        outer = value.shape[: value.dim() - self.event_dim]
        return self._beside(found * (found.numel() / max(1, outer.numel())), len(outer)).expand(outer)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """This site's part of the vector that is drawn at the first site."""
        layout, replacing, outer = self.replacing.layout, self.replacing, len(self.batch_shape)
        with torch.no_grad():
            if outer > -layout.particle_dim:
                raise PyroVAEError(
                    f"expected at most one dimension of particles left of the plates of site '{self.part.name}', which "
                    f"is refined, got the batch shape {tuple(self.batch_shape)}. Pass max_plate_nesting="
                    f"{-layout.particle_dim - 1}."
                )
            if replacing.drawn is None:
                number = self.batch_shape[layout.particle_dim] if outer >= -layout.particle_dim else 1
                replacing.drawn = replacing.mixture.sample(number)
                replacing.lost = torch.zeros_like(replacing.drawn[1], dtype=torch.bool)
            y, chosen = replacing.drawn
            value = self._value(y[..., self.part.start : self.part.stop])
            # Where a value is so near to an end of its support that it has none of its own, the density is not known.
            back = self.replacing.layout.columns(Coordinates(self.own).inverse(value), self.part.event_dim)
            lost = ~back.isfinite().all(-1) & (chosen != 0)
            if being_recorded() or bool(lost.any()):
                middle = replacing.mixture.students[0].loc[:, self.part.start : self.part.stop]
                value = torch.where(
                    self._beside(lost, value.dim() - self.event_dim, self.event_dim), self._value(middle[None]), value
                )
                replacing.lost = lost if replacing.lost is None else replacing.lost | lost
            value = value.reshape(self.batch_shape + self.event_shape)
            if not replacing.mixture.has_guide:
                return value
            return torch.where(self._beside(chosen == 0, outer, self.event_dim), self.own.sample(), value)

    def _value(self, y: Tensor) -> Tensor:
        """The value at unconstrained latents (K, N, d), with all dimensions of plates."""
        return Coordinates(self.own).value(self.replacing.layout.unflattened(y, self.part))

    def _beside(self, matrix: Tensor, dims: int, event_dim: int = 0) -> Tensor:
        """A matrix (K, N) in the shape that broadcasts to the last `dims` dimensions of plates, and to an event."""
        layout = self.replacing.layout
        shape = [1] * -layout.particle_dim
        shape[layout.particle_dim], shape[layout.batch_dim] = matrix.shape
        return matrix.reshape([*(shape[len(shape) - dims :] if dims < len(shape) else shape), *[1] * event_dim])


class RefinedGuide(nn.Module):
    """A guide for rows of data that are known again by their content, in any order and in minibatches of any size.

    It is fixed: it has no parameters, and gradients do not flow through its samples. Rows that are equal share one
    proposal.

    Attributes:
        pareto_k: k-hat of each row's pilot draws, (N,).
    """

    pareto_k: Tensor
    log_shares: Tensor
    fingerprints: Tensor
    order: Tensor

    def __init__(
        self, base: PyroFunction, layout: Layout, mixture: Mixture, args: tuple[Any, ...], pareto_k: Tensor
    ) -> None:
        super().__init__()
        self.__wrapped__ = base  # by which its modules and its arguments are found
        self.layout = layout
        state = {f"student_{m}": student for m, student in enumerate(mixture.students)}
        self.students, self.has_guide = len(state), mixture.has_guide
        for name, student in state.items():
            for key, value in (vars(student.scale) | {"loc": student.loc, "df": student.df}).items():
                self.register_buffer(f"{name}_{key}", value)
        self.kinds = [type(student.scale) for student in mixture.students]
        self.register_buffer("log_shares", mixture.log_shares)
        self.register_buffer("pareto_k", pareto_k)
        fingerprints, order = fingerprint(columns_of(args)).sort()
        self.register_buffer("fingerprints", fingerprints)
        self.register_buffer("order", order)

    @property
    def mixture(self) -> Mixture:
        """The mixtures of all rows."""
        students = []
        for m, kind in enumerate(self.kinds):
            scale = {f: getattr(self, f"student_{m}_{f}") for f in inspect.signature(kind).parameters}
            students.append(Student(self._of(m, "loc"), kind(**scale), self._of(m, "df")))
        return Mixture(students, self.log_shares, self.has_guide)

    def _of(self, m: int, name: str) -> Tensor:
        found: Tensor = getattr(self, f"student_{m}_{name}")
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Sample the latents of these rows."""
        mixture = self.mixture.of(self.rows(args, kwargs))
        return Replacing(self.layout, mixture)(self.__wrapped__)(*args, **kwargs)

    def rows(self, args: tuple[Any, ...], kwargs: Mapping[str, Any] = MappingProxyType({})) -> Tensor:
        """The numbers of rows of data among those that were refined, (B,); all of them for a call without data.

        Raises:
            ValueError: a row is not among them.
        """
        try:
            args = tuple(inspect.signature(self.__wrapped__).bind(*args, **kwargs).arguments.values())
        except (TypeError, ValueError):  # the guide says what is wrong with them, or has no signature
            args = (*args, *kwargs.values())
        columns = columns_of(args)
        if not columns:
            return torch.arange(len(self.order), device=self.order.device)
        own = fingerprint(columns)
        place = torch.searchsorted(self.fingerprints, own).clamp(max=len(self.fingerprints) - 1)
        if not being_recorded():
            missing = (self.fingerprints[place] != own).nonzero()[:, 0]
            if len(missing):
                raise PyroVAEError(
                    f"expected rows of x that were refined, got {len(missing)} others of {len(own)}, such as row "
                    f"{missing[0].item()}: the guide knows a row by its exact values, in a dtype. Pass those rows, or "
                    "call pv.refine on these. For simulated data, as in pv.calibrate, pass the guide itself and "
                    "refine=True."
                )
        return self.order[place]


def columns_of(args: tuple[Any, ...]) -> list[Tensor]:
    """The arguments that have rows."""
    return [each for arg in args for each in (arg if isinstance(arg, tuple) else (arg,)) if _has_rows(each)]


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def fingerprint(columns: Sequence[Tensor]) -> Tensor:
    """A number for each row of tensors, from all of its values, (N,)."""
    total: Any = 0
    for place, column in enumerate(columns):
        bits = _bits(column.detach()).flatten(1) if column.dim() > 1 else _bits(column.detach())[:, None]
        salt = torch.arange(bits.shape[1], device=bits.device) * 0x9E3779B9 + (place + 1) * 0x632BE5AB
        total = total + _mixed(bits ^ _mixed(salt)).sum(1)
    return torch.as_tensor(total)


def _bits(column: Tensor) -> Tensor:
    if not column.is_floating_point():
        return column.long()
    column = column + 0.0  # of minus zero, zero
    wide = column if column.dtype is torch.float64 else column.float()
    return wide.view(torch.int64 if wide.dtype is torch.float64 else torch.int32).long()


def _mixed(bits: Tensor) -> Tensor:
    """Numbers of 64 bits in which each bit depends on all bits (the finaliser of splitmix64, Steele et al. 2014)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        bits = (bits ^ ((bits >> shift) & (2 ** (64 - shift) - 1))) * factor
    return bits ^ ((bits >> 31) & (2**33 - 1))
