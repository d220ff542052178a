"""The CUDA kernels for 2:4 weights on tensor cores, and their registration.

The sources are csrc/cuda, device code only. CuPy launches them: from a cubin that came with the wheel, else compiled by
NVRTC on first use (`load.py`). CuPy is imported with the first kernel that runs, so that this package loads where
there is none. They serve weights in the order tiled24, which `SparseWeight.prepare` gives: canonical weights and calls
that they do not take are left to the other backends. Whether torch's cuSPARSELt is faster somewhere has not been
measured, so it serves nothing here and is a peer in the benchmark.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from perp_kernels import dispatch
from perp_kernels.ops._tiled24 import DTYPES, TILE

# Sparse tensor cores start here.
OLDEST = (8, 0)


def _why_unavailable() -> str | None:
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed"
    if torch.version.hip is not None:
        return "this torch is built for ROCm"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


unavailable = _why_unavailable()


def serves(tensor: Tensor, shape: list[int]) -> bool:
    """Whether the kernels take calls on this tensor's device and dtype with a weight of this shape."""
    if not tensor.is_cuda or tensor.dtype not in DTYPES or len(shape) != 2 or shape[1] % TILE or 0 in shape:
        return False
    from perp_kernels.cuda import load

    device = tensor.device.index
    return torch.cuda.get_device_capability(device) >= OLDEST and load.usable(device)


def _linear(x: Tensor, values: Tensor, index: Tensor, shape: list[int], *rest: Any) -> bool:
    return serves(x, shape)


def _weight(values: Tensor, index: Tensor, shape: list[int], *rest: Any) -> bool:
    return serves(values, shape)


def _pack(weight: Tensor, bits: Tensor) -> bool:
    return serves(weight, [*weight.shape])


def _register(op: str, supports: Callable[..., bool]) -> None:
    def serve(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"{__name__}.semi24"), op)(*arguments)

    dispatch.register(op, "cuda", serve, supports, unavailable)


_register("tiled24_linear", _linear)
_register("tiled24_lora_linear", _linear)
_register("tiled24_add_lowrank_", _weight)
_register("tiled24_assign_", _weight)
_register("tiled24_pack", _pack)


def active() -> str:
    """Where the kernels of this machine's GPU come from, in one line."""
    if unavailable is not None:
        return f"none: {unavailable}"
    from perp_kernels.cuda import load

    return "; ".join(f"GPU {device}: {load.origin(device)}" for device in range(torch.cuda.device_count()))
