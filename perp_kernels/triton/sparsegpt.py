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

from perp_kernels.ops.sparsegpt import block_mask, solve
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
    u_row,
    u_column,
    GROUP: tl.constexpr,
    PRUNED: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
):
    """W [b, N] in place, errors [b, N]; kept int8 [b, N] is read where GROUP is 0, else written: of each GROUP columns
    the PRUNED lowest scores go."""
    columns, n = tl.arange(0, C), tl.program_id(0) * BN + tl.arange(0, BN)
    at = columns[:, None] * N + n[None, :]
    inside = (columns < b)[:, None] & (n < N)[None, :]
    tile = tl.load(W + at, mask=inside, other=0.0)
    diagonal = tl.load(U + columns * (u_row + u_column), mask=columns < b, other=1.0)
    if GROUP == 0:
        keeps = tl.load(kept + at, mask=inside, other=1).to(tl.int32)
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
        tl.store(errors + j * N + n, error, mask=n < N)
        right = (columns > j) & (columns < b)
        row = tl.load(U + j * u_row + columns * u_column, mask=right, other=0.0)
        tile -= row[:, None] * error[None, :]
    tl.store(W + at, tl.where(keeps != 0, tile, 0.0), mask=inside)
    if GROUP > 0:
        tl.store(kept + at, keeps.to(tl.int8), mask=inside)


def _config(gpu: Target, b: int) -> Config:
    return configure("prune_block", gpu, f"b={b}", Config({"BN": 32}, num_warps=4, num_stages=1))


def prune_block(W: Tensor, U: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Prune the columns W [b, N] of a block in place under U [b, b]; returns the errors and the mask, both [b, N]."""
    b, N = W.shape
    errors = torch.empty_like(W)
    if pattern.is_nm:
        kept = torch.empty(b, N, dtype=torch.bool, device=W.device)
    else:
        kept = block_mask((W / U.diagonal()[:, None]).square(), pattern).contiguous()
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
            "u_row": U.stride(0),
            "u_column": U.stride(1),
        },
        {
            "GROUP": pattern.m or 0,
            "PRUNED": 0 if pattern.m is None or pattern.n is None else pattern.m - pattern.n,
            "C": triton.next_power_of_2(b),
        },
        config,
    )
    return errors, kept


def sparsegpt(weight: Tensor, H: Tensor, pattern: str, damp: float, block_size: int) -> tuple[Tensor, Tensor]:
    """The pruned and compensated weight and its mask: the contract of perp_kernels.ops.sparsegpt."""
    return solve(weight, H, pattern, damp, block_size, prune_block)
