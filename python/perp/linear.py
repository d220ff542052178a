"""SparseLinear: a linear layer that keeps its pruned weight as a SparseWeight, and the swap to and from nn.Linear."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import perp_kernels as pk
from perp.errors import UserError
from perp.experts import ExpertLinear, close, is_open, open_experts
from perp.modes import MODES


class SparseLinear(nn.Module):
    """y = x W^T + bias with a pruned W [out_features, in_features], alone or with an adapter beside it.

    The same projection of several experts is one layer, with W [experts, out_features, in_features]; A and B then have
    the number of experts in front, too.

    The components of the `pk.SparseWeight` are parameters of this module, dim 0 = output rows, so that sharding, `.to`,
    `state_dict` and `deepcopy` see ordinary tensors: `values` in the weight's dtype, `index` uint8 and, where rows keep
    unequal counts, `row_ptr` int64. None of them asks for a gradient until it is told to; `index` and `row_ptr` cannot.

    With `mode` None the layer is W alone. With one of `perp.modes.MODES` (`perp.adapters` attaches it) an adapter makes
    the effective weight of it, A = `lora_A` [r, in_features], B = `lora_B` [out_features, r].
    """

    values: nn.Parameter
    index: nn.Parameter
    row_ptr: nn.Parameter | None
    bias: nn.Parameter | None
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None

    def __init__(self, weight: pk.SparseWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.shape = weight.shape
        self.out_features, self.in_features = weight.shape[-2:]
        self.layout = weight.layout
        self.mode: str | None = None
        self.scale = 1.0
        components = weight.components()
        for name in ("values", "index", "row_ptr"):
            tensor = components.get(name)
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))
        self.register_parameter("bias", bias)
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)

    @classmethod
    def from_linear(cls, linear: nn.Linear | ExpertLinear, mask: Tensor, layout: str = "dense") -> SparseLinear:
        """Pack `linear.weight` under `mask` (bool of its shape, True = kept); the bias parameter is shared."""
        layer = cls(pk.pack(linear.weight.detach(), mask, layout=layout), linear.bias)
        return layer.train(linear.training)

    def to_linear(self) -> Any:
        """The layer as nn.Linear (or ExpertLinear), pruned weights exactly zero; UserError while it has an adapter."""
        if self.mode is not None:
            raise UserError(f"the layer still carries its {self.mode} adapter; merge adapters before unswapping.")
        weight = nn.Parameter(self.sparse_weight.unpack(), requires_grad=self.values.requires_grad)
        if len(self.shape) == 3:
            return ExpertLinear(weight, self.bias).train(self.training)
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = weight
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    @property
    def sparse_weight(self) -> pk.SparseWeight:
        """A view of this layer's weight; what is written into it is written into the layer."""
        return pk.SparseWeight(
            values=self.values,
            index=self.index,
            row_ptr=self.row_ptr,
            shape=self.shape,
            layout=self.layout,
        )

    @property
    def weight(self) -> Tensor:
        """The effective weight, adapter included: a new dense tensor without gradient, for readers of nn.Linear."""
        if self.mode is not None and self.lora_A is not None and self.lora_B is not None:
            return MODES[self.mode].effective(self.sparse_weight, self.lora_A, self.lora_B, self.scale)
        return self.sparse_weight.unpack()

    def forward(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        """x [..., in_features] in the dtype of `values` -> [..., out_features].

        With experts, x [T, in_features] is sorted by expert and `offsets`, int64 [E], says where each one's tokens end.
        """
        if self.mode is not None and self.lora_A is not None and self.lora_B is not None:
            forward = MODES[self.mode].forward
            return forward(x, self.sparse_weight, self.lora_A, self.lora_B, self.scale, self.bias, offsets)
        # Not through nn.Module's attributes, which take longer to find than the parameters of a small product to read.
        own: dict[str, Any] = self._parameters
        weight = pk.SparseWeight(own["values"], own["index"], own["row_ptr"], self.shape, self.layout)
        return pk.sparse_linear(x, weight, own["bias"], offsets)

    def extra_repr(self) -> str:
        adapter = "" if self.lora_A is None else f", mode={self.mode}, r={self.lora_A.shape[0]}, scale={self.scale:g}"
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, layout={self.layout}{adapter}"


def swap_linears(model: nn.Module, masks: Mapping[str, Tensor], layout: str = "dense") -> list[str]:
    """Replace in place each nn.Linear that `masks` names (qualified name -> bool [out, in], True = kept); the names.

    Fused experts (bool [experts, out, in]) are opened first, see `perp.experts`.
    Names are checked before anything is replaced: each must be an nn.Linear, have its mask's shape and own its weight
    alone, since packing one side of a tied weight would silently untie it. The dense weights are released one by one.
    """
    newly_open = open_experts(model, masks.keys())
    try:
        _check_swap(model, masks)
    except UserError:
        for module in newly_open:
            close(module)
        raise
    modules = dict(model.named_modules())
    for name, mask in masks.items():
        replace_module(model, name, SparseLinear.from_linear(modules.pop(name), mask, layout))
    return list(masks)


def _check_swap(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules())
    for name, mask in masks.items():
        linear = modules.get(name)
        if not isinstance(linear, (nn.Linear, ExpertLinear)):
            raise UserError(f"{name} is not an nn.Linear of this model; masks must name the layers that were pruned.")
        if mask.dtype != torch.bool or mask.shape != linear.weight.shape:
            raise UserError(
                f"the mask of {name} is {mask.dtype} {list(mask.shape)}; it must be bool {list(linear.weight.shape)}."
            )
        if owners[id(linear.weight)] > 1:
            raise UserError(f"the weight of {name} is tied to another module; a tied weight cannot be pruned.")


def unswap(model: nn.Module, keep_open: bool = False) -> list[str]:
    """Put nn.Linear back for every SparseLinear, pruned weights exactly zero; UserError before adapters are merged.

    Open experts are fused again, unless `keep_open`.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseLinear)}
    for name, layer in layers.items():
        if layer.mode is not None:
            raise UserError(f"{name} still carries its {layer.mode} adapter; merge adapters before unswapping.")
    names = list(layers)
    for name in names:
        replace_module(model, name, layers.pop(name).to_linear())
    for module in [module for module in model.modules() if is_open(module) and not keep_open]:
        close(module)
    return names


def replace_module(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` where the submodule `name` of `model` was."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
