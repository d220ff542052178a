"""The ops on a weight in the order tiled24, which `SparseWeight.prepare` gives.

    tiled24_linear(x [..., K], values, index, shape [N, K], bias [N] or None) -> [..., N]
    tiled24_lora_linear(x, values, index, shape, A [r, K], B [N, r], scale, bias) -> [..., N]
    tiled24_add_lowrank_(values, index, shape, A, B, scale): W += scale * M * (B A), in place
    tiled24_assign_(values, index, shape, weight [N, K]): the kept values become those of `weight`

They do what sparse_linear, masked_lora_linear and add_lowrank_ do with the canonical form, under the same contracts; a
caller of those does not meet these. The reference restores the canonical form for the call and hands it on, so that
whatever serves semi24 serves here. The weight is frozen: there are gradients for x, A, B and the bias, and backward
restores the canonical form likewise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from perp_kernels.ops._arguments import wants_gradient
from perp_kernels.ops._library import define, serve
from perp_kernels.ops._rows import PackedRows
from perp_kernels.ops._tiled24 import tile_values, untile_index, untile_values

if TYPE_CHECKING:
    from perp_kernels.layouts import SparseWeight


def canonical(values: Tensor, index: Tensor, shape: list[int]) -> tuple[Tensor, Tensor, None, str, list[int]]:
    """What every op on a semi24 weight takes in place of (values, index, row_ptr, layout, shape)."""
    N = shape[0]
    return untile_values(values, N), untile_index(index, N), None, "semi24", shape


def _linear(x: Tensor, values: Tensor, index: Tensor, shape: list[int], bias: Tensor | None) -> Tensor:
    return serve("sparse_linear", x, *canonical(values, index, shape), bias, None)


def _lora_linear(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    shape: list[int],
    A: Tensor,
    B: Tensor,
    scale: float,
    bias: Tensor | None,
) -> Tensor:
    return serve("masked_lora_linear", x, *canonical(values, index, shape), A, B, scale, bias, None)


def _add_lowrank(values: Tensor, index: Tensor, shape: list[int], A: Tensor, B: Tensor, scale: float) -> None:
    merged, *rest = canonical(values, index, shape)
    serve("add_lowrank_", merged, *rest, A, B, scale)
    values.copy_(tile_values(merged))


def _assign(values: Tensor, index: Tensor, shape: list[int], weight: Tensor) -> None:
    kept, rows, *_ = canonical(values, index, shape)
    PackedRows(kept, rows, None, "semi24", shape[1]).store(0, shape[0], weight)
    values.copy_(tile_values(kept))


def _linear_fake(x: Tensor, values: Tensor, index: Tensor, shape: list[int], *rest: Any) -> Tensor:
    return x.new_empty([*x.shape[:-1], shape[0]])


def _nothing(*arguments: Any) -> None:
    return None


_WEIGHT = "Tensor values, Tensor index, SymInt[] shape"
_linear_op = define(f"tiled24_linear(Tensor x, {_WEIGHT}, Tensor? bias) -> Tensor", _linear, _linear_fake)
_lora_linear_op = define(
    f"tiled24_lora_linear(Tensor x, {_WEIGHT}, Tensor A, Tensor B, float scale, Tensor? bias) -> Tensor",
    _lora_linear,
    _linear_fake,
)
_IN_PLACE = _WEIGHT.replace("Tensor values", "Tensor(a!) values")
add_lowrank_ = define(
    f"tiled24_add_lowrank_({_IN_PLACE}, Tensor A, Tensor B, float scale) -> ()", _add_lowrank, _nothing
)
assign_ = define(f"tiled24_assign_({_IN_PLACE}, Tensor weight) -> ()", _assign, _nothing)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, values: Tensor, index: Tensor, shape: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(values, index)
        ctx.shape, ctx.x_shape = shape, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _linear_op(x, values, index, shape, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        values, index = ctx.saved_tensors
        weight = canonical(values, index, ctx.shape)
        needs = [ctx.needs_input_grad[0], False, ctx.needs_input_grad[1]]
        dx, _, dbias = torch.ops.perp_kernels.sparse_linear_backward(grad_y, None, *weight, None, needs)
        return dx.view(ctx.x_shape) if needs[0] else None, dbias.to(ctx.bias_dtype) if needs[2] else None, *(None,) * 3


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        scale: float,
        values: Tensor,
        index: Tensor,
        shape: tuple[int, ...],
    ) -> Tensor:
        trains_adapter = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(x if trains_adapter else None, A, B, values, index)
        ctx.scale, ctx.shape, ctx.x_shape = scale, shape, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _lora_linear_op(x, values, index, shape, A, B, scale, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, values, index = ctx.saved_tensors
        weight, needs = canonical(values, index, ctx.shape), list(ctx.needs_input_grad[:4])
        dx, dA, dB, dbias = torch.ops.perp_kernels.masked_lora_linear_backward(
            grad_y, x, *weight, A, B, ctx.scale, None, needs
        )
        return (
            dx.view(ctx.x_shape) if needs[0] else None,
            dA if needs[1] else None,
            dB if needs[2] else None,
            dbias.to(ctx.bias_dtype) if needs[3] else None,
            *(None,) * 4,
        )


def _check_frozen(values: Tensor) -> None:
    if values.requires_grad and torch.is_grad_enabled():
        raise ValueError("The values of a prepared weight get no gradient: train its canonical form.")


def linear(x: Tensor, w: SparseWeight, bias: Tensor | None) -> Tensor:
    """sparse_linear for a prepared weight; arguments are checked by the caller."""
    _check_frozen(w.values)
    if wants_gradient(x, bias):
        return _Linear.apply(x, bias, w.values, w.index, w.shape)
    return _linear_op(x, w.values, w.index, w.shape, bias)


def lora_linear(x: Tensor, w: SparseWeight, A: Tensor, B: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """masked_lora_linear for a prepared weight; arguments are checked by the caller."""
    _check_frozen(w.values)
    if wants_gradient(x, A, B, bias):
        return _LoraLinear.apply(x, A, B, bias, scale, w.values, w.index, w.shape)
    return _lora_linear_op(x, w.values, w.index, w.shape, A, B, scale, bias)
