"""gram_: add the Gram matrix of some tokens to a running sum.

    gram_(H [K, K], x [..., K]) -> H,  H += X^T X in place
    gram_(H [E, K, K], x [T, K], offsets [E]) -> H, one matrix per expert, tokens sorted by expert

H is float32, or float64 for x in float64; x is float32, float64, bfloat16 or float16, widened before it is multiplied,
so that the sum is formed in the dtype of H. Being a sum, H can be added over batches and ranks. Not differentiable.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from perp_kernels.arrays import as_optional_tensor, as_tensor
from perp_kernels.layouts import DTYPES
from perp_kernels.ops._library import define
from perp_kernels.ops._rows import accumulation_dtype, expert_spans

# Widened copies of 16-bit tokens are made for this many at a time.
_TOKENS = 1024


def _reference(H: Tensor, x: Tensor, offsets: Tensor | None) -> None:
    K = x.shape[-1]
    tokens, grams = x.reshape(-1, K), H.view(-1, K, K)
    for expert, begin, end in expert_spans(list(H.shape[:-2]), len(tokens), offsets):
        for part in tokens[begin:end].split(_TOKENS):
            wide = part.to(H.dtype)
            grams[expert].addmm_(wide.t(), wide)


def _fake(H: Tensor, x: Tensor, offsets: Tensor | None) -> None:
    return None


_gram_op = define("gram_(Tensor(a!) H, Tensor x, Tensor? offsets) -> ()", _reference, _fake)


def gram_(H: Any, x: Any, offsets: Any = None) -> Tensor:
    """H += X^T X in place: see the contract above. Returns H as a tensor."""
    H, x, offsets = as_tensor(H), as_tensor(x).detach(), as_optional_tensor(offsets)
    K = x.shape[-1]
    if x.dtype not in DTYPES or H.dtype != accumulation_dtype(x.dtype):
        raise TypeError(f"H is float32, or float64 for x in float64, not {H.dtype} for x in {x.dtype}.")
    if H.shape[-2:] != (K, K) or H.dim() not in (2, 3) or not H.is_contiguous():
        raise ValueError(f"H of x {list(x.shape)} is contiguous [{K}, {K}] or [E, {K}, {K}], not {list(H.shape)}.")
    if (H.dim() == 3) != (offsets is not None):
        raise ValueError("Offsets divide the tokens among the experts of H [E, K, K], and only those.")
    _gram_op(H, x, offsets)
    return H
