"""wanda_select by the native kernels: a row's scores are formed where they are ranked."""

from __future__ import annotations

import torch
from torch import Tensor

from perp_kernels.cpu import native
from perp_kernels.cpu.select import select
from perp_kernels.ops.select import NAN
from perp_kernels.pattern import Pattern


def wanda_select(weight: Tensor, norms: Tensor, pattern: str) -> Tensor:
    """The mask of a contiguous weight [N, K], the contract of perp_kernels.ops.wanda_select: the same bits."""
    parsed, K = Pattern.parse(pattern), weight.shape[1]
    group = parsed.m or K
    pruned = parsed.pruned(group)
    if parsed.scope in ("matrix", "slab") or pruned == 0:
        return select(weight.float().abs() * norms, pattern)
    kept = torch.empty(weight.shape, dtype=torch.bool)
    out = native.view("kept", kept.view(torch.uint8))
    if not native.extension().wanda_select(
        native.view("weight", weight), native.view("norms", norms), group, pruned, out
    ):
        raise ValueError(NAN)
    return kept


def _supports(weight: Tensor, norms: Tensor, pattern: str) -> bool:
    return weight.device.type == norms.device.type == "cpu" and norms.dtype == torch.float32


native.register("wanda_select", wanda_select, _supports)
