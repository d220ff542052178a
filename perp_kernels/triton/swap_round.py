"""swap_round_ by Triton: all pairs of a few rows against tiles of H, then each row's best pair is judged and traded.

A program forms the scores of its rows' pairs in registers, [rows, u, p] at a time, and keeps the least for each u over
all p: two multiplications and a minimum a pair, and a tile of H read once for all its rows. Programs that share rows
take ranges of u, whose bests are compared in order by the second kernel, so that no result depends on chance.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from perp_kernels.ops.swap_round import GUARD, group_of
from perp_kernels.triton.launch import Config, Target, configure, launch, target


@triton.jit
def _state(weight, kept, correlation, H, rows, column, inside, K):
    """Of places [rows, column]: the weight, 1 where it is kept, c, and the diagonal of H."""
    at = rows * K + column
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    keeps = tl.load(kept + at, mask=inside, other=0).to(tl.int32)
    c = tl.load(correlation + at, mask=inside, other=0.0)
    diagonal = tl.load(H + column.to(tl.int64) * K + column, mask=column < K, other=0.0)
    return w, keeps, c, diagonal


@triton.jit
def _take(best, place, value, u, K):
    """The running best [rows] and its place, after values [rows, u]: of equal ones the first."""
    least = tl.min(value, axis=1)
    at = tl.min(tl.where(value == least[:, None], u[None, :], K), axis=1)
    better = least < best
    return tl.where(better, least, best), tl.where(better, at, place)


@triton.jit
def pair_rows_kernel(
    lowest, places, weight, kept, correlation, H, N, K, span,
    BN: tl.constexpr, BU: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """The best of the kept u in [span] columns against all pruned p: dL and u, [parts, N]."""
    n, part = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1)
    rows, there = n.to(tl.int64)[:, None], (n < N)[:, None]
    best, place = tl.full((BN,), float("inf"), tl.float32), tl.zeros((BN,), tl.int32)
    for first in range(part * span, tl.minimum((part + 1) * span, K), BU):
        u = first + tl.arange(0, BU)
        inside_u = there & (u < K)[None, :]
        w_u, keeps, c_u, diagonal = _state(weight, kept, correlation, H, rows, u[None, :], inside_u, K)
        alone = tl.where(keeps != 0, w_u * (2.0 * c_u + w_u * diagonal), float("inf"))
        twice = (-2.0 * w_u)[:, :, None]
        least = tl.full((BN, BU, BP), float("inf"), tl.float32)
        for second in range(0, K, BP):
            p = second + tl.arange(0, BP)
            inside_p = there & (p < K)[None, :]
            w_p, keeps_p, c_p, diagonal_p = _state(weight, kept, correlation, H, rows, p[None, :], inside_p, K)
            enter = tl.where(inside_p & (keeps_p == 0), w_p * (w_p * diagonal_p - 2.0 * c_p), float("inf"))
            g = tl.load(
                H + u.to(tl.int64)[:, None] * K + p[None, :], mask=(u < K)[:, None] & (p < K)[None, :], other=0.0
            )
            least = tl.minimum(least, enter[:, None, :] + twice * (w_p[:, None, :] * g[None, :, :]))
        best, place = _take(best, place, alone + tl.min(least, axis=2), u, K)
    tl.store(lowest + part * N + n, best, mask=n < N)
    tl.store(places + part * N + n, place, mask=n < N)


@triton.jit
def pair_groups_kernel(
    lowest, places, weight, kept, correlation, H, N, K, span,
    M: tl.constexpr, BN: tl.constexpr, BU: tl.constexpr,
):  # fmt: skip
    """`pair_rows_kernel` with p in u's group of M columns: the M - 1 others, each gathered for all u at once."""
    n, part = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1)
    rows, there = n.to(tl.int64)[:, None], (n < N)[:, None]
    best, place = tl.full((BN,), float("inf"), tl.float32), tl.zeros((BN,), tl.int32)
    for first in range(part * span, tl.minimum((part + 1) * span, K), BU):
        u = first + tl.arange(0, BU)
        inside = there & (u < K)[None, :]
        w_u, keeps, c_u, diagonal = _state(weight, kept, correlation, H, rows, u[None, :], inside, K)
        alone = tl.where(keeps != 0, w_u * (2.0 * c_u + w_u * diagonal), float("inf"))
        least = tl.full((BN, BU), float("inf"), tl.float32)
        for shift in tl.static_range(1, M):
            p = u - u % M + (u % M + shift) % M
            w_p, keeps_p, c_p, diagonal_p = _state(weight, kept, correlation, H, rows, p[None, :], inside, K)
            enter = tl.where(inside & (keeps_p == 0), w_p * (w_p * diagonal_p - 2.0 * c_p), float("inf"))
            g = tl.load(H + u.to(tl.int64) * K + p, mask=u < K, other=0.0)[None, :]
            least = tl.minimum(least, enter - 2.0 * w_u * (w_p * g))
        best, place = _take(best, place, alone + least, u, K)
    tl.store(lowest + part * N + n, best, mask=n < N)
    tl.store(places + part * N + n, place, mask=n < N)


