"""An objective of one program as a torch module, for optimisers, DDP and Lightning."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pyro.infer.elbo import ELBOModule
from torch import Tensor, nn

from pyro_vae.engine.modules import PyroFunction, find_modules
from pyro_vae.errors import PyroVAEError

if TYPE_CHECKING:
    from pyro_vae.objectives.base import Objective


class ObjectiveModule(ELBOModule):
    """The loss of an objective for one model and guide, with their parameters; see :meth:`pyro_vae.Objective.__call__`.

    Its parameters, buffers and modes are those of the modules that model and guide are, are methods of, or hold as
    arguments of ``functools.partial``.

    Raises:
        ValueError: when its parameters are asked for, and neither belongs to a module.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.mlp_vae((5,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
        >>> loss = pv.ELBO()(vae)
        >>> optimizer = torch.optim.Adam(loss.parameters())
        >>> loss(torch.randn(4, 5)).backward()
    """

    def __init__(self, objective: Objective, model: PyroFunction, guide: PyroFunction) -> None:
        nn.Module.__init__(self)
        # Not as attributes of the module, which would register a model that is a module twice.
        vars(self).update(model=model, guide=guide)
        self.elbo: Objective = objective
        self.program = nn.ModuleList(find_modules(model, guide))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The differentiable loss, called with the program's arguments."""
        loss: Tensor = self.elbo.differentiable_loss(self.model, self.guide, *args, **kwargs)
        return loss

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of the modules of model and guide."""
        functions = [inspect.unwrap(function) for function in (self.model, self.guide)]
        whole = any(isinstance(getattr(function, "__self__", function), nn.Module) for function in functions)
        if not whole and not all(map(find_modules, functions)):  # functools.partial may hold a part of the modules
            raise PyroVAEError(
                "can't know the parameters: expected a model or guide that is a torch.nn.Module, or a method of one, "
                "got plain functions, whose pyro.param and pyro.module statements are found only by running them. Run "
                "the loss once, and build the optimiser on [p for _, p in pyro.get_param_store().named_parameters()]."
            )
        return super().named_parameters(*args, **kwargs)
