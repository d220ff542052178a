"""unpack by Triton: the contract of perp_kernels.ops.unpack."""

from __future__ import annotations

from torch import Tensor

from perp_kernels.triton.decode import contiguous
from perp_kernels.triton.effective import effective_weight


def unpack(values: Tensor, index: Tensor, row_ptr: Tensor | None, K: int, layout: str) -> Tensor:
    """The dense weight [R, K], +0 where pruned."""
    if layout == "dense":
        return values.detach().clone()
    return effective_weight(contiguous(values, index, row_ptr, layout, K))
