"""The CUDA kernels and their registration: 2:4 weights on sparse tensor cores, and a bitmap's decoding of few tokens.

The sources are csrc/cuda, device code only. CuPy launches them: from a cubin that came with the wheel, else compiled by
NVRTC on first use (`load.py`). CuPy is imported with the first kernel that runs, so that this package loads where
there is none. The kernels for 2:4 serve weights in the order tiled24, which `SparseWeight.prepare` gives; that for
bitmaps serves `sparse_linear` of up to 16 tokens on the canonical weight. Calls that they do not take are left to the
other backends. Whether torch's cuSPARSELt is faster somewhere has not been measured, so it serves nothing here and is a
peer in the benchmark.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from perp_kernels import dispatch
from perp_kernels.ops._tiled24 import DTYPES, TILE

# Sparse tensor cores, asynchronous copies and bfloat16 start here.
OLDEST = (8, 0)


def _why_unavailable() -> str | None:
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed"
    if torch.version.hip is not None:
        return "this torch is built for ROCm"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


unavailable = _why_unavailable()


@functools.cache
def _loads(device: int, kind: str) -> bool:
    from perp_kernels.cuda import load

    return torch.cuda.get_device_capability(device) >= OLDEST and load.usable(device, kind)


def serves(tensor: Tensor, shape: list[int]) -> bool:
    """Whether the kernels for 2:4 take calls on this tensor's device and dtype with a weight of this shape."""
    if not tensor.is_cuda or tensor.dtype not in DTYPES or len(shape) != 2 or shape[1] % TILE or 0 in shape:
        return False
    return _loads(tensor.device.index, "2:4")


def _linear(x: Tensor, values: Tensor, index: Tensor, shape: list[int], *rest: Any) -> bool:
    return serves(x, shape)


def _weight(values: Tensor, index: Tensor, shape: list[int], *rest: Any) -> bool:
    return serves(values, shape)


def _pack(weight: Tensor, bits: Tensor) -> bool:
    return serves(weight, [*weight.shape])


def _bitmap(
    x: Tensor, values: Tensor, index: Tensor, row_ptr: Tensor | None, layout: str, shape: list[int], *rest: Any
) -> bool:
    if not x.is_cuda or layout != "bitmap":
        return False
    from perp_kernels.cuda import bitmap

    return bitmap.takes(x, values, layout, shape) and _loads(x.device.index, "bitmap")


def _register(op: str, module: str, supports: Callable[..., bool]) -> None:
    """Let the function `op` of perp_kernels.cuda.`module` serve the op of that name."""

    def serve(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"{__name__}.{module}"), op)(*arguments)

    dispatch.register(op, "cuda", serve, supports, unavailable)


_register("sparse_linear", "bitmap", _bitmap)
_register("tiled24_linear", "semi24", _linear)
_register("tiled24_lora_linear", "semi24", _linear)
_register("tiled24_add_lowrank_", "semi24", _weight)
_register("tiled24_assign_", "semi24", _weight)
_register("tiled24_pack", "semi24", _pack)


def active() -> str:
    """Where the kernels of this machine's GPU come from, in one line."""
    if unavailable is not None:
        return f"none: {unavailable}"
    from perp_kernels.cuda import load

    return "; ".join(f"GPU {device}: {load.origin(device)}" for device in range(torch.cuda.device_count()))
