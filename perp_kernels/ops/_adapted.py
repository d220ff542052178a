"""The walk that the references of masked_lora_linear and scale_lora_linear share.

Both multiply by an effective weight made of a packed W and the product P = B A of an adapter: W + scale * M * P, or
W * P. A chunk of output rows at a time, that weight is formed, used and dropped, and so is the gradient by P.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from perp_kernels.ops._rows import (
    PackedRows,
    accumulation_dtype,
    add_product_,
    clear_pruned_,
    expert_spans,
    row_chunks,
)


class Effective(Protocol):
    """How W and P make the effective weight; both methods work on rows start..stop of w."""

    def rows(self, w: PackedRows, A: Tensor, B: Tensor, start: int, stop: int) -> Tensor:
        """Those rows of the effective weight for A [r, K] and B [rows, r]: a new tensor in their dtype, 0 if pruned."""
        ...

    def product_gradient_(self, w: PackedRows, G: Tensor, start: int, stop: int) -> Tensor:
        """The gradient by P from that by the effective weight, G [rows, K], in place."""
        ...


@dataclass(frozen=True)
class Added:
    """W + scale * M * P."""

    scale: float

    def rows(self, w: PackedRows, A: Tensor, B: Tensor, start: int, stop: int) -> Tensor:
        W = w.dense(start, stop).to(A.dtype, copy=w.layout == "dense")
        return clear_pruned_(W.addmm_(B, A, alpha=self.scale), w.mask(start, stop))

    def product_gradient_(self, w: PackedRows, G: Tensor, start: int, stop: int) -> Tensor:
        return clear_pruned_(G.mul_(self.scale), w.mask(start, stop))


@dataclass(frozen=True)
class Scaled:
    """W * P."""

    def rows(self, w: PackedRows, A: Tensor, B: Tensor, start: int, stop: int) -> Tensor:
        return clear_pruned_(torch.mm(B, A).mul_(w.dense(start, stop)), w.mask(start, stop))

    def product_gradient_(self, w: PackedRows, G: Tensor, start: int, stop: int) -> Tensor:
        return clear_pruned_(G.mul_(w.dense(start, stop)), w.mask(start, stop))


def forward(
    effective: Effective,
    x: Tensor,
    w: PackedRows,
    shape: list[int],
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    offsets: Tensor | None,
) -> Tensor:
    """y [..., N] of x [..., K]."""
    A, B = _widened(A, B, shape, x.dtype)
    N, K = shape[-2:]
    tokens = x.reshape(-1, K)
    y = x.new_empty(len(tokens), N)
    for expert, begin, end in expert_spans(shape, len(tokens), offsets):
        first = expert * N
        for start, stop in row_chunks(N, K):
            W = effective.rows(w, A[expert], B[expert, start:stop], first + start, first + stop).to(x.dtype)
            torch.mm(tokens[begin:end], W.t(), out=y[begin:end, start:stop])
            del W  # before the next chunk is formed
        if bias is not None:
            y[begin:end] += bias.view(-1, N)[expert]
    return y.view(*x.shape[:-1], N)


def backward(
    effective: Effective,
    grad_y: Tensor,
    x: Tensor | None,
    w: PackedRows,
    shape: list[int],
    A: Tensor,
    B: Tensor,
    offsets: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x [T, K], A, B and bias, each empty where `needs` does not ask for it.

    x may be None where neither that of A nor that of B is asked for. That of the bias is in the accumulation dtype.
    """
    needs_x, needs_A, needs_B, needs_bias = needs
    dtype, wide = w.values.dtype, accumulation_dtype(w.values.dtype)
    A_wide, B_wide = _widened(A, B, shape, dtype)
    N, K = shape[-2:]
    dy = grad_y.reshape(-1, N)
    dx = dy.new_zeros((len(dy), K) if needs_x else 0, dtype=wide)
    dA = dy.new_zeros(A_wide.shape if needs_A else 0, dtype=wide)
    dB = dy.new_zeros(B_wide.shape if needs_B else 0, dtype=wide)
    dbias = dy.new_empty(shape[:-1] if needs_bias else 0, dtype=wide)
    for expert, begin, end in expert_spans(shape, len(dy), offsets):
        dy_e, A_e, first = dy[begin:end], A_wide[expert], expert * N
        for start, stop in row_chunks(N, K):
            dy_c, B_c, rows = dy_e[:, start:stop], B_wide[expert, start:stop], (first + start, first + stop)
            if needs_x:
                add_product_(dx[begin:end], dy_c, effective.rows(w, A_e, B_c, *rows).to(dtype))
            if needs_A or needs_B:
                assert x is not None
                G = (dy_c.t() @ x.reshape(-1, K)[begin:end]).to(wide)
                dP = effective.product_gradient_(w, G, *rows)
                if needs_A:
                    dA[expert].addmm_(B_c.t(), dP)
                if needs_B:
                    torch.mm(dP, A_e.t(), out=dB[expert, start:stop])
                del G, dP  # before the next chunk is formed
        if needs_bias:
            dbias.view(-1, N)[expert] = dy_e.sum(0, dtype=wide)
    dA, dB = dA.view(A.shape if needs_A else 0), dB.view(B.shape if needs_B else 0)
    return dx.to(dtype), dA.to(A.dtype), dB.to(B.dtype), dbias


def backward_fake(
    grad_y: Tensor,
    x: Tensor | None,
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor | None,
    layout: str,
    shape: list[int],
    A: Tensor,
    B: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fake of both ops: their schemas begin with these arguments and end in `needs`."""
    needs_x, needs_A, needs_B, needs_bias = rest[-1]
    N, K = shape[-2:]
    dx = values.new_empty((grad_y.numel() // N, K) if needs_x else 0)
    dA, dB = A.new_empty(A.shape if needs_A else 0), B.new_empty(B.shape if needs_B else 0)
    dbias = values.new_empty(shape[:-1] if needs_bias else 0, dtype=accumulation_dtype(values.dtype))
    return dx, dA, dB, dbias


def merge_(effective: Effective, w: PackedRows, shape: list[int], A: Tensor, B: Tensor) -> None:
    """Overwrite the values by the effective weight, in the chunks of `forward` and hence to the same bits."""
    A, B = _widened(A, B, shape, w.values.dtype)
    N, K = shape[-2:]
    for expert in range(len(A)):
        first = expert * N
        for start, stop in row_chunks(N, K):
            W = effective.rows(w, A[expert], B[expert, start:stop], first + start, first + stop)
            w.store(first + start, first + stop, W)
            del W  # before the next chunk is formed


def _widened(A: Tensor, B: Tensor, shape: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A [E, r, K] and B [E, N, r] in the accumulation dtype of `dtype`; a weight [N, K] is E = 1."""
    *experts, N, K = shape
    E, r, wide = math.prod(experts), A.shape[-2], accumulation_dtype(dtype)
    return A.to(wide).reshape(E, r, K), B.to(wide).reshape(E, N, r)
