"""What every pair shares: parameters under their parts' names, and data that are looked at before they do harm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from math import prod
from typing import Any, TypeVar, cast

import pyro
import torch
from pyro.infer.util import is_validation_enabled
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pyro_vae.engine.modules import evaluating
from pyro_vae.errors import PyroVAEError
from pyro_vae.likelihoods import Likelihood

Method = TypeVar("Method", bound=Callable[..., Any])


class Pair(nn.Module):
    """A module with a likelihood, around one plate ``data``; a subclass has a `model` and a `guide`."""

    likelihood: Likelihood

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("likelihood", "posterior", "prior", "classifier", "encoder"):
            self._check_part(name, value)
        super().__setattr__(name, value)

    def _check_part(self, name: str, part: Any) -> None:
        """Refuse what is no such part, or one of other data."""
        kind = Likelihood if name == "likelihood" else nn.Module
        if not isinstance(part, kind):
            example = {
                "likelihood": "pv.Bernoulli(decoder, event_shape)",
                "prior": "pv.StandardNormal(latent_dim)",
            }.get(name)
            raise PyroVAEError(
                f"expected {name} to be a {'pv.Likelihood' if kind is Likelihood else 'torch.nn.Module'}, got {part!r}. Build it"
                f"{f': {example}, say' if example else ''}."
            )
        parts = {
            "likelihood": getattr(self, "likelihood", None),
            "posterior": getattr(self, "posterior", None),
            name: part,
        }
        likelihood, theirs = parts["likelihood"], getattr(parts["posterior"], "event_shape", None)
        if likelihood is not None and theirs is not None and theirs != likelihood.event_shape:
            raise PyroVAEError(
                f"expected a posterior of the likelihood's event_shape {likelihood.event_shape}, got {theirs}. Give both that of "
                "one datum."
            )

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one datum."""
        return self.likelihood.event_shape

    @contextmanager
    def _data(
        self, x: Tensor, mask: Tensor | None, subsample_size: int | None, *given: Tensor
    ) -> Iterator[tuple[Tensor, ...]]:
        """The plate around the sites: x with the likelihood's `filler` where it is missing, and what else there is, subsampled alike."""
        x = self._observed(x, mask, subsample_size)
        dims = len(self.event_shape)
        with pyro.plate("data", len(x), subsample_size=subsample_size):
            kept = () if mask is None else (pyro.subsample(mask, event_dim=dims),)
            yield (pyro.subsample(x, event_dim=dims), *(pyro.subsample(y, event_dim=1) for y in given), *kept)

    def _observed(self, x: Tensor, mask: Tensor | None, subsample_size: int | None = None) -> Tensor:
        """The data, with zeros (or the likelihood's filler) where they are missing."""
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != x.shape:
                got = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
                raise PyroVAEError(
                    f"expected mask to be booleans of x's shape {tuple(x.shape)}, True where an element is observed, got {got}. "
                    "If these are labels that a DataLoader gives, leave them out of it, or use pv.ConditionalVAE."
                )
            x = torch.where(mask, x, self.likelihood.filler)
        self._check(x, subsample_size)
        return x

    def _check(self, x: Tensor, subsample_size: int | None = None) -> None:
        """Refuse data that are none of this pair's."""
        if not isinstance(x, Tensor):
            fix = (
                "torch.tensor(x.to_numpy(), dtype=torch.float32)"
                if hasattr(x, "to_numpy")
                else "split.x, or torch.as_tensor(x)"
            )
            raise PyroVAEError(f"expected x to be a tensor, got {type(x).__name__}. Pass {fix}.")
        if x.dim() == 0 or tuple(x.shape[1:]) != self.event_shape:
            shape = ", ".join(map(str, self.event_shape))
            if tuple(x.shape) == self.event_shape:
                fix = "For one datum, pass x[None]."
            elif x.dim() > 1 and prod(x.shape[1:]) == prod(self.event_shape):
                fix = f"Reshape it: x.reshape(-1, {shape})."
            else:
                fix = "Build the VAE with the event_shape of your data, or pass data of that shape."
            raise PyroVAEError(f"expected x of shape (N, {shape}), got {tuple(x.shape)}. {fix}")
        if not x.is_floating_point():
            raise PyroVAEError(f"expected x of floating point, got {x.dtype}. Convert it: x.float().")
        own = next((parameter.dtype for parameter in self.parameters()), x.dtype)
        if x.dtype != own:
            raise PyroVAEError(f"expected x of {own}, as the networks are, got {x.dtype}. Convert it: x.to({own}).")
        if subsample_size is not None and not isinstance(subsample_size, int):
            raise PyroVAEError(
                f"expected subsample_size to be an integer or None, got {type(subsample_size).__name__}."
            )
        if is_validation_enabled():
            self.likelihood.check(x)


