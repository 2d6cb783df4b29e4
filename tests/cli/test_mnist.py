"""The whole path on real MNIST, against what a plain hand-written loop reaches."""

from __future__ import annotations

import os
from pathlib import Path

import pyro
import pytest
import torch

import pyro_vae as pv

ROOT = Path(os.environ.get("PYRO_VAE_DATA", Path(__file__).parents[3] / "shared" / "data")).resolve()


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "MNIST").is_dir(), reason=f"no MNIST in {ROOT}; set PYRO_VAE_DATA")
def test_ten_epochs_are_no_worse_than_a_hand_written_loop():
    """784-400-20, tanh, Adam 1e-3, minibatches of 128 drawn anew: by hand, ELBO -105.0 and IWAE-64 -101.0."""
    pyro.set_rng_seed(0)
    mnist = pv.data.load("mnist", root=ROOT, binarize="dynamic", validation=0)
    vae = pv.mlp_vae(mnist.event_shape, latent_dim=20, hidden_dims=(400,))
    pv.fit(vae.model, vae.guide, mnist.train, pv.ELBO(), epochs=10, batch_size=128, lr=1e-3, seed=0)
    bounds = {}
    with torch.no_grad():
        for objective in (pv.ELBO(), pv.IWAE(64)):
            parts = [objective.bound(vae.model, vae.guide, x) for x in mnist.test.x.split(500)]
            bounds[objective.name] = torch.cat(parts).mean().item()
    assert bounds["ELBO, closed-form KL"] > -105.5
    assert bounds["IWAE"] > -101.5
