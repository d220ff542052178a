"""select: the mask that prunes the lowest scores under a pattern.

    select(scores [N, K], pattern) -> bool [N, K], True = kept

A share prunes exactly floor(share * n) of the n scores of each scope: an output row (the default), the matrix, or a
slab of 128 columns over all rows (the last slab may be narrower). N:M keeps N of each M consecutive columns of a row.
Of equal scores the one that a stable ascending sort puts first is pruned first: the lower column, after the lower row
where the scope has several. Scores may be infinite; a NaN is a ValueError. [E, N, K] is E matrices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perp_kernels.arrays import as_tensor
from perp_kernels.ops._library import define
from perp_kernels.pattern import Pattern

SLAB = 128
NAN = "Scores hold NaN, which has no rank: check the weights and the calibration statistics."

# Scores ranked at once: bounds the temporaries, some ten bytes a score.
_AT_ONCE = 1 << 20


def _order_statistic(rows: Tensor, rank: int) -> Tensor:
    """[R, 1]: the rank-th lowest of each of the rows [R, L]."""
    if rows.is_cuda:
        # A GPU finds each row's order statistic with one processor; all of them share in a sort.
        return rows.sort(dim=1).values[:, rank - 1 : rank]
    # With a count of the ties it takes a third to an eighth of the time of a stable sort.
    return rows.kthvalue(rank, dim=1, keepdim=True).values


def keep_highest(scores: Tensor, pruned: int) -> Tensor:
    """The mask [R, L] of scores [R, L] that prunes the `pruned` lowest of each row, the first of equal ones first."""
    if pruned == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    kept = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    rows = max(1, _AT_ONCE // scores.shape[1])
    for part, out in zip(scores.split(rows), kept.split(rows), strict=True):
        threshold = _order_statistic(part, pruned)
        tied = part == threshold
        tied_pruned = pruned - (part < threshold).sum(1, keepdim=True)
        torch.logical_or(part > threshold, tied & (tied.cumsum(1, dtype=torch.int32) > tied_pruned), out=out)
    return kept


def _matrix(scores: Tensor, pattern: Pattern) -> Tensor:
    N, K = scores.shape
    if pattern.m is not None and pattern.n is not None:
        return keep_highest(scores.reshape(-1, pattern.m), pattern.m - pattern.n).view(N, K)
    if pattern.scope == "matrix":
        return keep_highest(scores.reshape(1, -1), pattern.pruned(N * K)).view(N, K)
    if pattern.scope == "slab":
        slabs = scores.split(SLAB, dim=1)
        return torch.cat([_matrix(slab, Pattern(None, None, pattern.sparsity, "matrix")) for slab in slabs], dim=1)
    return keep_highest(scores, pattern.pruned(K))


def reference(scores: Tensor, pattern: str) -> Tensor:
    if bool(scores.isnan().any()):
        raise ValueError(NAN)
    parsed = Pattern.parse(pattern)
    if scores.numel() == 0:
        return torch.empty_like(scores, dtype=torch.bool)
    if scores.dim() == 3:
        return torch.stack([_matrix(matrix, parsed) for matrix in scores])
    return _matrix(scores, parsed)


def _fake(scores: Tensor, pattern: str) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.bool)


_select = define("select(Tensor scores, str pattern) -> Tensor", reference, _fake)


def select(scores: Any, pattern: str | Pattern) -> Tensor:
    """The mask of `scores` under `pattern`: see the contract above."""
    scores, pattern = as_tensor(scores), Pattern.parse(pattern)
    if scores.dim() not in (2, 3) or not scores.is_floating_point():
        raise ValueError(f"Scores are floating point [N, K] or [E, N, K], not {scores.dtype} {list(scores.shape)}.")
    pattern.check(scores.shape[-1], "scores")
    return _select(scores.detach().contiguous(), str(pattern))
