"""What the minibatches of a step give together: their loss, and their gradient as that of one minibatch."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_vae.engine.rows import Count


class Accumulated:
    r"""The sums over the minibatches of a step, with n_i data and the mean gradient g_i.

    The gradient is the mean :math:`\sum_i n_i g_i / \sum_i n_i`, which equals that of all data together, also where
    minibatches have different sizes. Of one minibatch, each parameter's ``grad`` stays as it is.

    Attributes:
        number: how many minibatches; `taken`, how many of them this process had rows of.
        count: their data, or the sum of their weights.
        total, parts: their losses, and reconstructions and KLs, as sums over data.
        sums: the sums of gradients over data, by parameter.
    """

    def __init__(self, of_one: bool, buffers: Mapping[Tensor, Tensor]) -> None:
        self.of_one, self.buffers = of_one, buffers  # `buffers` are places for sums
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.sums: dict[Tensor, Tensor] = {}
        self.number = self.taken = 0
        self.count = 0.0
        self.total: Any = 0.0
        self.parts: Tensor | None = None

    def add(self, parameters: Iterable[Tensor], loss: Any, data: Count, parts: Tensor | None) -> None:
        """Add the loss of a minibatch, its parts, and the gradients."""
        self.total, self.count = self.total + loss * data.share, self.count + data.own
        self.taken += 1
        if parts is not None:
            parts = parts * data.share
            self.parts = parts if self.parts is None else self.parts + parts
        if self.of_one:
            return
        with torch.no_grad():
            for parameter in parameters:
                if parameter.grad is None:
                    continue
                if parameter in self.sums:
                    self.sums[parameter].add_(parameter.grad, alpha=data.own)
                else:
                    self.sums[parameter] = torch.mul(parameter.grad, data.own, out=self.buffers.get(parameter))

    def put(self, parameters: Iterable[Tensor]) -> None:
        """Make the mean each parameter's ``grad``."""
        if self.of_one:
            return
        for parameter in parameters:
            total = self.sums.get(parameter)
            parameter.grad = None if total is None else total.div_(self.count or 1.0)  # weights may all be zero
