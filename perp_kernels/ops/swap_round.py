"""swap_round_: one round of SparseSwaps, in place: each row trades its best pair of a kept and a pruned weight.

    swap_round_(weight [N, K], mask [N, K], correlation [N, K], H [K, K], pattern) -> gain [N]

SparseSwaps (arXiv 2512.10922, section 3). With G = H the Gram matrix X^T X of what the layer reads, the pruned weights
of a row w cost L = r G r^T, where r is w where pruned and 0 where kept, and c = r G is the row of `correlation`.
Pruning u and reviving p changes L by

    dL(u, p) = 2 w_u c_u + w_u^2 G_uu - 2 w_p c_p + w_p^2 G_pp - 2 w_u w_p G_up

and c by w_u G_u - w_p G_p. Each row takes the pair of least dL among all its pairs, of equal ones that of the lowest u,
then of the lowest p. The two cannot be chosen apart: the last term can turn two good halves into a bad pair. Under N:M
both are of one group, so a mask that keeps N of M goes on doing so; under a share they are any two of the row, whose
number of kept weights stays. A slab has no pairs of its own: PatternError.

The pair is found in the dtype of H, float32 (float64 for a float64 weight); whether it is traded is decided in float64,
from sums over the row's weights and not from `correlation`: dL has to be below -2^-36 times the sum of the magnitudes
that it is made of, more than float64 can lose on rows up to 2^17. So the exact loss falls with each trade, however many
rounds the roundings of `correlation` have added up over.

gain, in the dtype of H, is -dL of the trade made, and 0 for a row without one: it stays without until it changes, so
the caller leaves it out of later rounds. Rows know nothing of each other, hence there is no list of active rows:
gathering them costs 9 bytes a weight once, where a list would cost the kernels their whole tiles in every round.

weight: float32, bfloat16 or float16 beside float32 H and correlation, or all three float64. mask: bool, True = kept,
contiguous, as correlation is: both are changed. H is symmetric. A pair whose dL is not finite is never traded. [E, N,
K] with H [E, K, K] is E matrices. No more than O(N K) memory is used. Not differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perp_kernels.arrays import as_tensor
from perp_kernels.layouts import DTYPES
from perp_kernels.ops._library import define
from perp_kernels.ops._rows import accumulation_dtype
from perp_kernels.pattern import Pattern, PatternError

# Of the magnitudes in dL, what a sum of up to 2^17 terms can lose in float64.
GUARD = 2.0**-36

# Pair scores held at once, and the rows that share them.
_AT_ONCE = 1 << 22
_ROWS = 64


def group_of(pattern: str, K: int) -> int:
    """The number of consecutive columns within which weights are traded."""
    return Pattern.parse(pattern).m or K


def _prices(W: Tensor, mask: Tensor, c: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """What pruning each kept and reviving each pruned weight costs alone; infinity where it is not to be had."""
    leave, enter = W * (2 * c + W * diagonal), W * (W * diagonal - 2 * c)
    return leave.masked_fill(~mask, torch.inf), enter.masked_fill(mask, torch.inf)


def _pair(W: Tensor, leave: Tensor, enter: Tensor, H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(least dL, u, p) of each row [R]: pairs of a few u with all p at a time."""
    R, K = W.shape
    best, u = W.new_full((R,), torch.inf), torch.zeros(R, dtype=torch.int64, device=W.device)
    step = max(1, _AT_ONCE // (R * K))
    for first in range(0, K, step):
        few = slice(first, first + step)
        scores = (W[:, None, :] * H[few]).mul_(-2 * W[:, few, None]).add_(enter[:, None, :])
        value, place = (leave[:, few] + scores.amin(2)).min(1)
        better = value < best
        best, u = torch.where(better, value, best), torch.where(better, first + place, u)
    p = (enter - 2 * W.gather(1, u[:, None]) * (W * H[u])).argmin(1)
    return best, u, p


def _pair_in_groups(W: Tensor, leave: Tensor, enter: Tensor, H: Tensor, M: int) -> tuple[Tensor, Tensor, Tensor]:
    """`_pair` within groups of M columns, of which H needs the diagonal blocks alone."""
    R, K = W.shape
    blocks = H.view(K // M, M, K // M, M).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    w, leave, enter = (t.view(R, K // M, M) for t in (W, leave, enter))
    scores = leave[..., None] + (enter[:, :, None, :] - 2 * w[..., None] * (w[:, :, None, :] * blocks))
    best, at = scores.flatten(1).min(1)
    u, partner = at // M, at % M
    return best, u, u // M * M + partner


def _verdict(W: Tensor, mask: Tensor, H: Tensor, u: Tensor, p: Tensor) -> Tensor:
    """dL [R] of trading u for p, in float64 from the definition, where it is safely below 0; else 0."""
    residual = W.masked_fill(mask, 0).double()
    w_u, w_p = (W.gather(1, at[:, None]).squeeze(1).double() for at in (u, p))
    to_u, to_p = (residual * H[at] for at in (u, p))
    own = w_u.square() * H[u, u] + w_p.square() * H[p, p]
    joint = 2 * w_u * w_p * H[u, p]
    change = 2 * w_u * to_u.sum(1) - 2 * w_p * to_p.sum(1) + own - joint
    size = 2 * w_u.abs() * to_u.abs().sum(1) + 2 * w_p.abs() * to_p.abs().sum(1) + own + joint.abs()
    return torch.where(change < -GUARD * size, change, 0.0)


def _reference(weight: Tensor, mask: Tensor, correlation: Tensor, H: Tensor, pattern: str) -> Tensor:
    (N, K), diagonal = weight.shape, H.diagonal()
    M = group_of(pattern, K)
    gain = H.new_zeros(N)
    if K == 0:
        return gain
    for start in range(0, N, _ROWS):
        rows = slice(start, start + _ROWS)
        W, kept, c = weight[rows].to(H.dtype), mask[rows], correlation[rows]
        prices = _prices(W, kept, c, diagonal)
        best, u, p = _pair(W, *prices, H) if M == K else _pair_in_groups(W, *prices, H, M)
        change = torch.where(best.isfinite(), _verdict(W, kept, H, u, p), 0.0)
        gain[rows] = -change
        traded = (change < 0).nonzero().squeeze(1)
        u, p, W = u[traded], p[traded], W[traded]
        kept[traded, u], kept[traded, p] = False, True
        c[traded] += W.gather(1, u[:, None]) * H[u] - W.gather(1, p[:, None]) * H[p]
    return gain


def _fake(weight: Tensor, mask: Tensor, correlation: Tensor, H: Tensor, pattern: str) -> Tensor:
    return H.new_empty(weight.shape[0])


_swap_round_op = define(
    "swap_round_(Tensor weight, Tensor(a!) mask, Tensor(b!) correlation, Tensor H, str pattern) -> Tensor",
    _reference,
    _fake,
)


def swap_round_(weight: Any, mask: Any, correlation: Any, H: Any, pattern: str | Pattern) -> Tensor:
    """Trade the best pair of each row in place and return what each gained: see the contract above."""
    weight, mask, correlation, H = (as_tensor(array).detach() for array in (weight, mask, correlation, H))
    pattern, K = Pattern.parse(pattern), weight.shape[-1]
    if weight.dtype not in DTYPES or any(t.dtype != accumulation_dtype(weight.dtype) for t in (correlation, H)):
        raise TypeError(
            "The correlation and H are float32, or float64 for a weight in float64, not "
            f"{correlation.dtype} and {H.dtype} for {weight.dtype}."
        )
    if weight.dim() not in (2, 3) or H.shape != (*weight.shape[:-2], K, K):
        raise ValueError(
            f"A weight [N, K] or [E, N, K] has H [K, K] or [E, K, K]: {list(weight.shape)} and {list(H.shape)} differ."
        )
    for name, tensor in (("mask", mask), ("correlation", correlation)):
        if tensor.shape != weight.shape or not tensor.is_contiguous():
            raise ValueError(f"The {name} is contiguous {list(weight.shape)} as the weight, not {list(tensor.shape)}.")
    if mask.dtype != torch.bool:
        raise TypeError(f"The mask is bool, not {mask.dtype}.")
    if pattern.scope == "slab":
        raise PatternError(
            f'A slab has no pairs of its own, so weights cannot be traded under "{pattern}": '
            f'write "{str(pattern).removesuffix("/slab")}".'
        )
    pattern.check(K)
    if weight.dim() == 2:
        return _swap_round_op(weight.contiguous(), mask, correlation, H.contiguous(), str(pattern))
    experts = zip(weight.contiguous(), mask, correlation, H.contiguous(), strict=True)
    gains = [_swap_round_op(*expert, str(pattern)) for expert in experts]
    return torch.stack(gains) if gains else H.new_empty(weight.shape[:-1])
