"""add_lowrank_, mul_lowrank_: merge an adapter into a packed weight, in place.

    add_lowrank_(values, index, row_ptr or None, layout, shape, A, B, scale):   W += scale * M * (B A)
    mul_lowrank_(values, index, row_ptr or None, layout, shape, A, B):          W *= B A

A [r, K] and B [N, r], or [E, r, K] and [E, N, r]. Each element is formed in float32 (float64 for float64), by the same
arithmetic as in `masked_lora_linear` and `scale_lora_linear`, and rounded once to the dtype of the values. The mask is
untouched: pruned weights stay +0, and a kept weight that becomes 0 stays kept. Not differentiable.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from perp_kernels.ops import _adapted
from perp_kernels.ops._adapted import Added, ReferenceAdapted, Scaled
from perp_kernels.ops._library import define
from perp_kernels.ops._rows import PackedRows


def _add(
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor | None,
    layout: str,
    shape: list[int],
    A: Tensor,
    B: Tensor,
    scale: float,
) -> None:
    w = PackedRows(values, index, row_ptr, layout, shape[-1])
    _adapted.merge_(ReferenceAdapted(Added(scale), w, shape, A, B), shape)


def _multiply(
    values: Tensor, index: Tensor, row_ptr: Tensor | None, layout: str, shape: list[int], A: Tensor, B: Tensor
) -> None:
    w = PackedRows(values, index, row_ptr, layout, shape[-1])
    _adapted.merge_(ReferenceAdapted(Scaled(), w, shape, A, B), shape)


def _fake(*arguments: Any) -> None:
    return None


_WEIGHT = "Tensor(a!) values, Tensor index, Tensor? row_ptr, str layout, SymInt[] shape"
add_lowrank_ = define(f"add_lowrank_({_WEIGHT}, Tensor A, Tensor B, float scale) -> ()", _add, _fake)
mul_lowrank_ = define(f"mul_lowrank_({_WEIGHT}, Tensor A, Tensor B) -> ()", _multiply, _fake)
