"""Reconstruction: fit what a pruned unit computes to what it computed when it was dense.

PERP (arXiv 2312.15230) does this per block with MaskLoRA, A Free Lunch in LLM Compression (arXiv 2510.14444) per
attention and MLP with all kept weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, MutableSequence, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from perp import distributed, flow, parts, precision, unit_loss
from perp.adapters import attach, merge
from perp.blocks import outputs
from perp.errors import UserError
from perp.linear import swap_linears, unswap
from perp.modes import MODES
from perp.optim import AdamW
from perp.unit_loss import LOSSES, Error
from perp.units import Unit
from perp_kernels import SparseWeight


@dataclass(frozen=True)
class ReconstructSettings:
    """How a unit is fitted.

    `parts`: what trains of the unit, see `perp.parts`; adapters, of rank `r` and scale `alpha` / r, are merged at the
    end, and "full" is kept weights, norms and biases. `lr` None: the rate that suits the parts. `epochs` passes over
    the windows in batches of `batch`, each in an order drawn from `seed`; AdamW without weight decay, the rate rising
    over the first `warmup` share of the steps and falling linearly to 0. `inputs` and `targets`: see `perp.flow`;
    `loss`: one of `LOSSES`. `precision`: "model", or "bf16" for the products of training (`perp.precision`).
    """

    parts: Collection[str] = ("kept", "norms")
    inputs: str = "sparse"
    targets: str = "dense-weights"
    loss: str = "mse"
    lr: float | None = None
    epochs: int = 3
    batch: int = 2
    warmup: float = 0.1
    r: int = 16
    alpha: float = 32
    seed: int = 0
    precision: str = "model"

    def __post_init__(self) -> None:
        parts.check(self.parts, parts.UNIT_PARTS)
        precision.get(self.precision)
        flow.check(self.inputs, self.targets)
        if self.loss not in LOSSES:
            raise UserError(f"{self.loss!r} is not a loss of reconstruction; choose one of {', '.join(LOSSES)}.")
        if self.epochs < 1 or self.batch < 1:
            raise UserError(
                f"{self.epochs} epochs in batches of {self.batch} are no training; both must be at least 1."
            )

    @property
    def two_models(self) -> bool:
        """Whether a unit reads what the pruned model gives and is fitted to what the dense one does."""
        return (self.inputs, self.targets) == ("sparse", "dense-model")

    @property
    def rate(self) -> float:
        """`lr`, or the default for these parts."""
        return parts.default_rate(parts.UNIT_RATES, self.parts) if self.lr is None else self.lr


@dataclass(frozen=True)
class Losses:
    """The loss of a unit's output, the mean over all windows, pruned only and as it was left.

    `restored`: the fit did worse than it began, or diverged, and was undone. `unmerged`: the loss before the adapters
    were merged, where the merge changes it (lora_prune).
    """

    before: float
    after: float
    restored: bool = False
    unmerged: float | None = None


def reconstruct(
    unit: Unit,
    masks: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    targets: MutableSequence[Tensor],
    arguments: Callable[[Sequence[int]], Any],
    settings: ReconstructSettings,
    keep_targets: bool = False,
) -> Losses:
    """Fit the pruned `unit` to `targets`; its pruned weights stay exactly zero.

    `masks`: bool [out, in], True = kept, of at least the unit's linears, by qualified name. `inputs`, `targets`: hidden
    states [1, T, H], one per window of this rank, in memory of any device; `arguments(window_ids)`: the rest of the
    block's call.

    `targets` is used up, unless `keep_targets`: on return it holds the outputs of the unit as it was left, which the
    next unit reads, so that no third copy of the activations is ever alive. UserError where the unit's output is NaN or
    infinite to begin with.
    """
    error = LOSSES[settings.loss]
    before = _measure(unit, inputs, targets, arguments, error)
    if not math.isfinite(before):
        raise UserError(f"the output of {unit.name} is NaN or infinite; load the model in float32.")
    unmerged = None
    mode = parts.adapter_mode(settings.parts)
    with _prepared(unit, masks, settings) as parameters:
        packed, others = _begun(unit)
        diverged = bool(parameters) and not _train(unit, parameters, inputs, targets, arguments, settings)
        if mode and not MODES[mode].exact and not diverged:
            unmerged = _measure(unit, inputs, targets, arguments, error)
    overwrite = not keep_targets
    after = math.nan if diverged else _measure(unit, inputs, targets, arguments, error, overwrite)
    if after <= before:
        return Losses(before, after, unmerged=unmerged)
    for name, weight in packed.items():
        unit.linears[name].weight.data = weight.unpack()
    for parameter, value in others:
        parameter.data = value
    for window, output in enumerate(outputs(unit, inputs, arguments) if overwrite else ()):
        targets[window] = output
    return Losses(before, before, restored=True, unmerged=unmerged)


@contextmanager
def _prepared(unit: Unit, masks: Mapping[str, Tensor], settings: ReconstructSettings) -> Iterator[list[nn.Parameter]]:
    """The unit's linears as SparseLinear and, of the whole block, only the chosen parameters (yielded) trainable."""
    block = unit.block
    flags = {name: parameter.requires_grad for name, parameter in block.named_parameters()}
    mode = parts.adapter_mode(settings.parts)
    # Packed, so that gradients, moments and what an undone fit goes back to are of the kept weights alone.
    layout = "dense" if mode else "bitmap"
    swap_linears(block, {name: masks[f"{unit.prefix}.{name}"] for name in unit.linear_names}, layout)
    try:
        if mode and unit.linear_names:
            attach(block, mode, settings.r, settings.alpha, settings.seed)
        parameters = parts.trainable([*unit.linears.values(), *unit.norms.values()], settings.parts)
        block.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield parameters
    finally:
        merge(block)
        unswap(block, keep_open=True)
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(flags[name])


