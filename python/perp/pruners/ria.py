"""RIA (Zhang et al., ICLR 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language
Models")."""

from __future__ import annotations

import torch
from torch import Tensor

from perp.statistics import Kind, Statistics
from perp_kernels import Pattern, select
from perp_kernels.pattern import Scope

NEEDS: Kind | None = "norms"
SCOPES: tuple[Scope, ...] = ("row", "matrix", "slab")

# The paper's power of the input norms.
POWER = 0.5


def scores(weight: Tensor, norms: Tensor) -> Tensor:
    """(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) norms_j^0.5 in fp32 at least; 0 in a column or row of zeros."""
    size = weight.to(torch.promote_types(weight.dtype, torch.float32)).abs()
    columns, rows = (size.sum(dim, keepdim=True) for dim in (0, 1))
    relative = sum(torch.where(total > 0, size / total, 0.0) for total in (columns, rows))
    return relative * norms.to(size.dtype).pow(POWER)


def prune(weight: Tensor, statistics: Statistics | None, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Prunes the lowest scores of each row, as the works that build on RIA do; its own code's default is the matrix.

    Statistics of either kind serve. Returns (the pruned weight, its mask).
    """
    if statistics is None:
        raise ValueError("ria needs the statistics of what the layer reads.")
    mask = select(scores(weight, statistics.square_sums.sqrt()), pattern.with_scope(SCOPES[0]))
    return weight.masked_fill(~mask, 0), mask
