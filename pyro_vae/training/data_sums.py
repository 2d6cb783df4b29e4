"""Sums by which a checkpoint recognises data: of each block of rows, whatever the processor that prepared them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from pyro_vae.engine.minibatches import Minibatches

BLOCKS = 64  # the rows fall into so many blocks, with a sum each
ROUNDING_OF_SUMS = 2.0**-40  # of sums in float64, whose order may differ


def describe(batches: Minibatches) -> dict[str, Any]:
    """What is known of the data without another look at a minibatch: their lengths, and the sums of stored tensors.

    Those of a custom column or data set, and of a stream, can't be known.
    """
    if batches.loader is None:
        stored = [tensor for column in batches.columns for tensor in _stored(column) or [None]]
        rows, dynamic = batches.size, [_dynamic(column) for column in batches.columns]
    else:
        data = batches.loader.dataset
        stored, dynamic = _stored(data), [_dynamic(data)]
        rows = len(data) if hasattr(data, "__len__") and batches.steps is not None else None
    known = {"rows": rows, "minibatches": batches.steps, "columns": [_sums(tensor) for tensor in stored]}
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


def _stored(data: Any) -> list[Tensor | None]:
    """The tensors that hold the rows; none of a data set whose rows can't be had without a use of it."""
    if isinstance(data, Tensor):
        return [data]
    if isinstance(data, Subset):
        index = torch.as_tensor(data.indices)
        return [None if tensor is None else tensor[index.to(tensor.device)] for tensor in _stored(data.dataset)]
    if isinstance(data, TensorDataset):
        return list(data.tensors)
    if type(data) in (list, tuple):
        return _columns(data)
    images = getattr(data, "images", None)  # of a split of pyro_vae.data, which may draw from them at each use
    if not isinstance(images, Tensor) or not hasattr(data, "__len__"):
        return []
    return [images] if images.dim() and len(images) == len(data) else []


def _columns(rows: Sequence[Any]) -> list[Tensor | None]:
    """The columns of a list of rows, each of which is a tensor, or some tensors; none if they can't be stacked."""
    split = [row if isinstance(row, tuple | list) else (row,) for row in rows]
    kinds = {tuple((v.shape, v.dtype) if isinstance(v, Tensor) else None for v in row) for row in split}
    if len(kinds) != 1 or None in next(iter(kinds)):
        return []
    return [torch.stack([v.detach() for v in column]) for column in zip(*split, strict=True)]


def _sums(tensor: Tensor | None) -> dict[str, Any] | None:
    """Sums of the tensor's blocks of rows, with weights that differ from row to row and from element to element."""
    if tensor is None or tensor.layout != torch.strided or tensor.dim() == 0:
        return None
    with torch.no_grad():
        rows = tensor.detach().resolve_conj()
        rows = (torch.view_as_real(rows) if rows.is_complex() else rows).reshape(len(tensor), -1)
        of_rows, of_elements = _weights(len(rows)), _weights(rows.shape[1])
        sums, sizes = [], []
        for part, weights in zip(rows.split(size := _block(len(rows))), of_rows.split(size), strict=True):
            values = part.cpu().to(torch.float64)
            if not bool((values @ of_elements).isfinite().all()):  # a DataLoader's may have missing values
                values = values.nan_to_num(nan=math.pi)
            sums.append(weights @ (values @ of_elements))
            sizes.append(weights @ (values.abs() @ of_elements))
        shape = list(tensor.shape)
        return {"shape": shape, "dtype": str(tensor.dtype), "sums": torch.stack(sums), "sizes": torch.stack(sizes)}


def _block(rows: int) -> int:
    return max(1, -(-rows // BLOCKS))


def _weights(number: int) -> Tensor:
    """Weights between 0.5 and 1.5, no two alike."""
    return 0.5 + torch.arange(1, number + 1, dtype=torch.float64).mul(0.6180339887498949).frac()
