"""Sums by which a checkpoint recognises data: of each block of rows, whatever the processor that prepared them."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from pyro_vae.engine.minibatches import Minibatches

BLOCKS = 64  # the rows fall into so many blocks, with a sum each
MOST_ELEMENTS = 2**26  # are read, in half a second; of more data, the first rows of each block
ROUNDING_OF_SUMS = 2.0**-40  # of sums in float64, whose order may differ


def describe(batches: Minibatches) -> dict[str, Any]:
    """What is known of the data without another look at a minibatch: their lengths, and sums of stored rows.

    The rows of a custom column or data set, and of a stream, can't be known.
    """
    if batches.loader is None:
        stored: list[_Rows | None] = []
        for column in batches.columns:
            stored.extend(_stored(column) or [None])
        number, dynamic = batches.size, [_dynamic(column) for column in batches.columns]
    else:
        data = batches.loader.dataset
        stored, dynamic = [*_stored(data)], [_dynamic(data)]
        number = len(data) if hasattr(data, "__len__") and batches.steps is not None else None
    known = {"rows": number, "minibatches": batches.steps, "columns": [_sums(column) for column in stored]}
    return known | {"dynamic": None if None in dynamic else any(dynamic)}


@dataclass(frozen=True)
class Difference:
    """What differs, and how it was and is."""

    what: str
    was: Any
    now: Any


def difference(saved: dict[str, Any], own: dict[str, Any]) -> Difference | None:
    """The first difference between two descriptions; what only one of them knows is not compared."""
    words = {"rows": "the number of rows", "minibatches": "the number of minibatches", "dynamic": "dynamic"}
    for what, word in words.items():
        if saved[what] is not None and own[what] is not None and saved[what] != own[what]:
            return Difference(word, saved[what], own[what])
    if saved["columns"] and own["columns"] and len(saved["columns"]) != len(own["columns"]):
        return Difference("the number of tensors", len(saved["columns"]), len(own["columns"]))
    for i, (was, now) in enumerate(zip(saved["columns"], own["columns"], strict=False)):
        if was is None or now is None:
            continue
        tensor = f" of tensor {i}" if len(own["columns"]) > 1 else ""
        for what in ("shape", "dtype"):
            if was[what] != now[what]:
                return Difference(f"the {what}{tensor}", was[what], now[what])
        dtype = getattr(torch, was["dtype"].removeprefix("torch."))
        precision = 4 * torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0.0
        bound = max(precision, ROUNDING_OF_SUMS) * torch.maximum(was["sizes"], now["sizes"])
        different = (was["sums"] != now["sums"]) & ((was["sums"] - now["sums"]).abs() > bound)
        if bool(different.any()):
            block, size = int(different.nonzero()[0]), _block(was["shape"][0])
            first, last = block * size, min((block + 1) * size, was["shape"][0]) - 1
            rows = f"row {first}" if first == last else f"rows {first} to {last}"
            sums = (f"{each['sums'][block]:.9g}" for each in (was, now))
            return Difference(f"the weighted sum of {rows}{tensor}", *sums)
    return None


def _dynamic(data: Any) -> bool | None:
    """Whether each use draws new images, as a split of pyro_vae.data may; None if that can't be known."""
    if isinstance(data, Subset):
        return _dynamic(data.dataset)
    if isinstance(data, Tensor | TensorDataset):
        return False
    found = getattr(data, "dynamic", None)
    return found if isinstance(found, bool) else None


@dataclass(frozen=True)
class _Rows:
    """Rows that lie in memory or in a file: those of a tensor, or of a list of tensors."""

    number: int
    take: Callable[[Tensor], Tensor]  # those of the given numbers


def _stored(data: Any) -> list[_Rows]:
    """What holds the rows, column by column; nothing of a data set whose rows can't be had without a use of it."""
    if isinstance(data, Tensor):
        strided = data.layout == torch.strided and data.dim() > 0
        return [_Rows(len(data), lambda index: data[index.to(data.device)])] if strided else []
    if isinstance(data, TensorDataset):
        return [column for tensor in data.tensors for column in _stored(tensor)]
    if isinstance(data, Subset):
        indices, whole = torch.as_tensor(data.indices), _stored(data.dataset)
        return [_Rows(len(indices), functools.partial(_chosen, column, indices)) for column in whole]
    if type(data) in (list, tuple):
        return _columns(data)
    images = getattr(data, "images", None)  # of a split of pyro_vae.data, which may draw from them at each use
    if not isinstance(images, Tensor) or not hasattr(data, "__len__"):
        return []
    return _stored(images) if images.dim() and len(images) == len(data) else []


def _chosen(column: _Rows, indices: Tensor, index: Tensor) -> Tensor:
    return column.take(indices[index])


def _columns(rows: Sequence[Any]) -> list[_Rows]:
    """The columns of a list of rows, each of which is a tensor, or some tensors; none if they can't be stacked."""
    split = [row if isinstance(row, tuple | list) else (row,) for row in rows]
    kinds = {tuple((v.shape, v.dtype) if isinstance(v, Tensor) else None for v in row) for row in split}
    if len(kinds) != 1 or None in next(iter(kinds)):
        return []

    def stacked(column: int, index: Tensor) -> Tensor:
        return torch.stack([split[i][column] for i in index.tolist()])

    return [_Rows(len(split), functools.partial(stacked, column)) for column in range(len(split[0]))]


def _sums(rows: _Rows | None) -> dict[str, Any] | None:
    """Sums of the blocks of rows, with weights that differ from row to row and from element to element."""
    if rows is None or rows.number == 0:
        return None
    with torch.no_grad():
        row = rows.take(torch.tensor([0])).detach()
        width = max(1, row.numel() * (1 + row.is_complex()))
        size = _block(rows.number)
        taken = min(size, max(1, MOST_ELEMENTS // (BLOCKS * width)))
        of_rows, of_elements = _weights(rows.number), _weights(width)
        sums, sizes = [], []
        for start in range(0, rows.number, size):
            stop = min(start + taken, rows.number)
            values, weights = _as_float64(rows.take(torch.arange(start, stop))), of_rows[start:stop]
            totals = values @ of_elements[: values.shape[1]]
            if not bool(totals.isfinite().all()):  # a DataLoader's may have missing values
                values = values.nan_to_num(nan=math.pi)
                totals = values @ of_elements[: values.shape[1]]
            sums.append(weights @ totals)
            sizes.append(weights @ (values.abs() @ of_elements[: values.shape[1]]))
        shape = [rows.number, *row.shape[1:]]
        return {"shape": shape, "dtype": str(row.dtype), "sums": torch.stack(sums), "sizes": torch.stack(sizes)}


def _as_float64(rows: Tensor) -> Tensor:
    """The rows on the CPU, as a matrix."""
    rows = rows.detach().cpu().as_subclass(Tensor)
    rows = torch.view_as_real(rows.resolve_conj()) if rows.is_complex() else rows
    return rows.reshape(len(rows), -1).to(torch.float64)


def num_blocks(rows: int) -> int:
    """The number of blocks into which so many rows fall."""
    return -(-rows // _block(rows))


def _block(rows: int) -> int:
    return max(1, -(-rows // BLOCKS))


def _weights(number: int) -> Tensor:
    """Weights between 0.5 and 1.5, no two alike."""
    return 0.5 + torch.arange(1, number + 1, dtype=torch.float64).mul(0.6180339887498949).frac()
