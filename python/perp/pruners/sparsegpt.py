"""SparseGPT (arXiv 2301.00774): column by column, the error of what is pruned is compensated in the weights to come."""

from __future__ import annotations

from torch import Tensor

import perp_kernels as pk
from perp.statistics import Kind, Statistics
from perp_kernels.pattern import Scope

NEEDS: Kind | None = "gram"
SCOPES: tuple[Scope, ...] = ("slab", "row")


def prune(weight: Tensor, statistics: Statistics | None, pattern: pk.Pattern) -> tuple[Tensor, Tensor]:
    """Algorithm 1 with the paper's damping of 1 % and blocks of 128. Returns (the updated weight, its mask)."""
    if statistics is None or statistics.sums.ndim != 2:
        raise ValueError("sparsegpt needs the Gram matrix of what the layer reads.")
    return pk.sparsegpt(weight, statistics.sums, pattern.with_scope(SCOPES[0]), damp=0.01, block_size=128)
