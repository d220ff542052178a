"""unpack: the dense weight of a packed one.

    unpack(values, index, row_ptr or None, K, layout) -> [R, K] in the dtype of values

+0 where pruned, and the very bits of `values` where kept (a kept -0 stays -0). Not differentiable.
"""

from __future__ import annotations

from torch import Tensor

from perp_kernels.ops._library import define
from perp_kernels.ops._rows import PackedRows


def _reference(values: Tensor, index: Tensor, row_ptr: Tensor | None, K: int, layout: str) -> Tensor:
    weight = PackedRows(values, index, row_ptr, layout, K).dense(0, len(index))
    return weight.clone() if layout == "dense" else weight


def _fake(values: Tensor, index: Tensor, row_ptr: Tensor | None, K: int, layout: str) -> Tensor:
    return values.new_empty([index.shape[0], K])


unpack = define(
    "unpack(Tensor values, Tensor index, Tensor? row_ptr, SymInt K, str layout) -> Tensor", _reference, _fake
)