@triton.jit
def trade_kernel(
    gain, kept, correlation, weight, H, lowest, places, N, K,
    PARTS: tl.constexpr, GROUP: tl.constexpr, GUARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row: the best u of the parts, its best p (in u's group, where GROUP is not 0), the verdict and the trade."""
    row = tl.program_id(0)
    best, u = tl.load(lowest + row), tl.load(places + row)
    for part in tl.static_range(1, PARTS):
        other, place = tl.load(lowest + part * N + row), tl.load(places + part * N + row)
        u = tl.where(other < best, place, u)
        best = tl.minimum(other, best)
    row = row.to(tl.int64)
    w_u = tl.load(weight + row * K + u).to(tl.float32)
    H_u = H + u.to(tl.int64) * K
    least, p = tl.full((), float("inf"), tl.float32), u
    for first in range(0, K, BLOCK):
        j = first + tl.arange(0, BLOCK)
        w, keeps, c, diagonal = _state(weight, kept, correlation, H, row, j, j < K, K)
        pruned = (j < K) & (keeps == 0)
        if GROUP > 0:
            pruned = pruned & (j // GROUP == u // GROUP)
        g = tl.load(H_u + j, mask=j < K, other=0.0)
        change = tl.where(pruned, w * (w * diagonal - 2.0 * c) - 2.0 * w_u * (w * g), float("inf"))
        here = tl.min(change, axis=0)
        at = tl.min(tl.where(change == here, j, K), axis=0)
        p = tl.where(here < least, at, p)
        least = tl.minimum(here, least)
    w_p = tl.load(weight + row * K + p).to(tl.float32)
    H_p = H + p.to(tl.int64) * K
    to_u, to_p = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    size_u, size_p = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for first in range(0, K, BLOCK):
        j = first + tl.arange(0, BLOCK)
        w = tl.load(weight + row * K + j, mask=j < K, other=0.0).to(tl.float64)
        keeps = tl.load(kept + row * K + j, mask=j < K, other=1)
        w = tl.where(keeps != 0, 0.0, w)
        term_u = w * tl.load(H_u + j, mask=j < K, other=0.0).to(tl.float64)
        term_p = w * tl.load(H_p + j, mask=j < K, other=0.0).to(tl.float64)
        to_u += term_u
        to_p += term_p
        size_u += tl.abs(term_u)
        size_p += tl.abs(term_p)
    a, b = w_u.to(tl.float64), w_p.to(tl.float64)
    own = a * a * tl.load(H_u + u).to(tl.float64) + b * b * tl.load(H_p + p).to(tl.float64)
    joint = 2.0 * a * b * tl.load(H_u + p).to(tl.float64)
    change = 2.0 * a * tl.sum(to_u, axis=0) - 2.0 * b * tl.sum(to_p, axis=0) + own - joint
    size = 2.0 * tl.abs(a) * tl.sum(size_u, axis=0) + 2.0 * tl.abs(b) * tl.sum(size_p, axis=0) + own + tl.abs(joint)
    trade = (tl.abs(best) < float("inf")) & (change < -GUARD * size)
    tl.store(gain + row, tl.where(trade, -change, 0.0).to(tl.float32))
    tl.store(kept + row * K + u, 0, mask=trade)
    tl.store(kept + row * K + p, 1, mask=trade)
    end = tl.where(trade, K, 0)
    for first in range(0, end, BLOCK):
        j = first + tl.arange(0, BLOCK)
        inside = j < end
        step = w_u * tl.load(H_u + j, mask=inside, other=0.0) - w_p * tl.load(H_p + j, mask=inside, other=0.0)
        at = correlation + row * K + j
        tl.store(at, tl.load(at, mask=inside, other=0.0) + step, mask=inside)


def _config(gpu: Target, K: int, M: int) -> Config:
    if M < K:
        return configure("pair_groups", gpu, f"M={M}", Config({"BN": 8, "BU": 128}, num_warps=4, num_stages=1))
    return configure("pair_rows", gpu, f"K={K}", Config({"BN": 16, "BU": 16, "BP": 32}, num_warps=4, num_stages=2))


def _parts(gpu: Target, row_tiles: int, column_tiles: int) -> int:
    """A power of two, so that few kinds of kernels are compiled: enough programs for all processors, a few times."""
    parts = 1
    while parts < 16 and 2 * parts <= column_tiles and parts * row_tiles < 4 * gpu.processors:
        parts *= 2
    return parts


def swap_round_(weight: Tensor, mask: Tensor, correlation: Tensor, H: Tensor, pattern: str) -> Tensor:
    """Trades the best pair of each row in place: the contract of perp_kernels.ops.swap_round."""
    (N, K), gpu = weight.shape, target(weight)
    gain = torch.empty(N, device=weight.device)
    if K == 0:
        return gain.zero_()
    M, kept = group_of(pattern, K), mask.view(torch.int8)
    config = _config(gpu, K, M)
    row_tiles, column_tiles = triton.cdiv(N, config.tiles["BN"]), triton.cdiv(K, config.tiles["BU"])
    parts = _parts(gpu, row_tiles, column_tiles)
    lowest = torch.empty(parts, N, device=weight.device)
    places = torch.empty(parts, N, dtype=torch.int32, device=weight.device)
    state = {"weight": weight, "kept": kept, "correlation": correlation, "H": H, "N": N, "K": K}
    launch(
        pair_rows_kernel if M == K else pair_groups_kernel,
        (row_tiles, parts),
        {"lowest": lowest, "places": places, **state, "span": triton.cdiv(column_tiles, parts) * config.tiles["BU"]},
        {} if M == K else {"M": M},
        config,
    )
    block = min(1024, triton.next_power_of_2(K))
    launch(
        trade_kernel,
        (N,),
        {"gain": gain, "lowest": lowest, "places": places, **state},
        {"PARTS": parts, "GROUP": 0 if M == K else M, "GUARD": GUARD},
        configure("trade", gpu, f"K={K}", Config({"BLOCK": block}, num_warps=4, num_stages=1)),
    )
    return gain
