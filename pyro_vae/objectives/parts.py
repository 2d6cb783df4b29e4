"""The two parts of a loss, reconstruction and KL, read off the runs that the loss needs anyway."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyro_vae.engine.program import Run
from pyro_vae.engine.sites import is_factor
from pyro_vae.engine.weights import terms, total
from pyro_vae.objectives.base import Objective
from pyro_vae.objectives.elbo import ELBO


class Parts:
    """The parts of one loss, as :func:`collected` finds them."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.runs: list[Tensor] = []  # reconstruction and KL of each

    def see(self, run: Run) -> None:
        """Add a run of the program."""
        observed = {name: site for name, site in run.model.items() if site["is_observed"]}
        latent = {name: site for name, site in run.model.items() if not site["is_observed"]}
        guide = {name: site for name, site in run.guide.items() if not is_factor(site)}
        with torch.no_grad():
            if isinstance(self.objective, ELBO) and self.objective.kl == "analytic":
                kl = total((site, self.objective.kl_at(run, name)) for name, site in guide.items())
            else:
                kl = total(terms(guide)) - total(terms(latent))
            reconstruction = total(terms(observed))
            self.runs.append(torch.stack([reconstruction, kl.to(reconstruction)]))  # without latents, it is on the CPU

    def sums(self) -> Tensor:
        """Reconstruction and KL, summed over data: a tensor of two numbers."""
        return torch.stack(self.runs).sum(0) / self.objective.num_samples


@contextmanager
def collected(objective: Any) -> Iterator[Parts | None]:
    """Inside, the parts of one loss of this objective are collected; None for an objective that is not of this package.

    .. math:: \\text{reconstruction} = \\sum_n \\frac1K \\sum_k \\log p(x_n \\mid z_{kn})

    The KL is that in closed form where the loss has it, with its free bits and without beta; otherwise it is the mean
    of log q(z|x) - log p(z) over the particles.
    """
    if not isinstance(objective, Objective):
        yield None
        return
    parts = Parts(objective)
    objective._on_run = parts.see
    try:
        yield parts
    finally:
        objective._on_run = None
