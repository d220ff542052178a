"""Mixtures of experts: the fused 3-D weights of an experts module as linears of their own, and the routers to leave.

transformers 5 keeps the same projection of all experts in one parameter, [E, N, K] or [E, K, N], in a module that its
experts interface describes: forward(hidden [T, H], expert ids [T, k], their weights [T, k]), the attributes has_gate,
has_bias and is_transposed, the method _apply_gate. While such a module is open, each projection is an ExpertLinear
child of the parameter's name, in the parameter's memory; closed, it is what it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ExpertLinear(nn.Module):
    """y = x W_e^T + bias_e for the tokens of each expert e; weight [E, N, K], bias [E, N] or None."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape[-2:]
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [T, K], sorted by expert, and where each expert's tokens end, int64 [E] -> [T, N]."""
        spans = pairwise([0, *offsets.tolist()])
        biases = [None] * len(self.weight) if self.bias is None else self.bias
        return torch.cat([F.linear(x[i:j], w, b) for (i, j), w, b in zip(spans, self.weight, biases, strict=True)])


class _Open:
    """The forward of an open experts module, put before its own class."""

    def forward(self: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Hidden states [T, H], the experts chosen for each token and their weights, both [T, k] -> [T, H]."""
        k = chosen.shape[-1]
        ordered, order = chosen.flatten().sort(stable=True)
        # Not by counting, where numbers make the shape: `perp.graph` runs this without any.
        each = torch.arange(self.num_experts, dtype=ordered.dtype, device=ordered.device)
        offsets = torch.searchsorted(ordered, each, right=True)
        up = self.gate_up_proj if self.has_gate else self.up_proj
        x = up(hidden[order // k], offsets)
        x = self.down_proj(self._apply_gate(x) if self.has_gate else self.act_fn(x), offsets)
        if self.has_post_expert_norm:
            x = self.post_expert_norm(x)
        # Back in the tokens' order and summed there: the same on every device, which adding by index is not.
        x = x[order.argsort()].view(len(hidden), k, -1)
        return (x * weights.to(x.dtype)[..., None]).sum(1).to(hidden.dtype)


def is_fused(module: nn.Module) -> bool:
    """Whether this is a closed experts module whose projections can be opened."""
    described = all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "num_experts"))
    if not described or getattr(module, "_is_expert_parallel", False):
        return False
    weights = [module._parameters.get(name) for name in _projections(module)]
    return all(weight is not None and weight.ndim == 3 for weight in weights)


def is_open(module: nn.Module) -> bool:
    return isinstance(module, _Open)


@contextmanager
def opened(model: nn.Module) -> Iterator[None]:
    """All experts modules of `model` open; those that were closed are closed again at the end."""
    modules = open_experts(model)
    try:
        yield
    finally:
        for module in modules:
            close(module)


@contextmanager
def closed(model: nn.Module) -> Iterator[None]:
    """All experts modules of `model` closed; those that were open are open again at the end."""
    modules = [module for module in model.modules() if is_open(module)]
    for module in modules:
        close(module)
    try:
        yield
    finally:
        if modules:
            open_experts(model)


def open_experts(model: nn.Module, names: Iterable[str] | None = None) -> list[nn.Module]:
    """Open the experts modules of `model` (those that hold a projection of these qualified names), and return them."""
    found = []
    for name, module in list(model.named_modules()):
        if is_fused(module) and (names is None or any(f"{name}.{p}" in names for p in _projections(module))):
            for projection in _projections(module):
                linear = _view(module, projection)
                del module._parameters[projection]
                module._parameters.pop(f"{projection}_bias", None)
                module._modules[projection] = linear.train(module.training)
            module.__class__ = type(type(module).__name__, (_Open, type(module)), {})
            found.append(module)
    return found


def close(module: nn.Module) -> None:
    """Give an open experts module its fused parameters back."""
    for projection in _projections(module):
        linear: Any = module._modules.pop(projection)
        weight = linear.weight
        if module.is_transposed:
            weight = nn.Parameter(weight.detach().transpose(1, 2).contiguous(), weight.requires_grad)
        module.register_parameter(projection, weight)
        if linear.bias is not None:
            module.register_parameter(f"{projection}_bias", linear.bias)
    module.__class__ = type(module).__bases__[1]


def linears(block: nn.Module) -> dict[str, Any]:
    """Every weight matrix of `block` that a pattern can prune, by its name: nn.Linear and the experts' projections.

    Those of an open experts module are its children; of a closed one, views made for this call. Routers, and the gates
    of shared experts, are left out: they choose, with few weights, what all others compute.
    """
    left = {id(module) for router in routers(block) for module in router.modules()}
    found: dict[str, Any] = {}
    for name, module in block.named_modules():
        if isinstance(module, (nn.Linear, ExpertLinear)) and id(module) not in left:
            found[name] = module
        elif is_fused(module):
            found |= {f"{name}.{projection}": _view(module, projection) for projection in _projections(module)}
    return found


def listed(block: nn.Module) -> dict[str, int]:
    """The linears of experts that are modules of a list, by name, with the number of experts they are one of."""
    return {
        f"{name}.{inner}": _count(module)
        for name, module in block.named_modules()
        if isinstance(module, nn.ModuleList) and _count(module)
        for inner, linear in module.named_modules()
        if isinstance(linear, nn.Linear)
    }


def routers(block: nn.Module) -> list[nn.Module]:
    """Beside the experts, what holds a single matrix of no more outputs than there are experts.

    Experts are a fused module, one of two or more weights [E, .., ..] of another kind, or a list of two or more modules
    with linears.
    """
    found = []
    for parent in block.modules():
        counts = [_count(child) for child in parent.children()]
        for child, own in zip(parent.children(), counts, strict=True):
            matrices = [p for p in child.parameters() if p.ndim == 2]
            if own == 0 and len(matrices) == 1 and len(matrices[0]) <= max(counts):
                found.append(child)
    return found


def _count(module: nn.Module) -> int:
    """How many experts these are, 0 for anything else."""
    if is_fused(module) or is_open(module):
        return int(cast(int, module.num_experts))
    if isinstance(module, nn.ModuleList) and len(module) > 1:
        held = (any(isinstance(m, nn.Linear) for m in expert.modules()) for expert in module)
        return len(module) if all(held) else 0
    # What transformers' interface does not describe, and a convolution, of one such weight, is not.
    stacked = {len(p) for p in module._parameters.values() if p is not None and p.ndim == 3}
    several = sum(p is not None and p.ndim == 3 for p in module._parameters.values()) > 1
    return stacked.pop() if several and len(stacked) == 1 else 0


def _projections(module: Any) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def _view(module: Any, projection: str) -> ExpertLinear:
    """A projection of a closed experts module as [E, N, K], in its own memory."""
    weight = getattr(module, projection)
    if module.is_transposed:
        weight = nn.Parameter(weight.detach().transpose(1, 2), weight.requires_grad)
    return ExpertLinear(weight, getattr(module, f"{projection}_bias", None) if module.has_bias else None)
