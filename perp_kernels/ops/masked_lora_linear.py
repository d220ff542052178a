"""masked_lora_linear: a linear layer with a frozen packed weight and a low-rank adapter that the weight's mask clips.

    masked_lora_linear(x [..., K], w [N, K], A [r, K], B [N, r], scale, bias [N] or None) -> y [..., N]
    masked_lora_linear(x [T, K], w [E, N, K], A [E, r, K], B [E, N, r], scale, bias [E, N] or None, offsets [E])

    y = x W_eff^T + bias,   W_eff = W + scale * M * (B A)

with M the mask (MaskLoRA of PERP, arXiv 2312.15230). `SparseWeight.add_lowrank_` turns W into W_eff to the bit, so a
merged layer computes what its adapter did. In the second form the tokens are sorted by expert and offsets[e] is where
those of expert e end.

x has the dtype of the values; A, B and the bias have it too, or float32. W_eff is formed in float32 (float64 for
float64) and rounded once to the dtype of x. Gradients for x, A, B and bias; their sums are formed in float32.

Backward saves x, A, B and the packed weight, nothing else: both passes walk the output rows in chunks and form W_eff a
chunk at a time, so that no tensor [N, K] exists in either. A chunk of the weight's gradient G = dY^T x is masked and
folded into dB = scale * G A^T and dA += scale * B^T G at once.
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
    "masked_lora_linear(Tensor x, Tensor values, Tensor index, Tensor? row_ptr, str layout, SymInt[] shape, Tensor A, "
    "Tensor B, float scale, Tensor? bias, Tensor? offsets) -> Tensor",
    _adapted.reference.masked_lora_linear,
    linear_fake,
)
_backward_op = define(
    "masked_lora_linear_backward(Tensor grad_y, Tensor? x, Tensor values, Tensor index, Tensor? row_ptr, str layout, "
    "SymInt[] shape, Tensor A, Tensor B, float scale, Tensor? offsets, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _adapted.reference.masked_lora_linear_backward,
    _adapted.backward_fake,
)


class _MaskedLoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        scale: float,
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
        ctx.scale, ctx.layout, ctx.shape, ctx.x_shape = scale, layout, shape, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _forward_op(x, values, index, row_ptr, layout, shape, A, B, scale, bias, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, values, index, row_ptr, offsets = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:4])
        dx, dA, dB, dbias = _backward_op(
            grad_y, x, values, index, row_ptr, ctx.layout, ctx.shape, A, B, ctx.scale, offsets, needs
        )
        return (
            dx.view(ctx.x_shape) if needs[0] else None,
            dA if needs[1] else None,
            dB if needs[2] else None,
            dbias.to(ctx.bias_dtype) if needs[3] else None,
            *(None,) * 7,
        )


def masked_lora_linear(
    x: Any, w: SparseWeight, A: Any, B: Any, scale: float, bias: Any = None, offsets: Any = None
) -> Tensor:
    """y = x (W + scale * M * (B A))^T + bias for a packed W with mask M: see the contract above.

    The packed weight is frozen: no gradient reaches w.values.
    """
    x, A, B = as_tensor(x), as_tensor(A), as_tensor(B)
    bias, offsets = as_optional_tensor(bias), as_optional_tensor(offsets)
    check_linear(x, w, bias, offsets)
    check_adapter(w, A, B)
    if wants_gradient(x, A, B, bias):
        return _MaskedLoraLinear.apply(
            x, A, B, bias, float(scale), w.values, w.index, w.row_ptr, w.layout, w.shape, offsets
        )
    return _forward_op(x, w.values, w.index, w.row_ptr, w.layout, w.shape, A, B, float(scale), bias, offsets)
