"""A tile of P^T Q, summed over tokens, and the order in which tiles are taken: what all sums over tokens share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def grouped(pid, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row, column) of tile `pid` in bands of GROUP rows, so that tiles in flight share rows and columns in cache."""
    band = GROUP * column_tiles
    first = pid // band * GROUP
    height = min(row_tiles - first, GROUP)
    return first + pid % band % height, pid % band // height


@triton.jit
def transposed_product(
    p, q, begin, end, first_row, first_column, rows, columns, p_stride, q_stride,
    BN: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """float32 [BN, BK]: P[begin:end, first_row:]^T Q[begin:end, first_column:] for P [*, rows] and Q [*, columns]."""
    n, k = first_row + tl.arange(0, BN), first_column + tl.arange(0, BK)
    sum = tl.zeros((BN, BK), dtype=tl.float32)
    for start in range(begin, end, BT):
        t = start + tl.arange(0, BT).to(tl.int64)
        inside = (t < end)[:, None]
        p_tile = tl.load(p + t[:, None] * p_stride + n[None, :], mask=inside & (n < rows)[None, :], other=0.0)
        q_tile = tl.load(q + t[:, None] * q_stride + k[None, :], mask=inside & (k < columns)[None, :], other=0.0)
        sum = tl.dot(tl.trans(p_tile), q_tile, sum, input_precision=PRECISION)
    return sum
