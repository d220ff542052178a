"""What ours is compared with: published or plain-torch ways to do the same, nothing tuned, nothing handicapped.

The tests take their baselines from here too, so that what is checked and what is timed cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import device
from perp_kernels import Pattern

BIT_VALUES = (1, 2, 4, 8, 16, 32, 64, 128)
SLAB = 128


def published_masked_lora(
    x: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """MaskLoRA as its paper's code computes it (arXiv 2312.15230): the effective weight in full, under autograd.

    x [..., K], W [N, K] with zeros where pruned, A [r, K], B [N, r]; adapters are rounded to W's dtype.
    """
    update = (B.to(W.dtype) @ A.to(W.dtype)).masked_fill(W == 0, 0)
    return F.linear(x, W + scale * update, bias)


@cache
def compiled_masked_lora() -> Callable[..., Tensor]:
    """`published_masked_lora` under torch.compile; on a CPU, where it stands in for a rehearsal, traced only."""
    # One graph for each shape of the benchmark: more than torch keeps of one function by default.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(published_masked_lora, dynamic=False, backend="inductor" if device.on_gpu() else "eager")


def boolean_pack(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Kept values [nnz] by boolean indexing, and the mask [N, K], K % 8 == 0, as bytes with the low bit first."""
    place = torch.tensor(BIT_VALUES, dtype=torch.uint8, device=mask.device)
    return weight[mask], (mask.view(torch.uint8).unflatten(-1, (-1, 8)) * place).sum(-1, dtype=torch.uint8)


def boolean_unpack(values: Tensor, bits: Tensor) -> Tensor:
    """The dense [N, K] weight of `boolean_pack`."""
    place = torch.tensor(BIT_VALUES, dtype=torch.uint8, device=bits.device)
    mask = bits.unsqueeze(-1).bitwise_and(place).ne(0).flatten(-2)
    dense = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    dense[mask] = values
    return dense


def gram(H: Tensor, x: Tensor) -> Tensor:
    """H [K, K] fp32 += xᵀ x through a full product, x [T, K] widened first as the reference implementations do."""
    wide = x.float()
    H += wide.T @ wide
    return H


def bf16_gram(H: Tensor, x: Tensor) -> Tensor:
    """One product of the full square of 16-bit x [T, K], its sums in float32, without the addition to H."""
    if x.is_cuda:
        return torch.mm(x.T, x, out_dtype=torch.float32)
    return x.float().T @ x.float()


def merged(W: Tensor, mask: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The dense W [N, K] with its adapter A [r, K], B [N, r] merged into the kept weights, in place."""
    return W.add_((B @ A).masked_fill(~mask, 0), alpha=scale)


def select(scores: Tensor, pattern: Pattern) -> Tensor:
    """Mask [N, K] that drops the lowest scores by stable sorts, as Wanda's reference code does (arXiv 2306.11695)."""
    N, K = scores.shape
    if pattern.m is not None:
        return _drop_lowest(scores.view(-1, pattern.m), pattern).view(N, K)
    if pattern.scope == "matrix":
        return _drop_lowest(scores.view(1, -1), pattern).view(N, K)
    if pattern.scope == "slab":
        slabs = scores.split(SLAB, dim=1)
        return torch.cat([_drop_lowest(s.reshape(1, -1), pattern).view(N, -1) for s in slabs], dim=1)
    return _drop_lowest(scores, pattern)


def _drop_lowest(scores: Tensor, pattern: Pattern) -> Tensor:
    order = scores.sort(dim=-1, stable=True).indices
    dropped = order[:, : pattern.pruned(scores.shape[1])]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(-1, dropped, False)


def sparsegpt(weight: Tensor, H: Tensor, pattern: Pattern, damp: float = 0.01) -> tuple[Tensor, Tensor]:
    """SparseGPT (arXiv 2301.00774, algorithm 1) column by column in plain torch, in the dtype of `H`.

    weight [N, K]; H [K, K] the Gram of its inputs. A share of zeros is met by each slab of 128 columns; under N:M
    each row chooses among its next M columns as updated so far. Returns the new weight in its own dtype, and the mask.
    """
    W = weight.to(H.dtype, copy=True)
    H = H.clone()
    rows, columns = W.shape
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    W[:, dead] = 0
    H.diagonal().add_(damp * H.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    mask = torch.ones(rows, columns, dtype=torch.bool, device=W.device)
    for start in range(0, columns, SLAB):
        end = min(start + SLAB, columns)
        errors, mask[:, start:end] = sparsegpt_block(W[:, start:end], inverse[start:end, start:end], pattern)
        W[:, end:] -= errors @ inverse[start:end, end:]
    return W.to(weight.dtype), mask


def sparsegpt_block(W: Tensor, U: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """The column loop of `sparsegpt` over W [N, b], pruned in place, under the block U [b, b] of the factor.

    Returns the errors [N, b] that the columns to the right are owed, and the mask [N, b].
    """
    block, width = W.clone(), W.shape[1]
    errors, mask = torch.zeros_like(block), torch.ones(block.shape, dtype=torch.bool, device=W.device)
    group = pattern.m or width
    for j in range(width):
        if j % group == 0:
            ahead = slice(j, j + group)
            mask[:, ahead] = select(block[:, ahead] ** 2 / U.diagonal()[ahead] ** 2, pattern.with_scope("matrix"))
        pruned = torch.where(mask[:, j], block[:, j], 0)
        errors[:, j] = (block[:, j] - pruned) / U[j, j]
        block[:, j:] -= errors[:, j : j + 1] @ U[j : j + 1, j:]
        block[:, j] = pruned
    W.copy_(block)
    return errors, mask


def swap_round(weight: Tensor, mask: Tensor, correlation: Tensor, H: Tensor, group: int | None = None) -> None:
    """A round of SparseSwaps (arXiv 2512.10922) in place: for each row the changes of the loss by all pairs, and the
    trade of the best where it is negative. weight, mask, correlation [N, K], H [K, K]; pairs within `group` columns."""
    K = weight.shape[1]
    columns = torch.arange(K)
    apart = False if group is None else columns[:, None] // group != columns // group
    diagonal = H.diagonal()
    for w, kept, c in zip(weight, mask, correlation, strict=True):
        u, p = (2 * w * c + w**2 * diagonal)[:, None], (w**2 * diagonal - 2 * w * c)[None, :]
        changes = u + p - 2 * torch.outer(w, w) * H
        changes.masked_fill_(~kept[:, None] | kept[None, :] | apart, torch.inf)
        best = int(changes.argmin())
        if changes.view(-1)[best] < 0:
            u_place, p_place = divmod(best, K)
            kept[u_place], kept[p_place] = False, True
            c += w[u_place] * H[u_place] - w[p_place] * H[p_place]


def masked_refit(weight: Tensor, mask: Tensor, H: Tensor, damp: float) -> Tensor:
    """The kept weights [N, K] that fit the whole row best under H + damp mean(diag H) I: one Cholesky solve a row."""
    A = H + damp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    targets, new = weight @ A, torch.zeros_like(weight)
    for kept, target, out in zip(mask, targets, new, strict=True):
        factor = torch.linalg.cholesky(A[kept][:, kept])
        out[kept] = torch.cholesky_solve(target[kept, None], factor).squeeze(1)
    return new
