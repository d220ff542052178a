"""sparse_linear: a linear layer whose weight is packed.

    sparse_linear(x [..., K], w [N, K], bias [N] or None) -> y [..., N],  y = x W^T + bias
    sparse_linear(x [T, K], w [E, N, K], bias [E, N] or None, offsets [E]) -> y [T, N]

In the second form the tokens are sorted by expert and offsets[e] is where those of expert e end. x has the dtype of the
values; the bias has it too, or float32. Gradients for x, bias and w.values, that is for the kept weights alone: where
the layout stores a zero for a pruned weight, its gradient is zero. Sums are formed in float32 (float64 for float64).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from perp_kernels.arrays import as_optional_tensor, as_tensor
from perp_kernels.layouts import SparseWeight
from perp_kernels.ops import _walk, tiled24
from perp_kernels.ops._arguments import check_linear, wants_gradient
from perp_kernels.ops._library import define, serve, unwatched
from perp_kernels.ops._rows import PackedRows, accumulation_dtype, linear_fake, row_chunks
from perp_kernels.ops._tiled24 import TILED24
from perp_kernels.ops._walk import Tile


class Decoded(Protocol):
    """A packed weight in tiles, without an adapter: the implementations of the backward pass differ in nothing else."""

    @property
    def sum_tiles(self) -> Sequence[Tile]:
        """Tiles for a product that sums over the rows."""
        ...

    @property
    def row_tiles(self) -> Sequence[Tile]:
        """Tiles of whole rows."""
        ...

    def form(self, expert: int, tile: Tile) -> Tensor:
        """That tile, 0 where pruned."""
        ...

    def fold(self, expert: int, tile: Tile, dy: Tensor, x: Tensor, dvalues: Tensor) -> None:
        """Store the gradient dy^T x by a tile of whole rows in its places of dvalues, shaped as the values are."""
        ...


class _ReferenceDecoded:
    def __init__(self, w: PackedRows, shape: list[int]) -> None:
        self._w, self._N = w, shape[-2]
        N, K = shape[-2:]
        self.row_tiles = _walk.row_tiles(row_chunks(N, K), K)
        # The layout dense needs no decoding.
        self.sum_tiles = _walk.row_tiles([(0, N)], K) if w.layout == "dense" else self.row_tiles

    def form(self, expert: int, tile: Tile) -> Tensor:
        return self._w.dense(expert * self._N + tile.rows.start, expert * self._N + tile.rows.stop)

    def fold(self, expert: int, tile: Tile, dy: Tensor, x: Tensor, dvalues: Tensor) -> None:
        first = expert * self._N
        dw = replace(self._w, values=dvalues)
        dw.store(first + tile.rows.start, first + tile.rows.stop, dy.t() @ x)


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
    if layout == "dense" and offsets is None and (bias is None or bias.dtype == x.dtype):
        return F.linear(x, values, bias)
    w = _ReferenceDecoded(PackedRows(values, index, row_ptr, layout, shape[-1]), shape)
    return _walk.multiply(x, shape, bias, offsets, w.sum_tiles, w.form)


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
    w = _ReferenceDecoded(PackedRows(values, index, row_ptr, layout, shape[-1]), shape)
    return backward(w, grad_y, x, values, shape, offsets, needs)


def backward(
    w: Decoded,
    grad_y: Tensor,
    x: Tensor | None,
    values: Tensor,
    shape: list[int],
    offsets: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [T, K], values and bias, each empty where `needs` does not ask for it.

    x may be None where that of values is not asked for. That of the bias is in the accumulation dtype.
    """
    needs_x, needs_values, needs_bias = needs
    N, K = shape[-2:]
    dy = grad_y.reshape(math.prod(grad_y.shape[:-1]), N)
    dx = _walk.multiply_transposed(dy, shape, offsets, w.sum_tiles, w.form) if needs_x else dy.new_empty(0)
    dvalues = values.new_zeros(values.shape if needs_values else 0)
    if needs_values:
        assert x is not None

        def fold(expert: int, tile: Tile, dy: Tensor, x: Tensor) -> None:
            w.fold(expert, tile, dy, x, dvalues)

        _walk.fold_gradient(dy, x.reshape(-1, K), shape, offsets, w.row_tiles, fold)
    wide = accumulation_dtype(values.dtype)
    dbias = _walk.bias_gradient(dy, shape, offsets) if needs_bias else dy.new_empty(0, dtype=wide)
    return dx, dvalues, dbias


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
    K = shape[-1]
    dx = values.new_empty((math.prod(grad_y.shape[:-1]), K) if needs_x else 0)
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
    if w.layout == TILED24:
        return tiled24.linear(x, w, bias)
    if wants_gradient(x, w.values, bias):
        return _SparseLinear.apply(x, w.values, bias, w.index, w.row_ptr, w.layout, w.shape, offsets)
    if unwatched(x, w.values, bias):
        return serve("sparse_linear", x, w.values, w.index, w.row_ptr, w.layout, w.shape, bias, offsets)
    return _forward_op(x, w.values, w.index, w.row_ptr, w.layout, w.shape, bias, offsets)
