"""masked_lora_linear, scale_lora_linear and the merges of their adapters by the native kernels."""

from __future__ import annotations

from torch import Tensor

from perp_kernels.cpu import native, tiles
from perp_kernels.cpu.tiles import AdaptedTiles
from perp_kernels.ops import _adapted

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def masked_lora_linear(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor | None,
    layout: str,
    shape: list[int],
    A: Tensor,
    B: Tensor,
    scale: float,
    bias: Tensor | None,
    offsets: Tensor | None,
) -> Tensor:
    """The contract of perp_kernels.ops.masked_lora_linear; ValueError for components that contradict each other."""
    w = AdaptedTiles("add", scale, values, index, row_ptr, layout, shape, A, B)
    return _adapted.forward(w, x, shape, bias, offsets)


def masked_lora_linear_backward(
    grad_y: Tensor,
    x: Tensor | None,
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor | None,
    layout: str,
    shape: list[int],
    A: Tensor,
    B: Tensor,
    scale: float,
    offsets: Tensor | None,
    needs: list[bool],
) -> Gradients:
    """The gradients of `masked_lora_linear`."""
    w = AdaptedTiles("add", scale, values, index, row_ptr, layout, shape, A, B)
    return _adapted.backward(w, grad_y, x, shape, A, B, offsets, needs)


def scale_lora_linear(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor | None,
    layout: str,
    shape: list[int],
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    offsets: Tensor | None,
) -> Tensor:
    """The contract of perp_kernels.ops.scale_lora_linear; ValueError for components that contradict each other."""
    w = AdaptedTiles("multiply", 1.0, values, index, row_ptr, layout, shape, A, B)
    return _adapted.forward(w, x, shape, bias, offsets)


def scale_lora_linear_backward(
    grad_y: Tensor,
    x: Tensor | None,
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor | None,
    layout: str,
    shape: list[int],
    A: Tensor,
    B: Tensor,
    offsets: Tensor | None,
    needs: list[bool],
) -> Gradients:
    """The gradients of `scale_lora_linear`."""
    w = AdaptedTiles("multiply", 1.0, values, index, row_ptr, layout, shape, A, B)
    return _adapted.backward(w, grad_y, x, shape, A, B, offsets, needs)


def add_lowrank_(
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor | None,
    layout: str,
    shape: list[int],
    A: Tensor,
    B: Tensor,
    scale: float,
) -> None:
    """The contract of perp_kernels.ops.merge; ValueError for components that contradict each other."""
    _merge_(AdaptedTiles("add", scale, values, index, row_ptr, layout, shape, A, B), values, shape)


def mul_lowrank_(
    values: Tensor, index: Tensor, row_ptr: Tensor | None, layout: str, shape: list[int], A: Tensor, B: Tensor
) -> None:
    """The contract of perp_kernels.ops.merge; ValueError for components that contradict each other."""
    _merge_(AdaptedTiles("multiply", 1.0, values, index, row_ptr, layout, shape, A, B), values, shape)


def _merge_(w: AdaptedTiles, values: Tensor, shape: list[int]) -> None:
    _adapted.merge_(w, shape)
    native.written(values)


def _supports_linear(x: Tensor, values: Tensor, index: Tensor, *_: object) -> bool:
    return x.device.type == "cpu" and tiles.supported(values, index)


def _supports_backward(grad_y: Tensor, x: Tensor | None, values: Tensor, index: Tensor, *_: object) -> bool:
    return grad_y.device.type == "cpu" and tiles.supported(values, index)


def _supports_merge(values: Tensor, index: Tensor, *_: object) -> bool:
    return tiles.supported(values, index)


native.register("masked_lora_linear", masked_lora_linear, _supports_linear)
native.register("masked_lora_linear_backward", masked_lora_linear_backward, _supports_backward)
native.register("scale_lora_linear", scale_lora_linear, _supports_linear)
native.register("scale_lora_linear_backward", scale_lora_linear_backward, _supports_backward)
native.register("add_lowrank_", add_lowrank_, _supports_merge)
native.register("mul_lowrank_", mul_lowrank_, _supports_merge)
