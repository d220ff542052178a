"""Wanda (arXiv 2306.11695): the score of a weight is its absolute value times the norm of the input it multiplies."""

from __future__ import annotations

import torch
from torch import Tensor

from perp.statistics import Kind, Statistics
from perp_kernels import Pattern, wanda_select
from perp_kernels.pattern import Scope

NEEDS: Kind | None = "norms"
SCOPES: tuple[Scope, ...] = ("row", "matrix", "slab")


def prune(weight: Tensor, statistics: Statistics | None, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Scores |W_ij| ||X_j||_2 in fp32; statistics of either kind serve. Returns (the pruned weight, its mask).

    The mean over samples that the reference takes before the root scales all scores of a matrix alike.
    """
    if statistics is None:
        raise ValueError("wanda needs the statistics of what the layer reads.")
    norms = statistics.square_sums.sqrt()
    mask = wanda_select(weight, norms.to(torch.promote_types(weight.dtype, norms.dtype)), pattern.with_scope(SCOPES[0]))
    return weight.masked_fill(~mask, 0), mask
