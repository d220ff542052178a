"""masked_refit: the kept weights of each row fitted anew, by least squares, to what the whole row computed.

    masked_refit(weight [N, K], mask [N, K], H [K, K], damp=0.01) -> new weight [N, K]

H is the Gram matrix X^T X of what the layer reads, at any scale. Of all rows w' that are zero where the mask is False,
the new one has the least

    ||(w' - w) X||^2 + d ||w' - w||^2,   d = damp * mean(diag H),

so that with A = H + d I its kept part solves A_SS w'_S = (A w)_S. Inputs that the calibration never saw, H_jj = 0, keep
their weights; a row with nothing kept is zero, one with all kept stays as it is, bit for bit.

It is solved by conjugate gradients on A, preconditioned by its diagonal, all rows side by side: a step is one product
[rows, K] x [K, K] of a dense H and of directions that are masked, where a Cholesky factorisation for each row's own S
would take |S|^3 / 3 operations and |S|^2 memory a row and share nothing. What a step lowers is the very error that is
asked for, it never rises, and a singular H, which a factorisation needs damping for, costs it nothing: the solution
nearest to the start, which is the weight itself under the mask, is found.

A row is done when eight steps together have lowered its error by less than 1/1000 of what is left (10^-15 in float64),
or by a rounding of what it was at first. Then its residual is formed anew from the definition, and it is done for good
when eight steps from there say so too: what roundings had left is found by that. Rows still falling after 512 steps
are left there, with one warning that counts them. No row is returned with a higher error than it had under the mask
alone. It works in float32 (float64 for a float64 weight), on 256 rows or 2 MiB a tensor at a time, and rounds the
result once.

Where A has a direction of negative curvature beyond rounding, H is no Gram matrix: damp is multiplied by ten, with a
warning, until there is none or it exceeds 1 (ValueError). [E, N, K] with H [E, K, K] is E matrices.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perp_kernels.arrays import as_tensor
from perp_kernels.layouts import DTYPES
from perp_kernels.ops._library import define
from perp_kernels.ops._rows import accumulation_dtype

_STEPS, _MOST_STEPS = 8, 512
_ENOUGH = {torch.float32: 1e-3, torch.float64: 1e-15}
_CHUNK_BYTES, _MIN_ROWS = 2 << 20, 256


class _NegativeCurvature(Exception):
    """A is not positive semi-definite."""


@dataclass
class _Rows:
    """Rows being solved: where they belong, the solution, the residual, the direction, and r^T D^-1 r [R, 1]."""

    place: Tensor
    kept: Tensor
    X: Tensor
    R: Tensor
    P: Tensor
    rz: Tensor
    error: Tensor
    least: Tensor  # a gain too small to go on for, whatever is left

    def only(self, chosen: Tensor) -> _Rows:
        return _Rows(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class _System:
    """A = H + d I and the inverse of its diagonal, 0 where that is 0: such an input has no residual."""

    H: Tensor
    d: Tensor
    inverse: Tensor

    def times(self, rows: Tensor) -> Tensor:
        return (rows @ self.H).add_(self.d * rows)

    def begin(self, W: Tensor, kept: Tensor, X: Tensor, place: Tensor, least: Tensor | None = None) -> _Rows:
        """The rows `place` at X, their residual and error formed from the definition."""
        missing = W[place] - X[place]
        product = self.times(missing)
        R = product.masked_fill(~kept[place], 0)
        Z = R * self.inverse
        rz, error = (R * Z).sum(1, keepdim=True), (product * missing).sum(1, keepdim=True)
        rounding = torch.finfo(W.dtype).eps * error if least is None else least[place]
        return _Rows(place, kept[place], X[place], R, Z, rz, error, rounding)

    def descend(self, rows: _Rows, enough: float) -> Tensor:
        """Eight steps in place; gives bool [R], whether the row is still falling."""
        flat = 8 * torch.finfo(self.H.dtype).eps
        gained, negative = torch.zeros_like(rows.rz), torch.zeros_like(rows.rz, dtype=torch.bool)
        for _ in range(_STEPS):
            Q = self.times(rows.P).masked_fill_(~rows.kept, 0)
            curvature = (rows.P * Q).sum(1, keepdim=True)
            scale = flat * (rows.P.square() * (self.H.diagonal() + self.d)).sum(1, keepdim=True)
            negative |= curvature < -scale
            # A direction without curvature holds rounding alone, which a step along it would blow up.
            step = torch.where(curvature > scale, rows.rz / curvature, 0.0)
            gained += step * rows.rz
            rows.X.addcmul_(rows.P, step)
            rows.R.addcmul_(Q, step, value=-1)
            Z = rows.R * self.inverse
            rz = (rows.R * Z).sum(1, keepdim=True)
            rows.P.mul_(torch.where(step > 0, rz / rows.rz, 0.0)).add_(Z)
            rows.rz = rz
        if bool(negative.any()):
            raise _NegativeCurvature
        rows.error -= gained
        return (gained > enough * rows.error.clamp_min(0) + rows.least).squeeze(1)


def _solve(W: Tensor, kept: Tensor, system: _System) -> tuple[Tensor, int]:
    """(the rows' solution, how many were still falling when they were left)."""
    enough, X = _ENOUGH[W.dtype], W.masked_fill(~kept, 0)
    begun = system.begin(W, kept, X, torch.arange(len(W), device=W.device))
    error, start = begun.error.clone(), X.clone()
    active, left = begun.place[(begun.rz > 0).squeeze(1)], _MOST_STEPS // _STEPS
    while len(active) and left:
        rows = system.begin(W, kept, X, active, begun.least)
        falling = system.descend(rows, enough)
        X[active] = rows.X
        active, left = active[falling], left - 1
        while left and bool(falling.any()):
            rows = rows.only(falling)
            falling = system.descend(rows, enough)
            X[rows.place] = rows.X
            left -= 1
    lowered = system.begin(W, kept, X, begun.place).error <= error
    return torch.where(lowered, X, start), len(active)


def _matrix(weight: Tensor, mask: Tensor, H: Tensor, damp: float) -> Tensor:
    dtype = accumulation_dtype(weight.dtype)
    H, (N, K), asked = H.to(dtype), weight.shape, damp
    chunk = max(_MIN_ROWS, _CHUNK_BYTES // (dtype.itemsize * max(K, 1)))
    while True:
        d = damp * H.diagonal().mean()
        diagonal = H.diagonal() + d
        system = _System(H, d, torch.where(diagonal > 0, 1 / diagonal, 0.0))
        new, falling = torch.empty_like(weight, memory_format=torch.contiguous_format), 0
        try:
            for rows, kept, out in zip(weight.split(chunk), mask.split(chunk), new.split(chunk), strict=True):
                solved, left = _solve(rows.to(dtype), kept, system)
                out.copy_(solved)
                falling += left
            break
        except _NegativeCurvature:
            damp = max(0.01, 10 * damp)
            if damp > 1:
                raise ValueError(
                    "H is not positive semi-definite: it is not a Gram matrix X^T X of finite activations."
                ) from None
    if damp != asked:
        warnings.warn(f"H has negative curvature at damp={asked:g}; used damp={damp:g}.", stacklevel=2)
    if falling:
        warnings.warn(
            f"{falling} of {N} rows were still improving after {_MOST_STEPS} steps; raise damp.", stacklevel=2
        )
    return new


def _reference(weight: Tensor, mask: Tensor, H: Tensor, damp: float) -> Tensor:
    for name, tensor in (("weight", weight), ("H", H)):
        if tensor.numel() and not all(extreme.isfinite() for extreme in tensor.aminmax()):
            raise ValueError(f"The {name} holds NaN or infinity: check the model and the calibration activations.")
    if weight.numel() == 0:
        return weight.clone()
    if weight.dim() == 2:
        return _matrix(weight, mask, H, damp)
    return torch.stack([_matrix(*expert, damp) for expert in zip(weight, mask, H, strict=True)])


def _fake(weight: Tensor, mask: Tensor, H: Tensor, damp: float) -> Tensor:
    return weight.new_empty(weight.shape)


_masked_refit_op = define("masked_refit(Tensor weight, Tensor mask, Tensor H, float damp) -> Tensor", _reference, _fake)


def masked_refit(weight: Any, mask: Any, H: Any, damp: float = 0.01) -> Tensor:
    """The refitted weight, zero where the mask is False, in the dtype of `weight`: see the contract above."""
    weight, mask, H = (as_tensor(array).detach() for array in (weight, mask, H))
    if weight.dtype not in DTYPES or not H.is_floating_point() or mask.dtype != torch.bool:
        raise TypeError(
            f"The weight and H are floating point and the mask bool, not {weight.dtype}, {H.dtype} and {mask.dtype}."
        )
    K = weight.shape[-1] if weight.dim() else 0
    if weight.dim() not in (2, 3) or mask.shape != weight.shape or H.shape != (*weight.shape[:-2], K, K):
        raise ValueError(
            "A weight [N, K] or [E, N, K] has a mask of its shape and H [K, K] or [E, K, K], not "
            f"{list(weight.shape)} with {list(mask.shape)} and {list(H.shape)}."
        )
    if damp < 0:
        raise ValueError(f"damp is at least 0, not {damp}.")
    return _masked_refit_op(weight, mask, H, float(damp))
