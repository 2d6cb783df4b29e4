"""The gradient of several minibatches, as that of one minibatch with all their data."""

from collections.abc import Iterable

import torch
from torch import Tensor


class Accumulated:
    r"""The mean :math:`\sum_i n_i g_i / \sum_i n_i` over minibatches with n_i data and the mean gradient g_i.

    It equals the mean gradient of all data together, also where minibatches have different sizes.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.sums: dict[Tensor, Tensor] = {}
        self.data = 0.0
        self.number = 0  # of minibatches

    def add(self, parameters: Iterable[Tensor], data: float) -> None:
        """Add the gradients of a minibatch with so many data."""
        with torch.no_grad():
            for parameter in parameters:
                if parameter.grad is None:
                    continue
                if parameter in self.sums:
                    self.sums[parameter].add_(parameter.grad, alpha=data)
                else:
                    self.sums[parameter] = parameter.grad * data
        self.data, self.number = self.data + data, self.number + 1

    def put(self, parameters: Iterable[Tensor]) -> None:
        """Make the mean each parameter's ``grad``, and begin anew."""
        for parameter in parameters:
            total = self.sums.get(parameter)
            parameter.grad = None if total is None else total.div_(self.data or 1.0)  # weights may all be zero
        self.clear()
