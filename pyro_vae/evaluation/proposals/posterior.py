"""The posterior of each datum as a density of its vector y, up to a constant, and the slope that the fit follows."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_vae.compiled.function import CompiledFunction
from pyro_vae.engine.modules import PyroFunction
from pyro_vae.engine.program import Program
from pyro_vae.engine.traces import in_particles, traced
from pyro_vae.engine.weights import log_density, terms
from pyro_vae.evaluation.pieces import Args
from pyro_vae.evaluation.proposals.layout import Layout, Placing
from pyro_vae.evaluation.runs import Values, run_at


class Posterior:
    """log p(x, z) |dz / dy| at vectors (K, N, D), where z are the values that a base gives to its sites at y.

    With `compile`, the slope is compiled once, at its first call, for as many data as the program has.
    """

    def __init__(self, program: Program, base: PyroFunction, layout: Layout, vectorize: bool, compile: bool) -> None:
        self.program, self.base, self.layout, self.vectorize = program, base, layout, vectorize
        self.size = len(program.args[0])  # of each minibatch but the last
        self.compiled = CompiledFunction(self._slope, program.modules()) if compile else None

    def slope(self, y: Tensor, args: Args) -> Tensor:
        """The derivative of the log-density in y, on these data."""
        if self.compiled is None:
            return self._slope(y, *args)
        number = len(args[0])
        if number < self.size:  # to compile once more takes longer than to repeat data of the last minibatch
            rows = torch.arange(self.size, device=y.device) % number
            y, args = y[:, rows], tuple(each[rows.to(each.device)] for each in args)
        slope: Tensor = self.compiled(y, *args)
        return slope[:, :number]

    @torch.enable_grad()
    def _slope(self, y: Tensor, *args: Tensor) -> Tensor:
        y = y.detach().requires_grad_()
        program = self.program.on(args)
        values, volume = self._values(program, y)
        there = run_at(replace(program, guide=None), values, len(y), self.vectorize)
        # A datum's density depends on its own vector alone.
        (slope,) = torch.autograd.grad((log_density(there, terms(there.model)) + volume).sum(), y)
        return slope

    def _values(self, program: Program, y: Tensor) -> tuple[Values, Tensor]:
        """The sites' values at vectors, by the base, since a site's coordinates depend on the sites before it."""
        if not self.vectorize and len(y) > 1:
            each = [self._values(program, one[None]) for one in y]
            values = {name: torch.cat([found[name] for found, _ in each]) for name in each[0][0]}
            return values, torch.cat([volume for _, volume in each])
        placing = Placing(self.layout, y)
        # Only the values are needed: the density of a flow at given ones would record its inverse for each gradient.
        placed = in_particles(placing(self.base), len(y), None if len(y) == 1 else -program.depth)
        nodes: Any = traced(placed, program.args, program.kwargs).nodes
        return {part.name: nodes[part.name]["value"] for part in self.layout.parts}, placing.volume
