"""Data as arrays that give rows, and as dictionaries: training is the same as on the tensors that they stand for."""

from __future__ import annotations

import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse
import torch
from helpers.arrays import OnDisk
from pyro import poutine
from torch.utils.data import DataLoader, IterableDataset

import pyro_vae as pv
from pyro_vae.engine.minibatches import Minibatches

X = torch.randn(23, 4, generator=torch.Generator().manual_seed(0))


def memory_mapped(tmp_path):
    np.save(tmp_path / "x.npy", X.numpy())
    return np.load(tmp_path / "x.npy", mmap_mode="r")


def in_hdf5(tmp_path):
    return pytest.importorskip("h5py").File(tmp_path / "x.h5", "w").create_dataset("x", data=X.numpy())


def in_zarr(tmp_path):
    return pytest.importorskip("zarr").array(X.numpy(), chunks=(5, 4))


def read_only(tmp_path):
    array = X.numpy().copy()
    array.flags.writeable = False
    return array


ARRAYS = {
    "NumPy": lambda _: X.numpy(),
    "read-only": read_only,
    "other byte order": lambda _: X.numpy().astype(">f4"),
    "backwards": lambda _: X.flip(0).contiguous().numpy()[::-1],
    "memory-mapped": memory_mapped,
    "on disk": lambda _: OnDisk(X.numpy()),
    "HDF5": in_hdf5,
    "Zarr": in_zarr,
    "csr matrix": lambda _: scipy.sparse.csr_matrix(X.numpy()),
    "csr array": lambda _: scipy.sparse.csr_array(X.numpy()),
    "AnnData": lambda _: pytest.importorskip("anndata").AnnData(scipy.sparse.csr_matrix(X.numpy())).X,
    "in a tuple": lambda _: (OnDisk(X.numpy()),),
    "in a dictionary": lambda _: {"x": OnDisk(X.numpy())},
    "dictionary of tensors": lambda _: {"x": X},
}


def trained(data, **options):
    torch.manual_seed(0)
    vae = pv.mlp_vae((4,), latent_dim=2, hidden_dims=(5,), likelihood="gaussian")
    return pv.fit(vae, data, pv.ELBO(), epochs=2, seed=0, progress=False, **options).train_bound.tolist()


@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.filterwarnings("error")
def test_arrays_train_as_the_tensor_of_their_rows(kind, tmp_path):
    assert trained(ARRAYS[kind](tmp_path), batch_size=8) == trained(X, batch_size=8)


def test_no_more_than_a_minibatch_is_read_at_a_time():
    array = OnDisk(X.numpy())
    trained(array, batch_size=8)
    assert array.most == 8
    trained(X, batch_size=8, validation=array)
    assert array.most == 8


@pytest.mark.parametrize("dtype", ["float64", "uint8", "uint16", "uint32", "int64", "bool"])
def test_numbers_stay_as_they_are(dtype):
    values = np.array([[0, 1], [1, 0]]).astype(dtype)
    (found,) = Minibatches(values, 2, "x").example()
    assert found.tolist() == values.tolist()
    assert found.dtype.is_signed or dtype in ("uint8", "bool")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_refused_when_they_are_read(value):
    bad = X.numpy().copy()
    bad[20, 1] = value
    for data in (bad, OnDisk(bad), scipy.sparse.csr_matrix(bad), {"x": OnDisk(bad)}):
        with pytest.raises(pv.PyroVAEError, match=r"expected data to be finite, got (NaN|infinity)"):
            trained(data, batch_size=8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (scipy.sparse.csc_matrix(X.numpy()), "got a csc_matrix. Pass x.tocsr()"),
        (np.ma.array(X.numpy()), "got a MaskedArray. Pass torch.as_tensor(x.filled(0)), and a mask"),
        (np.array(["a", "b"]), "got an ndarray. Convert its values to numbers"),
        (np.float32(1), "expected data to be a dense tensor of one row or more"),
        ((X.numpy(), X[:3]), "expected data to be tensors of one length, got lengths [23, 3]"),
        (X.numpy().astype("float64"), "expected x of torch.float32, the dtype of the networks, got torch.float64"),
        (X.numpy()[:0], "expected data to train on, got none"),
    ],
)
def test_these_arrays_are_refused(data, message):
    with pytest.raises(pv.PyroVAEError, match=re.escape(message)):
        trained(data)


class Table:
    """Rows beside other columns, as those of AnnData (obs and X) and of Hugging Face (with_format) are."""

    def __init__(self, **attributes):
        vars(self).update(attributes)

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return {"x": X[index]}


def test_tables_are_refused_with_what_to_pass():
    with pytest.raises(pv.PyroVAEError, match=r"got a Table. Pass its matrix, x.X"):
        trained(Table(obs=None, X=X.numpy()))
    with pytest.raises(pv.PyroVAEError, match=r"got a Table. Pass DataLoader\(x.with_format\(\"torch\"\)"):
        trained(Table(with_format=None))


SEEN = X > -1


def masked(rows, order=("x", "mask")):
    return [{name: {"x": x, "mask": m}[name] for name in order} for x, m in rows]


