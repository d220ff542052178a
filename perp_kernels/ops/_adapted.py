"""What masked_lora_linear, scale_lora_linear and their merges have in common.

All multiply by an effective weight made of a packed W and the product P = B A of an adapter: W + scale * M * P, or
W * P. A tile at a time, that weight is formed, used and dropped, and so is the gradient by P.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from perp_kernels.ops import _walk
from perp_kernels.ops._library import written
from perp_kernels.ops._rows import PackedRows, accumulation_dtype, clear_pruned_, row_chunks
from perp_kernels.ops._walk import Tile

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


class Adapted(Protocol):
    """An effective weight in tiles: the implementations differ in nothing else."""

    @property
    def row_tiles(self) -> Sequence[Tile]:
        """Tiles of whole rows, for products that sum over the columns."""
        ...

    @property
    def sum_tiles(self) -> Sequence[Tile]:
        """Tiles for the products of the backward pass, which sum over the rows."""
        ...

    def form(self, expert: int, tile: Tile) -> Tensor:
        """That tile in the dtype of the values, 0 where pruned."""
        ...

    def fold(self, expert: int, tile: Tile, dy: Tensor, x: Tensor, dA: Tensor | None, dB: Tensor | None) -> None:
        """Add to dA [r, columns] and dB [rows, r] what the gradient dy^T x by the tile comes to."""
        ...


class Stored(Adapted, Protocol):
    """One that can also be written back."""

    def store(self, expert: int, tile: Tile, W: Tensor) -> None:
        """Overwrite the values of a tile of whole rows by W, which may be destroyed."""
        ...


class Effect(Protocol):
    """How W and P make the effective weight; both methods work on rows start..stop of w."""

    @property
    def name(self) -> str:
        """What the kernels call it."""
        ...

    @property
    def scale(self) -> float: ...

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
    name: str = "add"

    def rows(self, w: PackedRows, A: Tensor, B: Tensor, start: int, stop: int) -> Tensor:
        W = w.dense(start, stop).to(A.dtype, copy=w.layout == "dense")
        return clear_pruned_(W.addmm_(B, A, alpha=self.scale), w.mask(start, stop))

    def product_gradient_(self, w: PackedRows, G: Tensor, start: int, stop: int) -> Tensor:
        return clear_pruned_(G.mul_(self.scale), w.mask(start, stop))


@dataclass(frozen=True)
class Scaled:
    """W * P."""

    scale: float = 1.0
    name: str = "multiply"

    def rows(self, w: PackedRows, A: Tensor, B: Tensor, start: int, stop: int) -> Tensor:
        return clear_pruned_(torch.mm(B, A).mul_(w.dense(start, stop)), w.mask(start, stop))

    def product_gradient_(self, w: PackedRows, G: Tensor, start: int, stop: int) -> Tensor:
        return clear_pruned_(G.mul_(w.dense(start, stop)), w.mask(start, stop))


class ReferenceAdapted:
    """An effective weight in plain torch, in tiles of whole rows."""

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
        self._effect, self._w = effect, PackedRows(values, index, row_ptr, layout, shape[-1])
        self._A, self._B = widened(A, B, shape, values.dtype)
        self._N = shape[-2]
        self.row_tiles = self.sum_tiles = _walk.row_tiles(row_chunks(*shape[-2:]), shape[-1])

    def form(self, expert: int, tile: Tile) -> Tensor:
        B = self._B[expert, tile.rows]
        return self._effect.rows(self._w, self._A[expert], B, *self._bounds(expert, tile)).to(self._w.values.dtype)

    def fold(self, expert: int, tile: Tile, dy: Tensor, x: Tensor, dA: Tensor | None, dB: Tensor | None) -> None:
        G = (dy.t() @ x).to(self._A.dtype)
        dP = self._effect.product_gradient_(self._w, G, *self._bounds(expert, tile))
        if dA is not None:
            dA.addmm_(self._B[expert, tile.rows].t(), dP)
        if dB is not None:
            dB.addmm_(dP, self._A[expert].t())

    def store(self, expert: int, tile: Tile, W: Tensor) -> None:
        self._w.store(*self._bounds(expert, tile), W)

    def _bounds(self, expert: int, tile: Tile) -> tuple[int, int]:
        return expert * self._N + tile.rows.start, expert * self._N + tile.rows.stop


def forward(w: Adapted, x: Tensor, shape: list[int], bias: Tensor | None, offsets: Tensor | None) -> Tensor:
    """y [..., N] of x [..., K]."""
    return _walk.multiply(x, shape, bias, offsets, w.row_tiles, w.form)


def backward(
    w: Adapted,
    grad_y: Tensor,
    x: Tensor | None,
    shape: list[int],
    A: Tensor,
    B: Tensor,
    offsets: Tensor | None,
    needs: list[bool],
) -> Gradients:
    """Gradients of x [T, K], A, B and bias, each empty where `needs` does not ask for it.

    x may be None where neither that of A nor that of B is asked for. That of the bias is in the accumulation dtype.
    """
    needs_x, needs_A, needs_B, needs_bias = needs
    *experts, N, K = shape
    dy = grad_y.reshape(math.prod(grad_y.shape[:-1]), N)
    wide = accumulation_dtype(dy.dtype)
    dx = _walk.multiply_transposed(dy, shape, offsets, w.sum_tiles, w.form) if needs_x else dy.new_empty(0)
    dA = dy.new_zeros(A.shape if needs_A else 0, dtype=wide)
    dB = dy.new_zeros(B.shape if needs_B else 0, dtype=wide)
    if needs_A or needs_B:
        assert x is not None
        E = math.prod(experts)
        dA_e = dA.view(E, *A.shape[-2:]) if needs_A else None
        dB_e = dB.view(E, *B.shape[-2:]) if needs_B else None

        def fold(expert: int, tile: Tile, dy: Tensor, x: Tensor) -> None:
            dA_t = None if dA_e is None else dA_e[expert, :, tile.columns]
            dB_t = None if dB_e is None else dB_e[expert, tile.rows]
            w.fold(expert, tile, dy, x, dA_t, dB_t)

        _walk.fold_gradient(dy, x.reshape(-1, K), shape, offsets, w.sum_tiles, fold)
    dbias = _walk.bias_gradient(dy, shape, offsets) if needs_bias else dy.new_empty(0, dtype=wide)
    return dx, dA.to(A.dtype), dB.to(B.dtype), dbias


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
) -> Gradients:
    """The fake of both ops: their schemas begin with these arguments and end in `needs`."""
    needs_x, needs_A, needs_B, needs_bias = rest[-1]
    K = shape[-1]
    dx = values.new_empty((math.prod(grad_y.shape[:-1]), K) if needs_x else 0)
    dA, dB = A.new_empty(A.shape if needs_A else 0), B.new_empty(B.shape if needs_B else 0)
    dbias = values.new_empty(shape[:-1] if needs_bias else 0, dtype=accumulation_dtype(values.dtype))
    return dx, dA, dB, dbias


def merge_(w: Stored, shape: list[int]) -> None:
    """Overwrite the values by the effective weight, in the tiles of `forward` and hence to the same bits."""
    for expert in range(math.prod(shape[:-2])):
        for tile in w.row_tiles:
            w.store(expert, tile, w.form(expert, tile))


def widened(A: Tensor, B: Tensor, shape: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A [E, r, K] and B [E, N, r] in the accumulation dtype of `dtype`; a weight [N, K] is E = 1."""
    *experts, N, K = shape
    E, r, wide = math.prod(experts), A.shape[-2], accumulation_dtype(dtype)
    return A.to(wide).reshape(E, r, K), B.to(wide).reshape(E, N, r)