@torch.enable_grad()
def _train(
    unit: Unit,
    parameters: list[nn.Parameter],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    arguments: Callable[[Sequence[int]], Any],
    settings: ReconstructSettings,
) -> bool:
    """Train the parameters; False where the loss or a gradient became NaN or infinite."""

    def loss(ids: list[int], share: float) -> Tensor:
        output = unit(torch.cat([inputs[i] for i in ids]), arguments(ids))
        return LOSSES[settings.loss](output, torch.cat([targets[i] for i in ids])) * share

    count = int(distributed.total(len(inputs)))
    steps = settings.epochs * math.ceil(count / settings.batch)
    generator = torch.Generator().manual_seed(settings.seed)
    with precision.narrowed_linears(unit.linears.values(), precision.get(settings.precision)) as masters:
        optimiser = AdamW(parameters, settings.rate, steps, settings.warmup, inputs[0].dtype, masters)
        for _ in range(settings.epochs):
            for ids in torch.randperm(count, generator=generator).split(settings.batch):
                own = distributed.held(ids.tolist())
                share = distributed.share(sum(unit_loss.weight(settings.loss, targets[i]) for i in own))
                try:
                    optimiser.step([partial(loss, own, share)] if own else [])
                except UserError:
                    return False
    return True


@torch.no_grad()
def _measure(
    unit: Unit,
    inputs: Sequence[Tensor],
    targets: MutableSequence[Tensor],
    arguments: Callable[[Sequence[int]], Any],
    error: Error,
    overwrite: bool = False,
) -> float:
    """The mean of all windows' losses; with `overwrite`, each target gives way to the output."""
    losses = {}
    for window, output in enumerate(outputs(unit, inputs, arguments)):
        losses[distributed.number(window)] = error(output, targets[window]).item()
        if overwrite:
            targets[window] = output
    losses = distributed.merged(losses)
    return sum(losses[window] for window in sorted(losses)) / len(losses)


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
