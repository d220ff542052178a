"""Tiles of packed weights: which columns a tile keeps, and where their values lie.

Every layout is read the same way. `tile_start` gives, for each row of a tile, the position in `values` where the tile
begins; `locate` gives the tile's kept columns, the rank of each among those of its row, and where the next tile to the
right begins. Index bytes are read once per eight columns.

The host describes a weight by `arguments` and `switches`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from perp_kernels.ops._rows import PackedRows

DENSE = tl.constexpr(0)
BITMAP = tl.constexpr(1)
SEMI24 = tl.constexpr(2)

LAYOUTS = {"dense": 0, "bitmap": 1, "semi24": 2}


def slice_rows(w: PackedRows, start: int, stop: int) -> PackedRows:
    """Rows start..stop of a weight, over the same memory."""
    if w.row_ptr is None:
        return PackedRows(w.values[start:stop], w.index[start:stop], None, w.layout, w.K)
    return PackedRows(w.values, w.index[start:stop], w.row_ptr[start : stop + 1], w.layout, w.K)


def arguments(w: PackedRows) -> dict[str, Any]:
    """What every kernel that reads a packed weight takes: its components and their strides."""
    return {
        "values": w.values,
        "index": w.index,
        "row_ptr": w.index if w.row_ptr is None else w.row_ptr,
        "N": len(w.index),
        "K": w.K,
        "width": w.index.shape[1],
        "row_stride": 0 if w.row_ptr is not None else w.values.shape[1],
    }


def switches(w: PackedRows) -> dict[str, Any]:
    return {"LAYOUT": LAYOUTS[w.layout], "RAGGED": w.row_ptr is not None}


def contiguous(values: Tensor, index: Tensor, row_ptr: Tensor | None, layout: str, K: int) -> PackedRows:
    """The components as the kernels read them, with no gaps."""
    values, index = values.detach().contiguous(), index.contiguous()
    return PackedRows(values, index, None if row_ptr is None else row_ptr.contiguous(), layout, K)


def precision(values: torch.dtype, *factors: torch.dtype) -> str:
    """The precision of products of float32 `factors` that end in a weight of dtype `values`.

    Three TF32 products err by less than a thousandth of a 16-bit rounding; a float32 weight gets float32 products.
    Ignored by the hardware where all factors are 16-bit, whose products are exact.
    """
    return "ieee" if values == torch.float32 else "tf32x3"


@triton.jit
def _prefixes(byte):
    """uint32 of the same shape: nibble j counts the bits 0..j of a byte, so that nibble 7 counts all of them."""
    spread = (byte | (byte << 12)) & 0x000F000F
    spread = (spread | (spread << 6)) & 0x03030303
    spread = (spread | (spread << 3)) & 0x11111111
    return spread * 0x11111111


@triton.jit
def tile_start(
    index, row_ptr, rows, inside, first_column, width, row_stride,
    LAYOUT: tl.constexpr, RAGGED: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """int64 [BN]: the position of the first value at or after `first_column`, a multiple of 8, of each of `rows`."""
    if RAGGED:
        start = tl.load(row_ptr + rows, mask=inside, other=0)
    else:
        start = rows.to(tl.int64) * row_stride
    if LAYOUT == DENSE:
        start += first_column
    elif LAYOUT == SEMI24:
        start += first_column // 2
    else:
        # Counted again by each program that starts inside a row: the index is a ninth of what is read, and this keeps
        # no table beside the weight.
        count = tl.zeros((BN,), dtype=tl.int32)
        for at in range(0, first_column // 8, 64):
            columns = at + tl.arange(0, 64)
            wanted = inside[:, None] & (columns < first_column // 8)[None, :]
            byte = tl.load(index + rows.to(tl.int64)[:, None] * width + columns[None, :], mask=wanted, other=0)
            count += tl.sum((_prefixes(byte.to(tl.uint32)) >> 28).to(tl.int32), axis=1)
        start += count
    return start


@triton.jit
def locate(
    index, rows, inside, first_column, width, start,
    LAYOUT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """(kept bool [BN, BK], ranks int32 [BN, BK], start of the next tile) of the columns from `first_column`.

    The value of a kept column lies at start + rank. Nothing outside `inside` rows or past the last column is kept.
    """
    BYTES: tl.constexpr = BK // 8
    at = tl.arange(0, BYTES)
    columns = first_column // 8 + at
    wanted = inside[:, None] & (columns < width)[None, :]
    byte = tl.load(index + rows.to(tl.int64)[:, None] * width + columns[None, :], mask=wanted, other=0).to(tl.uint32)
    place = tl.arange(0, 8).to(tl.uint32)[None, None, :]
    if LAYOUT == SEMI24:
        nibble = (byte[:, :, None] >> (place & 4)) & 15
        first, second = nibble & 3, nibble >> 2
        column = place & 3
        kept = (first < second) & ((column == first) | (column == second))
        rank = (4 * at)[None, :, None] + ((place >> 2) * 2).to(tl.int32) + (column == second).to(tl.int32)
        following = start + BK // 2
    else:
        kept = ((byte[:, :, None] >> place) & 1) != 0
        if LAYOUT == DENSE:
            rank = (8 * at)[None, :, None] + place.to(tl.int32) + tl.zeros((BN, 1, 1), dtype=tl.int32)
            following = start + BK
        else:
            prefixes = _prefixes(byte)
            counts = (prefixes >> 28).to(tl.int32)
            before = tl.cumsum(counts, axis=1) - counts
            within = ((prefixes << 4)[:, :, None] >> (4 * place)) & 15
            rank = before[:, :, None] + within.to(tl.int32)
            following = start + tl.sum(counts, axis=1)
    kept = tl.reshape(kept, (BN, BK))
    return kept, tl.reshape(rank, (BN, BK)), following


@triton.jit
def kept_columns(index, rows, inside, first_column, width, LAYOUT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """bool [BN, BK]: what `locate` gives first, for a kernel that needs no values."""
    columns = first_column // 8 + tl.arange(0, BK // 8)
    wanted = inside[:, None] & (columns < width)[None, :]
    byte = tl.load(index + rows.to(tl.int64)[:, None] * width + columns[None, :], mask=wanted, other=0).to(tl.uint32)
    place = tl.arange(0, 8).to(tl.uint32)[None, None, :]
    if LAYOUT == SEMI24:
        nibble = (byte[:, :, None] >> (place & 4)) & 15
        first, second = nibble & 3, nibble >> 2
        kept = (first < second) & (((place & 3) == first) | ((place & 3) == second))
    else:
        kept = ((byte[:, :, None] >> place) & 1) != 0
    return tl.reshape(kept, (BN, BK))
