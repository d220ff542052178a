"""select and wanda_select by Triton, for N:M and for a share of each row: the scores are read once, or are formed where
they are ranked, from the weight and the norms.

A row is searched for the highest score that it prunes, bit by bit from the top: the scores' bits, turned so that they
rise as the scores do, are counted against a growing prefix. No sort, and 32 counts over registers for a row of any
length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from perp_kernels.ops.select import NAN
from perp_kernels.pattern import Pattern
from perp_kernels.triton.launch import Config, configure, launch, target


@triton.jit
def _scores(scores, norms, at, column, inside, WEIGHTED: tl.constexpr):
    """float32 scores at `at`: those given, or |weight| norm where WEIGHTED; `column` is theirs in the row."""
    score = tl.load(scores + at, mask=inside, other=0.0).to(tl.float32)
    if WEIGHTED:
        score = tl.abs(score) * tl.load(norms + column, mask=inside, other=0.0)
    return score


@triton.jit
def _report_nan(nan, score):
    """Set nan[0] where a score is NaN: whichever program does so, it stores the same."""
    some = tl.max((score != score).to(tl.int32), axis=None)
    tl.store(nan, 1, mask=some != 0)


@triton.jit
def select_groups_kernel(
    kept, nan, scores, norms, groups, K,
    M: tl.constexpr, PRUNED: tl.constexpr, WIDTH: tl.constexpr, WEIGHTED: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """kept int8 and scores [groups, M]: the PRUNED lowest of each group go, of equal ones the first."""
    group, column = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS), tl.arange(0, WIDTH)
    at, there = group[:, None] * M + column[None, :], group < groups
    inside = there[:, None] & (column < M)[None, :]
    own = _scores(scores, norms, at, at % K, inside, WEIGHTED)
    _report_nan(nan, own)
    lower = tl.zeros((GROUPS, WIDTH), dtype=tl.int32)
    for i in tl.static_range(0, M):
        other = _scores(scores, norms, group * M + i, (group * M + i) % K, there, WEIGHTED)[:, None]
        lower += ((other < own) | ((other == own) & (i < column)[None, :])).to(tl.int32)
    tl.store(kept + at, (lower >= PRUNED).to(tl.int8), mask=inside)


@triton.jit
def _keys(score):
    """uint32 that rise as the scores do."""
    score = tl.where(score == 0.0, 0.0, score)  # -0 ranks with 0
    bits = score.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def select_row_kernel(
    kept, nan, scores, norms, K, pruned, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr, PART: tl.constexpr
):
    """kept int8 and scores [rows, K]: the `pruned` lowest of each row go, of equal ones the first."""
    row, whole = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = whole < K
    score = _scores(scores, norms, row * K + whole, whole, inside, WEIGHTED)
    _report_nan(nan, score)
    keys = _keys(score)
    # The pruned-th lowest key is the highest value that fewer than `pruned` keys lie below.
    threshold = tl.sum(tl.zeros((BLOCK,), dtype=tl.uint32), axis=0)
    bit = tl.full((), 0x80000000, dtype=tl.uint32)
    for _ in range(0, 32):
        candidate = threshold | bit
        bit = bit >> 1
        below = tl.sum((inside & (keys < candidate)).to(tl.int32), axis=0)
        threshold = tl.where(below < pruned, candidate, threshold)
    tied_pruned = pruned - tl.sum((inside & (keys < threshold)).to(tl.int32), axis=0)
    # The second pass reads the row from cache, a part at a time: ranking ties over the whole row in registers spills.
    for start in range(0, K, PART):
        column = start + tl.arange(0, PART)
        inside_part = column < K
        keys_part = _keys(_scores(scores, norms, row * K + column, column, inside_part, WEIGHTED))
        tied = (inside_part & (keys_part == threshold)).to(tl.int32)
        keep = (keys_part > threshold) | ((tied != 0) & (tl.cumsum(tied, axis=0) > tied_pruned))
        tl.store(kept + row * K + column, keep.to(tl.int8), mask=inside_part)
        tied_pruned -= tl.sum(tied, axis=0)


def select(scores: Tensor, pattern: str) -> Tensor:
    """bool of the shape of `scores`, True = kept: the contract of perp_kernels.ops.select."""
    return _checked(*choose(scores, Pattern.parse(pattern)))


def wanda_select(weight: Tensor, norms: Tensor, pattern: str) -> Tensor:
    """bool of the shape of `weight`, True = kept: the contract of perp_kernels.ops.wanda_select."""
    return _checked(*choose(weight, Pattern.parse(pattern), norms))


def _checked(kept: Tensor, nan: Tensor) -> Tensor:
    if bool(nan):
        raise ValueError(NAN)
    return kept


def choose(scores: Tensor, pattern: Pattern, norms: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(the mask, int32 [1] that is not 0 where a score is NaN) of the scores, or of |scores| norms."""
    K, gpu, weighted = scores.shape[-1], target(scores), norms is not None
    kept = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    nan = torch.zeros(1, dtype=torch.int32, device=scores.device)
    arguments = {"kept": kept.view(torch.int8), "nan": nan, "scores": scores, "norms": norms if weighted else scores}
    if pattern.m is not None and pattern.n is not None:
        groups = scores.numel() // pattern.m
        config = configure("select_groups", gpu, f"M={pattern.m}", Config({"GROUPS": 256}, num_warps=4, num_stages=1))
        width = triton.next_power_of_2(pattern.m)
        launch(
            select_groups_kernel,
            (triton.cdiv(groups, config.tiles["GROUPS"]),),
            {**arguments, "groups": groups, "K": K},
            {"M": pattern.m, "PRUNED": pattern.m - pattern.n, "WIDTH": width, "WEIGHTED": weighted},
            config,
        )
        return kept, nan
    block = triton.next_power_of_2(K)
    # 32 scores to a thread, so that keys and scores stay in registers.
    default = Config({"PART": min(block, 4096)}, num_warps=max(1, min(32, block // 1024)), num_stages=1)
    launch(
        select_row_kernel,
        (scores.numel() // K if K else 0,),
        {**arguments, "K": K, "pruned": pattern.pruned(K)},
        {"BLOCK": block, "WEIGHTED": weighted},
        configure("select_row", gpu, f"K={block}", default),
    )
    return kept, nan
