"""Adapters beside pruned weights: attach them, merge them without losing a zero, or take them off unmerged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perp import head
from perp.errors import UserError
from perp.linear import SparseLinear
from perp.modes import MODES


@dataclass(frozen=True)
class Adapter:
    """An adapter off its layer: A [r, in], B [out, r], and the factor of B A."""

    A: Tensor
    B: Tensor
    scale: float


def attach(model: nn.Module, mode: str = "mask_lora", r: int = 16, alpha: float = 32, seed: int = 0) -> list[str]:
    """Give every SparseLinear in `model` an adapter of this mode and return their names; `perp.modes` has the modes.

    The layers compute the same as before (scale_lora: to rounding). A and B are fp32 (fp64 beside fp64 weights). What
    is random is drawn on the CPU, in module order, from one generator seeded with `seed`: the same on every device and
    whatever the global generator did. Layers swapped under all-true masks train plain LoRA.
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
        A, B = MODES[mode].start(layer.shape, r, generator)
        layer.lora_A = nn.Parameter(A.to(layer.values.device, dtype))
        layer.lora_B = nn.Parameter(B.to(layer.values.device, dtype))
        layer.mode, layer.scale = mode, alpha / r
    return list(layers)


def adapted(model: nn.Module) -> dict[str, SparseLinear]:
    """The layers of `model` that carry an adapter, by name."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseLinear)}
    return {name: layer for name, layer in layers.items() if layer.mode is not None}


@torch.no_grad()
def merge(model: nn.Module) -> list[str]:
    """Merge every adapter into its layer's kept weights, fp32 per element and in place, and drop it; returns the names.

    Pruned weights stay exactly zero. The merged layer differs from the adapter's by rounding only, except under
    lora_prune, which loses here what it added to pruned weights. An adapter of the head goes into the head, untied
    first from an embedding that it shares (`perp.head`). UserError, and nothing merged, for lora, which would fill the
    zeros: `detach` takes it off.
    """
    layers = adapted(model)
    for name, layer in layers.items():
        if layer.mode is not None and MODES[layer.mode].merge_ is None:
            raise UserError(
                f"the {layer.mode} adapter of {name} cannot be merged without filling the zeros; keep the adapters "
                "(perp run --keep-adapters, perp.detach) or train mask_lora, which merges."
            )
    for layer in layers.values():
        A, B, scale, mode = _taken(layer)
        merge_ = MODES[mode].merge_
        assert merge_ is not None
        merge_(layer.sparse_weight, A, B, scale)
    return [*layers, *head.merge(model)]


def detach(model: nn.Module) -> dict[str, Adapter]:
    """Take every adapter off its layer without merging it, and return them by the layer's name."""
    found = {}
    for name, layer in adapted(model).items():
        A, B, scale, _ = _taken(layer)
        found[name] = Adapter(A.detach(), B.detach(), scale)
    return found


def _taken(layer: SparseLinear) -> tuple[Tensor, Tensor, float, str]:
    A, B, mode = layer.lora_A, layer.lora_B, layer.mode
    assert A is not None
    assert B is not None
    assert mode is not None
    layer.lora_A = layer.lora_B = None
    layer.mode = None
    return A, B, layer.scale, mode
