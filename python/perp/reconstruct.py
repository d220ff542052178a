"""Reconstruction: fit what a pruned unit computes to what it computed when it was dense.

PERP (arXiv 2312.15230) does this per block with MaskLoRA, A Free Lunch in LLM Compression (arXiv 2510.14444) per
attention and MLP with all kept weights.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, MutableSequence, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from perp.adapters import PARTS, attach, merge, trainable
from perp.blocks import ArgumentsOf, outputs
from perp.errors import UserError
from perp.linear import swap_linears, unswap
from perp.optim import AdamW
from perp.units import Unit
from perp_kernels import SparseWeight

# Tuned by the error on validation windows after the first three blocks of a model of 135M parameters, at 2:4 and at
# 50 % (48 steps). Kept weights at 6e-3 did 2 % better, but fitted the first unit of all worse than it began.
_RATES = {"mask_lora": 1e-2, "kept": 3e-3}
_OTHER_RATE = 5e-3


@dataclass(frozen=True)
class ReconstructSettings:
    """How a unit is fitted.

    `parts`: what trains: "kept" (the kept weights) or "mask_lora" (adapters of rank `r` and scale `alpha` / r, merged
    at the end), and "norms" and "biases" of the unit. `lr` None: the rate that suits the parts. `epochs` passes over
    the windows in batches of `batch`, each in an order drawn from `seed`; AdamW without weight decay, the rate rising
    over the first `warmup` share of the steps and falling linearly to 0.
    """

    parts: Collection[str] = ("kept", "norms")
    lr: float | None = None
    epochs: int = 3
    batch: int = 2
    warmup: float = 0.1
    r: int = 16
    alpha: float = 32
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = sorted(set(self.parts) - set(PARTS))
        if unknown or not self.parts:
            what = repr(unknown[0]) if unknown else "nothing"
            raise UserError(f"{what} is not a part to reconstruct with; choose among {', '.join(PARTS)}.")
        if {"kept", "mask_lora"} <= set(self.parts):
            raise UserError('"kept" and "mask_lora" train the same weights; reconstruct with one of them.')
        if self.epochs < 1 or self.batch < 1:
            raise UserError(
                f"{self.epochs} epochs in batches of {self.batch} are no training; both must be at least 1."
            )

    @property
    def rate(self) -> float:
        """`lr`, or the default for these parts."""
        if self.lr is not None:
            return self.lr
        return next((rate for part, rate in _RATES.items() if part in self.parts), _OTHER_RATE)


@dataclass(frozen=True)
class Losses:
    """The mean squared error of a unit's output over all windows, pruned only and as it was left.

    `restored`: the fit did worse than it began, or diverged, and was undone.
    """

    before: float
    after: float
    restored: bool = False


def reconstruct(
    unit: Unit,
    masks: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    targets: MutableSequence[Tensor],
    arguments: ArgumentsOf,
    settings: ReconstructSettings,
) -> Losses:
    """Fit the pruned `unit` to `targets`; its pruned weights stay exactly zero.

    `masks`: bool [out, in], True = kept, of at least the unit's linears, by qualified name. `inputs`, `targets`: hidden
    states [1, T, H], one per window, in memory of any device; `arguments(window_ids)`: the rest of the block's call.

    `targets` is used up: on return it holds the outputs of the unit as it was left, which the next unit reads, so that
    no third copy of the activations is ever alive. UserError where the unit's output is NaN or infinite to begin with.
    """
    before = _measure(unit, inputs, targets, arguments)
    if not math.isfinite(before):
        raise UserError(f"the output of {unit.name} is NaN or infinite; load the model in float32.")
    with _prepared(unit, masks, settings) as parameters:
        packed, others = _begun(unit)
        diverged = bool(parameters) and not _train(unit, parameters, inputs, targets, arguments, settings)
    after = math.nan if diverged else _measure(unit, inputs, targets, arguments, overwrite=True)
    if after <= before:
        return Losses(before, after)
    for name, weight in packed.items():
        unit.linears[name].weight.data = weight.unpack()
    for parameter, value in others:
        parameter.data = value
    for window, output in enumerate(outputs(unit, inputs, arguments)):
        targets[window] = output
    return Losses(before, before, restored=True)


@contextmanager
def _prepared(unit: Unit, masks: Mapping[str, Tensor], settings: ReconstructSettings) -> Iterator[list[nn.Parameter]]:
    """The unit's linears as SparseLinear and, of the whole block, only the chosen parameters (yielded) trainable."""
    block = unit.block
    flags = {name: parameter.requires_grad for name, parameter in block.named_parameters()}
    # Packed, so that gradients, moments and what an undone fit goes back to are of the kept weights alone.
    swap_linears(block, {name: masks[f"{unit.prefix}.{name}"] for name in unit.linear_names}, "bitmap")
    try:
        if "mask_lora" in settings.parts:
            attach(block, r=settings.r, alpha=settings.alpha, seed=settings.seed)
        parameters = trainable([*unit.linears.values(), *unit.norms.values()], settings.parts)
        block.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield parameters
    finally:
        merge(block)
        unswap(block)
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(flags[name])


@torch.enable_grad()
def _train(
    unit: Unit,
    parameters: list[nn.Parameter],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    arguments: ArgumentsOf,
    settings: ReconstructSettings,
) -> bool:
    """Train the parameters; False where the loss or a gradient became NaN or infinite."""

    def loss(ids: list[int]) -> Tensor:
        output = unit(torch.cat([inputs[i] for i in ids]), arguments(ids))
        return _error(output, torch.cat([targets[i] for i in ids]))

    steps = settings.epochs * math.ceil(len(inputs) / settings.batch)
    optimiser = AdamW(parameters, settings.rate, steps, settings.warmup, dtype=inputs[0].dtype)
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.epochs):
        for ids in torch.randperm(len(inputs), generator=generator).split(settings.batch):
            try:
                optimiser.step([partial(loss, ids.tolist())])
            except UserError:
                return False
    return True


@torch.no_grad()
def _measure(
    unit: Unit,
    inputs: Sequence[Tensor],
    targets: MutableSequence[Tensor],
    arguments: ArgumentsOf,
    overwrite: bool = False,
) -> float:
    """The mean of the windows' errors; with `overwrite`, each target gives way to the output."""
    total = 0.0
    for window, output in enumerate(outputs(unit, inputs, arguments)):
        total += _error(output, targets[window]).item()
        if overwrite:
            targets[window] = output
    return total / len(inputs)


def _error(output: Tensor, target: Tensor) -> Tensor:
    """The mean squared difference, in fp32 at least."""
    dtype = torch.promote_types(output.dtype, torch.float32)
    return (output.to(dtype) - target.to(output.device, dtype)).square().mean()


def _begun(unit: Unit) -> tuple[dict[str, SparseWeight], list[tuple[nn.Parameter, Tensor]]]:
    """Copies of the kept weights of the unit's SparseLinears, by name, and of its norms' and biases' parameters."""
    packed, others = {}, []
    for name, layer in unit.linears.items():
        packed[name] = layer.sparse_weight
        packed[name].values = layer.values.detach().clone()
        if layer.bias is not None:
            others.append((layer.bias, layer.bias.detach().clone()))
    for norm in unit.norms.values():
        others += [(parameter, parameter.detach().clone()) for parameter in norm.parameters()]
    return packed, others
