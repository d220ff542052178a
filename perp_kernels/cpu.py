"""The native CPU kernels, and the only module that touches the extension `perp_kernels._C`.

`available` says whether the extension was built and loads here, and `why` says it in one sentence. Without it nothing
in this module may be called; the package then serves every op from its plain-torch reference.

`PERP_NO_NATIVE=1` leaves the extension out at installation, and unused at run time.
"""

from __future__ import annotations

import importlib
import os
import weakref
from types import ModuleType
from typing import Any

# Before `_C`, so that the loader gives `_C` the OpenMP runtime torch has brought: one thread pool in the process.
import torch
from torch import Tensor

from perp_kernels import dispatch


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
ELEMENTS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _native() -> ModuleType:
    if _C is None:
        raise RuntimeError(f"no native CPU kernels: {why}")
    return _C


def _view(name: str, tensor: Tensor) -> Any:
    """`tensor` as the extension takes it. Raises ValueError for a tensor that is not in this machine's memory."""
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}, the CPU kernels need it on cpu")
    if tensor.layout is not torch.strided or tensor.dtype not in _DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}, which is not a dtype the CPU kernels know")
    return _native().View(tensor.data_ptr(), _DTYPES[tensor.dtype], tuple(tensor.shape), tuple(tensor.stride()))


def cpu_features() -> list[str]:
    """The instruction sets, among those the kernels use, that this CPU has."""
    return list(_native().cpu_features())


def set_path(name: str) -> None:
    """Forces the code path of every kernel in this process: "auto", "avx512" or "portable"."""
    _native().set_path(name)


def active_path() -> str:
    """The code path that serves calls now: "avx512" or "portable"."""
    return str(_native().active_path())


