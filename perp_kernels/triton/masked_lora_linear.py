"""masked_lora_linear by Triton: W + scale * M * (B A) in a temporary of the call, which torch multiplies.

The adapter's gradients come from tiles of the weight's gradient, which is never written.
"""

from __future__ import annotations

from torch import Tensor

from perp_kernels.ops._rows import PackedRows
from perp_kernels.triton import adapted
from perp_kernels.triton.effective import Adapter


def masked_lora_linear(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor | None,
    layout: str,
    shape: list[int],
    A: Tensor,
    B: Tensor,
    scale: float,
    bias: Tensor | None,
    offsets: Tensor | None,
) -> Tensor:
    """y [..., N] of x [..., K]: the contract of perp_kernels.ops.masked_lora_linear."""
    w = PackedRows(values, index, row_ptr, layout, shape[-1])
    return adapted.forward(x, w, shape, Adapter("added", A, B, scale), bias, offsets)


def masked_lora_linear_backward(
    grad_y: Tensor,
    x: Tensor | None,
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor | None,
    layout: str,
    shape: list[int],
    A: Tensor,
    B: Tensor,
    scale: float,
    offsets: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x [T, K], A, B and the bias, each empty where `needs` does not ask for it."""
    w = PackedRows(values, index, row_ptr, layout, shape[-1])
    return adapted.backward(grad_y, x, w, shape, Adapter("added", A, B, scale), offsets, needs)
