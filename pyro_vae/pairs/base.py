"""The base class of model/guide pairs: checks of parts and data, the data plate, and registration of parameters."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
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
from torch.utils import _pytree as pytree

from pyro_vae.checks import converter, how_to_make_dense, is_dense, refuse_invalid_parameters, shown
from pyro_vae.devices import elsewhere, note_memory, refuse_without_values
from pyro_vae.engine.modules import eval_mode
from pyro_vae.engine.precision import is_half, promoting, single_precision
from pyro_vae.engine.threads import ONE_THREAD
from pyro_vae.errors import PyroVAEError, require_count
from pyro_vae.likelihoods import Likelihood

Method = TypeVar("Method", bound=Callable[..., Any])

#: The parts whose type is checked, each with the example in the error message.
PARTS = {
    "likelihood": ", such as pv.Bernoulli(decoder, event_shape)",
    "posterior": "",
    "prior": ", such as pv.StandardNormal(latent_dim)",
    "classifier": "",
    "encoder": "",
}


def on_own_device(method: Method) -> Method:
    """Decorate a method of a pair: it refuses tensors on another device than the parameters."""

    @wraps(method)
    def wrapper(pair: "Pair", *args: Any, **kwargs: Any) -> Any:
        _refuse_elsewhere(pair, method, args, kwargs)
        return method(pair, *args, **kwargs)

    # What unwraps a bound method would find the function inside, which has lost its pair.
    vars(wrapper).update(__signature__=inspect.signature(method))
    del vars(wrapper)["__wrapped__"]
    return cast(Method, wrapper)


def _refuse_elsewhere(pair: "Pair", method: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not isinstance(pair, Pair):
        raise PyroVAEError(
            f"expected a pair, got {shown(pair)}. Call the method of an instance: vae.{method.__name__}."
        )
    first = first_parameter(pair)
    for value in (*args, *kwargs.values()):
        # Only then, since to look at every parameter takes time.
        if first is not None and isinstance(value, Tensor) and value.device != first.device:
            refusal = elsewhere(pair.parameters(), method, (pair, *args), kwargs)
            if refusal is not None:
                raise refusal


def first_parameter(module: nn.Module) -> nn.Parameter | None:
    """The first of its parameters, in a tenth of the time that ``parameters`` takes."""
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter
    for part in module._modules.values():
        found = None if part is None else first_parameter(part)
        if found is not None:
            return found
    return None


def in_evaluation_mode(method: Method) -> Method:
    """Decorate a method as :func:`on_own_device` does; no gradients, evaluation mode, results of float32 at least."""
    convert = converter(method)

    @wraps(method)
    def wrapper(pair: "Pair", *args: Any, **kwargs: Any) -> Any:
        (_, *args), kwargs = convert((pair, *args), kwargs)
        _refuse_elsewhere(pair, method, args, kwargs)
        widening = promoting() if any(map(is_half, pair.parameters())) else nullcontext()
        recorded = torch.compiler.is_compiling()  # by torch.export, ONNX or torch.compile
        # A recorded graph can't hold what validation does with values, and torch.export.load fails on no_grad's.
        around = pyro.validation_enabled(False) if recorded else torch.no_grad()
        with ONE_THREAD.for_a_moment(), around, single_precision(), widening, eval_mode([pair]):
            try:
                result = method(pair, *args, **kwargs)
            except (ValueError, RuntimeError) as error:
                refuse_without_values(error)
                if isinstance(error, ValueError):
                    refuse_invalid_parameters(error)
                else:
                    note_memory(error, method.__name__, "Ask for fewer, or pass fewer rows of data.")
                raise
        if recorded:
            return pytree.tree_map_only(Tensor, Tensor.detach, result)
        if any(map(_has_nan, pytree.tree_leaves(result))):
            raise PyroVAEError(
                f"{method.__name__} gives NaN: expected finite data and parameters, got others. Check x.isfinite() "
                "and the parameters."
            )
        return result

    return cast(Method, wrapper)


def _has_nan(value: Any) -> bool:
    number = isinstance(value, Tensor) and value.is_floating_point() and not value.is_meta
    return number and bool(value.isnan().any())


class Pair(nn.Module):
    """Base class of pairs of named parts with one plate, ``data``. A subclass defines `model` and `guide`."""

    prior: nn.Module
    likelihood: Likelihood
    posterior: nn.Module

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in PARTS:
            self._check_part(name, value)
        super().__setattr__(name, value)

    def _check_part(self, name: str, part: Any) -> None:
        """Raise ValueError for a part of the wrong type, or of another event shape than the other parts."""
        kind, named = (Likelihood, "pv.Likelihood") if name == "likelihood" else (nn.Module, "torch.nn.Module")
        if not isinstance(part, kind):
            raise PyroVAEError(f"expected {name} to be a {named}, got {part!r}. Pass an instance{PARTS[name]}.")
        parts = {**self._modules, name: part}
        own_model = getattr(type(self), "model", self).__module__.startswith("pyro_vae.")  # calls it without arguments
        if name == "prior" and own_model and not _takes_nothing(part):
            raise PyroVAEError(
                f"expected prior to return the distribution of one z when it is called without arguments, got a "
                f"{type(part).__name__}, which takes some. Pass one such as pv.StandardNormal(latent_dim)."
            )
        own, theirs = (getattr(parts.get(key), "event_shape", None) for key in ("likelihood", "posterior"))
        if own is not None and theirs is not None and theirs != own:
            raise PyroVAEError(
                f"expected a posterior of the likelihood's event_shape {own}, got {theirs}. Pass one shape to both."
            )

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one datum."""
        return self.likelihood.event_shape

    @in_evaluation_mode
    def decode(self, z: Tensor) -> Tensor:
        """The mean of p(x|z): (*batch, Z) to (*batch, *event)."""
        return self.likelihood.decode(z)

    def _register(self, *names: str) -> None:
        """Register parts' parameters with Pyro, in place of an earlier pair's parameters of the same names."""
        store = pyro.get_param_store()
        traces = [handler.trace for handler in _PYRO_STACK if isinstance(handler, TraceMessenger)]
        for name in names:
            module = getattr(self, name)
            for suffix, parameter in module.named_parameters():
                key = f"{name}$$${suffix}"
                if any(key in trace.nodes and trace.nodes[key]["value"] is not parameter for trace in traces):
                    raise PyroVAEError(
                        f"expected one pair in a program, got two pairs with a parameter named '{key}', of which Pyro "
                        "would train only the last. Write a program of their parts, with other names in pyro.module."
                    )
                # pyro.module alone would pass the earlier pair's parameter to the optimiser, and this pair would never
                # learn. The store turns requires_grad on, so a frozen parameter must stay out.
                if parameter.requires_grad and key in store and store[key] is not parameter:
                    store[key] = parameter
            pyro.module(name, module)

    @contextmanager
    def _data(
        self, x: Tensor, mask: Tensor | None, subsample_size: int | None, *given: Tensor
    ) -> Iterator[tuple[Any, ...]]:
        """The data plate. It yields x with missing elements replaced, `given` and the mask, all for one minibatch."""
        x = self._observed(x, mask, subsample_size)
        if len(x) == 0:
            raise PyroVAEError("expected x with one datum or more, got none. Drop empty minibatches.")
        if subsample_size is not None and subsample_size > len(x):
            raise PyroVAEError(
                f"expected a subsample_size of at most {len(x)}, the number of data, got {subsample_size}."
            )
        dims = len(self.event_shape)
        with pyro.plate("data", len(x), subsample_size=subsample_size):
            mask = None if mask is None else pyro.subsample(mask, event_dim=dims)
            yield (pyro.subsample(x, event_dim=dims), *(pyro.subsample(y, event_dim=1) for y in given), mask)

    def _observed(self, x: Tensor, mask: Tensor | None, subsample_size: int | None = None) -> Tensor:
        """Check x and the mask, and replace missing elements by the likelihood's `filler`."""
        if mask is not None and is_dense(x):
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != x.shape:
                like = isinstance(mask, Tensor) and mask.shape == x.shape
                raise PyroVAEError(
                    f"expected mask to be booleans of x's shape {tuple(x.shape)}, True where an element is observed, "
                    f"got {described(mask)}. {'Pass mask.bool(), if it is one. ' if like else ''}If these are a "
                    "DataLoader's labels, drop them, or use pv.ConditionalVAE. If these are minibatches, join them "
                    "with torch.cat."
                )
            x = torch.where(mask, x, self.likelihood.filler)
        self._check(x, subsample_size)
        return x

    def _check(self, x: Tensor, subsample_size: int | None = None) -> None:
        """Raise ValueError for x of the wrong shape or type, or outside the support of the likelihood."""
        if not is_dense(x):
            raise PyroVAEError(f"expected x to be a dense tensor, got {shown(x)}. {how_to_make_dense(x)}")
        if x.dim() == 0 or tuple(x.shape[1:]) != self.event_shape:
            shape = ", ".join(map(str, self.event_shape))
            if tuple(x.shape) == self.event_shape:
                fix = "For one datum, pass x[None]. If these are all data, build the pair with event_shape=x.shape[1:]."
            elif len(self.event_shape) == 3 and tuple(x.shape[1:]) == (*self.event_shape[1:], self.event_shape[0]):
                fix = "The channels come first: x.permute(0, 3, 1, 2)."
            elif x.dim() > 1 and _same_order(x.shape[1:], self.event_shape):
                fix = f"Reshape it: x.reshape(-1, {shape})."
            else:
                fix = "Build the VAE with the event_shape of your data, or pass data of that shape."
            raise PyroVAEError(f"expected x of shape (N, {shape}), got {tuple(x.shape)}. {fix}")
        if not x.is_floating_point():
            raise PyroVAEError(f"expected x of floating point, got {x.dtype}. Convert it: x.float().")
        first = first_parameter(self)
        own = x.dtype if first is None else first.dtype
        if x.dtype != own:
            raise PyroVAEError(f"expected x of {own}, the dtype of the networks, got {x.dtype}. Pass x.to({own}).")
        if subsample_size is not None:
            require_count("subsample_size", subsample_size, "Pass the minibatch size, or None for all data.")
        if is_validation_enabled():
            self.likelihood.check(x)


