"""Columns of data: what has rows that can be taken out by their numbers, and how rows of arrays become tensors."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyro_vae.checks import how_to_make_dense, is_dense, shown
from pyro_vae.errors import PyroVAEError

WIDER = {"u2": np.int32, "u4": np.int64}  # PyTorch computes with no unsigned integers of so many bytes


class ArrayRows:
    """An array that gives rows when they are asked for, such as one in a file, as a column whose rows are tensors."""

    def __init__(self, array: Any, name: str) -> None:
        self.array, self.name = array, name

    def __len__(self) -> int:
        return int(self.array.shape[0])

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        if isinstance(index, slice):
            rows = tensor_of(self.array[index])
        else:  # HDF5 takes increasing numbers alone, and each of them once
            numbers, places = np.unique(index.cpu().numpy(), return_inverse=True)
            # Zarr's own indexing takes a list of numbers for coordinates.
            rows = tensor_of(getattr(self.array, "oindex", self.array)[numbers])[torch.from_numpy(places)]
        check_finite(rows, self.name)
        return rows


def column_of(value: Any, name: str) -> Any:
    """A value as a column: an array as a tensor that shares its memory, or as rows that are read when they are needed.

    Raises:
        ValueError: it has no rows that can be taken out by their numbers.
    """
    if _gives_rows(value):
        in_memory = isinstance(value, np.ndarray) and not isinstance(value, np.memmap)
        value = tensor_of(value) if in_memory else ArrayRows(value, name)
    if not _is_column(value):
        raise PyroVAEError(
            f"expected {name} to be a dense tensor of one row or more, a split of pv.data, an array of numbers with "
            f"rows, a tuple or dictionary of these, or a DataLoader, got {shown(value)}. {_how_to_pass(value)}"
        )
    if isinstance(value, Tensor) and value.is_inference():  # it can't be used where gradients are recorded; a copy can
        value = value.clone()
    return value


def at_rows(column: Any, index: Any) -> Any:
    """Some rows of a column: a tensor, a split, or a list, such as one of strings."""
    if isinstance(column, list | tuple) and isinstance(index, Tensor):
        return type(column)(column[i] for i in index.tolist())
    return column[index]


def tensor_of(value: Any) -> Any:
    """Rows of an array as a tensor, which shares their memory where it can; any other value as it is."""
    if hasattr(value, "toarray") and _gives_rows(value):
        value = value.toarray()
    if isinstance(value, Tensor) or not _gives_rows(value):
        return value
    array = np.asarray(value)
    dtype = WIDER.get(array.dtype.str[1:], array.dtype.newbyteorder("="))
    array = array.astype(dtype, copy=False)
    if not array.flags.writeable or min(array.strides, default=0) < 0 or isinstance(value, np.memmap):
        array = array.copy()
    return torch.from_numpy(array)


def check_finite(column: Tensor, name: str) -> None:
    """Refuse NaN and infinity, and say which of the two there are."""
    if bool(torch.isfinite(column).all()):
        return
    missing = "; or, where they are missing values, pass (x.nan_to_num(), ~x.isnan()) to a model with a mask"
    found = {"NaN": bool(column.isnan().any()), "infinity": bool(column.isinf().any())}
    raise PyroVAEError(
        f"expected {name} to be finite, got {' and '.join(what for what in found if found[what])}. Drop "
        f"those rows{', or correct them' if found['infinity'] else f'{missing}, such as pv.VAE'}."
    )


def _gives_rows(value: Any) -> bool:
    """Whether it is an array of numbers that gives rows: NumPy's, Zarr's, HDF5's, a sparse one by rows, and others."""
    if isinstance(value, Tensor | np.ma.MaskedArray | pd.DataFrame | pd.Series | type):
        return False
    shape, kind = getattr(value, "shape", None), getattr(getattr(value, "dtype", None), "kind", None)
    by_rows = getattr(value, "format", "csr") == "csr"  # of a sparse array by columns, each row takes a pass over all
    return isinstance(shape, tuple) and len(shape) > 0 and kind in tuple("biuf") and by_rows


def _is_column(column: Any) -> bool:
    """Whether it has rows that can be taken out by their numbers."""
    if isinstance(column, Tensor):
        return is_dense(column) and column.dim() > 0 and not column.is_meta
    others = (Dataset, np.ndarray, pd.DataFrame, pd.Series, str, dict, type)
    sized = hasattr(column, "__len__") and not hasattr(column, "toarray")  # SciPy's sparse matrices refuse len
    table = hasattr(column, "obs") or hasattr(column, "with_format")  # of AnnData or Hugging Face, with other columns
    return sized and hasattr(column, "__getitem__") and not isinstance(column, others) and not table


def _how_to_pass(value: Any) -> str:
    """What to pass in place of a value: the end of a message."""
    if hasattr(value, "with_format"):
        return 'Pass DataLoader(x.with_format("torch"), batch_size=64).'
    if hasattr(value, "obs") and hasattr(value, "X"):
        return "Pass its matrix, x.X."
    if hasattr(value, "tocsr"):
        return "Pass x.tocsr()."
    return how_to_make_dense(value)
