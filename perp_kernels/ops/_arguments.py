"""Checks that the linear ops share, on properties that are known while tracing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from perp_kernels.layouts import SparseWeight


def check_linear(x: Tensor, w: SparseWeight, bias: Tensor | None, offsets: Tensor | None) -> None:
    """Raise ValueError or TypeError unless x, bias and offsets fit the weight."""
    N, K = w.shape[-2:]
    if x.dtype != w.dtype:
        raise TypeError(f"x is {x.dtype} but the weight's values are {w.dtype}: cast one of them.")
    if x.shape[-1] != K:
        raise ValueError(f"x is [..., {x.shape[-1]}] but the weight has {K} inputs.")
    if bias is not None and bias.shape != (*w.shape[:-2], N):
        raise ValueError(f"The bias of a weight {list(w.shape)} is {[*w.shape[:-2], N]}, not {list(bias.shape)}.")
    if len(w.shape) == 2:
        if offsets is not None:
            raise ValueError("A weight [N, K] takes no offsets: they divide the tokens among the experts of [E, N, K].")
    elif offsets is None or offsets.shape != w.shape[:1] or x.dim() != 2:
        raise ValueError(
            f"A weight [E, N, K] takes x [T, K] sorted by expert and offsets [{w.shape[0]}], the end of each expert's "
            f"tokens; x is {list(x.shape)}, offsets {None if offsets is None else list(offsets.shape)}."
        )


def check_adapter(w: SparseWeight, A: Tensor, B: Tensor) -> None:
    """Raise ValueError unless A and B are the factors of a low-rank matrix of the weight's shape."""
    *experts, N, K = w.shape
    r = A.shape[-2] if A.dim() >= 2 else 0
    if A.shape != (*experts, r, K) or B.shape != (*experts, N, r):
        raise ValueError(
            f"Adapters of a weight {list(w.shape)} are A {[*experts, 'r', K]} and B {[*experts, N, 'r']}, "
            f"not {list(A.shape)} and {list(B.shape)}."
        )


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a call on these tensors is recorded for a backward pass. Where it is not, the op is called without its
    autograd.Function, which would take as long as all else that surrounds a small product."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