def in_evaluation_mode(method: Method) -> Method:
    """A pair's method without gradients and in evaluation mode: dropout is off, and batch norm takes no notice of its data."""

    @wraps(method)
    def evaluated(pair: Pair, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), evaluating([pair]):
            return method(pair, *args, **kwargs)

    return cast(Method, evaluated)


def register(name: str, module: nn.Module) -> None:
    """Register a module's parameters with Pyro, in place of those that an earlier pair left under its name.

    ``pyro.module`` alone would go on handing the earlier ones to the optimiser, and this pair would never learn.
    """
    store = pyro.get_param_store()
    traces = [handler.trace for handler in _PYRO_STACK if isinstance(handler, TraceMessenger)]
    for suffix, parameter in module.named_parameters():
        key = f"{name}$$${suffix}"
        if any(key in trace.nodes and trace.nodes[key]["value"] is not parameter for trace in traces):
            raise PyroVAEError(
                f"two pairs in one program have parameters of one name, '{key}', of which Pyro would train the last: expected one "
                "pair. Put the parts of both into a program of your own, with pyro.module statements of different names."
            )
        # A parameter that is put into the store wants a gradient from then on; a frozen one stays out.
        if parameter.requires_grad and key in store and store[key] is not parameter:
            store[key] = parameter
    pyro.module(name, module)


def indicators(y: Tensor, classes: int | None, size: int, dtype: torch.dtype) -> Tensor:
    """What networks see of y: a vector for each datum as it is, or the indicator vector of a label.

    Arguments:
        y: vectors (N, Y), or integer labels (N,).
        classes: how many labels there are; None where y is vectors.
        size: N.
        dtype: that of what networks see.

    Raises:
        ValueError: y is neither vectors of floating point nor labels, or labels without a number of classes.
    """
    if not isinstance(y, Tensor) or y.dim() == 0 or len(y) != size:
        got = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise PyroVAEError(f"expected y to be a tensor with a row for each of {size} data, got {got}.")
    if y.is_floating_point() and y.dim() == 2:
        if y.dtype != dtype or not (classes is None or y.shape[1] == classes):
            width = "Y" if classes is None else classes
            raise PyroVAEError(
                f"expected y of {dtype} and shape ({size}, {width}), got {y.dtype} of shape {tuple(y.shape)}."
            )
        return y
    if y.is_floating_point() or y.dim() != 1 or classes is None:
        raise PyroVAEError(
            f"expected y to be vectors of floating point, (N, Y), or integer labels, (N,), of a pair with num_classes={classes}, got "
            f"{y.dtype} of shape {tuple(y.shape)}. Build the pair with num_classes, or pass one_hot(y).float()."
        )
    check_labels(y, 0, classes)
    return one_hot(y.long(), classes).to(dtype)


def check_labels(y: Tensor, lowest: int, classes: int) -> None:
    """Refuse labels that are none of these classes'; while Pyro's validation is on, as looking at values takes time."""
    if is_validation_enabled() and not bool(((y >= lowest) & (y < classes)).all()):
        raise PyroVAEError(f"expected labels from {lowest} to {classes - 1}, got {int(y.min())} to {int(y.max())}.")


def mean_of(posterior: nn.Module, x: Tensor, *given: Tensor) -> Tensor:
    """The mean of q(z|x); or what a posterior that has none gives in its place."""
    embed = getattr(posterior, "embed", None)
    mean: Tensor = posterior(x, *given).mean if embed is None else embed(x, *given)
    return mean
