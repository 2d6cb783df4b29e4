"""Sizes: refused from the machine's memory on, and never where a run needs less."""

import os

import pytest

import pyro_vae as pv
from pyro_vae.cli.memory import check_memory, fewest_weights


def test_the_limit_is_the_memory():
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    check_memory("--size", memory // 4)
    with pytest.raises(pv.PyroVAEError, match=rf"memory of {memory / 2**30:.1f} GiB, got --size that take at least"):
        check_memory("--size", memory // 4 + 1)


@pytest.mark.parametrize("widths", [(1,), (3,), (400, 200), (2, 2, 2, 2)])
@pytest.mark.parametrize("latent_dim", [1, 20])
@pytest.mark.parametrize("conv", [False, True])
def test_networks_have_at_least_these_weights(widths, latent_dim, conv):
    if conv:
        vae = pv.conv_vae((1, 8, 8), latent_dim=latent_dim, channels=widths)
    else:
        vae = pv.mlp_vae((1, 8, 8), latent_dim=latent_dim, hidden_dims=widths)
    fewest = fewest_weights(1 if conv else 64, widths, latent_dim)
    assert fewest < sum(each.numel() for each in vae.parameters())
    assert conv or fewest > 0.5 * sum(each.numel() for each in vae.parameters() if each.dim() == 2)
