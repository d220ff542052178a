"""Parts: what of a model trains. Choose parameters by part, count them, and know the rate that suits a part."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import torch
from torch import nn

from perp.blocks import is_norm
from perp.errors import UserError
from perp.head import AdaptedHead
from perp.linear import SparseLinear
from perp.modes import MODES

# Each of these moves the pruned weights, so that a model trains at most one.
WEIGHTS = (*MODES, "kept", "full")
PARTS = (*WEIGHTS, "norms", "biases", "head")
# What a unit can be fitted with: the head is in none, and an adapter that never merges would be lost.
UNIT_PARTS = tuple(part for part in PARTS if part not in ("lora", "head"))

# AdamW's peak rates where none is given, by the first part of each table that trains, in its order.
#
# Retraining: mask_lora from the first trials on SmolLM2-135M; full, lora_prune, spp, scale_lora, norms and head from
# the trials in docs/methods.md; the others are what the literature uses.
RETRAIN_RATES = {
    "full": 4e-4,
    "kept": 1e-4,
    "mask_lora": 2e-3,
    "lora_prune": 3e-3,
    "lora": 1e-3,
    "spp": 1e-2,
    "scale_lora": 3e-3,
    "norms": 5e-3,
    "biases": 2e-3,
    "head": 1e-3,
}
# Reconstruction, a unit at a time. mask_lora and kept are tuned by the error on validation windows after the first
# three blocks of a model of 135M parameters, at 2:4 and at 50 % (48 steps). Kept weights at 6e-3 did 2 % better, but
# fitted the first unit of all worse than it began.
UNIT_RATES = {
    "full": 3e-3,
    "kept": 3e-3,
    "mask_lora": 1e-2,
    "lora_prune": 5e-3,
    "spp": 1e-2,
    "scale_lora": 3e-3,
    "norms": 5e-3,
    "biases": 5e-3,
}


def default_rate(rates: dict[str, float], parts: Collection[str]) -> float:
    """The rate of the first part in `rates` that is among `parts`."""
    return next(rate for part, rate in rates.items() if part in parts)


def check(parts: Collection[str], known: Collection[str] = PARTS) -> None:
    """UserError for a part that is not known, for none at all, and for parts that contradict each other."""
    unknown = sorted(set(parts) - set(known))
    if unknown:
        raise UserError(f"{unknown[0]!r} is not a part that can be trained here; choose among {', '.join(known)}.")
    if not parts:
        raise UserError(f"nothing is chosen to train; choose among {', '.join(known)}.")
    same = [part for part in WEIGHTS if part in parts]
    if len(same) > 1:
        raise UserError(f'"{same[0]}" and "{same[1]}" train the same weights; choose one of them.')
    if {"full", "head"} <= set(parts):
        raise UserError('"full" trains the head itself; leave "head" out, which would put an adapter beside it.')


def adapter_mode(parts: Collection[str]) -> str | None:
    """The adapter mode among `parts`."""
    return next((part for part in parts if part in MODES), None)


def trainable(modules: Iterable[nn.Module], parts: Collection[str]) -> list[nn.Parameter]:
    """The parameters that `parts` name among `modules` themselves (not their children), in order, each once.

    An adapter mode: the adapters of that mode. "kept": the values of every SparseLinear. "norms": all of every norm.
    "biases": every parameter called `bias`, the norms' included. "head": the adapter of the head. "full": every
    parameter but adapters: kept values, norms, biases, embeddings (tied or not) and head. No other part moves an
    embedding, nor a head otherwise than by its adapter.
    """
    found: dict[int, nn.Parameter] = {}
    for module in modules:
        own = dict(module.named_parameters(recurse=False))
        chosen = []
        if isinstance(module, SparseLinear):
            chosen += ["lora_A", "lora_B"] if module.mode in parts else []
            chosen += ["values"] if "kept" in parts else []
        if isinstance(module, AdaptedHead):
            chosen += ["lora_A", "lora_B"] if "head" in parts else []
        if "norms" in parts and is_norm(module):
            chosen += list(own)
        if "biases" in parts:
            chosen.append("bias")
        if "full" in parts:
            chosen += [name for name, p in own.items() if p.is_floating_point() and not name.startswith("lora_")]
        found |= {id(own[name]): own[name] for name in chosen if name in own}
    return list(found.values())


def select_trainable(model: nn.Module, parts: Collection[str]) -> list[nn.Parameter]:
    """Let the named parts of `model` require gradients, freeze the rest, and return what trains (see `trainable`).

    Adapters that a cast of the model narrowed become fp32 again. UserError where a part that needs them finds no
    adapters or no SparseLinear, or nothing at all is left to train; a model without norms or biases simply has none.
    """
    check(parts)
    selected = trainable(model.modules(), parts)
    for part in (*MODES, "kept", "head"):
        if part in parts and not trainable(model.modules(), {part}):
            remedy = "swap its pruned layers" if part == "kept" else "attach adapters"
            raise UserError(f"this model has nothing to train under {part!r}; {remedy} first or leave that part out.")
    if not selected:
        raise UserError(f"this model has nothing to train under {', '.join(sorted(parts))}; choose other parts.")
    model.requires_grad_(False)
    for parameter in selected:
        parameter.requires_grad_(True)
    for adapter in trainable(model.modules(), {*MODES, "head"}):
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
            if name in ("lora_A", "lora_B"):
                own = 0
            elif isinstance(module, SparseLinear) and name != "bias":
                own = math.prod(module.shape) if name == "values" else 0
                moving = module.sparse_weight.nnz if name == "values" else moving
            total += own
            trained += moving if parameter.requires_grad else 0
    return trained, total
