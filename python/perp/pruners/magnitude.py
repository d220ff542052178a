"""Magnitude: the weights of smallest absolute value go, by default the smallest of the whole matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from perp.statistics import Kind, Statistics
from perp_kernels import Pattern, select
from perp_kernels.pattern import Scope

NEEDS: Kind | None = None
SCOPES: tuple[Scope, ...] = ("matrix", "row", "slab")


def prune(weight: Tensor, statistics: Statistics | None, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """`statistics` is not read. Returns (the pruned weight, its mask)."""
    scores = weight.to(torch.promote_types(weight.dtype, torch.float32)).abs()
    mask = select(scores, pattern.with_scope(SCOPES[0]))
    return weight.masked_fill(~mask, 0), mask
