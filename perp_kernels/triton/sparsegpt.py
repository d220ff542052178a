"""sparsegpt by Triton: a block's columns are pruned and compensated on the chip; the rest is torch's products.

Rows do not depend on each other within a block, so a program keeps a few of them and walks the columns without ever
waiting for another. Folding the update of the columns to the right into it would read them once per column: that stays
one product per block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from perp_kernels.ops._library import written
from perp_kernels.ops.sparsegpt import share_mask, solve
from perp_kernels.pattern import Pattern
from perp_kernels.triton.launch import Config, Target, configure, launch, target


@triton.jit
def _at(tile, columns, column):
    """Column `column` of a tile [columns, rows]."""
    return tl.sum(tl.where((columns == column)[:, None], tile, 0.0), axis=0)


@triton.jit
def prune_block_kernel(
    W,
    errors,
    kept,
    U,
    N,
    b,
    w_row,
    e_row,
    k_row,
    u_row,
    u_column,
    GROUP: tl.constexpr,
    PRUNED: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
):
    """W [N, b] in place, errors [N, b]; kept int8 [N, b] is read where GROUP is 0, else written: of each GROUP columns
    the PRUNED lowest scores go. The rows of each lie w_row, e_row and k_row elements apart."""
    columns, n = tl.arange(0, C), tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    inside = (columns < b)[:, None] & (n < N)[None, :]
    tile = tl.load(W + n[None, :] * w_row + columns[:, None], mask=inside, other=0.0)
    diagonal = tl.load(U + columns * (u_row + u_column), mask=columns < b, other=1.0)
    if GROUP == 0:
        keeps = tl.load(kept + n[None, :] * k_row + columns[:, None], mask=inside, other=1).to(tl.int32)
    else:
        keeps = tl.full((C, BN), 1, dtype=tl.int32)
    for j in range(0, b):
        if GROUP > 0:  # noqa: SIM102 (known while compiling, where the next is not)
            if j % GROUP == 0:
                root = tile / diagonal[:, None]
                scores = root * root
                lower = tl.zeros((C, BN), dtype=tl.int32)
                for i in tl.static_range(0, GROUP):
                    other = _at(scores, columns, j + i)[None, :]
                    first = (i < columns - j)[:, None]
                    lower += ((other < scores) | ((other == scores) & first)).to(tl.int32)
                group = (columns >= j) & (columns < j + GROUP)
                keeps = tl.where(group[:, None], (lower >= PRUNED).to(tl.int32), keeps)
        w = _at(tile, columns, j)
        keep = tl.sum(tl.where((columns == j)[:, None], keeps, 0), axis=0) != 0
        d = tl.sum(tl.where(columns == j, diagonal, 0.0), axis=0)
        error = tl.where(keep, 0.0, w / d)
        tl.store(errors + n * e_row + j, error, mask=n < N)
        right = (columns > j) & (columns < b)
        row = tl.load(U + j * u_row + columns * u_column, mask=right, other=0.0)
        tile -= row[:, None] * error[None, :]
    tl.store(W + n[None, :] * w_row + columns[:, None], tl.where(keeps != 0, tile, 0.0), mask=inside)
    if GROUP > 0:
        tl.store(kept + n[None, :] * k_row + columns[:, None], keeps.to(tl.int8), mask=inside)


def _config(gpu: Target, b: int) -> Config:
    return configure("prune_block", gpu, f"b={b}", Config({"BN": 32}, num_warps=4, num_stages=1))


def sparsegpt_block_(W: Tensor, U: Tensor, pattern: str, errors: Tensor, kept: Tensor) -> None:
    """Prunes and compensates the columns W [N, b] in place, the contract of perp_kernels.ops.sparsegpt."""
    parsed, (N, b) = Pattern.parse(pattern), W.shape
    if not parsed.is_nm:
        kept.copy_(share_mask(W, U.diagonal(), parsed))
    config = _config(target(W), b)
    launch(
        prune_block_kernel,
        (triton.cdiv(N, config.tiles["BN"]),),
        {
            "W": W,
            "errors": errors,
            "kept": kept.view(torch.int8),
            "U": U,
            "N": N,
            "b": b,
            "w_row": W.stride(0),
            "e_row": errors.stride(0),
            "k_row": kept.stride(0),
            "u_row": U.stride(0),
            "u_column": U.stride(1),
        },
        {
            "GROUP": parsed.m or 0,
            "PRUNED": 0 if parsed.m is None or parsed.n is None else parsed.m - parsed.n,
            "C": triton.next_power_of_2(b),
        },
        config,
    )
    written(W, errors, kept)


def sparsegpt(weight: Tensor, H: Tensor, pattern: str, damp: float, block_size: int) -> tuple[Tensor, Tensor]:
    """The pruned and compensated weight and its mask: the contract of perp_kernels.ops.sparsegpt."""
    return solve(weight, H, pattern, damp, block_size)
