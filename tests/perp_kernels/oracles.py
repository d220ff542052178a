"""Shared by the tests of the linear ops: weights that a layout can hold, and the bound that errors are held to."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from perp_kernels import SparseWeight, pack, select

# Where the tensors lie: drawn on the CPU, so that they are the same everywhere.
DEVICE = torch.device("cuda" if os.environ.get("PERP_GPU", "0") != "0" else "cpu")

LAYOUTS = ("dense", "bitmap", "semi24")


def random_mask(shape: tuple[int, ...], layout: str, seed: int = 0) -> Tensor:
    """A mask that `layout` can hold; rows keep different counts but for semi24, and row 0 keeps nothing."""
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    if layout == "semi24":
        return select(scores, "2:4")
    mask = scores < 0.5
    mask[..., 0, :] = False
    return mask


def random_weight(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, SparseWeight]:
    """(the dense weight with zeros, its mask, the packed weight); some kept weights are 0."""
    mask = random_mask(shape, layout, seed)
    weight = normal(*shape, seed=seed + 1) / shape[-1] ** 0.5
    weight = torch.where(mask, weight, 0.0).to(dtype)
    weight.view(-1)[::7] = 0.0
    return weight, mask, pack(weight, mask, layout)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def gradients(layer: Callable[..., Tensor], arguments: list[Tensor], grad_y: Tensor) -> list[Tensor]:
    """The output of `layer` and the gradients of all its arguments."""
    leaves = [argument.detach().clone().requires_grad_() for argument in arguments]
    y = layer(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y.to(y.dtype))]


def assert_no_worse(got: Tensor, plain: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """The largest error of `got` against float64 is at most `factor` times that of plain torch at the same dtype, or
    one rounding of the largest element where plain torch happens to be exact."""
    assert got.dtype == plain.dtype
    assert got.shape == plain.shape == exact.shape
    if exact.numel():
        error, error_of_plain = ((t.double() - exact).abs().max().item() for t in (got, plain))
        bound = max(factor * error_of_plain, torch.finfo(got.dtype).eps * exact.abs().max().item())
        assert error <= bound, f"error {error:.3g}, bound {bound:.3g}"
