"""The Triton kernels, a module per op or family of ops, and their registration.

Triton itself is imported with the first kernel that runs, so that this package loads where there is none. A kernel's
tile sizes come from `perp_kernels/tuning/sm_ARCH.json` or from an analytical default: nothing is tuned at a call.
Under `TRITON_INTERPRET=1` the kernels also serve tensors of the CPU, slowly and for tests, inside `backend("triton")`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from perp_kernels import dispatch
from perp_kernels.pattern import Pattern

# bfloat16 and asynchronous copies to shared memory start here.
OLDEST = (8, 0)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Adapters of a higher rank are left to the reference: their factors no longer fit on the chip beside a tile.
MAX_RANK = 128

# Longest group and row of scores that `select` holds on the chip, and widest block of `sparsegpt`.
MAX_GROUP = 32
MAX_ROW = 32768
MAX_BLOCK = 256

interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"


def _why_unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if interpreted:
        return None
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


unavailable = _why_unavailable()


@functools.cache
def _capable(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= OLDEST


def serves(tensor: Tensor) -> bool:
    """Whether the kernels can read `tensor`: its device and dtype."""
    if tensor.dtype not in DTYPES:
        return False
    return interpreted if tensor.device.type == "cpu" else tensor.is_cuda and _capable(tensor.device.index)


def _register(op: str, module: str, supports: Callable[..., bool]) -> None:
    """Let the function `op` of perp_kernels.triton.`module` serve the op of that name."""

    def serve(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"{__name__}.{module}"), op)(*arguments)

    dispatch.register(op, "triton", serve, supports, unavailable, on_request=interpreted)


def _gram(H: Tensor, x: Tensor, offsets: Tensor | None) -> bool:
    return serves(x)


def _unpack(values: Tensor, *_: Any) -> bool:
    return serves(values)


def _linear(x: Tensor, *_: Any) -> bool:
    return serves(x)


def _adapter(A: Tensor, B: Tensor) -> bool:
    return A.dtype in DTYPES and B.dtype in DTYPES and 1 <= A.shape[-2] <= MAX_RANK


def _merge(values: Tensor, index: Tensor, row_ptr: Tensor | None, layout: str, shape: list[int], *rest: Any) -> bool:
    return serves(values) and _adapter(rest[0], rest[1])


def _adapted(x: Tensor, values: Tensor, index: Tensor, row_ptr: Tensor | None, layout: str, *rest: Any) -> bool:
    return serves(x) and _adapter(rest[1], rest[2])


def _adapted_backward(grad_y: Tensor, x: Tensor | None, values: Tensor, *rest: Any) -> bool:
    return serves(values) and _adapter(rest[4], rest[5])


def _sparse_backward(grad_y: Tensor, x: Tensor | None, values: Tensor, *rest: Any) -> bool:
    return serves(values)


def _select(scores: Tensor, pattern: str) -> bool:
    parsed = Pattern.parse(pattern)
    if not serves(scores):
        return False
    return (
        parsed.m <= MAX_GROUP if parsed.m is not None else parsed.scope in (None, "row") and scores.shape[-1] <= MAX_ROW
    )


def _wanda_select(weight: Tensor, norms: Tensor, pattern: str) -> bool:
    return norms.dtype == torch.float32 and _select(weight, pattern)


def _sparsegpt(weight: Tensor, H: Tensor, pattern: str, damp: float, block_size: int) -> bool:
    return serves(weight) and block_size + (Pattern.parse(pattern).m or 0) <= MAX_BLOCK


def _sparsegpt_block(W: Tensor, U: Tensor, *_: Any) -> bool:
    rowwise = W.dtype == torch.float32 and (W.shape[1] <= 1 or W.stride(1) == 1)
    return serves(W) and rowwise and W.shape[1] <= MAX_BLOCK


def _swap_round(weight: Tensor, mask: Tensor, correlation: Tensor, H: Tensor, pattern: str) -> bool:
    return serves(weight) and (Pattern.parse(pattern).m or 0) <= MAX_GROUP


_register("gram_", "gram", _gram)
_register("select", "select", _select)
_register("wanda_select", "select", _wanda_select)
_register("sparsegpt", "sparsegpt", _sparsegpt)
_register("sparsegpt_block_", "sparsegpt", _sparsegpt_block)
_register("swap_round_", "swap_round", _swap_round)
_register("unpack", "unpack", _unpack)
_register("add_lowrank_", "adapted", _merge)
_register("mul_lowrank_", "adapted", _merge)
_register("sparse_linear", "sparse_linear", _linear)
_register("sparse_linear_backward", "sparse_linear", _sparse_backward)
for _op in ("masked_lora_linear", "scale_lora_linear"):
    _register(_op, "adapted", _adapted)
    _register(f"{_op}_backward", "adapted", _adapted_backward)