def pack(weight: Tensor, bits: Tensor, layout: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Packs a dense weight into the canonical form of `layout`.

    Args:
        weight: [R, K] bf16, fp16, fp32 or fp64.
        bits: uint8 [R, ceil(K/8)], the packed mask (1 = kept, padding bits 0).
        layout: "dense", "bitmap" or "semi24".

    Returns:
        values, index, row_ptr: bitmap values are [R, C] where every row keeps C columns, else flat with row_ptr int64
        [R + 1]; row_ptr is None for all else.

    Raises:
        ValueError: sizes that do not fit, a padding bit set, or (semi24) a group that does not keep exactly two.
    """
    native = _native()
    weight, bits = weight.detach(), bits.contiguous()
    if weight.dim() == 2 and weight.shape[1] > 1 and weight.stride(1) != 1:
        weight = weight.contiguous()
    source, index = _view("weight", weight), _view("index", bits)
    if layout == "dense":
        values = torch.empty(weight.shape, dtype=weight.dtype)
        native.pack_dense(source, index, _view("values", values))
        return values, bits, None
    rows, columns = weight.shape
    if layout == "semi24":
        positions = torch.empty_like(bits)
        native.bits_to_positions(index, columns, _view("positions", positions))
        values = torch.empty((rows, columns // 2), dtype=weight.dtype)
        native.pack_bitmap(source, index, _view("values", values), None)
        return values, positions, None
    if layout != "bitmap":
        raise ValueError(f'layout must be "dense", "bitmap" or "semi24", not "{layout}"')
    counts = torch.empty(rows, dtype=torch.int64)
    native.count_bits(index, columns, _view("counts", counts))
    if rows == 0 or bool((counts == counts[0]).all()):
        values = torch.empty((rows, int(counts[0]) if rows else 0), dtype=weight.dtype)
        row_ptr = None
    else:
        row_ptr = torch.zeros(rows + 1, dtype=torch.int64)
        torch.cumsum(counts, 0, out=row_ptr[1:])
        values = torch.empty(int(row_ptr[-1]), dtype=weight.dtype)
    native.pack_bitmap(source, index, _view("values", values), None if row_ptr is None else _view("row_ptr", row_ptr))
    return values, bits, row_ptr


def unpack(values: Tensor, index: Tensor, row_ptr: Tensor | None, K: int, layout: str) -> Tensor:
    """The dense [R, K] weight of a canonical form, +0 where pruned: the inverse of `pack`.

    Raises:
        ValueError: components that contradict each other (an index whose rows do not hold as many kept columns as
            values does, a row_ptr that does not rise from 0 to the number of values, a nibble that is no semi24 pair).
    """
    native = _native()
    values, index = values.detach().contiguous(), index.contiguous()
    if layout == "dense":
        return values.clone()
    bits = index
    if layout == "semi24":
        bits = torch.empty_like(index)
        native.positions_to_bits(_view("index", index), K, _view("bits", bits))
    elif layout != "bitmap":
        raise ValueError(f'layout must be "dense", "bitmap" or "semi24", not "{layout}"')
    out = torch.empty((index.shape[0], K), dtype=values.dtype)
    starts = None if row_ptr is None else _view("row_ptr", row_ptr)
    native.unpack_bitmap(_view("values", values), _view("index", bits), starts, _view("out", out))
    return out


# Tokens up to which the fused kernel beats unpacking and torch's product (measured on Zen 4 at 4096 x 4096; torch's
# fp16 product is a third as fast as its bf16 one).
FUSED_TOKENS = {torch.bfloat16: 64, torch.float32: 512, torch.float16: 4096}

# Rows unpacked at a time for torch's product, which loses a tenth of its rate on a quarter of this.
_CHUNK_BYTES = 16 << 20

# Checked handles by the identity of their index tensor, which outlives calls: it is a Parameter of some module. A
# handle is used again only while the addresses and the index's version are the ones it was checked with.
_handles: dict[int, tuple[weakref.ref[Tensor], tuple[object, ...], Any]] = {}


def _version(tensor: Tensor | None) -> tuple[int, int] | None:
    if tensor is None:
        return None
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _weight(values: Tensor, index: Tensor, row_ptr: Tensor | None, K: int, layout: str) -> Any:
    """The extension's handle of a packed weight, checked on first use.

    Raises:
        ValueError: components that contradict each other, as in `unpack`.
    """
    key = (values.data_ptr(), values.shape, values.dtype, _version(index), _version(row_ptr), K, layout)
    found = _handles.get(id(index))
    if found is not None and found[0]() is index and found[1] == key:
        return found[2]
    starts = None if row_ptr is None else _view("row_ptr", row_ptr)
    handle = _native().Weight(_view("values", values), _view("index", index), starts, K, layout)
    identity = id(index)
    _handles[identity] = (weakref.ref(index, lambda _: _handles.pop(identity, None)), key, handle)
    return handle


def sparse_linear(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor | None,
    layout: str,
    shape: list[int],
    bias: Tensor | None,
    offsets: Tensor | None,
) -> Tensor:
    """y = x W^T + bias for the packed weight `shape` = [N, K], the contract of perp_kernels.ops.sparse_linear.

    Up to `FUSED_TOKENS` tokens the weight is multiplied from its packed form; above, runs of rows are unpacked into
    cache and multiplied there by torch.
    """
    if offsets is not None:
        raise ValueError("weights [E, N, K] are served by the reference")
    N, K = shape[-2:]
    weight = _weight(values, index, row_ptr, K, layout)
    tokens = x.reshape(-1, K)
    if K > 1 and tokens.stride(1) != 1:
        tokens = tokens.contiguous()
    y = torch.empty((len(tokens), N), dtype=x.dtype)
    if len(tokens) <= FUSED_TOKENS[x.dtype]:
        weight.linear(_view("x", tokens), _view("y", y), None if bias is None else _view("bias", bias), 0)
        return y.view(*x.shape[:-1], N)
    rows = max(1, _CHUNK_BYTES // (K * values.element_size()))
    chunk = torch.empty((min(rows, N), K), dtype=x.dtype)
    for first in range(0, N, rows):
        part = chunk[: N - first]
        weight.unpack(_view("chunk", part), first)
        torch.mm(tokens, part.t(), out=y[:, first : first + rows])
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], N)


def _sparse_linear_supports(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor | None,
    layout: str,
    shape: list[int],
    bias: Tensor | None,
    offsets: Tensor | None,
) -> bool:
    # Experts and the dense layout, which torch multiplies as it is, are left to the reference.
    return x.device.type == "cpu" and x.dtype in FUSED_TOKENS and layout != "dense" and offsets is None


dispatch.register("sparse_linear", "cpu", sparse_linear, _sparse_linear_supports, None if available else why)
