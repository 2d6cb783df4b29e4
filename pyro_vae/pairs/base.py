"""What every pair shares: parameters under their parts' names, and data that are looked at before they do harm."""

from __future__ import annotations

from math import prod

import pyro
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

from pyro_vae.likelihoods import Likelihood


class Pair(nn.Module):
    """A module with a likelihood; a subclass has a `model` and a `guide`."""

    likelihood: Likelihood

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one datum."""
        return self.likelihood.event_shape

    def _check(self, x: Tensor, subsample_size: int | None = None) -> None:
        """Refuse data that are none of this pair's."""
        if not isinstance(x, Tensor):
            raise ValueError(f"expected x to be a tensor, got {type(x).__name__}. Pass split.x, or torch.as_tensor(x).")
        if x.dim() == 0 or tuple(x.shape[1:]) != self.event_shape:
            shape = ", ".join(map(str, self.event_shape))
            if tuple(x.shape) == self.event_shape:
                fix = "For one datum, pass x[None]."
            elif x.dim() > 1 and prod(x.shape[1:]) == prod(self.event_shape):
                fix = f"Reshape it: x.reshape(-1, {shape})."
            else:
                fix = "Build the VAE with the event_shape of your data, or pass data of that shape."
            raise ValueError(f"expected x of shape (N, {shape}), got {tuple(x.shape)}. {fix}")
        if not x.is_floating_point():
            raise ValueError(f"expected x of floating point, got {x.dtype}. Convert it: x.float().")
        own = next((parameter.dtype for parameter in self.parameters()), x.dtype)
        if x.dtype != own:
            raise ValueError(f"expected x of {own}, as the networks are, got {x.dtype}. Convert it: x.to({own}).")
        if subsample_size is not None and not isinstance(subsample_size, int):
            raise ValueError(f"expected subsample_size to be an integer or None, got {type(subsample_size).__name__}.")
        if is_validation_enabled():
            self.likelihood.check(x)


def register(name: str, module: nn.Module) -> None:
    """Register a module's parameters with Pyro, in place of those that an earlier pair left under its name.

    ``pyro.module`` alone would go on handing the earlier ones to the optimiser, and this pair would never learn.
    """
    store = pyro.get_param_store()
    for suffix, parameter in module.named_parameters():
        key = f"{name}$$${suffix}"
        if key in store and store[key] is not parameter:
            store[key] = parameter
    pyro.module(name, module)