@pytest.mark.parametrize("workers", [0, 2])
def test_dictionaries_go_in_by_name(workers):
    rows = list(zip(X, SEEN, strict=True))
    expected = trained(DataLoader(rows, batch_size=8))
    for order in (("x", "mask"), ("mask", "x")):
        assert trained(DataLoader(masked(rows, order), batch_size=8, num_workers=workers)) == expected
    assert trained({"mask": SEEN, "x": X}, batch_size=8) == trained((X, SEEN), batch_size=8)
    held_out = {"validation": {"mask": SEEN, "x": X}}
    assert trained({"mask": SEEN, "x": X}, batch_size=8, **held_out) == trained((X, SEEN), batch_size=8)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_training_goes_on_with_the_same_dictionary(checkpoint, tmp_path):
    options = {"checkpoint": tmp_path / "run.pt"} if checkpoint else {}
    torch.manual_seed(0)
    vae = pv.mlp_vae((4,), latent_dim=2, hidden_dims=(5,), likelihood="gaussian")
    for epochs in (1, 2):
        found = pv.fit(vae, {"x": X, "mask": SEEN}, pv.ELBO(), epochs=epochs, batch_size=8, progress=False, **options)
    assert len(found) == 2
    if checkpoint:
        with pytest.raises(pv.PyroVAEError, match="was written with other data"):
            pv.fit(vae, {"x": -X, "mask": SEEN}, pv.ELBO(), epochs=3, batch_size=8, progress=False, **options)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(masked(zip(X, SEEN, strict=True)))


def test_a_stream_of_dictionaries():
    pairs = [*zip(X, SEEN, strict=True)]
    assert trained(DataLoader(Stream(), batch_size=8)) == trained(DataLoader(pairs, batch_size=8))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("x", "label"), "arguments, ['x', 'mask'], got ['label'] too. Leave them out: a DataLoader does with"),
        (("x", "subsample_size"), "got ['subsample_size'] too"),
        (("mask",), "expected {} with the key 'x', which the model needs, got keys ['mask']. Add it."),
    ],
)
@pytest.mark.parametrize("kind", ["dictionary", "loader"])
def test_other_keys_are_refused_before_work(given, message, kind):
    data = dict.fromkeys(given, X)
    if kind == "loader":
        data = DataLoader([dict.fromkeys(given, x) for x in X], batch_size=8)
    torch.manual_seed(0)
    vae = pv.mlp_vae((4,), latent_dim=2, hidden_dims=(5,), likelihood="gaussian")
    before = torch.nn.utils.parameters_to_vector(vae.parameters()).clone()
    message = message.format("data" if kind == "dictionary" else "minibatches")
    with pytest.raises(pv.PyroVAEError, match=re.escape(message)) as caught:
        pv.fit(vae, data, pv.ELBO(), epochs=1, progress=False)
    assert "\n" not in str(caught.value)
    assert torch.equal(before, torch.nn.utils.parameters_to_vector(vae.parameters()))


def of_three(a, b=None, c=None):
    with pyro.plate("rows", len(a)):
        mean = pyro.sample("latent", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))
        pyro.sample("seen", dist.Normal(mean + (0.0 if c is None else c), 1.0), obs=a)


def guide_of_three(a, b=None, c=None):
    with pyro.plate("rows", len(a)):
        pyro.sample("latent", dist.Normal(a / 2, 0.7))


def test_programs_with_other_names():
    for model in (of_three, poutine.block(of_three, hide=["nothing"])):
        assert [*map(id, Minibatches({"a": X, "b": X}, 4, "x", model, guide_of_three).columns)] == [id(X), id(X)]
    with pytest.raises(pv.PyroVAEError, match="the key 'b', which the model takes before 'c', got keys"):
        Minibatches({"a": X, "c": X}, 4, "x", of_three, guide_of_three)
    with pytest.raises(pv.PyroVAEError, match=r"got \['a', 'b'\] in the model and \['b', 'a'\] in the guide"):
        Minibatches({"a": X, "b": X}, 4, "x", of_three, lambda b, a: None)
    with pytest.raises(pv.PyroVAEError, match="the model's parameters have no names, got a dictionary"):
        Minibatches({"a": X}, 4, "x", lambda *args: None, None)

    class Module(pyro.nn.PyroModule):
        def forward(self, a, b):
            pass

    auto = pyro.infer.autoguide.AutoNormal(of_three)
    assert len(Minibatches({"b": X, "a": -X}, 4, "x", Module(), auto).columns) == 2


def test_labels_are_left_out_by_collate():
    rows = [(x, i % 3) for i, x in enumerate(X)]
    with pytest.raises(pv.PyroVAEError, match="mask"):  # the label is the second argument
        trained(DataLoader(rows, batch_size=8))
    expected = trained(DataLoader([*X], batch_size=8))
    assert trained(DataLoader(rows, batch_size=8, collate_fn=pv.data.collate(0))) == expected
    named = [{"label": label, "x": x} for x, label in rows]
    for workers in (0, 1):
        loader = DataLoader(named, batch_size=8, num_workers=workers, collate_fn=pv.data.collate("x"))
        assert trained(loader) == expected
    for columns in ((), ("x", 0), (None,), ([0],)):
        with pytest.raises(pv.PyroVAEError, match="expected columns to be keys of dictionaries, or places in tuples"):
            pv.data.collate(*columns)
    with pytest.raises(pv.PyroVAEError, match=r"expected data with the keys \['y'\], got a dict \(KeyError: 'y'\)"):
        trained(DataLoader(named, batch_size=8, collate_fn=pv.data.collate("y")))


def test_arrays_among_a_loaders_minibatches_become_tensors():
    sparse = scipy.sparse.csr_matrix(X.numpy())
    loader = DataLoader(range(23), batch_size=8, collate_fn=lambda rows: sparse[rows])
    assert trained(loader) == trained(DataLoader([*X], batch_size=8))
    loader = DataLoader(range(23), batch_size=8, collate_fn=lambda rows: {"x": X.numpy()[rows]})
    assert trained(loader) == trained(DataLoader([*X], batch_size=8))
