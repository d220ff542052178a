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
from typing import Any

import torch
from torch import Tensor

from perp_kernels.arrays import as_tensor
from perp_kernels.layouts import DTYPES
from perp_kernels.ops._library import define
from perp_kernels.ops._rows import accumulation_dtype
from perp_kernels.ops.select import keep_highest
from perp_kernels.pattern import Pattern, PatternError


def reversed_factor(H: Tensor, dtype: torch.dtype, damp: float) -> Tensor:
    """L lower triangular: R, which is L reversed in rows and columns, is upper triangular and R R^T is H as steps 1 and
    2 make it, so that R^-1 is the U of the contract.

    It is L L^T that is H reversed, which takes one Cholesky factorisation.
    """
    asked = damp
    while True:
        reversed_H = H.to(dtype).flip(0, 1)
        diagonal = reversed_H.diagonal()
        diagonal[diagonal == 0] = 1
        diagonal.add_(damp * diagonal.mean())
        L, failed = torch.linalg.cholesky_ex(reversed_H)
        if not bool(failed):
            break
        damp = max(0.01, 10 * damp)
        if damp > 1:
            raise ValueError("H is not positive semi-definite: it is not a Gram matrix X^T X of finite activations.")
    if damp != asked:
        warnings.warn(f"The Cholesky factorisation of H failed at damp={asked:g}; used damp={damp:g}.", stacklevel=2)
    return L


def inverse(R: Tensor) -> Tensor:
    """The inverses of small upper triangular matrices [..., b, b]."""
    identity = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    return torch.linalg.solve_triangular(R, identity, upper=True).contiguous()


def _diagonal_inverses(L: Tensor, block_size: int) -> list[Tensor]:
    """Of R's diagonal blocks, from left to right, all of full size at once: one at a time they leave a GPU idle."""
    K = len(L)
    ends = [K - start for start in range(0, K, block_size)]
    blocks = [L[max(end - block_size, 0) : end, max(end - block_size, 0) : end].flip(0, 1) for end in ends]
    full = [block for block in blocks if len(block) == block_size]
    inverses = list(inverse(torch.stack(full))) if full else []
    return inverses + [inverse(block) for block in blocks[len(full) :]]


def share_mask(W: Tensor, d: Tensor, pattern: Pattern) -> Tensor:
    """The mask [N, b] of a share of a block's scores (W / d)^2: in each row, or over the block."""
    scores = (W / d).square()
    if pattern.scope == "row":
        return keep_highest(scores, pattern.pruned(scores.shape[1]))
    return keep_highest(scores.view(1, -1), pattern.pruned(scores.numel())).view(scores.shape)


def _block_reference(W: Tensor, U: Tensor, pattern: str, errors: Tensor, kept: Tensor) -> None:
    parsed, (N, b) = Pattern.parse(pattern), W.shape
    d = U.diagonal()
    # Columns are the unit of work: transposed, each is contiguous.
    columns = W.t().contiguous()
    column_errors = torch.empty_like(columns)
    masks = torch.empty(b, N, dtype=torch.bool, device=W.device)
    if not parsed.is_nm:
        masks.copy_(share_mask(W, d, parsed).t())
    for j in range(b):
        if parsed.m is not None and parsed.n is not None and j % parsed.m == 0:
            group = slice(j, j + parsed.m)
            scores = (columns[group] / d[group, None]).square()
            masks[group] = keep_highest(scores.t().contiguous(), parsed.m - parsed.n).t()
        torch.div(columns[j].masked_fill(masks[j], 0), d[j], out=column_errors[j])
        columns[j].masked_fill_(~masks[j], 0)
        columns[j + 1 :].addr_(U[j, j + 1 :], column_errors[j], alpha=-1)
    W.copy_(columns.t())
    errors.copy_(column_errors.t())
    kept.copy_(masks.t())


def _block_fake(W: Tensor, U: Tensor, pattern: str, errors: Tensor, kept: Tensor) -> None:
    return None


sparsegpt_block_ = define(
    "sparsegpt_block_(Tensor(a!) W, Tensor U, str pattern, Tensor(b!) errors, Tensor(c!) kept) -> ()",
    _block_reference,
    _block_fake,
)
"""Step 4 within one block: prune its columns W [N, b] in place under U [b, b], write their errors [N, b] and the mask
[N, b] of what is kept. W, errors and kept may be columns of wider matrices."""


def _matrix(weight: Tensor, H: Tensor, pattern: Pattern, damp: float, block_size: int) -> tuple[Tensor, Tensor]:
    """One matrix, by R = U^-1 alone.

    With E the errors and D the change of the columns done so far, D = E U[done, done]; and U[done, b] =
    -U[done, done] R[done, b] U[b, b] for a block b to come. So b is owed -E U[done, b] = D R[done, b] U[b, b], and of
    the inverse only the diagonal blocks are formed, each from that block of R.
    """
    N, K = weight.shape
    dtype = accumulation_dtype(weight.dtype)
    W = weight.to(dtype, copy=True, memory_format=torch.contiguous_format)
    W[:, H.diagonal() == 0] = 0
    L = reversed_factor(H, dtype, damp)
    change, kept = torch.empty_like(W), torch.empty(W.shape, dtype=torch.bool, device=W.device)
    errors = W.new_empty(N, min(block_size, K))
    for start, U in zip(range(0, K, block_size), _diagonal_inverses(L, block_size), strict=True):
        stop = start + len(U)
        block, columns = slice(start, stop), W[:, start:stop]
        R = L[K - start :, K - stop : K - start].flip(0, 1)  # R[:start, block]
        change[:, block] = columns
        columns.addmm_(change[:, :start], R @ U)
        sparsegpt_block_(columns, U, str(pattern), errors[:, : len(U)], kept[:, block])
        change[:, block] -= columns
    return W.to(weight.dtype), kept


def solve(weight: Tensor, H: Tensor, pattern: str, damp: float, block_size: int) -> tuple[Tensor, Tensor]:
    """The op, whichever implementation serves `sparsegpt_block_`."""
    for name, tensor in (("weight", weight), ("H", H)):
        # A NaN makes both extremes NaN; a mask of what is finite would take four passes.
        if tensor.numel() and not all(extreme.isfinite() for extreme in tensor.aminmax()):
            raise ValueError(f"The {name} holds NaN or infinity: check the model and the calibration activations.")
    parsed = Pattern.parse(pattern)
    if parsed.m is not None:
        block_size = -(-block_size // parsed.m) * parsed.m
    if weight.numel() == 0:
        return weight.clone(), torch.empty_like(weight, dtype=torch.bool)
    if weight.dim() == 2:
        return _matrix(weight, H, parsed, damp, block_size)
    results = [_matrix(W, gram, parsed, damp, block_size) for W, gram in zip(weight, H, strict=True)]
    return torch.stack([W for W, _ in results]), torch.stack([mask for _, mask in results])


def _fake(weight: Tensor, H: Tensor, pattern: str, damp: float, block_size: int) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), weight.new_empty(weight.shape, dtype=torch.bool)


_sparsegpt_op = define(
    "sparsegpt(Tensor weight, Tensor H, str pattern, float damp, int block_size) -> (Tensor, Tensor)",
    solve,
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
