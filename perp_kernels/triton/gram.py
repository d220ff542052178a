"""gram_ by Triton: the tiles on and below the diagonal are computed, and each is added to H twice, as it is and turned.

Tiles of 16-bit x go through the tensor cores, whose products are exact in float32; float32 is multiplied as float32.
One program forms one tile over all tokens, so that the order of every sum is fixed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from perp_kernels.ops._library import written
from perp_kernels.triton.launch import Config, Target, configure, launch, rows_of, target
from perp_kernels.triton.product import transposed_product


@triton.jit
def triangle_row(at):
    """The row that entry `at` of a triangle taken row by row lies in: row i starts at i (i + 1) / 2."""
    i = ((tl.sqrt(8.0 * at + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The square root is exact to within one row.
    i = tl.where(i * (i + 1) // 2 > at, i - 1, i)
    return tl.where((i + 1) * (i + 2) // 2 <= at, i + 1, i)


@triton.jit
def banded_triangle(pid, side, GROUP: tl.constexpr):
    """(row, column <= row) of tile `pid` of a triangle of `side` rows, in bands of GROUP rows.

    A band's rectangle is taken column by column and the triangle at its end row by row, so that tiles in flight share
    rows and columns of x in cache; row by row, each wave of tiles would read nearly all of x.
    """
    first = triangle_row(pid) // GROUP * GROUP
    height = min(side - first, GROUP)
    at = pid - first * (first + 1) // 2
    rest = tl.maximum(at - height * first, 0)
    row = triangle_row(rest)
    in_rectangle = at < height * first
    i = tl.where(in_rectangle, first + at % height, first + row)
    j = tl.where(in_rectangle, at // height, first + rest - row * (row + 1) // 2)
    return i, j


@triton.jit
def gram_kernel(
    H, x, offsets, tokens, K, x_stride,
    EXPERTS: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    pid, expert = tl.program_id(0), tl.program_id(1)
    i, j = banded_triangle(pid, tl.cdiv(K, BLOCK), 8)
    begin, end = 0, tokens
    if EXPERTS:
        end = tl.minimum(tl.load(offsets + expert), tokens).to(tl.int32)
        if expert > 0:
            begin = tl.maximum(tl.load(offsets + expert - 1), 0).to(tl.int32)
    tile = transposed_product(
        x, x, begin, end, i * BLOCK, j * BLOCK, K, K, x_stride, x_stride, BLOCK, BLOCK, BT, PRECISION
    )
    H += expert.to(tl.int64) * K * K
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    at = H + rows[:, None].to(tl.int64) * K + columns[None, :]
    inside = (rows < K)[:, None] & (columns < K)[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) + tile, mask=inside)
    if i > j:
        at = H + columns[:, None].to(tl.int64) * K + rows[None, :]
        inside = (columns < K)[:, None] & (rows < K)[None, :]
        tl.store(at, tl.load(at, mask=inside, other=0.0) + tl.trans(tile), mask=inside)


def _config(target: Target, K: int, dtype: torch.dtype) -> Config:
    if dtype == torch.float32:
        default = Config({"BLOCK": 64, "BT": 16}, num_warps=4, num_stages=2)
    else:
        default = Config({"BLOCK": 128, "BT": 64}, num_warps=8, num_stages=3)
    return configure("gram", target, f"{dtype} K={K}", default)


def gram_(H: Tensor, x: Tensor, offsets: Tensor | None) -> None:
    """H [K, K] or [E, K, K] += X^T X: the contract of perp_kernels.ops.gram. The ends in `offsets` are read on the
    device: where they do not rise to the number of tokens, only tokens that exist are read, and nothing is raised."""
    K = x.shape[-1]
    tokens = rows_of(x, K)
    config = _config(target(x), K, x.dtype)
    side = triton.cdiv(K, config.tiles["BLOCK"])
    launch(
        gram_kernel,
        (side * (side + 1) // 2, 1 if offsets is None else len(offsets)),
        {
            "H": H,
            "x": tokens,
            "offsets": H if offsets is None else offsets,
            "tokens": len(tokens),
            "K": K,
            "x_stride": tokens.stride(0),
        },
        {"EXPERTS": offsets is not None, "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32"},
        config,
    )
    written(H)
