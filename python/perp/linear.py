"""SparseLinear: a linear layer that keeps its pruned weight as a SparseWeight, and the swap to and from nn.Linear."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import perp_kernels as pk
from perp.errors import UserError


class SparseLinear(nn.Module):
    """y = x W^T + bias with a pruned W [out_features, in_features], alone or with an adapter beside it.

    The components of the `pk.SparseWeight` are parameters of this module, dim 0 = output rows, so that sharding, `.to`,
    `state_dict` and `deepcopy` see ordinary tensors: `values` in the weight's dtype, `index` uint8 and, where rows keep
    unequal counts, `row_ptr` int64. None of them asks for a gradient until it is told to; `index` and `row_ptr` cannot.

    With `mode` None the layer is W alone. With "mask_lora" (`perp.adapters` attaches it) the effective weight is
    W + scale * M ⊙ (B A), M the mask, A = `lora_A` [r, in_features], B = `lora_B` [out_features, r]
    (PERP, arXiv 2312.15230: MaskLoRA).
    """

    values: nn.Parameter
    index: nn.Parameter
    row_ptr: nn.Parameter | None
    bias: nn.Parameter | None
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None

    def __init__(self, weight: pk.SparseWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
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
    def from_linear(cls, linear: nn.Linear, mask: Tensor, layout: str = "dense") -> SparseLinear:
        """Pack `linear.weight` under `mask` (bool [out, in], True = kept); the bias parameter is shared, not copied."""
        layer = cls(pk.pack(linear.weight.detach(), mask, layout=layout), linear.bias)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The same layer as nn.Linear, pruned weights exactly zero; UserError while an adapter is attached."""
        if self.mode is not None:
            raise UserError(f"the layer still carries its {self.mode} adapter; merge adapters before unswapping.")
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.sparse_weight.unpack(), requires_grad=self.values.requires_grad)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    @property
    def sparse_weight(self) -> pk.SparseWeight:
        """A view of this layer's weight; what is written into it is written into the layer."""
        return pk.SparseWeight(
            values=self.values,
            index=self.index,
            row_ptr=self.row_ptr,
            shape=(self.out_features, self.in_features),
            layout=self.layout,
        )

    @property
    def weight(self) -> Tensor:
        """The effective weight, adapter included: a new dense tensor without gradient, for readers of nn.Linear."""
        packed = self.sparse_weight
        if self.mode is not None:
            packed.values = packed.values.detach().clone()
            packed.add_lowrank_(self.lora_A, self.lora_B, self.scale)
        return packed.unpack()

    def prepare_(self) -> SparseLinear:
        """Bring a semi24 weight into the order that sparse tensor cores read, in place of its own; see
        `pk.SparseWeight.prepare`, whose errors these are. `state_dict` still gives the canonical form, and takes it."""
        return self._hold(self.sparse_weight.prepare())

    def restore_(self) -> SparseLinear:
        """The inverse of `prepare_`, to the bit."""
        return self._hold(self.sparse_weight.canonical())

    def _hold(self, weight: pk.SparseWeight) -> SparseLinear:
        if weight.layout != self.layout:
            self.values = nn.Parameter(weight.values, requires_grad=False)
            self.index = nn.Parameter(weight.index, requires_grad=False)
            self.layout = weight.layout
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout == pk.TILED24:
            weight = self.sparse_weight.canonical()
            destination[f"{prefix}values"], destination[f"{prefix}index"] = weight.values, weight.index

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        names = f"{prefix}values", f"{prefix}index"
        if self.layout == pk.TILED24 and all(name in state_dict for name in names):
            values, index = (state_dict[name] for name in names)
            weight = pk.SparseWeight(values, index, None, (self.out_features, self.in_features), "semi24").prepare()
            state_dict[names[0]], state_dict[names[1]] = weight.values, weight.index
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] in the dtype of `values` -> [..., out_features]."""
        if self.mode == "mask_lora":
            return pk.masked_lora_linear(x, self.sparse_weight, self.lora_A, self.lora_B, self.scale, self.bias)
        # Not through nn.Module's attributes, which take longer to find than the parameters of a small product to read.
        own: dict[str, Any] = self._parameters
        shape = (self.out_features, self.in_features)
        weight = pk.SparseWeight(own["values"], own["index"], own["row_ptr"], shape, self.layout)
        return pk.sparse_linear(x, weight, own["bias"])

    def extra_repr(self) -> str:
        adapter = "" if self.lora_A is None else f", mode={self.mode}, r={self.lora_A.shape[0]}, scale={self.scale:g}"
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, layout={self.layout}{adapter}"


def swap_linears(model: nn.Module, masks: Mapping[str, Tensor], layout: str = "dense") -> list[str]:
    """Replace in place each nn.Linear that `masks` names (qualified name -> bool [out, in], True = kept); the names.

    Names are checked before anything is replaced: each must be an nn.Linear, have its mask's shape and own its weight
    alone, since packing one side of a tied weight would silently untie it. The dense weights are released one by one.
    """
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules())
    for name, mask in masks.items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise UserError(f"{name} is not an nn.Linear of this model; masks must name the layers that were pruned.")
        if mask.dtype != torch.bool or mask.shape != linear.weight.shape:
            raise UserError(
                f"the mask of {name} is {mask.dtype} {list(mask.shape)}; it must be bool {list(linear.weight.shape)}."
            )
        if owners[id(linear.weight)] > 1:
            raise UserError(f"the weight of {name} is tied to another module; a tied weight cannot be pruned.")
    for name, mask in masks.items():
        replace_module(model, name, SparseLinear.from_linear(modules.pop(name), mask, layout))
    return list(masks)


def prepare(model: nn.Module) -> list[str]:
    """Bring every 2:4 layer of `model` that can be into the order that sparse tensor cores read, in place; the names.

    Worth it where `perp doctor` lists CUDA kernels: elsewhere each call restores the canonical form. Layers of other
    layouts, of other dtypes than bfloat16 and float16, or whose inputs are no multiple of 64, stay as they are.
    """
    prepared = []
    for name, layer in model.named_modules():
        if isinstance(layer, SparseLinear) and layer.layout == "semi24":
            with contextlib.suppress(ValueError, TypeError):
                layer.prepare_()
                prepared.append(name)
    return prepared


def unswap(model: nn.Module) -> list[str]:
    """Put nn.Linear back for every SparseLinear, pruned weights exactly zero; UserError before adapters are merged."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseLinear)}
    for name, layer in layers.items():
        if layer.mode is not None:
            raise UserError(f"{name} still carries its {layer.mode} adapter; merge adapters before unswapping.")
    names = list(layers)
    for name in names:
        replace_module(model, name, layers.pop(name).to_linear())
    return names


def replace_module(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` where the submodule `name` of `model` was."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
