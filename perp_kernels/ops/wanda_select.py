"""wanda_select: the mask of Wanda, from the weight and the norms of its inputs, without the scores in memory.

    wanda_select(weight [N, K], norms [K], pattern) -> bool [N, K], True = kept

Wanda (arXiv 2306.11695, section 3): the score of w_ij is |w_ij| norms_j. It is formed in float32, float64 for a weight
in float64, and norms are of that dtype. The mask is the one that `select` gives for these scores, ties and errors
alike: a score that is NaN, be it only the product of infinity and 0, is a ValueError. [E, N, K] with norms [E, K] is E
matrices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perp_kernels.arrays import as_tensor
from perp_kernels.layouts import DTYPES
from perp_kernels.ops import select
from perp_kernels.ops._library import define
from perp_kernels.ops._rows import accumulation_dtype
from perp_kernels.pattern import Pattern


def _reference(weight: Tensor, norms: Tensor, pattern: str) -> Tensor:
    return select.reference(weight.to(norms.dtype).abs() * norms, pattern)


def _fake(weight: Tensor, norms: Tensor, pattern: str) -> Tensor:
    return weight.new_empty(weight.shape, dtype=torch.bool)


_wanda_select_op = define("wanda_select(Tensor weight, Tensor norms, str pattern) -> Tensor", _reference, _fake)


def wanda_select(weight: Any, norms: Any, pattern: str | Pattern) -> Tensor:
    """The mask of `weight` under `pattern`: see the contract above."""
    weight, norms, pattern = as_tensor(weight).detach(), as_tensor(norms).detach(), Pattern.parse(pattern)
    if weight.dtype not in DTYPES or norms.dtype != accumulation_dtype(weight.dtype):
        raise TypeError(f"Norms are float32, or float64 for a weight in float64, not {norms.dtype} for {weight.dtype}.")
    K = weight.shape[-1] if weight.dim() else 0
    if weight.dim() not in (2, 3) or norms.shape != (*weight.shape[:-2], K):
        raise ValueError(
            f"A weight [N, K] or [E, N, K] has norms [K] or [E, K], not {list(weight.shape)} with {list(norms.shape)}."
        )
    pattern.check(K)
    weight, norms = weight.contiguous(), norms.contiguous()
    if weight.dim() == 2:
        return _wanda_select_op(weight, norms, str(pattern))
    masks = [_wanda_select_op(*expert, str(pattern)) for expert in zip(weight, norms, strict=True)]
    return torch.stack(masks) if masks else torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
