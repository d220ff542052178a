"""The adapter modes: what each starts from, computes beside a packed weight W with mask M, and merges into it.

| mode | effective weight | start | merge |
|---|---|---|---|
| mask_lora | W + s · M ⊙ (B A) | A uniform, B = 0 | exact |
| scale_lora | W ⊙ (B A) | A = B = 1/√r, so that B A = 1 | exact |
| spp | W + s · W ⊙ (B A) | A uniform, B = 0 | exact |
| lora_prune | W + s · B A | A uniform, B = 0 | W + s · M ⊙ (B A): what was trained beside pruned weights is lost |
| lora | W + s · B A | A uniform, B = 0 | never: it would fill the zeros |

From PERP (arXiv 2312.15230); spp as in A Free Lunch in LLM Compression (arXiv 2510.14444). A is [r, K], B [N, r] and
s = alpha / r; scale_lora has no s. With experts each has their number in front. Uniform is ±1/√K, PEFT's choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

import perp_kernels as pk

Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Mode:
    """One row of the table.

    `start(shape, r, generator)` gives A and B in fp32 on the CPU for a weight of that shape. `forward` and `merge_`
    take the packed weight, A, B and s; `merge_` None: the mode never merges. `exact`: a merge changes what the layer
    computes by rounding only.
    """

    start: Callable[[tuple[int, ...], int, torch.Generator], Factors]
    forward: Callable[[Tensor, pk.SparseWeight, Tensor, Tensor, float, Tensor | None, Tensor | None], Tensor]
    merge_: Callable[[pk.SparseWeight, Tensor, Tensor, float], object] | None
    exact: bool = True

    def effective(self, w: pk.SparseWeight, A: Tensor, B: Tensor, scale: float) -> Tensor:
        """The weight that `forward` multiplies by: a new dense tensor in the dtype of `w`, without gradient."""
        if not self.exact or self.merge_ is None:
            return (w.unpack().to(A.dtype) + scale * (B.detach() @ A.detach())).to(w.dtype)
        copy = pk.SparseWeight(w.values.detach().clone(), w.index, w.row_ptr, w.shape, w.layout)
        self.merge_(copy, A, B, scale)
        return copy.unpack()


def _from_zero(shape: tuple[int, ...], r: int, generator: torch.Generator) -> Factors:
    *experts, N, K = shape
    bound = 1 / math.sqrt(K)
    A = torch.empty(*experts, r, K).uniform_(-bound, bound, generator=generator)
    return A, torch.zeros(*experts, N, r)


def _from_ones(shape: tuple[int, ...], r: int, generator: torch.Generator) -> Factors:
    *experts, N, K = shape
    value = 1 / math.sqrt(r)
    return torch.full((*experts, r, K), value), torch.full((*experts, N, r), value)


def low_rank(x: Tensor, A: Tensor, B: Tensor, offsets: Tensor | None = None) -> Tensor:
    """x (B A)^T without ever forming B A; A and B are rounded to the dtype of x."""
    A, B = A.to(x.dtype), B.to(x.dtype)
    if offsets is None:
        return F.linear(F.linear(x, A), B)
    spans = pairwise([0, *offsets.tolist()])
    return torch.cat([F.linear(F.linear(x[i:j], a), b) for (i, j), a, b in zip(spans, A, B, strict=True)])


def _lora(
    x: Tensor, w: pk.SparseWeight, A: Tensor, B: Tensor, scale: float, bias: Tensor | None, offsets: Tensor | None
) -> Tensor:
    return pk.sparse_linear(x, w, bias, offsets) + scale * low_rank(x, A, B, offsets)


def _mask_lora(
    x: Tensor, w: pk.SparseWeight, A: Tensor, B: Tensor, scale: float, bias: Tensor | None, offsets: Tensor | None
) -> Tensor:
    return pk.masked_lora_linear(x, w, A, B, scale, bias, offsets)


def _scale_lora(
    x: Tensor, w: pk.SparseWeight, A: Tensor, B: Tensor, scale: float, bias: Tensor | None, offsets: Tensor | None
) -> Tensor:
    return pk.scale_lora_linear(x, w, A, B, bias, offsets)


def _spp(
    x: Tensor, w: pk.SparseWeight, A: Tensor, B: Tensor, scale: float, bias: Tensor | None, offsets: Tensor | None
) -> Tensor:
    return pk.scale_lora_linear(x, w, *_one_more(A, B, scale), bias, offsets)


def _one_more(A: Tensor, B: Tensor, scale: float) -> Factors:
    """The factors of 1 + s B A, of rank r + 1: W ⊙ that is W + s · W ⊙ (B A), so scale_lora's op serves."""
    return (
        torch.cat([A.new_ones(*A.shape[:-2], 1, A.shape[-1]), A], dim=-2),
        torch.cat([B.new_ones(*B.shape[:-1], 1), scale * B], dim=-1),
    )


def _add_(w: pk.SparseWeight, A: Tensor, B: Tensor, scale: float) -> None:
    w.add_lowrank_(A, B, scale)


def _multiply_(w: pk.SparseWeight, A: Tensor, B: Tensor, scale: float) -> None:
    w.mul_lowrank_(A, B)


def _multiply_one_more_(w: pk.SparseWeight, A: Tensor, B: Tensor, scale: float) -> None:
    w.mul_lowrank_(*_one_more(A.detach(), B.detach(), scale))


MODES = {
    "mask_lora": Mode(_from_zero, _mask_lora, _add_),
    "scale_lora": Mode(_from_ones, _scale_lora, _multiply_),
    "spp": Mode(_from_zero, _spp, _multiply_one_more_),
    "lora_prune": Mode(_from_zero, _lora, _add_, exact=False),
    "lora": Mode(_from_zero, _lora, None, exact=False),
}
