"""Choosing a linear's mask and kept weights: by a method, then by a refined mask, then by a closed-form refit."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from perp import allocate as allocation
from perp import distributed
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
    `masks`, which it fills: by qualified name of the linear, on the CPU. `skipped`: the names of those that stay dense,
    under masks that keep everything. `refined`: what refining did, by name. `unread`: linears that the calibration text
    never reached, pruned by magnitude.
    """

    def __init__(
        self,
        pruner: Pruner,
        refine: RefineSettings | None,
        refit: bool,
        masks: MutableMapping[str, Tensor],
        skipped: Collection[str] = (),
    ) -> None:
        self.pruner, self.refine, self.refit = pruner, refine, refit
        self.needs: Kind | None = "gram" if refine or refit else pruner.NEEDS
        self.held_out: Collection[int] = ()
        self.masks, self.skipped = masks, skipped
        self.refined: dict[str, Refinement] = {}
        self.unread: list[str] = []

    def pruned(self, linears: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the linears that are not skipped."""
        return {name: linear for name, linear in linears.items() if name not in self.skipped}

    def prune(self, unit: Unit, statistics: Mapping[str, Statistics], pattern: Pattern) -> None:
        """Prune the unit's linears; of the projection of several experts, each expert's matrix by itself.

        The matrices are spread over the ranks. A pruned weight is new memory: the old one may be mapped from a file,
        and would stay in memory for a copy.
        """
        linears, masks = self.pruned(unit.linears), {}
        costs = {label: _cost(own) for name, linear in linears.items() for label, own in _parts(name, linear.weight)}
        owners = distributed.spread(costs)
        with distributed.together():
            for name, linear in linears.items():
                read, weight = statistics.get(name), linear.weight
                if weight.ndim == 2:
                    weight.data, masks[name] = self._prune(name, weight, read, pattern, owners)
                else:
                    new, own = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device), []
                    for e, (label, dense) in enumerate(_parts(name, weight)):
                        new[e], mask = self._prune(label, dense, read and read.of_expert(e), pattern, owners)
                        own.append(mask)
                    weight.data, masks[name] = new, torch.stack(own)
        for name, linear in linears.items():
            for (label, weight), (_, mask) in zip(
                _parts(name, linear.weight.data), _parts(name, masks[name]), strict=True
            ):
                distributed.send_out_(weight, owners[label])
                distributed.send_out_(mask, owners[label], through=weight.device)
        for name, linear in unit.linears.items():
            self.masks[name] = masks[name] if name in masks else torch.ones(linear.weight.shape, dtype=torch.bool)
        self.refined |= distributed.merged({label: self.refined[label] for label in owners if label in self.refined})

    def _prune(
        self, name: str, weight: Tensor, read: Statistics | None, pattern: Pattern, owners: Mapping[str, int]
    ) -> tuple[Tensor, Tensor]:
        """One matrix pruned, and its mask on the CPU; tensors to be filled where another rank prunes it."""
        if owners[name] != distributed.rank():
            return torch.empty_like(weight), torch.empty(weight.shape, dtype=torch.bool)
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
        if unread := [name for own in distributed.gather(self.unread) for name in own]:
            warnings.warn(
                f"{len(unread)} linears read no token of the calibration text and were pruned by magnitude, such "
                f"as {unread[0]}; use more windows.",
                stacklevel=stacklevel + 1,
            )
        if kept := [name for name, refined in self.refined.items() if refined.steps == 0]:
            warnings.warn(
                f"refinement found no better mask on the windows held out for {len(kept)} of {len(self.refined)} "
                f"linears, such as {kept[0]}; they keep the one of {method}.",
                stacklevel=stacklevel + 1,
            )


def _parts(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """The matrices of a linear [N, K], which is one, or of several experts' [E, N, K], with a name for each."""
    return [(name, tensor)] if tensor.ndim == 2 else [(f"{name}[{e}]", own) for e, own in enumerate(tensor)]


def _cost(weight: Tensor) -> float:
    """What choosing its mask takes, to a factor: the decomposition of its Gram, and a pass over that for each row."""
    N, K = weight.shape
    return K * K * (K + N)
