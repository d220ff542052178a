"""The extension `perp_kernels._C`: whether it is there, how tensors reach it, which code path it takes.

`available` says whether the extension was built and loads here, and `why` says it in one sentence. Without it no
function of `perp_kernels.cpu` may be called; the package then serves every op from its plain-torch reference.

`PERP_NO_NATIVE=1` leaves the extension out at installation, and unused at run time.
"""

from __future__ import annotations

import importlib
import os
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

# Before `_C`, so that the loader gives `_C` the OpenMP runtime torch has brought: one thread pool in the process.
import torch
from torch import Tensor

from perp_kernels import dispatch
from perp_kernels.ops._library import written as written


def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get("PERP_NO_NATIVE", "0") not in ("", "0"):
        return None, "PERP_NO_NATIVE is set"
    try:
        native = importlib.import_module("perp_kernels._C")
    except ModuleNotFoundError:
        return None, "the native extension was not built: no C++ compiler, or PERP_NO_NATIVE=1, at installation"
    except ImportError as error:
        return None, f"the native extension does not load: {error}"
    return native, f"the {native.active_path()} path of the native extension"


_C, why = _load()
available = _C is not None

_DTYPES = {
    torch.uint8: "uint8",
    torch.int64: "int64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
    torch.float64: "float64",
}


def extension() -> ModuleType:
    """The extension. Raises RuntimeError where it is not there."""
    if _C is None:
        raise RuntimeError(f"no native CPU kernels: {why}")
    return _C


def view(name: str, tensor: Tensor) -> Any:
    """`tensor` as the extension takes it. Raises ValueError for a tensor that is not in this machine's memory."""
    if not tensor.is_cpu:
        raise ValueError(f"{name} is on {tensor.device}, the CPU kernels need it on cpu")
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None or tensor.layout is not torch.strided:
        raise ValueError(f"{name} is {tensor.dtype}, which is not a dtype the CPU kernels know")
    return extension().View(tensor.data_ptr(), dtype, tensor.shape, tensor.stride())


def by_rows(matrix: Tensor) -> Tensor:
    """[rows, columns] as the kernels read it: `matrix` itself where its rows have unit stride and do not overlap, else
    a copy."""
    rows, columns = matrix.shape
    apart = rows <= 1 or matrix.stride(0) >= columns
    return matrix if apart and (columns <= 1 or matrix.stride(1) == 1) else matrix.contiguous()


def matrix(name: str, tensor: Tensor, rows: int, columns: int) -> Any:
    """A contiguous tensor as the extension takes it, seen as [rows, columns] without a view of torch's being made."""
    if not tensor.is_cpu or rows * columns != tensor.numel():
        raise ValueError(f"{name} is {list(tensor.shape)} on {tensor.device}, expected {rows} x {columns} on cpu")
    return extension().View(tensor.data_ptr(), _DTYPES[tensor.dtype], (rows, columns), (columns, 1))


def cpu_features() -> list[str]:
    """The instruction sets, among those the kernels use, that this CPU has."""
    return list(extension().cpu_features())


def set_path(name: str) -> None:
    """Forces the code path of every kernel in this process: "auto", "avx512", "avx2" or "portable"."""
    extension().set_path(name)


def active_path() -> str:
    """The code path that serves calls now: "avx512", "avx2" or "portable"."""
    return str(extension().active_path())


def read_words(buffer: Tensor) -> int:
    """The bitwise or of an int64 tensor [n], read by all threads as fast as memory gives it: what bounds a product with
    few tokens. The result, an unsigned number of 64 bits, is there to be checked."""
    return int(extension().read_words(view("buffer", buffer)))


def register(op: str, function: Callable[..., Any], supports: Callable[..., bool]) -> None:
    """Let `function` serve `op` on this machine's CPU, where the extension is there and `supports` its arguments."""
    dispatch.register(op, "cpu", function, supports, None if available else why)


# Checked handles by the identity of their index tensor, which outlives calls: it is a Parameter of some module. A
# handle is used again only while the addresses and the index's version are the ones it was checked with. What is
# written through `.data` has no version: whoever does so must keep the components true to each other.
_handles: dict[int, tuple[weakref.ref[Tensor], tuple[object, ...], Any]] = {}


def _state(tensor: Tensor | None) -> tuple[int, int] | None:
    return None if tensor is None else (tensor.data_ptr(), tensor._version)


def weight(values: Tensor, index: Tensor, row_ptr: Tensor | None, K: int, layout: str) -> Any:
    """The extension's handle of a packed weight, checked on first use.

    Raises:
        ValueError: components that contradict each other, as in `unpack`.
    """
    if index.is_inference() or (row_ptr is not None and row_ptr.is_inference()):
        return _checked(values, index, row_ptr, K, layout)  # without a version, a change would go unseen
    storage = values.data_ptr(), values.shape, values.is_contiguous(), values.dtype
    key = (storage, _state(index), _state(row_ptr), K, layout)
    found = _handles.get(id(index))
    if found is not None and found[0]() is index and found[1] == key:
        return found[2]
    handle = _checked(values, index, row_ptr, K, layout)
    identity = id(index)
    _handles[identity] = (weakref.ref(index, lambda _: _handles.pop(identity, None)), key, handle)
    return handle


def _checked(values: Tensor, index: Tensor, row_ptr: Tensor | None, K: int, layout: str) -> Any:
    starts = None if row_ptr is None else view("row_ptr", row_ptr)
    return extension().Weight(view("values", values), view("index", index), starts, K, layout)
