"""A device that this machine does not have, with real values: tensors on it refuse those on the CPU, and float64.

It has the name of Apple's, ``mps``, which has no float64. Its tensors hold tensors on the CPU, which do the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("mps:0")
META = torch.device("meta")  # by which name C++ knows the device: it must have one that each machine has
ACROSS = ("aten::_to_copy", "aten::copy_", "aten::_local_scalar_dense")  # operations between devices


class OnGPU(Tensor):
    """A tensor on the device."""

    __slots__ = ("inner",)
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: GPU)
    is_meta = property(lambda self: False)

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGPU:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return Tensor._make_wrapper_subclass(cls, inner.shape, **layout, device=META)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self, **_: Any) -> str:
        return f"on a GPU: {self.inner}"

    def __format__(self, spec: str) -> str:
        return format(self.inner, spec)

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def numpy(self) -> Any:
        raise TypeError(f"can't convert {GPU} device type tensor to numpy.")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with _Operations():
            return func(*args, **kwargs or {})


class _Names(TorchFunctionMode):
    """Lets ``device="mps"`` reach the operations below."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [META if _is_gpu(value) else value for value in args]
        kwargs = {key: META if _is_gpu(value) else value for key, value in (kwargs or {}).items()}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == META:  # C++ would drop the values
            return func(*args, **{key: value for key, value in kwargs.items() if key != "device"}).to(META)
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """Does an operation on the CPU, and keeps the device of its arguments."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves, structure = pytree.tree_flatten((args, dict(kwargs or {})))
        tensors = [value for value in leaves if isinstance(value, Tensor)]
        there = [isinstance(tensor, OnGPU) for tensor in tensors]
        devices = [value for value in leaves if isinstance(value, torch.device)]
        if not any(there) and META not in devices:
            return func(*args, **kwargs or {})
        name = func.overloadpacket._qualified_op_name
        by_index = name.startswith("aten::index") and there[0]  # an index may be on the CPU
        with_dims = any(tensor.dim() for tensor, on_gpu in zip(tensors, there, strict=True) if not on_gpu)
        if any(there) and with_dims and name not in ACROSS and not by_index:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {GPU} and cpu! ({name})")
        stays = there[0] if name == "aten::copy_" else META in devices if devices else any(there)
        args, kwargs = pytree.tree_unflatten([_inner(value) for value in leaves], structure)
        result = func(*args, **kwargs)
        own = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, OnGPU)}  # of in-place operations

        def outer(value: Any) -> Any:
            if not isinstance(value, Tensor) or not stays:
                return value
            if value.dtype == torch.float64:
                raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype ({name})")
            return own[id(value)] if id(value) in own else OnGPU(value)

        return outer(result) if isinstance(result, Tensor) else pytree.tree_map(outer, result)


def _is_gpu(value: Any) -> bool:
    return isinstance(value, str | torch.device) and str(value).split(":")[0] == GPU.type


def _inner(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.inner if isinstance(value, OnGPU) else value


@contextmanager
def pretended_gpu() -> Iterator[torch.device]:
    """Inside, this machine has the device that it yields."""
    with _Names(), _Operations():
        yield GPU
