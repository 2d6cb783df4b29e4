"""Parameters for each datum, fitted by Adam with a falling step size and averaged iterates."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

AVERAGED = 0.5  # share of the iterates, at the end, whose average reduces the gradient's noise


@torch.enable_grad()
def minimise(loss: Callable[[], Tensor], leaves: list[Tensor], num_steps: int, lr: float, bar: Any) -> None:
    """Move the leaves to where the loss is least, on average over its noise; no two data share an element of them."""
    for leaf in leaves:
        leaf.requires_grad_()
    adam = torch.optim.Adam(leaves, lr=lr)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, num_steps)
    total = [torch.zeros_like(leaf) for leaf in leaves]
    first = int((1 - AVERAGED) * num_steps)
    for step in range(num_steps):
        for leaf, gradient in zip(leaves, torch.autograd.grad(loss(), leaves), strict=True):
            leaf.grad = gradient.nan_to_num(0.0, 0.0, 0.0)  # a density that overflows at a draw has no gradient
        adam.step()
        falling.step()
        if step >= first:
            for mean, leaf in zip(total, leaves, strict=True):
                mean += leaf.detach() / (num_steps - first)
        bar.update()
    for leaf, mean in zip(leaves, total, strict=True):
        leaf.requires_grad_(False).copy_(mean)
