"""select by Triton, for N:M and for a share of each row: the scores are read once, and looked at for NaN on the way.

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
def _look_for_nan(found_nan, scores):
    """Write 1 to `found_nan` where there is a NaN: the same from every program, whoever comes last."""
    count = tl.sum(tl.ravel(scores != scores).to(tl.int32), axis=0)
    tl.store(found_nan, 1, mask=count > 0)


@triton.jit
def select_groups_kernel(
    kept, found_nan, scores, groups, M: tl.constexpr, PRUNED: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr
):
    """kept int8 and scores [groups, M]: the PRUNED lowest of each group go, of equal ones the first."""
    group, column = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS), tl.arange(0, WIDTH)
    at, inside = group[:, None] * M + column[None, :], (group < groups)[:, None] & (column < M)[None, :]
    own = tl.load(scores + at, mask=inside, other=0.0).to(tl.float32)
    _look_for_nan(found_nan, own)
    lower = tl.zeros((GROUPS, WIDTH), dtype=tl.int32)
    for i in tl.static_range(0, M):
        other = tl.load(scores + group * M + i, mask=group < groups, other=0.0).to(tl.float32)[:, None]
        lower += ((other < own) | ((other == own) & (i < column)[None, :])).to(tl.int32)
    tl.store(kept + at, (lower >= PRUNED).to(tl.int8), mask=inside)


@triton.jit
def _keys(score):
    """uint32 that rise as the scores do."""
    score = tl.where(score == 0.0, 0.0, score)  # -0 ranks with 0
    bits = score.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def select_row_kernel(kept, found_nan, scores, K, pruned, BLOCK: tl.constexpr, PART: tl.constexpr):
    """kept int8 and scores [rows, K]: the `pruned` lowest of each row go, of equal ones the first."""
    row = tl.program_id(0).to(tl.int64)
    inside = tl.arange(0, BLOCK) < K
    loaded = tl.load(scores + row * K + tl.arange(0, BLOCK), mask=inside, other=0.0).to(tl.float32)
    _look_for_nan(found_nan, loaded)
    keys = _keys(loaded)
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
        keys_part = _keys(tl.load(scores + row * K + column, mask=inside_part, other=0.0).to(tl.float32))
        tied = (inside_part & (keys_part == threshold)).to(tl.int32)
        keep = (keys_part > threshold) | ((tied != 0) & (tl.cumsum(tied, axis=0) > tied_pruned))
        tl.store(kept + row * K + column, keep.to(tl.int8), mask=inside_part)
        tied_pruned -= tl.sum(tied, axis=0)


def select(scores: Tensor, pattern: str) -> Tensor:
    """bool of the shape of `scores`, True = kept: the contract of perp_kernels.ops.select."""
    kept, found_nan = choose(scores, Pattern.parse(pattern))
    if bool(found_nan):
        raise ValueError(NAN)
    return kept


def choose(scores: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """What `select` gives, and int32 [1], not 0 where the scores hold NaN: known without waiting for the GPU."""
    K, gpu = scores.shape[-1], target(scores)
    kept = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    found_nan = torch.zeros(1, dtype=torch.int32, device=scores.device)
    arguments = {"kept": kept.view(torch.int8), "found_nan": found_nan, "scores": scores}
    if pattern.m is not None and pattern.n is not None:
        groups = scores.numel() // pattern.m
        config = configure("select_groups", gpu, f"M={pattern.m}", Config({"GROUPS": 256}, num_warps=4, num_stages=1))
        launch(
            select_groups_kernel,
            (triton.cdiv(groups, config.tiles["GROUPS"]),),
            {**arguments, "groups": groups},
            {"M": pattern.m, "PRUNED": pattern.m - pattern.n, "WIDTH": triton.next_power_of_2(pattern.m)},
            config,
        )
        return kept, found_nan
    block = triton.next_power_of_2(K)
    # 32 scores to a thread, so that keys and scores stay in registers.
    default = Config({"PART": min(block, 4096)}, num_warps=max(1, min(32, block // 1024)), num_stages=1)
    launch(
        select_row_kernel,
        (scores.numel() // K if K else 0,),
        {**arguments, "K": K, "pruned": pattern.pruned(K)},
        {"BLOCK": block},
        configure("select_row", gpu, f"K={block}", default),
    )
    return kept, found_nan
