"""What masked_lora_linear and scale_lora_linear share: they differ in how the effective weight is made."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from perp_kernels.ops._rows import PackedRows, accumulation_dtype, expert_spans
from perp_kernels.triton.decode import contiguous, slice_rows
from perp_kernels.triton.effective import Adapter, effective_weight, merge_
from perp_kernels.triton.gradient import adapter_gradients
from perp_kernels.triton.launch import rows_of


def _experts(
    w: PackedRows, shape: list[int], adapter: Adapter, tokens: int, offsets: Tensor | None
) -> Iterator[tuple[int, int, int, PackedRows, Adapter]]:
    """(expert, first token, last token + 1, weight [N, K], its adapter) for each matrix of the weight."""
    N, K = shape[-2:]
    A, B = adapter.A.view(-1, adapter.A.shape[-2], K), adapter.B.view(-1, N, adapter.B.shape[-1])
    for expert, begin, end in expert_spans(shape, tokens, offsets):
        part = slice_rows(w, expert * N, (expert + 1) * N)
        yield expert, begin, end, part, Adapter(adapter.how, A[expert], B[expert], adapter.scale)


def forward(
    x: Tensor, w: PackedRows, shape: list[int], adapter: Adapter, bias: Tensor | None, offsets: Tensor | None
) -> Tensor:
    """y [..., N] of x [..., K]: the effective weight is a temporary of the call."""
    N, K = shape[-2:]
    w, x_rows = contiguous(*_components(w), K), rows_of(x, K)
    y = torch.empty((len(x_rows), N), dtype=x.dtype, device=x.device)
    for expert, begin, end, part, own in _experts(w, shape, adapter.detached(), len(x_rows), offsets):
        torch.mm(x_rows[begin:end], effective_weight(part, own).t(), out=y[begin:end])
        if bias is not None:
            y[begin:end] += bias.reshape(-1, N)[expert]
    return y.view(*x.shape[:-1], N)


def backward(
    grad_y: Tensor,
    x: Tensor | None,
    w: PackedRows,
    shape: list[int],
    adapter: Adapter,
    offsets: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x [T, K], A, B and the bias, each empty where `needs` does not ask for it."""
    needs_x, needs_A, needs_B, needs_bias = needs
    N, K = shape[-2:]
    A, B, dtype = adapter.A, adapter.B, w.values.dtype
    w, dy = contiguous(*_components(w), K), rows_of(grad_y, N)
    dx = dy.new_empty((len(dy), K) if needs_x else 0, dtype=dtype)
    dA, dB = A.new_empty(A.shape if needs_A else 0), B.new_empty(B.shape if needs_B else 0)
    dbias = dy.new_empty(shape[:-1] if needs_bias else 0, dtype=accumulation_dtype(dtype))
    for expert, begin, end, part, own in _experts(w, shape, adapter.detached(), len(dy), offsets):
        if needs_x:
            torch.mm(dy[begin:end], effective_weight(part, own), out=dx[begin:end])
        if needs_A or needs_B:
            assert x is not None
            to_A, to_B = adapter_gradients(dy[begin:end], rows_of(x, K)[begin:end], part, own, needs_A, needs_B)
            if to_A is not None:
                dA.view(-1, *to_A.shape)[expert] = to_A
            if to_B is not None:
                dB.view(-1, *to_B.shape)[expert] = to_B
        if needs_bias:
            dbias.view(-1, N)[expert] = dy[begin:end].sum(0, dtype=dbias.dtype)
    return dx, dA, dB, dbias


def merge(w: PackedRows, shape: list[int], adapter: Adapter) -> None:
    """Overwrite the values by those of the effective weight."""
    merged = contiguous(*_components(w), shape[-1])
    no_tokens = None if len(shape) == 2 else torch.zeros(shape[0], dtype=torch.int64)
    for _, _, _, part, own in _experts(merged, shape, adapter.detached(), 0, no_tokens):
        merge_(part, own)
    if merged.values.data_ptr() != w.values.data_ptr():
        w.values.copy_(merged.values)


def _components(w: PackedRows) -> tuple[Tensor, Tensor, Tensor | None, str]:
    return w.values, w.index, w.row_ptr, w.layout
