"""Checkpoints of earlier versions still load, and their trainings go on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import pyro_vae as pv

OLD = Path(__file__).parent / "data" / "version_0_1_0.pt"  # two epochs of the program below, by version 0.1.0
X = torch.linspace(-1, 1, 60).reshape(20, 3)


def program():
    return pv.mlp_vae((3,), latent_dim=1, hidden_dims=(4,), likelihood="gaussian")


def test_parameters_of_version_0_1_0_load():
    vae = program()
    before = vae.posterior.encoder[1].weight.clone()
    pv.load_parameters(OLD, vae, X)
    assert not torch.equal(before, vae.posterior.encoder[1].weight)
    assert torch.isfinite(pv.ELBO().bound(vae, X)).all()


def test_a_training_of_version_0_1_0_goes_on(tmp_path):
    """It goes on from the file's parameters and noise; the order of the data is that of later versions."""
    path = shutil.copy(OLD, tmp_path / "checkpoint.pt")
    options = {"epochs": 4, "batch_size": 8, "seed": 0, "validation": X[:4], "patience": 5, "progress": False}
    saved = torch.load(path, weights_only=True)
    resumed = program()
    with pytest.warns(UserWarning, match="written by an earlier version"):
        history = pv.fit(resumed, X, pv.IWAE(3, "dreg"), checkpoint=path, **options)
    assert len(history) == 4
    assert history.train_bound.tolist()[:2] == [row["train_bound"] for row in saved["history"]]
    # Each of the four steps of Adam since then moves a parameter by at most about lr.
    before = sorted(saved["parameters"].items())
    for (name, old), (_, own) in zip(before, sorted(resumed.named_parameters()), strict=True):
        assert 0 < (own - old).abs().max() < 8 * 1e-3, name


def test_a_flipped_byte_of_a_tensor_is_refused(tmp_path):
    """Each tensor, and the pickle, has a checksum; torch does not compare it."""
    path, vae = tmp_path / "run.pt", pv.mlp_vae((5,), latent_dim=2, hidden_dims=(16,), likelihood="gaussian")
    x = torch.randn(64, 5)
    pv.fit(vae, x, pv.ELBO(), epochs=1, seed=0, checkpoint=path)
    whole = path.read_bytes()
    for parameter in vae.parameters():
        if parameter.numel() < 8:  # so few bytes may stand elsewhere too
            continue
        at = whole.index(parameter.detach().numpy().tobytes())
        path.write_bytes(whole[: at + 2] + bytes([whole[at + 2] ^ 0x7F]) + whole[at + 3 :])
        with pytest.raises(pv.PyroVAEError, match="truncated, damaged, or another kind of file"):
            pv.load_parameters(path, vae, x)
    path.write_bytes(whole)
    pv.load_parameters(path, vae, x)
