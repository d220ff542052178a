"""sparse_linear: a linear layer whose weight is packed.

    sparse_linear(x [..., K], w [N, K], bias [N] or None) -> y [..., N],  y = x W^T + bias
    sparse_linear(x [T, K], w [E, N, K], bias [E, N] or None, offsets [E]) -> y [T, N]

In the second form the tokens are sorted by expert and offsets[e] is where those of expert e end. x has the dtype of the
values; the bias has it too, or float32. Gradients for x, bias and w.values, that is for the kept weights alone: where
the layout stores a zero for a pruned weight, its gradient is zero. Sums are formed in float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from perp_kernels.arrays import as_optional_tensor, as_tensor
from perp_kernels.layouts import SparseWeight
from perp_kernels.ops._arguments import check_linear, wants_gradient
from perp_kernels.ops._library import define, serve, unwatched
from perp_kernels.ops._rows import PackedRows, accumulation_dtype, add_product_, expert_spans, linear_fake, row_chunks


def _decoded_chunks(N: int, K: int, layout: str) -> Iterable[tuple[int, int]]:
    """Bounds of the rows to decode at a time: all of them in the layout dense, which needs no decoding."""
    return [(0, N)] if layout == "dense" else row_chunks(N, K)


def _forward(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor | None,
    layout: str,
    shape: list[int],
    bias: Tensor | None,
    offsets: Tensor | None,
) -> Tensor:
    N, K = shape[-2:]
    if layout == "dense" and offsets is None and (bias is None or bias.dtype == x.dtype):
        return F.linear(x, values, bias)
    w = PackedRows(values, index, row_ptr, layout, K)
    tokens = x.reshape(-1, K)
    y = x.new_empty(len(tokens), N)
    for expert, begin, end in expert_spans(shape, len(tokens), offsets):
        for start, stop in _decoded_chunks(N, K, layout):
            W = w.dense(expert * N + start, expert * N + stop)
            torch.mm(tokens[begin:end], W.t(), out=y[begin:end, start:stop])
        if bias is not None:
            y[begin:end] += bias.view(-1, N)[expert]
    return y.view(*x.shape[:-1], N)


def _backward(
    grad_y: Tensor,
    x: Tensor | None,
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor | None,
    layout: str,
    shape: list[int],
    offsets: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [T, K], values and bias, each empty where `needs` does not ask for it.

    x may be None where that of values is not asked for. That of the bias is in the accumulation dtype.
    """
    needs_x, needs_values, needs_bias = needs
    N, K = shape[-2:]
    dy = grad_y.reshape(-1, N)
    wide = accumulation_dtype(values.dtype)
    # In the layout dense, dx is a single product; elsewhere it is a sum over chunks.
    dx = values.new_zeros((len(dy), K) if needs_x else 0, dtype=values.dtype if layout == "dense" else wide)
    dvalues = values.new_empty(values.shape if needs_values else 0)
    dbias = values.new_empty(shape[:-1] if needs_bias else 0, dtype=wide)
    w, dw = (PackedRows(v, index, row_ptr, layout, K) for v in (values, dvalues))
    for expert, begin, end in expert_spans(shape, len(dy), offsets):
        dy_e, first = dy[begin:end], expert * N
        if needs_x:
            for start, stop in _decoded_chunks(N, K, layout):
                add_product_(dx[begin:end], dy_e[:, start:stop], w.dense(first + start, first + stop))
        if needs_values:
            assert x is not None
            x_e = x.reshape(-1, K)[begin:end]
            for start, stop in row_chunks(N, K):
                dw.store(first + start, first + stop, dy_e[:, start:stop].t() @ x_e)
        if needs_bias:
            dbias.view(-1, N)[expert] = dy_e.sum(0, dtype=wide)
    return dx.to(values.dtype), dvalues, dbias


def _backward_fake(
    grad_y: Tensor,
    x: Tensor | None,
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor | None,
    layout: str,
    shape: list[int],
    offsets: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    needs_x, needs_values, needs_bias = needs
    N, K = shape[-2:]
    dx = values.new_empty((grad_y.numel() // N, K) if needs_x else 0)
    dvalues = values.new_empty(values.shape if needs_values else 0)
    dbias = values.new_empty(shape[:-1] if needs_bias else 0, dtype=accumulation_dtype(values.dtype))
    return dx, dvalues, dbias


_forward_op = define(
    "sparse_linear(Tensor x, Tensor values, Tensor index, Tensor? row_ptr, str layout, SymInt[] shape, Tensor? bias, "
    "Tensor? offsets) -> Tensor",
    _forward,
    linear_fake,
)
_backward_op = define(
    "sparse_linear_backward(Tensor grad_y, Tensor? x, Tensor values, Tensor index, Tensor? row_ptr, str layout, "
    "SymInt[] shape, Tensor? offsets, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        index: Tensor,
        row_ptr: Tensor | None,
        layout: str,
        shape: tuple[int, ...],
        offsets: Tensor | None,
    ) -> Tensor:
        # x is an activation: kept alive only where the gradient of the values needs it.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values, index, row_ptr, offsets)
        ctx.layout, ctx.shape, ctx.x_shape = layout, shape, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _forward_op(x, values, index, row_ptr, layout, shape, bias, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, values, index, row_ptr, offsets = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        dx, dvalues, dbias = _backward_op(grad_y, x, values, index, row_ptr, ctx.layout, ctx.shape, offsets, needs)
        return (
            dx.view(ctx.x_shape) if needs[0] else None,
            dvalues if needs[1] else None,
            dbias.to(ctx.bias_dtype) if needs[2] else None,
            *(None,) * 5,
        )


def sparse_linear(x: Any, w: SparseWeight, bias: Any = None, offsets: Any = None) -> Tensor:
    """y = x W^T + bias for a packed W: see the contract above."""
    x, bias, offsets = as_tensor(x), as_optional_tensor(bias), as_optional_tensor(offsets)
    check_linear(x, w, bias, offsets)
    if wants_gradient(x, w.values, bias):
        return _SparseLinear.apply(x, w.values, bias, w.index, w.row_ptr, w.layout, w.shape, offsets)
    if unwatched(x, w.values):
        return serve("sparse_linear", x, w.values, w.index, w.row_ptr, w.layout, w.shape, bias, offsets)
    return _forward_op(x, w.values, w.index, w.row_ptr, w.layout, w.shape, bias, offsets)