def _takes_nothing(module: nn.Module) -> bool:
    """Whether it can be called without arguments."""
    try:
        inspect.signature(module.forward).bind()
    except TypeError:
        return False
    return True


def _same_order(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Whether reshaping keeps the axes: one of both is flat, or they differ by axes of size 1."""
    flat = 1 in (len(shape), len(other)) and prod(shape) == prod(other)
    return flat or [n for n in shape if n != 1] == [n for n in other if n != 1]


class Labelled(Pair):
    """Base class of pairs given y: labels, which the networks get as indicator vectors, or vectors."""

    num_classes: int | None

    @in_evaluation_mode
    def decode(self, z: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        """The mean of p(x|z, y): (*batch, N, Z), and y as in :meth:`model`, to (*batch, N, *event)."""
        if z.dim() < 2:
            raise PyroVAEError(f"expected z of shape (*batch, N, Z), got {tuple(z.shape)}. For one z, pass z[None].")
        return self.likelihood.decode(z, indicators(y, self.num_classes, z.shape[-2], z.dtype))

    @in_evaluation_mode
    def generate(self, y: Tensor) -> Tensor:
        """The means of p(x|z, y) at one sample of z from the prior for each of n values of y, of shape (n, *event)."""
        return self.decode(self.prior().sample((len(y) if isinstance(y, Tensor) and y.dim() else 0,)), y)


def indicators(y: Tensor, classes: int | None, size: int, dtype: torch.dtype) -> Tensor:
    """The network input for y: vectors (N, Y) unchanged, and integer labels (N,) as indicators of the classes."""
    if not isinstance(y, Tensor) or y.dim() == 0 or y.shape[0] != size:  # len(y) would fix the size in an export
        got = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise PyroVAEError(f"expected y to be a tensor with a row for each of {size} data, got {got}. Pass one.")
    if y.is_floating_point() and y.dim() == 2:
        if y.dtype != dtype or not (classes is None or y.shape[1] == classes):
            width = "Y" if classes is None else classes
            expected = f"y of {dtype} and shape ({size}, {width})"
            raise PyroVAEError(f"expected {expected}, got {described(y)}. Pass such vectors.")
        return y
    if y.is_floating_point() or y.dim() != 1 or classes is None:
        raise PyroVAEError(
            f"expected y to be floating-point vectors (N, Y), or integer labels (N,) with num_classes={classes}, got "
            f"{described(y)}. Build the pair with num_classes, or pass one_hot(y).float()."
        )
    check_labels(y, 0, classes)
    return one_hot(y.long(), classes).to(dtype)


def check_labels(y: Tensor, lowest: int, classes: int) -> None:
    """Raise ValueError for labels out of range, if Pyro's validation is on, since reading values takes time."""
    if is_validation_enabled() and not bool(((y >= lowest) & (y < classes)).all()):
        got = f"{int(y.min())} to {int(y.max())}"
        raise PyroVAEError(f"expected labels from {lowest} to {classes - 1}, got {got}. Number the classes from 0.")


def described(value: Any) -> str:
    """The dtype and shape of a tensor, or the type of another value, for an error message."""
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def mean_of(posterior: nn.Module, x: Tensor, *given: Tensor) -> Tensor:
    """The mean of q(z|x), or the posterior's `embed` if it has that method."""
    embed = getattr(posterior, "embed", None)
    return posterior(x, *given).mean if embed is None else embed(x, *given)
