"""add_lowrank_ and mul_lowrank_ by Triton: the contracts of perp_kernels.ops.merge."""

from __future__ import annotations

from torch import Tensor

from perp_kernels.ops._rows import PackedRows
from perp_kernels.triton import adapted
from perp_kernels.triton.effective import Adapter


def add_lowrank_(
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor | None,
    layout: str,
    shape: list[int],
    A: Tensor,
    B: Tensor,
    scale: float,
) -> None:
    """W += scale * M * (B A) in place."""
    adapted.merge(PackedRows(values, index, row_ptr, layout, shape[-1]), shape, Adapter("added", A, B, scale))


def mul_lowrank_(
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor | None,
    layout: str,
    shape: list[int],
    A: Tensor,
    B: Tensor,
) -> None:
    """W *= B A in place."""
    adapted.merge(PackedRows(values, index, row_ptr, layout, shape[-1]), shape, Adapter("scaled", A, B))
