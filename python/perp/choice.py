"""Choosing a linear's mask and kept weights: by a method, then by a refined mask, then by a closed-form refit."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, MutableMapping

import torch
from torch import Tensor

from perp import allocate as allocation
from perp.errors import UserError
from perp.pruners import Pruner, magnitude
from perp.refine import RefineSettings
from perp.refine import refine as improve
from perp.refine.watch import Refinement
from perp.statistics import Kind, Statistics
from perp.units import Unit
from perp_kernels import Pattern, PatternError, masked_refit

# Of the closed-form refit, SparseGPT's.
DAMP = 0.01


def check(method: str, pattern: Pattern, refine: RefineSettings | None, refit: bool, allocate: str) -> None:
    """Refuse what contradicts itself: UserError or PatternError."""
    allocation.check(allocate, pattern)
    if refine and pattern.scope == "slab":
        raise PatternError(
            f'masks of slabs cannot be refined: write "{str(pattern).removesuffix("/slab")}/row", or refine nothing.'
        )
    if refine and method == "sparsegpt" and not refit:
        raise UserError(
            "another mask undoes what sparsegpt compensated for; refit the kept weights too, or begin from wanda."
        )


class Choice:
    """What prunes the linears of one model, and what it has given so far.

    `needs`: the statistics that it reads. `held_out`: the calibration windows that refinement keeps to watch itself by.
    `masks`, which it fills: by qualified name of the linear, on the CPU. `refined`: what refining did, by name.
    `unread`: linears that the calibration text never reached, pruned by magnitude.
    """

    def __init__(
        self, pruner: Pruner, refine: RefineSettings | None, refit: bool, masks: MutableMapping[str, Tensor]
    ) -> None:
        self.pruner, self.refine, self.refit = pruner, refine, refit
        self.needs: Kind | None = "gram" if refine or refit else pruner.NEEDS
        self.held_out: Collection[int] = ()
        self.masks = masks
        self.refined: dict[str, Refinement] = {}
        self.unread: list[str] = []

    def prune(self, unit: Unit, statistics: Mapping[str, Statistics], pattern: Pattern) -> None:
        """Prune the unit's linears; of the projection of several experts, each expert's matrix by itself.

        A pruned weight is new memory: the old one may be mapped from a file, and would stay in memory for a copy.
        """
        for name, linear in unit.linears.items():
            read, weight = statistics.get(name), linear.weight
            if weight.ndim == 2:
                weight.data, mask = self._prune(name, weight, read, pattern)
            else:
                new, masks = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device), []
                for e, dense in enumerate(weight):
                    new[e], own = self._prune(f"{name}[{e}]", dense, read and read.of_expert(e), pattern)
                    masks.append(own)
                weight.data, mask = new, torch.stack(masks)
            self.masks[name] = mask

    def _prune(self, name: str, weight: Tensor, read: Statistics | None, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """One matrix pruned, and its mask on the CPU."""
        if self.needs and not (read and read.tokens):
            self.unread.append(name)
            new, mask = magnitude.prune(weight, None, pattern)
        else:
            new, mask = self._choose(name, weight, read, pattern)
        return new, mask.cpu()

    def _choose(self, name: str, dense: Tensor, read: Statistics | None, pattern: Pattern) -> tuple[Tensor, Tensor]:
        pooled = read.pooled() if read else None
        weight, mask = self.pruner.prune(dense, pooled, pattern)
        if self.refine and read:
            held_out = read.held_out.sums if read.held_out and read.held_out.tokens else None
            found = improve(dense, mask, read.sums, pattern, self.refine, held_out)
            mask, self.refined[name] = found.mask, found.figures
            weight = dense.masked_fill(~mask, 0)
        if self.refit and pooled:
            weight = masked_refit(dense, mask, pooled.sums, damp=DAMP)
        return weight, mask

    def report(self, method: str, stacklevel: int = 2) -> None:
        """Warn of linears without statistics, and of masks that refinement left as they were."""
        if self.unread:
            warnings.warn(
                f"{len(self.unread)} linears read no token of the calibration text and were pruned by magnitude, such "
                f"as {self.unread[0]}; use more windows.",
                stacklevel=stacklevel + 1,
            )
        if kept := [name for name, refined in self.refined.items() if refined.steps == 0]:
            warnings.warn(
                f"refinement found no better mask on the windows held out for {len(kept)} of {len(self.refined)} "
                f"linears, such as {kept[0]}; they keep the one of {method}.",
                stacklevel=stacklevel + 1,
            )
