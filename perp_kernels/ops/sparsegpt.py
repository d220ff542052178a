"""sparsegpt: prune a weight column by column, each error compensated by the weights to its right.

    sparsegpt(weight [N, K], H [K, K], pattern, damp=0.01, block_size=128) -> (new weight [N, K], mask [N, K])

SparseGPT (Frantar and Alistarh, arXiv 2301.00774, algorithm 1). H is the Gram matrix X^T X of the layer's inputs at any
scale. In order:

1. Dead columns, H_ii = 0: H_ii becomes 1 and the weight's column 0.
2. H += damp * mean(diag H) * I.
3. U, the upper triangular factor of H^-1 = U^T U.
4. For each block of `block_size` columns (rounded up to a multiple of M), from left to right:
   the score of w_ij is (w_ij / U_jj)^2. A share prunes the lowest floor(share * n) scores of the block, over all rows
   (scope slab, the default) or in each row (scope row); N:M prunes per row when its group's first column is reached,
   by the weights as updated by then. Ties fall as in `select`.
   Each column j in turn: e = (w_j - M_j * w_j) / U_jj, and the columns l > j of the block lose e U_jl;
   at its end the columns right of the block lose what the errors of the block make of them.

It works in float32 (float64 for a float64 weight) and rounds the result once. Where the Cholesky factorisation fails,
damp is multiplied by ten, with a warning, until it succeeds or exceeds 1. [E, N, K] with H [E, K, K] is E matrices.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from perp_kernels.arrays import as_tensor
from perp_kernels.layouts import DTYPES
from perp_kernels.ops._library import define
from perp_kernels.ops._rows import accumulation_dtype
from perp_kernels.ops.select import keep_highest
from perp_kernels.pattern import Pattern, PatternError


def _inverse_factor(H: Tensor, damp: float) -> Tensor:
    """U upper triangular with (H + damp * mean(diag H) * I)^-1 = U^T U.

    Reversed in rows and columns, H = L L^T reads H = R R^T with R upper triangular, so that H^-1 = R^-T R^-1 and
    U = R^-1: one factorisation and one triangular solve, where forming H^-1 first takes two factorisations.
    """
    identity = torch.eye(len(H), dtype=H.dtype, device=H.device)
    mean = H.diagonal().mean()
    asked = damp
    while True:
        L, failed = torch.linalg.cholesky_ex((H + damp * mean * identity).flip(0, 1))
        if not bool(failed):
            break
        damp = max(0.01, 10 * damp)
        if damp > 1:
            raise ValueError("H is not positive semi-definite: it is not a Gram matrix X^T X of finite activations.")
    if damp != asked:
        warnings.warn(f"The Cholesky factorisation of H failed at damp={asked:g}; used damp={damp:g}.", stacklevel=2)
    return torch.linalg.solve_triangular(L.flip(0, 1), identity, upper=True)


def block_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    """Mask of the scores of a block, both [columns, rows]."""
    by_row = scores.t()
    if pattern.scope == "row":
        return keep_highest(by_row, pattern.pruned(by_row.shape[1])).t()
    return keep_highest(by_row.reshape(1, -1), pattern.pruned(by_row.numel())).view(by_row.shape).t()


PruneBlock = Callable[[Tensor, Tensor, Pattern], tuple[Tensor, Tensor]]


def _prune_block(W: Tensor, U: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Prune the columns W [b, N] of a block in place under U [b, b]; returns the errors and the mask, both [b, N]."""
    b, N = W.shape
    d = U.diagonal()
    errors = torch.empty_like(W)
    if pattern.is_nm:
        kept = torch.empty(b, N, dtype=torch.bool, device=W.device)
    else:
        kept = block_mask((W / d[:, None]).square(), pattern).contiguous()
    for j in range(b):
        if pattern.m is not None and pattern.n is not None and j % pattern.m == 0:
            group = slice(j, j + pattern.m)
            scores = (W[group] / d[group, None]).square()
            kept[group] = keep_highest(scores.t().contiguous(), pattern.m - pattern.n).t()
        torch.div(W[j].masked_fill(kept[j], 0), d[j], out=errors[j])
        W[j].masked_fill_(~kept[j], 0)
        W[j + 1 :].addr_(U[j, j + 1 :], errors[j], alpha=-1)
    return errors, kept


