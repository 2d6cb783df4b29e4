"""Sums of blocks of rows: equal for equal data, whatever the processor, and for no others."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

from pyro_vae.engine.minibatches import Minibatches
from pyro_vae.training.data_sums import describe, difference

X = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def between(first, second):
    """The difference of two data sets, as a DataLoader has them."""
    return difference(*(describe(Minibatches(DataLoader(data, 100), None, "data")) for data in (first, second)))


def changed(x, index, value):
    x = x.clone()
    x[index] = value
    return x


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (changed(X, (999, 2), 0.0), "the weighted sum of rows 992 to 999"),
        (X[torch.randperm(1000, generator=torch.Generator().manual_seed(1))], "the weighted sum of rows 0 to 15"),
        (X.flip(1), "the weighted sum of rows 0 to 15"),
        (-X, "the weighted sum of rows 0 to 15"),
        (X.float(), "the dtype"),
        (X.reshape(1000, 3, 1), "the shape"),
        (X[:999], "the number of rows"),
        (changed(X, (20, 1), math.nan), "the weighted sum of rows 16 to 31"),
    ],
    ids=["value", "rows", "columns", "sign", "dtype", "shape", "number", "missing"],
)
def test_other_data_have_other_sums(other, what):
    assert between(X, other).what == what


def test_the_sums_are_weighted_by_row_and_by_element():
    golden = 0.6180339887498949
    of_rows, of_elements = ([0.5 + (k * golden) % 1 for k in range(1, n + 1)] for n in (2, 3))
    x = torch.tensor([[1.0, 2.0, -3.0], [0.5, 0.0, 4.0]], dtype=torch.float64)
    expected = [
        a * sum(b * v for b, v in zip(of_elements, row, strict=True)) for a, row in zip(of_rows, x, strict=True)
    ]
    (column,) = describe(Minibatches(x, None, "data"))["columns"]
    torch.testing.assert_close(column["sums"], torch.stack(expected), rtol=1e-14, atol=0)


def test_the_data_stay_as_they_are():
    before = X.clone()
    between(X, X)
    assert torch.equal(X, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_rounding_is_no_difference(dtype):
    """The sums of positive data change by the factor of the data; those of float64 have a rounding of their own."""
    x = X.abs().to(dtype)
    up = torch.nextafter(x, torch.tensor(math.inf, dtype=dtype)) if dtype != torch.float16 else x * (1 + 2**-10)
    assert between(x, up) is None
    assert between(x, x * (1 + 16 * max(torch.finfo(dtype).eps, 2**-40))) is not None


@pytest.mark.parametrize(
    "other",
    [
        changed(X, (20, 1), math.nan),
        changed(X, (20, 1), math.inf),
        X > 0,
        (X * 10).long(),
        torch.complex(X, X),
        X[:1],
        X[:, 0],
        X[:, :0],
    ],
    ids=["missing", "infinite", "bool", "int", "complex", "one", "scalars", "empty"],
)
def test_equal_data_have_equal_sums(other):
    assert between(other, other.clone()) is None


def test_the_tensors_of_a_loader_are_compared_whatever_holds_them():
    data = TensorDataset(X, X[:, 0])
    for other in (list(zip(X, X[:, 0], strict=True)), Subset(data, range(1000))):
        assert between(data, other) is None
    assert between(data, TensorDataset(X, -X[:, 0])).what == "the weighted sum of rows 0 to 15 of tensor 1"
    assert between(Subset(data, range(10)), Subset(data, range(1, 11))).what == "the weighted sum of row 0 of tensor 0"
    assert between(data, X).what == "the number of tensors"
    assert between(list(X), list(changed(X, (500, 0), 9.0))).what == "the weighted sum of rows 496 to 511"
    ragged = [X[:3], X[:4]]
    assert describe(Minibatches(DataLoader(ragged, 1), None, "data"))["columns"] == []


def test_of_much_data_the_first_rows_of_each_block_are_read(monkeypatch):
    """Sixteen rows are a block; four of each are within the limit."""
    monkeypatch.setattr("pyro_vae.training.data_sums.MOST_ELEMENTS", 64 * 3 * 4)
    assert between(X, changed(X, (19, 2), 9.0)).what == "the weighted sum of rows 16 to 31"
    assert between(X, changed(X, (20, 2), 9.0)) is None


def test_the_imaginary_part_counts():
    assert between(torch.complex(X, X), torch.complex(X, -X)).what == "the weighted sum of rows 0 to 15"
