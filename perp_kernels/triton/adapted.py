"""masked_lora_linear, scale_lora_linear and the merges of their adapters by Triton.

The effective weight is one temporary of the call, which torch multiplies; the adapter's gradients come from tiles of
the weight's gradient, which is never written.
"""

from __future__ import annotations

import math

from torch import Tensor

from perp_kernels.ops._adapted import AdaptedOps, Effect
from perp_kernels.ops._rows import PackedRows
from perp_kernels.ops._walk import Tile
from perp_kernels.triton.decode import contiguous, slice_rows
from perp_kernels.triton.effective import Adapter, effective_weight, merge_
from perp_kernels.triton.gradient import adapter_gradients
from perp_kernels.triton.launch import rows_of


class AdaptedMatrices:
    """The effective weights of the experts, each one tile."""

    def __init__(
        self,
        effect: Effect,
        values: Tensor,
        index: Tensor,
        row_ptr: Tensor | None,
        layout: str,
        shape: list[int],
        A: Tensor,
        B: Tensor,
    ) -> None:
        *experts, self._N, K = shape
        E, r = math.prod(experts), A.shape[-2]
        self.values, self._effect = values, effect
        self._w = contiguous(values, index, row_ptr, layout, K)
        self._A = A.detach().contiguous().view(E, r, K)
        self._B = B.detach().contiguous().view(E, self._N, r)
        self.row_tiles = self.sum_tiles = [Tile(slice(0, self._N), slice(0, K))]

    def form(self, expert: int, tile: Tile) -> Tensor:
        return effective_weight(*self._matrix(expert))

    def fold(self, expert: int, tile: Tile, dy: Tensor, x: Tensor, dA: Tensor | None, dB: Tensor | None) -> None:
        dy, x = rows_of(dy, self._N), rows_of(x, self._w.K)
        adapter_gradients(dy, x, *self._matrix(expert), dA, dB)

    def merge_(self) -> None:
        for expert in range(len(self._A)):
            merge_(*self._matrix(expert))
        if self._w.values.data_ptr() != self.values.data_ptr():
            self.values.copy_(self._w.values)

    def _matrix(self, expert: int) -> tuple[PackedRows, Adapter]:
        part = slice_rows(self._w, expert * self._N, (expert + 1) * self._N)
        return part, Adapter(self._effect, self._A[expert], self._B[expert])


def _merge(w: AdaptedMatrices, shape: list[int]) -> None:
    w.merge_()


_ops = AdaptedOps(AdaptedMatrices, _merge)
masked_lora_linear = _ops.masked_lora_linear
masked_lora_linear_backward = _ops.masked_lora_linear_backward
scale_lora_linear = _ops.scale_lora_linear
scale_lora_linear_backward = _ops.scale_lora_linear_backward
add_lowrank_ = _ops.add_lowrank_
mul_lowrank_ = _ops.mul_lowrank_
