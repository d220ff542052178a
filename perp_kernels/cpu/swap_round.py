"""swap_round_ by the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from perp_kernels.cpu import native
from perp_kernels.ops.swap_round import group_of


def swap_round_(weight: Tensor, mask: Tensor, correlation: Tensor, H: Tensor, pattern: str) -> Tensor:
    """Trades the best pair of each row in place, the contract of perp_kernels.ops.swap_round."""
    gain, wide = torch.empty(len(weight)), weight.float()  # a view does not keep its tensor alive
    native.extension().swap_round(
        native.view("weight", wide),
        native.view("kept", mask.view(torch.uint8)),
        native.view("correlation", correlation),
        native.view("H", H),
        group_of(pattern, weight.shape[1]),
        native.view("gain", gain),
    )
    native.written(mask, correlation)
    return gain


def _supports(weight: Tensor, mask: Tensor, correlation: Tensor, H: Tensor, pattern: str) -> bool:
    return all(t.device.type == "cpu" for t in (weight, mask, correlation, H)) and H.dtype == torch.float32


native.register("swap_round_", swap_round_, _supports)
