"""masked_lora_linear, scale_lora_linear and the merges of their adapters by the native kernels."""

from __future__ import annotations

from torch import Tensor

from perp_kernels.cpu import native, tiles
from perp_kernels.cpu.tiles import AdaptedTiles
from perp_kernels.ops._adapted import AdaptedOps

# Each has its op's contract, and raises ValueError for components that contradict each other.
OPS = AdaptedOps(AdaptedTiles)


def _supports_linear(x: Tensor, values: Tensor, index: Tensor, *_: object) -> bool:
    return x.device.type == "cpu" and tiles.supported(values, index)


def _supports_backward(grad_y: Tensor, x: Tensor | None, values: Tensor, index: Tensor, *_: object) -> bool:
    return grad_y.device.type == "cpu" and tiles.supported(values, index)


def _supports_merge(values: Tensor, index: Tensor, *_: object) -> bool:
    return tiles.supported(values, index)


native.register("masked_lora_linear", OPS.masked_lora_linear, _supports_linear)
native.register("masked_lora_linear_backward", OPS.masked_lora_linear_backward, _supports_backward)
native.register("scale_lora_linear", OPS.scale_lora_linear, _supports_linear)
native.register("scale_lora_linear_backward", OPS.scale_lora_linear_backward, _supports_backward)
native.register("add_lowrank_", OPS.add_lowrank_, _supports_merge)
native.register("mul_lowrank_", OPS.mul_lowrank_, _supports_merge)