@dataclass(frozen=True)
class AdaptedOps:
    """The ops of one implementation, their arguments in the order of the schemas: written once for all of them.

    make: `make(effect, values, index, row_ptr, layout, shape, A, B)` is its effective weight; merge: overwrites the
    values of one by it.
    """

    make: Callable[..., Any]
    merge: Callable[[Any, list[int]], None] = merge_

    def masked_lora_linear(
        self,
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
        w = self.make(Added(scale), values, index, row_ptr, layout, shape, A, B)
        return forward(w, x, shape, bias, offsets)

    def masked_lora_linear_backward(
        self,
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
    ) -> Gradients:
        w = self.make(Added(scale), values, index, row_ptr, layout, shape, A, B)
        return backward(w, grad_y, x, shape, A, B, offsets, needs)

    def scale_lora_linear(
        self,
        x: Tensor,
        values: Tensor,
        index: Tensor,
        row_ptr: Tensor | None,
        layout: str,
        shape: list[int],
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        offsets: Tensor | None,
    ) -> Tensor:
        w = self.make(Scaled(), values, index, row_ptr, layout, shape, A, B)
        return forward(w, x, shape, bias, offsets)

    def scale_lora_linear_backward(
        self,
        grad_y: Tensor,
        x: Tensor | None,
        values: Tensor,
        index: Tensor,
        row_ptr: Tensor | None,
        layout: str,
        shape: list[int],
        A: Tensor,
        B: Tensor,
        offsets: Tensor | None,
        needs: list[bool],
    ) -> Gradients:
        w = self.make(Scaled(), values, index, row_ptr, layout, shape, A, B)
        return backward(w, grad_y, x, shape, A, B, offsets, needs)

    def add_lowrank_(
        self,
        values: Tensor,
        index: Tensor,
        row_ptr: Tensor | None,
        layout: str,
        shape: list[int],
        A: Tensor,
        B: Tensor,
        scale: float,
    ) -> None:
        self.merge(self.make(Added(scale), values, index, row_ptr, layout, shape, A, B), shape)
        written(values)

    def mul_lowrank_(
        self,
        values: Tensor,
        index: Tensor,
        row_ptr: Tensor | None,
        layout: str,
        shape: list[int],
        A: Tensor,
        B: Tensor,
    ) -> None:
        self.merge(self.make(Scaled(), values, index, row_ptr, layout, shape, A, B), shape)
        written(values)


reference = AdaptedOps(ReferenceAdapted)
