"""add_lowrank_, mul_lowrank_: merge an adapter into a packed weight, in place.

    add_lowrank_(values, index, row_ptr or None, layout, shape, A, B, scale):   W += scale * M * (B A)
    mul_lowrank_(values, index, row_ptr or None, layout, shape, A, B):          W *= B A

A [r, K] and B [N, r], or [E, r, K] and [E, N, r]. Each element is formed in float32 (float64 for float64), by the same
arithmetic as in `masked_lora_linear` and `scale_lora_linear`, and rounded once to the dtype of the values. The mask is
untouched: pruned weights stay +0, and a kept weight that becomes 0 stays kept. Not differentiable.
"""

from __future__ import annotations

from typing import Any

from perp_kernels.ops._adapted import reference
from perp_kernels.ops._library import define


def _fake(*arguments: Any) -> None:
    return None


_WEIGHT = "Tensor(a!) values, Tensor index, Tensor? row_ptr, str layout, SymInt[] shape"
add_lowrank_ = define(f"add_lowrank_({_WEIGHT}, Tensor A, Tensor B, float scale) -> ()", reference.add_lowrank_, _fake)
mul_lowrank_ = define(f"mul_lowrank_({_WEIGHT}, Tensor A, Tensor B) -> ()", reference.mul_lowrank_, _fake)
