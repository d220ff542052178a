"""The weight that a linear op multiplies by, formed from its packed values: W, W + s M (B A) or W (B A).

One kernel writes it dense, into an op's temporary, or back over the packed values, which is the merge: both round the
same float32 once, so that a merged weight has the bits that its adapter's op multiplied by.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from perp_kernels.ops._adapted import Effect
from perp_kernels.ops._rows import PackedRows
from perp_kernels.triton import decode
from perp_kernels.triton.decode import DENSE, index_tile, kept_columns, read_tile, tile_start, write_tile
from perp_kernels.triton.launch import Config, Target, configure, launch, target

# How W and P = B A make the effective weight.
PLAIN = tl.constexpr(0)
ADDED = tl.constexpr(1)
SCALED = tl.constexpr(2)

MODES = {"add": 1, "multiply": 2}


@dataclass(frozen=True)
class Adapter:
    """How A [r, K] and B [N, r], contiguous, change a weight: the effect of P = B A on it."""

    effect: Effect
    A: Tensor
    B: Tensor

    @property
    def mode(self) -> int:
        return MODES[self.effect.name]

    @property
    def rank(self) -> int:
        return len(self.A)

    def padded_rank(self) -> int:
        """The extent of the rank in a tile: tensor cores take powers of two from 16."""
        return max(16, triton.next_power_of_2(self.rank))


@triton.jit
def product_tile(A, B, n, k, N, K, r, R: tl.constexpr, PRECISION: tl.constexpr):
    """float32: rows n and columns k of B A."""
    i = tl.arange(0, R)
    b = tl.load(B + n.to(tl.int64)[:, None] * r + i[None, :], mask=(n < N)[:, None] & (i < r)[None, :], other=0.0)
    a = tl.load(A + i.to(tl.int64)[:, None] * K + k[None, :], mask=(i < r)[:, None] & (k < K)[None, :], other=0.0)
    if a.dtype != b.dtype:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(b, a, input_precision=PRECISION)


@triton.jit
def effective_kernel(
    out, values, index, row_ptr, A, B, scale, N, K, width, row_stride, r, span,
    LAYOUT: tl.constexpr, RAGGED: tl.constexpr, MODE: tl.constexpr, IN_PLACE: tl.constexpr, R: tl.constexpr,
    PRECISION: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = rows < N
    first = tl.program_id(1) * span
    start = tile_start(index, row_ptr, rows, inside, first, width, row_stride, LAYOUT, RAGGED, BN)
    byte = index_tile(index, rows, inside, first, width, BK)
    for column in range(first, tl.minimum(first + span, K), BK):
        columns = column + tl.arange(0, BK)
        within = inside[:, None] & (columns < K)[None, :]
        if LAYOUT == DENSE:
            weight = tl.load((values + start)[:, None] + tl.arange(0, BK)[None, :], mask=within, other=0.0)
            following = start + BK
        else:
            weight, following = read_tile(values, byte, start, LAYOUT, BN, BK)
        if MODE != PLAIN:
            product = product_tile(A, B, rows, columns, N, K, r, R, PRECISION)
            if MODE == ADDED:
                effective = weight.to(tl.float32) + scale * product
            else:
                effective = weight.to(tl.float32) * product
            weight = tl.where(kept_columns(byte, LAYOUT, BN, BK), effective, 0.0).to(weight.dtype)
        if not IN_PLACE:
            tl.store(out + rows.to(tl.int64)[:, None] * K + columns[None, :], weight, mask=within)
        elif LAYOUT == DENSE:
            tl.store((values + start)[:, None] + tl.arange(0, BK)[None, :], weight, mask=within)
        else:
            write_tile(values, weight, byte, start, LAYOUT, BN, BK)
        start = following
        # The values' addresses wait for these bytes: asked for now, they are there when the values are.
        byte = index_tile(index, rows, inside, column + BK, width, BK)


def _config(target: Target, w: PackedRows) -> Config:
    default = Config({"BN": 16, "BK": 128}, num_warps=4, num_stages=2)
    return configure("effective", target, f"{w.values.dtype} {w.layout}", default)


# Programs for each processor below which rows are cut into spans of columns: some ten small programs hide the latency
# of memory.
_PROGRAMS = 10


def _run(out: Tensor, w: PackedRows, adapter: Adapter | None, in_place: bool) -> None:
    gpu = target(w.values)
    config = _config(gpu, w)
    row_tiles, column_tiles = triton.cdiv(len(w.index), config.tiles["BN"]), triton.cdiv(w.K, config.tiles["BK"])
    spans = min(column_tiles, max(1, _PROGRAMS * gpu.processors // max(row_tiles, 1)))
    span = triton.cdiv(column_tiles, spans) * config.tiles["BK"]
    launch(
        effective_kernel,
        (row_tiles, triton.cdiv(w.K, span)),
        {
            "out": out,
            **decode.arguments(w),
            "A": w.values if adapter is None else adapter.A,
            "B": w.values if adapter is None else adapter.B,
            "scale": 1.0 if adapter is None else adapter.effect.scale,
            "r": 0 if adapter is None else adapter.rank,
            "span": span,
        },
        {
            **decode.switches(w),
            "MODE": 0 if adapter is None else adapter.mode,
            "IN_PLACE": in_place,
            "R": 16 if adapter is None else adapter.padded_rank(),
            "PRECISION": decode.precision(w.values.dtype),
        },
        config,
    )


def effective_weight(w: PackedRows, adapter: Adapter | None = None) -> Tensor:
    """The effective weight [N, K] in the dtype of the values, +0 where pruned; W itself without an adapter.

    A new tensor, but for a plain weight of the layout dense, which is there already.
    """
    if adapter is None and w.layout == "dense":
        return w.values
    out = torch.empty((len(w.index), w.K), dtype=w.values.dtype, device=w.values.device)
    _run(out, w, adapter, in_place=False)
    return out


def merge_(w: PackedRows, adapter: Adapter) -> None:
    """Overwrite the kept values by those of the effective weight."""
    _run(w.values, w, adapter, in_place=True)