def _matrix(
    weight: Tensor, H: Tensor, pattern: Pattern, damp: float, block_size: int, prune_block: PruneBlock
) -> tuple[Tensor, Tensor]:
    K = weight.shape[1]
    dtype = accumulation_dtype(weight.dtype)
    # Columns are the unit of work: transposed, each is contiguous.
    W = weight.to(dtype).t().clone(memory_format=torch.contiguous_format)
    H = H.to(dtype, copy=True)
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    W[dead] = 0
    U = _inverse_factor(H, damp)
    kept = torch.empty(W.shape, dtype=torch.bool, device=W.device)
    for start in range(0, K, block_size):
        stop = min(start + block_size, K)
        errors, kept[start:stop] = prune_block(W[start:stop], U[start:stop, start:stop], pattern)
        W[stop:].addmm_(U[start:stop, stop:].t(), errors, alpha=-1)
    return W.t().to(weight.dtype).contiguous(), kept.t().contiguous()


def solve(
    weight: Tensor, H: Tensor, pattern: str, damp: float, block_size: int, prune_block: PruneBlock
) -> tuple[Tensor, Tensor]:
    """The whole of it around `prune_block`, which prunes the columns of a block: see `_prune_block`."""
    for name, tensor in (("weight", weight), ("H", H)):
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"The {name} holds NaN or infinity: check the model and the calibration activations.")
    parsed = Pattern.parse(pattern)
    if parsed.m is not None:
        block_size = -(-block_size // parsed.m) * parsed.m
    if weight.dim() == 2:
        return _matrix(weight, H, parsed, damp, block_size, prune_block)
    results = [_matrix(W, gram, parsed, damp, block_size, prune_block) for W, gram in zip(weight, H, strict=True)]
    return torch.stack([W for W, _ in results]), torch.stack([mask for _, mask in results])


def _reference(weight: Tensor, H: Tensor, pattern: str, damp: float, block_size: int) -> tuple[Tensor, Tensor]:
    return solve(weight, H, pattern, damp, block_size, _prune_block)


def _fake(weight: Tensor, H: Tensor, pattern: str, damp: float, block_size: int) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), weight.new_empty(weight.shape, dtype=torch.bool)


_sparsegpt_op = define(
    "sparsegpt(Tensor weight, Tensor H, str pattern, float damp, int block_size) -> (Tensor, Tensor)",
    _reference,
    _fake,
)


def sparsegpt(
    weight: Any, H: Any, pattern: str | Pattern, damp: float = 0.01, block_size: int = 128
) -> tuple[Tensor, Tensor]:
    """The pruned and compensated weight, zero where the mask is False, and the mask: see the contract above."""
    weight, H, pattern = as_tensor(weight).detach(), as_tensor(H), Pattern.parse(pattern)
    if weight.dtype not in DTYPES or not H.is_floating_point():
        raise TypeError(f"The weight and H are floating point, not {weight.dtype} and {H.dtype}.")
    K = weight.shape[-1]
    if weight.dim() not in (2, 3) or H.shape != (*weight.shape[:-2], K, K):
        raise ValueError(
            f"A weight [N, K] or [E, N, K] has H [K, K] or [E, K, K]: {list(weight.shape)} and {list(H.shape)} differ."
        )
    if pattern.scope == "matrix":
        raise PatternError(
            f'SparseGPT decides a slab of columns at a time, so it cannot rank a matrix as "{pattern}" asks: '
            f'write "{str(pattern).removesuffix("/matrix")}".'
        )
    if damp < 0 or block_size < 1:
        raise ValueError(f"damp is at least 0 and block_size at least 1, not {damp} and {block_size}.")
    pattern.check(K)
    return _sparsegpt_op(weight, H, str(pattern), float(damp), block_size)
