"""select by the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from perp_kernels.cpu import native
from perp_kernels.ops.select import NAN, SLAB
from perp_kernels.pattern import Pattern

ELEMENTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def select(scores: Tensor, pattern: str) -> Tensor:
    """The mask of contiguous scores [N, K] or [E, N, K], the contract of perp_kernels.ops.select: the same bits."""
    parsed = Pattern.parse(pattern)
    extension, K = native.extension(), scores.shape[-1]
    kept = torch.empty(scores.shape, dtype=torch.bool)
    if kept.numel() == 0:
        return kept
    from_rows, to_rows = scores.view(-1, K), kept.view(torch.uint8).view(-1, K)
    rows, mask = native.view("scores", from_rows), native.view("kept", to_rows)
    if parsed.m is not None and parsed.n is not None:
        good = extension.select_groups(rows, parsed.m, parsed.m - parsed.n, mask)
    elif parsed.scope in ("matrix", "slab"):
        N, width = scores.shape[-2], SLAB if parsed.scope == "slab" else K
        good = all(
            extension.select_jointly(native.view("scores", part), parsed.pruned(part.numel()), native.view("kept", out))
            for matrix, matrix_kept in zip(from_rows.split(N), to_rows.split(N), strict=True)
            for part, out in zip(matrix.split(width, dim=1), matrix_kept.split(width, dim=1), strict=True)
        )
    else:
        good = extension.select_rows(rows, parsed.pruned(K), mask)
    if not good:
        raise ValueError(NAN)
    return kept


def _supports(scores: Tensor, pattern: str) -> bool:
    return scores.device.type == "cpu" and scores.dtype in ELEMENTS


native.register("select", select, _supports)
