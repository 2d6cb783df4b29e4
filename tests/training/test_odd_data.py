"""Data of unusual kinds: each trains, or is refused by name before any work."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import pyro_vae as pv

X = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))


def pair() -> pv.VAE:
    return pv.mlp_vae((4,), latent_dim=2, hidden_dims=(5,), likelihood="gaussian")


def with_batch_norm() -> pv.VAE:
    encoder = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4))
    likelihood = pv.Gaussian(nn.Linear(2, 4), (4,))
    return pv.VAE(prior=pv.StandardNormal(2), likelihood=likelihood, posterior=pv.DiagonalNormal(encoder, (4,)))


def made_in_inference_mode() -> torch.Tensor:
    with torch.inference_mode():
        return X.clone()


def train(data, vae=None, **options):
    return pv.fit(pair() if vae is None else vae, data, pv.ELBO(), epochs=1, seed=0, progress=False, **options)


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (made_in_inference_mode(), {}),
        (made_in_inference_mode(), {"batch_size": 3}),
        (DataLoader(made_in_inference_mode(), batch_size=3), {}),
        (X.clone().requires_grad_(), {}),
        (X[:1].expand(7, 4), {}),
        (X.as_subclass(type("Sub", (torch.Tensor,), {})), {}),
        (X, {"validation": X[:0]}),
        (X, {"validation": DataLoader(X[:2], batch_size=3, drop_last=True)}),
    ],
)
def test_these_train(data, options):
    assert train(data, **options).train_bound.notna().all()


def test_a_tensor_that_was_made_in_inference_mode_trains_as_its_copy():
    torch.manual_seed(0)
    first = train(made_in_inference_mode(), pair())
    torch.manual_seed(0)
    assert train(X, pair()).train_bound.tolist() == first.train_bound.tolist()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (X.to_sparse(), r"got a torch.sparse_coo tensor.*Pass x.to_dense\(\)"),
        (lambda: X.to_sparse_csr(), r"Pass x.to_dense\(\)"),
        (
            lambda: torch.nested.nested_tensor([X[0], X[1, :2]]),
            r"got a nested tensor. Pass torch.nested.to_padded_tensor",
        ),
        (lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), r"Pass x.dequantize\(\)"),
        (scipy.sparse.coo_matrix(X.numpy()), r"got a coo_matrix. Pass x.tocsr\(\)"),
        (np.float64(3.0), "expected data to be a dense tensor"),
        ([X, X], "If these are minibatches, join them with torch.cat"),
        ([X, X[:2]], r"one length, got lengths \[7, 2\]"),
        ((each for each in X), "got a generator"),
        (DataLoader(X[:0], batch_size=2), "expected a DataLoader with a minibatch, got an empty one"),
        (DataLoader(X[:2], batch_size=3, drop_last=True), "expected a DataLoader with a minibatch, got an empty one"),
        (DataLoader(X.to("meta"), batch_size=3), "expected minibatches with values, got a tensor of .*, on meta. Pass"),
        (DataLoader([{"y": row} for row in X], batch_size=2), r"arguments, \['x', 'mask'\], got \['y'\] too. Leave"),
        (DataLoader([str(row) for row in X], batch_size=2), "minibatches that begin with a str. Set its collate_fn"),
        (TensorDataset(X), "got a TensorDataset. Pass a DataLoader of it, or its tensors"),
        (Subset(TensorDataset(X), [0, 1]), "got a Subset. Pass a DataLoader"),
        (X * 1j, "expected x of floating point, got torch.complex64"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_these_are_refused_by_name(data, message):
    with pytest.raises(pv.PyroVAEError, match=message):
        train(data() if callable(data) else data)


@pytest.mark.parametrize(
    ("data", "options"),
    [(X, {"batch_size": 3}), (X[:1], {}), (DataLoader(X, batch_size=3), {}), (X, {"batch_size": 3, "compile": True})],
)
def test_a_last_minibatch_of_one_row_is_refused_under_batch_norm_before_work(data, options):
    vae = with_batch_norm()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    with pytest.raises(pv.PyroVAEError, match="expected minibatches of two rows or more, since batch norm"):
        train(data, vae, **options)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


@pytest.mark.parametrize(
    ("data", "options"), [(X, {"batch_size": 4}), (X, {}), (DataLoader(X, batch_size=3, drop_last=True), {})]
)
def test_other_last_minibatches_train_under_batch_norm(data, options):
    assert train(data, with_batch_norm(), **options).train_bound.notna().all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_without_gradients_is_refused(mode):
    vae = pair()
    with mode(), pytest.raises(pv.PyroVAEError, match=r"outside of torch.no_grad\(\) and torch.inference_mode\(\)"):
        train(X, vae)


def test_a_result_of_nan_is_refused():
    vae = pv.mlp_semi_supervised_vae((4,), latent_dim=2, num_classes=3, hidden_dims=(5,), likelihood="gaussian")
    for value in (torch.nan, torch.inf):
        with pytest.raises(pv.PyroVAEError, match="classify gives NaN: expected finite data and parameters"):
            vae.classify(torch.full((6, 4), value))


def test_empty_minibatches():
    with pytest.raises(pv.PyroVAEError, match="expected x with one datum or more, got none"):
        pv.ELBO().differentiable_loss(pair(), X[:0])
    assert pair().embed(X[:0]).shape == (0, 2)
