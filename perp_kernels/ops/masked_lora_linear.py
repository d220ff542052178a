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

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from perp_kernels.arrays import as_optional_tensor, as_tensor
from perp_kernels.layouts import SparseWeight
from perp_kernels.ops._arguments import check_adapter, check_linear
from perp_kernels.ops._library import define
from perp_kernels.ops._rows import (
    PackedRows,
    accumulation_dtype,
    add_product_,
    clear_pruned_,
    expert_spans,
    row_chunks,
)


def effective_rows(w: PackedRows, A: Tensor, B: Tensor, scale: float, start: int, stop: int) -> Tensor:
    """Rows start..stop of W + scale * M * (B A), a new tensor in the dtype of A [r, K] and B [rows, r]."""
    W = w.dense(start, stop).to(A.dtype, copy=w.layout == "dense")
    return clear_pruned_(W.addmm_(B, A, alpha=scale), w.mask(start, stop))


def _forward(
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
    *experts, N, K = shape
    E, r, wide = math.prod(experts), A.shape[-2], accumulation_dtype(x.dtype)
    A, B = A.to(wide).reshape(E, r, K), B.to(wide).reshape(E, N, r)
    w = PackedRows(values, index, row_ptr, layout, K)
    tokens = x.reshape(-1, K)
    y = x.new_empty(len(tokens), N)
    for expert, begin, end in expert_spans(shape, len(tokens), offsets):
        first = expert * N
        for start, stop in row_chunks(N, K):
            W = effective_rows(w, A[expert], B[expert, start:stop], scale, first + start, first + stop)
            torch.mm(tokens[begin:end], W.to(x.dtype).t(), out=y[begin:end, start:stop])
            del W  # before the next chunk is formed
        if bias is not None:
            y[begin:end] += bias.view(-1, N)[expert]
    return y.view(*x.shape[:-1], N)


def _forward_fake(
    x: Tensor, values: Tensor, index: Tensor, row_ptr: Any, layout: str, shape: list[int], *_: Any
) -> Tensor:
    return x.new_empty([*x.shape[:-1], shape[-2]])


def _backward(
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
    """Gradients of x [T, K], A, B and bias, each empty where `needs` does not ask for it.

    x may be None where neither that of A nor that of B is asked for. That of the bias is in the accumulation dtype.
    """
    needs_x, needs_A, needs_B, needs_bias = needs
    *experts, N, K = shape
    E, r, wide = math.prod(experts), A.shape[-2], accumulation_dtype(values.dtype)
    dy = grad_y.reshape(-1, N)
    dx = values.new_zeros((len(dy), K) if needs_x else 0, dtype=wide)
    dA = values.new_zeros((E, r, K) if needs_A else 0, dtype=wide)
    dB = values.new_zeros((E, N, r) if needs_B else 0, dtype=wide)
    dbias = values.new_empty(shape[:-1] if needs_bias else 0, dtype=wide)
    A_wide, B_wide = A.to(wide).reshape(E, r, K), B.to(wide).reshape(E, N, r)
    w = PackedRows(values, index, row_ptr, layout, K)
    for expert, begin, end in expert_spans(shape, len(dy), offsets):
        dy_e, first, A_e = dy[begin:end], expert * N, A_wide[expert]
        for start, stop in row_chunks(N, K):
            dy_c, B_c = dy_e[:, start:stop], B_wide[expert, start:stop]
            if needs_x:
                W = effective_rows(w, A_e, B_c, scale, first + start, first + stop).to(values.dtype)
                add_product_(dx[begin:end], dy_c, W)
                del W  # before G is formed
            if needs_A or needs_B:
                assert x is not None
                G = (dy_c.t() @ x.reshape(-1, K)[begin:end]).to(wide)
                clear_pruned_(G, w.mask(first + start, first + stop))
                if needs_A:
                    dA[expert].addmm_(B_c.t(), G, alpha=scale)
                if needs_B:
                    dB[expert, start:stop].addmm_(G, A_e.t(), alpha=scale)
                del G  # before the next chunk is formed
        if needs_bias:
            dbias.view(-1, N)[expert] = dy_e.sum(0, dtype=wide)
    dA, dB = dA.view(A.shape if needs_A else 0), dB.view(B.shape if needs_B else 0)
    return dx.to(values.dtype), dA.to(A.dtype), dB.to(B.dtype), dbias


def _backward_fake(
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
    needs_x, needs_A, needs_B, needs_bias = needs
    N, K = shape[-2:]
    dx = values.new_empty((grad_y.numel() // N, K) if needs_x else 0)
    dA, dB = A.new_empty(A.shape if needs_A else 0), B.new_empty(B.shape if needs_B else 0)
    dbias = values.new_empty(shape[:-1] if needs_bias else 0, dtype=accumulation_dtype(values.dtype))
    return dx, dA, dB, dbias


_forward_op = define(
    "masked_lora_linear(Tensor x, Tensor values, Tensor index, Tensor? row_ptr, str layout, SymInt[] shape, Tensor A, "
    "Tensor B, float scale, Tensor? bias, Tensor? offsets) -> Tensor",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "masked_lora_linear_backward(Tensor grad_y, Tensor? x, Tensor values, Tensor index, Tensor? row_ptr, str layout, "
    "SymInt[] shape, Tensor A, Tensor B, float scale, Tensor? offsets, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
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
    return _MaskedLoraLinear.apply(
        x, A, B, bias, float(scale), w.values, w.index, w.row_ptr, w.layout, w.shape, offsets
    )
