"""The pruning methods, one module each."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from perp.errors import UserError
from perp.pruners import magnitude, ria, sparsegpt, wanda
from perp.statistics import Kind, Statistics
from perp_kernels import Pattern, PatternError
from perp_kernels.pattern import Scope


class Pruner(Protocol):
    """A pruning method.

    `NEEDS`: the statistics it reads, None where it reads none. `SCOPES`: those within which it can prune a share of
    zeros, the first for a share that names none.
    """

    NEEDS: Kind | None
    SCOPES: tuple[Scope, ...]

    def prune(self, weight: Tensor, statistics: Statistics | None, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """(the pruned weight [N, K] in the dtype of `weight`, its mask: bool [N, K], True = kept)."""


METHODS: dict[str, Pruner] = {"magnitude": magnitude, "wanda": wanda, "ria": ria, "sparsegpt": sparsegpt}


def get(name: str) -> Pruner:
    """The method of that name; UserError for an unknown one."""
    if name not in METHODS:
        raise UserError(f"{name!r} is not a pruning method; choose one of {', '.join(METHODS)}.")
    return METHODS[name]


def resolve(name: str, pattern: str | Pattern) -> tuple[Pruner, Pattern]:
    """The method of that name and the pattern with its scope; UserError or PatternError for what does not exist."""
    pruner, pattern = get(name), Pattern.parse(pattern)
    scoped = pattern.with_scope(pruner.SCOPES[0])
    if scoped.scope is not None and scoped.scope not in pruner.SCOPES:
        known = " or ".join(str(Pattern(None, None, pattern.sparsity, scope)) for scope in pruner.SCOPES)
        raise PatternError(f'{name} cannot prune "{pattern}"; write {known}.')
    return pruner, scoped
