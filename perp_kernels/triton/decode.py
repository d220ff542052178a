"""Tiles of packed weights: which columns a tile keeps, and where their values lie.

`tile_start` gives, for each row of a tile, the position in `values` where the tile begins, and `index_tile` its index
bytes, one for eight columns: apart from the rest, so that a loop can ask for the next tile's before it needs them. From
both, `read_tile` and `write_tile` move the values of a packed layout, and `locate` gives any layout's kept columns, the
rank of each among those of its row, and where the next tile to the right begins.

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
        # no table beside the weight. Few rows are counted in long strides, since each stride waits for memory once.
        STRIDE: tl.constexpr = 64 if BN > 32 else 256
        count = tl.zeros((BN,), dtype=tl.int32)
        for at in range(0, first_column // 8, STRIDE):
            columns = at + tl.arange(0, STRIDE)
            wanted = inside[:, None] & (columns < first_column // 8)[None, :]
            byte = tl.load(index + rows.to(tl.int64)[:, None] * width + columns[None, :], mask=wanted, other=0)
            count += tl.sum((_prefixes(byte.to(tl.uint32)) >> 28).to(tl.int32), axis=1)
        start += count
    return start


@triton.jit
def index_tile(index, rows, inside, first_column, width, BK: tl.constexpr):
    """uint32 [BN, BK // 8]: the index bytes of the columns from `first_column`; 0 outside `inside` rows and `width`."""
    # A byte to a thread and its neighbour to the next, as the values behind them will be loaded: a vector of bytes
    # would have to change hands for each of its columns.
    columns = tl.max_contiguous(first_column // 8 + tl.arange(0, BK // 8), 1)
    wanted = inside[:, None] & (columns < width)[None, :]
    return tl.load(index + rows.to(tl.int64)[:, None] * width + columns[None, :], mask=wanted, other=0).to(tl.uint32)


@triton.jit
def locate(byte, start, LAYOUT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """(kept bool [BN, BK], ranks int32 [BN, BK], start of the next tile) of the columns of an `index_tile`.

    The value of a kept column lies at start + rank.
    """
    at = tl.arange(0, BK // 8)
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
def bitmap(byte, LAYOUT: tl.constexpr):
    """The kept columns of index bytes, a bit each."""
    if LAYOUT == SEMI24:
        first, second = byte & 3, (byte >> 2) & 3
        low = tl.where(first < second, (1 << first) | (1 << second), 0)
        first, second = (byte >> 4) & 3, byte >> 6
        byte = low | (tl.where(first < second, (1 << first) | (1 << second), 0) << 4)
    return byte


@triton.jit
def first_ranks(bits, LAYOUT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """(int32 [BN, BK // 8], int32 [BN]): the rank of the first kept column of each byte, and how many the tile keeps.

    Of a bitmap's bits, or of those that `bitmap` made of semi24."""
    if LAYOUT == BITMAP:
        counts = (_prefixes(bits) >> 28).to(tl.int32)
        rank, count = tl.cumsum(counts, axis=1) - counts, tl.sum(counts, axis=1)
    else:
        rank = tl.zeros((BN, 1), dtype=tl.int32) + (4 * tl.arange(0, BK // 8))[None, :]
        count = tl.full((BN,), BK // 2, dtype=tl.int32)
    return rank, count


@triton.jit
def _load_column(at, bits, place: tl.constexpr):
    """(that column's value of each byte, 0 where pruned; where the next kept column's lies)."""
    value = tl.load(at, mask=(bits & (1 << place)) != 0, other=0.0)
    return value, at + ((bits >> place) & 1).to(tl.int32)


@triton.jit
def columns_of(c0, c1, c2, c3, c4, c5, c6, c7, BN: tl.constexpr, BK: tl.constexpr):
    """[BN, BK] of eight [BN, BK // 8], which hold each eighth column. Nothing moves: a thread that has a byte's eight
    columns has them side by side."""
    even = tl.join(tl.join(c0, c4), tl.join(c2, c6))
    odd = tl.join(tl.join(c1, c5), tl.join(c3, c7))
    return tl.reshape(tl.join(even, odd), (BN, BK))


@triton.jit
def read_tile(values, byte, start, LAYOUT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """(weight [BN, BK], 0 where pruned; start of the next tile) of the columns of an `index_tile`.

    A column at a time of each byte, so that a thread counts on from one column to the next and tests its bits by
    constants: as one tile of addresses, each element would be located anew, at twice the instructions.
    """
    bits = bitmap(byte, LAYOUT)
    rank, count = first_ranks(bits, LAYOUT, BN, BK)
    at = (values + start)[:, None] + rank
    c0, at = _load_column(at, bits, 0)
    c1, at = _load_column(at, bits, 1)
    c2, at = _load_column(at, bits, 2)
    c3, at = _load_column(at, bits, 3)
    c4, at = _load_column(at, bits, 4)
    c5, at = _load_column(at, bits, 5)
    c6, at = _load_column(at, bits, 6)
    c7, at = _load_column(at, bits, 7)
    return columns_of(c0, c1, c2, c3, c4, c5, c6, c7, BN, BK), start + count


@triton.jit
def _store_column(at, value, bits, place: tl.constexpr):
    tl.store(at, value, mask=(bits & (1 << place)) != 0)
    return at + ((bits >> place) & 1).to(tl.int32)


@triton.jit
def write_tile(values, weight, byte, start, LAYOUT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Overwrite what `read_tile` read, in the dtype of the values."""
    bits = bitmap(byte, LAYOUT)
    rank, _ = first_ranks(bits, LAYOUT, BN, BK)
    at = (values + start)[:, None] + rank
    even, odd = tl.split(tl.reshape(weight, (BN, BK // 8, 2, 2, 2)))
    c04, c26 = tl.split(even)
    c15, c37 = tl.split(odd)
    c0, c4 = tl.split(c04)
    c2, c6 = tl.split(c26)
    c1, c5 = tl.split(c15)
    c3, c7 = tl.split(c37)
    at = _store_column(at, c0, bits, 0)
    at = _store_column(at, c1, bits, 1)
    at = _store_column(at, c2, bits, 2)
    at = _store_column(at, c3, bits, 3)
    at = _store_column(at, c4, bits, 4)
    at = _store_column(at, c5, bits, 5)
    at = _store_column(at, c6, bits, 6)
    _store_column(at, c7, bits, 7)


@triton.jit
def kept_columns(byte, LAYOUT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """bool [BN, BK]: what `locate` gives first, for a kernel that needs no values."""
    place = tl.arange(0, 8).to(tl.uint32)[None, None, :]
    if LAYOUT == SEMI24:
        nibble = (byte[:, :, None] >> (place & 4)) & 15
        first, second = nibble & 3, nibble >> 2
        kept = (first < second) & (((place & 3) == first) | ((place & 3) == second))
    else:
        kept = ((byte[:, :, None] >> place) & 1) != 0
    return tl.reshape(kept, (BN, BK))
