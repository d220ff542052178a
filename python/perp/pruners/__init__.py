"""The pruning methods, one module each."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from perp.errors import UserError
from perp.pruners import magnitude, sparsegpt, wanda
from perp.statistics import Kind, Statistics
from perp_kernels import Pattern
from perp_kernels.pattern import Scope


class Pruner(Protocol):
    """A pruning method.

    `NEEDS`: the statistics it reads, None where it reads none. `SCOPE`: the scope of a bare share of zeros.
    """

    NEEDS: Kind | None
    SCOPE: Scope

    def prune(self, weight: Tensor, statistics: Statistics | None, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """(the pruned weight [N, K] in the dtype of `weight`, its mask: bool [N, K], True = kept)."""


METHODS: dict[str, Pruner] = {"magnitude": magnitude, "wanda": wanda, "sparsegpt": sparsegpt}


def get(name: str) -> Pruner:
    """The method of that name; UserError for an unknown one."""
    if name not in METHODS:
        raise UserError(f"{name!r} is not a pruning method; choose one of {', '.join(METHODS)}.")
    return METHODS[name]
