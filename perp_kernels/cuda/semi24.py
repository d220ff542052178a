"""The ops on tiled24 weights by the CUDA kernels: the contracts of perp_kernels.ops.tiled24 and perp_kernels.ops.pack.

What the kernels ask of alignment is seen to here: tokens and dense weights that begin or go on elsewhere are copied, a
prepared weight, which is large and would be copied in every call, is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perp_kernels.cpu.native import written
from perp_kernels.cuda import plans
from perp_kernels.cuda.launch import ALIGNMENT, aligned_rows, gpu_of, run
from perp_kernels.ops._tiled24 import padded_rows


def _weight(values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    for name, component in (("values", values), ("index", index)):
        if not component.is_contiguous() or component.data_ptr() % ALIGNMENT:
            raise ValueError(
                f"The {name} of a prepared weight must be contiguous and begin at a multiple of {ALIGNMENT} bytes: "
                "clone the component."
            )
    return values.detach(), index


def _tokens(x: Tensor) -> Tensor:
    return aligned_rows(x.detach().reshape(-1, x.shape[-1]))


def tiled24_linear(x: Tensor, values: Tensor, index: Tensor, shape: list[int], bias: Tensor | None) -> Tensor:
    """y [..., N] of x [..., K]."""
    values, index = _weight(values, index)
    y = torch.empty((*x.shape[:-1], shape[0]), dtype=x.dtype, device=x.device)
    own_bias = None if bias is None else bias.detach().contiguous()
    launches = plans.linear(_tokens(x), values, index, shape, own_bias, y.view(-1, shape[0]), gpu_of(x))
    run(launches, x.device)
    return y


def _factor(factor: Tensor) -> Tensor:
    """Contiguous, aligned and in float32, which holds 16-bit factors exactly."""
    wide = factor.detach().float().contiguous()
    return wide if wide.data_ptr() % ALIGNMENT == 0 else wide.clone()


def tiled24_lora_linear(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    shape: list[int],
    A: Tensor,
    B: Tensor,
    scale: float,
    bias: Tensor | None,
) -> Tensor:
    """y [..., N] of x [..., K]; the effective values, half a dense weight, are a temporary of the call."""
    values, index = _weight(values, index)
    effective = torch.empty_like(values)
    run(plans.add_lowrank(values, index, shape, _factor(A), _factor(B), scale, effective), x.device)
    return tiled24_linear(x, effective, index, shape, bias)


def tiled24_add_lowrank_(values: Tensor, index: Tensor, shape: list[int], A: Tensor, B: Tensor, scale: float) -> None:
    """Merge, by the kernel that forms the effective values of tiled24_lora_linear and hence to the same bits."""
    values, index = _weight(values, index)
    run(plans.add_lowrank(values, index, shape, _factor(A), _factor(B), scale, values), values.device)
    written(values)


def tiled24_assign_(values: Tensor, index: Tensor, shape: list[int], weight: Tensor) -> None:
    """The kept values become those of the dense `weight`."""
    values, index = _weight(values, index)
    run(plans.repack(values, index, aligned_rows(weight)), values.device)
    written(values)


def tiled24_pack(weight: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """values and index of a dense weight [N, K]; the caller has checked that each group of four keeps two."""
    N, K = weight.shape
    values = torch.empty((padded_rows(N), K // 2), dtype=weight.dtype, device=weight.device)
    index = torch.empty((padded_rows(N), K // 8), dtype=torch.uint8, device=weight.device)
    run(plans.compress(values, index, aligned_rows(weight), bits.contiguous()), weight.device)
    return values, index
