"""Weights of data in a training: a scale of each datum's bound, outside of it, and a mean over the sum of weights."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae.checks import is_dense, shown
from pyro_vae.engine.minibatches import Minibatches
from pyro_vae.engine.modules import PyroFunction
from pyro_vae.engine.program import Program
from pyro_vae.engine.rows import Count, Rows
from pyro_vae.errors import PyroVAEError


class Weighs(Messenger):
    """Multiplies the scale of each site by the weight of its row of a plate."""

    def __init__(self, weights: Tensor, plate: str) -> None:
        super().__init__()
        self.weights, self.plate = weights, plate
        self.along: dict[int, Tensor] = {}  # the weights in the shape of a site, by the plate's dimension

    def _pyro_sample(self, msg: Any) -> None:
        if pyro.poutine.util.site_is_subsample(msg):
            return
        frame = next((each for each in msg["cond_indep_stack"] if each.name == self.plate), None)
        if frame is None:
            raise PyroVAEError(
                f"weights scale each datum's bound: expected every site inside the data's plate '{self.plate}', got "
                f"'{msg['name']}' outside of it. Move it inside, or drop weights."
            )
        if frame.dim not in self.along:
            self.along[frame.dim] = self.weights.reshape(-1, *[1] * (-frame.dim - 1))
        scale = self.along[frame.dim]
        # One object for all sites shows that their scales are equal.
        one = isinstance(msg["scale"], int | float) and msg["scale"] == 1
        msg["scale"] = scale if one else msg["scale"] * scale


@dataclass
class WeighedRows(Rows):
    """Counts the data of a minibatch, whose last column has their weights, by the sum of these."""

    def of(self, batch: Sequence[Any]) -> Count:
        """The sum of the weights, and what the loss stands for."""
        count, total = super().of(batch[:-1]), float(batch[-1].double().sum())
        return Count(total, total / count.share) if total > 0 else Count(0.0, 1.0)  # a loss of zero has any mean


def check(weights: Any, batches: Minibatches, objective: Any) -> Tensor | None:
    """The weights as a tensor; None without any."""
    if weights is None:
        return None
    if batches.loader is not None:
        raise PyroVAEError(
            "weights are a column beside the data: expected data as tensors or arrays with weights, got a DataLoader. "
            "Pass its data set's tensors, or a weighted sampler in the loader."
        )
    try:
        found = torch.as_tensor(weights)
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0)
    column = is_dense(found) and found.shape == (batches.size,) and not (found.is_complex() or found.is_meta)
    if not (column and bool(found.isfinite().all()) and bool((found >= 0).all()) and bool((found > 0).any())):
        raise PyroVAEError(
            f"expected weights to be {batches.size} finite numbers of at least 0, one for each datum and not all 0, "
            f"got {shown(weights)}. Pass a tensor of shape ({batches.size},)."
        )
    if getattr(objective, "free_bits", 0):
        raise PyroVAEError(
            "free bits average the KL over a minibatch without weights: expected free_bits=0 with weights, got "
            f"{objective.free_bits}. Drop one of the two."
        )
    return found.detach().to(torch.get_default_dtype()) if not found.is_floating_point() else found.detach()


def weighed(program: Program, rows: Rows, batches: Minibatches, weights: Tensor) -> tuple[Program, Rows]:
    """The program, its rows and its minibatches with a last column of weights."""
    if rows.plate is None:
        raise PyroVAEError(
            "weights are of the rows of the data's plate: expected a plate around what the model observes, got none. "
            "Put the observations into `with pyro.plate('data', ...):`."
        )
    plate = rows.plate.name

    def with_weights(function: PyroFunction) -> PyroFunction:
        def run(*args: Any) -> Any:
            with Weighs(args[-1], plate):
                return function(*args[:-1])

        run.__wrapped__ = function  # type: ignore[attr-defined]  # by which its modules are found
        run.__signature__ = _ANY  # type: ignore[attr-defined]
        return run

    batches.columns = (*batches.columns, weights)
    first = (*program.args, weights[: rows.number].to(program.device or weights.device))
    model, guide = with_weights(program.model), with_weights(program.guide_or_prior)
    return replace(program, model=model, guide=guide, args=first), WeighedRows(**vars(rows))


_ANY = inspect.signature(lambda *args: None)
