"""SparseSwaps (arXiv 2512.10922): each row trades its best pair of a kept and a pruned weight, round after round."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from perp.refine.watch import Refined, Watch
from perp_kernels import Pattern, swap_round_

if TYPE_CHECKING:
    from perp.refine import RefineSettings

# The paper's main tables.
ROUNDS = 100

# A look costs a product of the weight with the Gram, about a round's time.
_LOOK_EVERY, _PATIENCE = 5, 2


@torch.no_grad()
def refine(
    weight: Tensor,
    mask: Tensor,
    gram: Tensor,
    pattern: Pattern,
    settings: RefineSettings,
    held_out: Tensor | None = None,
) -> Refined:
    """Section 3: the joint argmin over all pairs of a row, within a group under N:M, until no pair lowers the row's
    error.

    Of the rows only those that traded in the last round are gone through again, gathered whenever they have halved.
    """
    w = weight.to(gram.dtype)
    found = mask.clone(memory_format=torch.contiguous_format)
    watch = Watch(w, mask, gram if held_out is None else held_out, _PATIENCE)
    rows, part = torch.arange(len(w), device=w.device), found.clone()
    correlation = w.masked_fill(mask, 0) @ gram
    last = settings.steps or ROUNDS
    for step in range(1, last + 1):
        moved = swap_round_(w, part, correlation, gram, pattern) > 0
        moving = int(moved.sum())
        if step % _LOOK_EVERY == 0 or step == last or moving == 0:
            found[rows] = part
            watch.look(found, step)
        if moving == 0 or watch.over:
            return watch.best
        if 2 * moving <= len(rows):
            found[rows] = part
            rows, w, part, correlation = rows[moved], w[moved], part[moved], correlation[moved]
    return watch.best
