"""The local error of a mask, and the best mask seen so far by the error on windows that are held out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def local_error(weight: Tensor, mask: Tensor, gram: Tensor) -> float:
    """tr(R G R^T) of the pruned weights R, the squared change of the linear's output over the Gram's tokens."""
    residual = weight.to(gram.dtype).masked_fill(mask, 0)
    return max(float(((residual @ gram) * residual).sum(dtype=torch.float64)), 0.0)


@dataclass(frozen=True)
class Refinement:
    """`before`, `after`: the local error of the warm start and of the refined mask, on the held-out windows where there
    are any; `steps`: those that led to that mask, 0 where nothing beat the warm start."""

    before: float
    after: float
    steps: int


@dataclass(frozen=True)
class Refined:
    """A refined mask, or the warm start where nothing beat it, with the figures of `Refinement`."""

    mask: Tensor
    before: float
    after: float
    steps: int

    @property
    def figures(self) -> Refinement:
        return Refinement(self.before, self.after, self.steps)


class Watch:
    """Looks at masks as they come. After `patience` looks without a better one, `over` is True."""

    def __init__(self, weight: Tensor, start: Tensor, gram: Tensor, patience: int) -> None:
        self._weight, self._gram, self._left = weight, gram, patience
        self._patience = patience
        before = local_error(weight, start, gram)
        self.best = Refined(start.clone(), before, before, 0)

    @property
    def over(self) -> bool:
        return self._left <= 0

    def look(self, mask: Tensor, steps: int) -> None:
        error = local_error(self._weight, mask, self._gram)
        if error < self.best.after:
            self.best, self._left = Refined(mask.clone(), self.best.before, error, steps), self._patience
        else:
            self._left -= 1
