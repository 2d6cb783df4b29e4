"""The bound of held-out data, which ranks measure together."""

import math
from typing import TYPE_CHECKING

import pyro
import torch

from pyro_vae.engine import rng
from pyro_vae.engine.minibatches import Minibatches
from pyro_vae.engine.modules import eval_mode

if TYPE_CHECKING:
    from pyro_vae.training.loop import Loop


def validate(loop: "Loop", held_out: Minibatches) -> float:
    """The mean bound of held-out data, with the same noise each time; training does not notice."""
    ranks, own = loop.ranks, held_out.generator_states()
    total, count = ranks.attempt(_sums, loop, held_out) or (0.0, 0.0)
    held_out.set_generator_states(own)
    total, count = ranks.sum_of(total, count)
    return -total / count if count else math.nan


def _sums(loop: "Loop", held_out: Minibatches) -> tuple[float, float]:
    """The loss of this rank's share, and the number of its data."""
    total, count, (program, rows_of) = 0.0, 0.0, loop.unweighed
    with (
        torch.no_grad(),
        rng.preserved(seed=loop.ranks.rank),
        eval_mode(loop.modules),
        loop.precision,
        pyro.distributions.validation_enabled(not loop.rows),  # the data are the same in each epoch
    ):
        for batch in held_out.shared(loop.ranks.share):
            if loop.unchecked_held_out is not None and held_out is loop.held_out:
                loop.unchecked_held_out.check(batch)
            loss = loop.objective.loss(program.model, program.guide, *batch)
            data = rows_of.of(batch)
            total, count = total + loss * data.share, count + data.own
    return total, count
