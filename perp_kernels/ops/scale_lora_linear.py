"""scale_lora_linear: a linear layer with a frozen packed weight and a low-rank matrix that scales it elementwise.

    scale_lora_linear(x [..., K], w [N, K], A [r, K], B [N, r], bias [N] or None) -> y [..., N]
    scale_lora_linear(x [T, K], w [E, N, K], A [E, r, K], B [E, N, r], bias [E, N] or None, offsets [E]) -> y [T, N]

    y = x W_eff^T + bias,   W_eff = W * (B A)

(ScaleLoRA of PERP, arXiv 2312.15230; A and B of ones / sqrt(r) leave W as it is.) `SparseWeight.mul_lowrank_` turns W
into W_eff to the bit. Tokens, dtypes, rounding and memory are as in `masked_lora_linear`: W_eff is formed a chunk of
rows at a time and the gradient G = dY^T x of a chunk is folded into dB = (G * W) A^T and dA += B^T (G * W).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from perp_kernels.arrays import as_optional_tensor, as_tensor
from perp_kernels.layouts import SparseWeight
from perp_kernels.ops import _adapted
from perp_kernels.ops._arguments import check_adapter, check_linear, wants_gradient
from perp_kernels.ops._library import define
from perp_kernels.ops._rows import linear_fake

_forward_op = define(
    "scale_lora_linear(Tensor x, Tensor values, Tensor index, Tensor? row_ptr, str layout, SymInt[] shape, Tensor A, "
    "Tensor B, Tensor? bias, Tensor? offsets) -> Tensor",
    _adapted.reference.scale_lora_linear,
    linear_fake,
)
_backward_op = define(
    "scale_lora_linear_backward(Tensor grad_y, Tensor? x, Tensor values, Tensor index, Tensor? row_ptr, str layout, "
    "SymInt[] shape, Tensor A, Tensor B, Tensor? offsets, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _adapted.reference.scale_lora_linear_backward,
    _adapted.backward_fake,
)


class _ScaleLoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        values: Tensor,
        index: Tensor,
        row_ptr: Tensor | None,
        layout: str,
        shape: tuple[int, ...],
        offsets: Tensor | None,
    ) -> Tensor:
        # x is an activation: kept alive only where the gradient of an adapter needs it.
        trains_adapter = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(x if trains_adapter else None, A, B, values, index, row_ptr, offsets)
        ctx.layout, ctx.shape, ctx.x_shape = layout, shape, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _forward_op(x, values, index, row_ptr, layout, shape, A, B, bias, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, values, index, row_ptr, offsets = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:4])
        dx, dA, dB, dbias = _backward_op(grad_y, x, values, index, row_ptr, ctx.layout, ctx.shape, A, B, offsets, needs)
        return (
            dx.view(ctx.x_shape) if needs[0] else None,
            dA if needs[1] else None,
            dB if needs[2] else None,
            dbias.to(ctx.bias_dtype) if needs[3] else None,
            *(None,) * 6,
        )


def scale_lora_linear(x: Any, w: SparseWeight, A: Any, B: Any, bias: Any = None, offsets: Any = None) -> Tensor:
    """y = x (W * (B A))^T + bias for a packed W: see the contract above.

    The packed weight is frozen: no gradient reaches w.values.
    """
    x, A, B = as_tensor(x), as_tensor(A), as_tensor(B)
    bias, offsets = as_optional_tensor(bias), as_optional_tensor(offsets)
    check_linear(x, w, bias, offsets)
    check_adapter(w, A, B)
    if wants_gradient(x, A, B, bias):
        return _ScaleLoraLinear.apply(x, A, B, bias, w.values, w.index, w.row_ptr, w.layout, w.shape, offsets)
    return _forward_op(x, w.values, w.index, w.row_ptr, w.layout, w.shape, A, B, bias, offsets)
