"""What the tests of training share: few data, a small pair, and whether two pairs have the same parameters."""

import pyro
import torch

import pyro_vae as pv
from pyro_vae.distributed import mixed

X = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))


def shuffled(number, seed, epoch, batch_size):
    """The minibatches of an epoch of `fit` with a seed: their order does not depend on the generators' states."""
    generator = torch.Generator().manual_seed(mixed(seed, epoch))
    return torch.randperm(number, generator=generator).split(batch_size)


def small_vae(seed=0):
    """A pair whose weights depend on the seed alone; the parameters of others are forgotten."""
    pyro.set_rng_seed(seed)
    pyro.clear_param_store()
    return pv.mlp_vae((6,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")


def same(first, second):
    """Whether all parameters are the same, to the last bit."""
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
