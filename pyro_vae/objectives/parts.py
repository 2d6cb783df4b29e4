"""The two parts of a loss, reconstruction and KL, read off the runs that the loss needs anyway."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_vae.engine.program import Run
from pyro_vae.engine.sites import Sites, is_factor
from pyro_vae.objectives.base import Objective
from pyro_vae.objectives.elbo import ELBO


class Parts:
    """The parts of one loss, as :func:`collected` finds them."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.runs: list[tuple[Tensor, Tensor | None]] = []

    def see(self, run: Run) -> None:
        """Add a run of the program."""
        observed = {name: site for name, site in run.model.items() if site["is_observed"]}
        latent = {name: site for name, site in run.model.items() if not site["is_observed"]}
        guide = {name: site for name, site in run.guide.items() if not is_factor(site)}
        sampled = all("unscaled_log_prob" in site for site in (*latent.values(), *guide.values()))
        self.runs.append((_sum(observed), _sum(guide) - _sum(latent) if sampled else None))

    def of(self, loss: Tensor) -> Tensor:
        """Reconstruction and KL of this loss, summed over data as it is: a tensor of two numbers."""
        number, objective = self.objective.num_samples, self.objective
        reconstruction = torch.stack([each for each, _ in self.runs]).sum() / number
        if isinstance(objective, ELBO) and objective.kl == "analytic":
            kl = (reconstruction + loss.detach()) / torch.as_tensor(objective.scheduled()["beta"])
        else:
            kl = torch.stack([each for _, each in self.runs if each is not None]).sum() / number
        return torch.stack([reconstruction, kl.to(reconstruction)])


@contextmanager
def collected(objective: Any) -> Iterator[Parts | None]:
    """Inside, the parts of one loss of this objective are collected; None for an objective that is not of this package.

    .. math:: \\text{reconstruction} = \\sum_n \\frac1K \\sum_k \\log p(x_n \\mid z_{kn})

    The KL is that in closed form where the loss has it, with its free bits; otherwise it is the mean of
    log q(z|x) - log p(z) over the particles.
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


def _sum(sites: Sites) -> Tensor:
    """The sum of the sites' log-densities, each with its scale and mask, without its gradient."""
    values = (scale_and_mask(s["unscaled_log_prob"].detach(), s["scale"], s["mask"]).sum() for s in sites.values())
    return sum(values, torch.zeros(()))
