"""Mask refinement, one method per module: a better mask of the same pattern, found from a warm start and the Gram.

What is lowered is the local error of a linear, ||(W - M * W) X||^2 = tr(R G R^T) with R the pruned weights and G = X^T
X. It is lowered on some calibration windows and watched on others, which are held out: the mask that did best there is
the one returned, since a mask that follows its own windows too closely serves the model worse (at 50 % SparseSwaps'
own table has perplexity rise while the error falls).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from torch import Tensor

from perp.errors import UserError
from perp.refine import sparsefw, sparseswaps
from perp.refine.watch import Refined
from perp_kernels import Pattern

Step = Literal["exact", "2/(t+2)"]

# By perplexity on windows that are never reported, of a model of 135M parameters, in domain and out of it: 60 %: Wanda
# 101.7 and 134.1, 0.5 69.3 and 148.6, 0.9 74.4 and 128.9; 2:4: Wanda 133.4 and 187.8, 0.5 89.7 and 173.2, 0.9 112.1 and
# 157.9. So 0.5 follows its own text too closely under shares, while under N:M it gains in domain more than it loses.
ALPHA, ALPHA_NM = 0.9, 0.5


@dataclass(frozen=True)
class RefineSettings:
    """How masks are refined.

    `method`: "sparseswaps" or "sparsefw". `steps`: at most so many rounds of one swap a row, or iterations of
    Frank-Wolfe; None leaves the method's own. `held_out`: the share of the calibration windows that watch. `alpha`
    (SparseFW): the share of the kept weights, those of highest Wanda scores, that stay kept, None for what suits the
    pattern (`alpha_of`); `step`: its step size.
    """

    method: str = "sparseswaps"
    steps: int | None = None
    held_out: float = 0.25
    alpha: float | None = None
    step: Step = "exact"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"{self.method!r} is no way to refine a mask; choose {' or '.join(METHODS)}.")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"refinement in {self.steps} steps is none; it takes at least 1.")
        if not 0 < self.held_out < 1:
            raise UserError(f"{self.held_out} of the windows cannot be held out; give a share between 0 and 1.")
        if self.alpha is not None and self.method != "sparsefw":
            raise UserError(f"alpha is of sparsefw, and masks are refined by {self.method}; leave it out.")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise UserError(f"alpha is {self.alpha}; the share of weights that stay kept lies between 0 and 1.")
        if self.step not in get_args(Step):
            raise UserError(f"{self.step!r} is no step size; choose {' or '.join(get_args(Step))}.")

    def alpha_of(self, pattern: Pattern) -> float:
        if self.alpha is not None:
            return self.alpha
        return ALPHA_NM if pattern.is_nm else ALPHA

    def windows(self, count: int) -> Sequence[int]:
        """Which of `count` calibration windows are held out: the last. UserError where none would be left."""
        held = max(1, round(self.held_out * count))
        if held >= count:
            raise UserError(
                f"refinement holds {held} of {count} calibration windows out, which leaves none; use more windows."
            )
        return range(count - held, count)


class Refiner(Protocol):
    """A way to refine: `mask` [N, K] of `weight` [N, K] follows `pattern`, and so does what is returned.

    `gram`: the Gram [K, K] that scores; `held_out`: the one that watches, None to watch by `gram` itself.
    """

    def refine(
        self,
        weight: Tensor,
        mask: Tensor,
        gram: Tensor,
        pattern: Pattern,
        settings: RefineSettings,
        held_out: Tensor | None = None,
    ) -> Refined: ...


METHODS: dict[str, Refiner] = {"sparseswaps": sparseswaps, "sparsefw": sparsefw}


def refine(
    weight: Tensor,
    mask: Tensor,
    gram: Tensor,
    pattern: Pattern,
    settings: RefineSettings,
    held_out: Tensor | None = None,
) -> Refined:
    """`mask` refined by the method of the settings; UserError for a pattern of slabs, PatternError for N:M that K does
    not divide by, ValueError for a weight or Gram that is NaN or infinite."""
    if pattern.scope == "slab":
        raise UserError(f'masks of slabs cannot be refined; write "{str(pattern).removesuffix("/slab")}/row".')
    pattern.check(weight.shape[1])
    for name, tensor in (("weight", weight), ("Gram", gram), ("held-out Gram", held_out)):
        if tensor is not None and tensor.numel() and not all(extreme.isfinite() for extreme in tensor.aminmax()):
            raise ValueError(f"The {name} is NaN or infinite, so that masks cannot be compared.")
    return METHODS[settings.method].refine(weight, mask, gram, pattern, settings, held_out)
