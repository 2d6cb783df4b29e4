"""Log-weights of a minibatch, from runs with as many particles as fit in memory."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from pyro_vae.devices import wide
from pyro_vae.engine.particles import Particles
from pyro_vae.engine.program import Program, Run
from pyro_vae.engine.weights import log_weights_of
from pyro_vae.evaluation.pieces import rows_at_once

T = TypeVar("T")

WEIGHTS_AT_ONCE = 2**22  # log-weights of a minibatch in memory
RUNS_AT_ONCE = 16  # runs of the model on the samples of one run of the guide


def draw_weights(program: Program, num_samples: int, vectorize: bool = True) -> Tensor:
    """Log-weights (K, N) of a minibatch, in float64, from runs with as many particles as fit in memory."""
    rows = max(1, rows_at_once(program.args) // len(program.args[0]))
    chunk_size = even_chunks(num_samples, rows) if vectorize else None
    at_once = RUNS_AT_ONCE * chunk_size if chunk_size else num_samples
    pieces, left = [], num_samples
    while left:
        particles = Particles(min(at_once, left), vectorize, chunk_size)
        pieces.append(wide(torch.cat(particles.read(program, log_weights_of))))
        left -= len(pieces[-1])
    return torch.cat(pieces)


def in_portions(
    program: Program, num_samples: int, vectorize: bool, read: Callable[[Run], T], elements: int = 1
) -> Iterator[list[T]]:
    """What `read` makes, with so many elements of a datum, of portions of the draws: for each a list by its runs.

    A portion fits in memory, and has at least two draws but for the last one.
    """
    at_once = even_chunks(num_samples, max(2, rows_at_once(program.args, elements) // len(program.args[0])))
    for start in range(0, num_samples, at_once):
        yield Particles(min(at_once, num_samples - start), vectorize).read(program, read)


def even_chunks(number: int, most: int) -> int:
    """The size of equal chunks of at most `most`. Tensors of one size can use the same memory again."""
    return -(-number // -(-number // most))
