"""Adapters beside pruned weights: attach, choose what trains, count it, merge without losing a zero.

A mode is three things: its parameters at the start (`attach`), its forward (`SparseLinear.forward`) and its merge
(`merge`). "mask_lora" is W + scale * M ⊙ (B A) with scale = alpha / r (PERP, arXiv 2312.15230).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import torch
from torch import nn

from perp.blocks import is_norm
from perp.errors import UserError
from perp.linear import SparseLinear

MODES = ("mask_lora",)
PARTS = ("mask_lora", "norms", "biases", "kept")


def attach(model: nn.Module, mode: str = "mask_lora", r: int = 16, alpha: float = 32, seed: int = 0) -> list[str]:
    """Give every SparseLinear in `model` an adapter and return their names; the layers compute the same as before.

    A [r, in] is uniform in ±1/sqrt(in) (Kaiming with a = sqrt(5), PEFT's choice) and B [out, r] zero, both fp32 (fp64
    beside fp64 weights). Every A is drawn on the CPU, in module order, from one generator seeded with `seed`: the same
    on every device and whatever the global generator did. Layers swapped under all-true masks train plain LoRA.
    """
    if mode not in MODES:
        raise UserError(f"{mode!r} is not an adapter mode; choose one of {', '.join(MODES)}.")
    if r < 1:
        raise UserError(f"the adapter rank is {r}; it must be at least 1.")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseLinear)}
    if not layers:
        raise UserError("this model has no SparseLinear to carry an adapter; swap its pruned layers first.")
    if any(layer.mode is not None for layer in layers.values()):
        raise UserError("this model already carries adapters; merge them before attaching new ones.")
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        dtype = torch.promote_types(layer.values.dtype, torch.float32)
        a = torch.empty(r, layer.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        layer.lora_A = nn.Parameter(a.to(layer.values.device, dtype))
        layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, r, dtype=dtype, device=layer.values.device))
        layer.mode, layer.scale = mode, alpha / r
    return list(layers)


@torch.no_grad()
def merge(model: nn.Module) -> list[str]:
    """Add every adapter into its layer's kept weights, fp32 per element and in place, and drop it; returns the names.

    Pruned weights stay exactly zero. The merged layer differs from the adapter's by rounding only.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, SparseLinear) and layer.mode is not None
    }
    for layer in layers.values():
        layer.sparse_weight.add_lowrank_(layer.lora_A, layer.lora_B, layer.scale)
        layer.lora_A = layer.lora_B = None
        layer.mode = None
    return list(layers)


def trainable(modules: Iterable[nn.Module], parts: Collection[str]) -> list[nn.Parameter]:
    """The parameters that `parts` name among `modules` themselves (not their children), in order, each once.

    "mask_lora": the adapters. "norms": all of every norm. "biases": every parameter called `bias`, the norms' included.
    "kept": the values of every SparseLinear. Embeddings and heads belong to none of them, so tied ones never move.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise UserError(f"{unknown[0]!r} is not a part that can be trained; choose among {', '.join(PARTS)}.")
    found: dict[int, nn.Parameter] = {}
    for module in modules:
        own = dict(module.named_parameters(recurse=False))
        chosen = []
        if isinstance(module, SparseLinear):
            chosen += ["lora_A", "lora_B"] if "mask_lora" in parts else []
            chosen += ["values"] if "kept" in parts else []
        if "norms" in parts and is_norm(module):
            chosen += list(own)
        if "biases" in parts:
            chosen.append("bias")
        found |= {id(own[name]): own[name] for name in chosen if name in own}
    return list(found.values())


def select_trainable(model: nn.Module, parts: Collection[str]) -> list[nn.Parameter]:
    """Let the named parts of `model` require gradients, freeze the rest, and return what trains (see `trainable`).

    Adapters that a cast of the model narrowed become fp32 again. UserError where "mask_lora" or "kept" finds no such
    layer, or nothing at all is left to train; a model without norms or biases simply has none to add.
    """
    selected = trainable(model.modules(), parts)
    for part, remedy in (("mask_lora", "attach adapters"), ("kept", "swap its pruned layers")):
        if part in parts and not trainable(model.modules(), {part}):
            raise UserError(f"this model has nothing to train under {part!r}; {remedy} first or leave that part out.")
    if not selected:
        raise UserError(f"this model has nothing to train under {', '.join(sorted(parts))}; choose other parts.")
    model.requires_grad_(False)
    for parameter in selected:
        parameter.requires_grad_(True)
    for adapter in trainable(model.modules(), {"mask_lora"}):
        adapter.data = adapter.data.to(torch.promote_types(adapter.dtype, torch.float32))
    return selected


def count_trainable(model: nn.Module) -> tuple[int, int]:
    """(numbers trained, numbers in the dense model). A trained SparseLinear counts its kept weights.

    The total is the model's own: pruned weights count as weights; adapters and packed index bytes do not count.
    """
    trained = total = 0
    counted: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in counted:
                continue
            counted.add(id(parameter))
            own = moving = parameter.numel()
            if isinstance(module, SparseLinear) and name != "bias":
                own = module.in_features * module.out_features if name == "values" else 0
                moving = module.sparse_weight.nnz if name == "values" else moving
            total += own
            trained += moving if parameter.requires_grad else 0
    return trained, total
