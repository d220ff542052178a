"""Pruning a model block by block, each on the outputs of the blocks already pruned, with or without reconstruction."""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from perp import allocate as allocation
from perp import pruners
from perp.adapters import trainable
from perp.blocks import ArgumentsOf, Calls, all_prunable, find_blocks, outputs, prunable, run_block, to_store
from perp.errors import UserError
from perp.models import check_finite
from perp.progress import Progress, Silent
from perp.pruners import Pruner, magnitude
from perp.reconstruct import Losses, ReconstructSettings
from perp.reconstruct import reconstruct as fit
from perp.refine import Refined, RefineSettings
from perp.refine import refine as improve
from perp.statistics import Kind, Statistics, collect
from perp.units import Unit, units
from perp_kernels import Pattern, PatternError, masked_refit

# Of the closed-form refit, SparseGPT's.
DAMP = 0.01


@dataclass(frozen=True)
class Pruned:
    """What pruning a model gave.

    `masks`: by qualified name of the linear, bool [out, in] on the CPU, True = kept. `losses`: by name of the unit, of
    those that were reconstructed. `seconds`: wall-clock time. `refined`: by name of the linear, what refining its mask
    did to its error on the windows held out; its mask is in `masks`. `shares`: of zeros, by block, where they differ.
    """

    masks: dict[str, Tensor]
    losses: dict[str, Losses]
    seconds: float
    refined: dict[str, Refined] = field(default_factory=dict)
    shares: list[float] = field(default_factory=list)


@torch.no_grad()
def prune_model(
    model: PreTrainedModel,
    windows: Tensor | None,
    method: str = "wanda",
    pattern: str | Pattern = "0.5",
    reconstruct: ReconstructSettings | None = None,
    granularity: str = "half-block",
    progress: Progress | None = None,
    *,
    refine: RefineSettings | None = None,
    refit: bool = False,
    allocate: str = "uniform",
) -> Pruned:
    """Prune every nn.Linear of the decoder's blocks in place; embeddings, head and norms are not pruned.

    `windows`: calibration token ids, int64 [n, T]; None will do for a method without statistics where nothing is
    reconstructed. `pattern` takes the method's scope where it names none. `granularity`: "half-block" or "block", the
    unit of reconstruction. `refine`: improve each linear's mask, on the calibration windows that it does not hold out;
    `refit`: fit the kept weights of each linear to what its dense weights compute, in closed form; both come before any
    reconstruction. `allocate`: "uniform", or "owl" for a share of zeros by block.

    Each block is fed by the pruned blocks before it. One pass with its dense weights gives the statistics of all its
    linears; then each unit in turn is pruned and, with `reconstruct`, fitted to what its dense weights compute from the
    same inputs. The model is put in eval mode. What can be refused is refused before any weight changes: UserError, or
    PatternError for a layer whose inputs do not divide by M.
    """
    started = time.monotonic()
    progress = progress or Silent()
    pruner, pattern = pruners.resolve(method, pattern)
    prefix, blocks = find_blocks(model.eval())
    check(method, pattern, refine, refit, allocate)
    _check(model, pattern, reconstruct)
    job = _Job(pruner, pattern, reconstruct, refine, refit)
    calls, patterns = None, [pattern] * len(blocks)
    if job.needs or reconstruct or allocate == "owl":
        if windows is None:
            raise UserError(f"{method} needs windows of calibration text here; give some.")
        job.held_out = refine.windows(len(windows)) if refine else ()
        if allocate == "owl":
            patterns = allocation.owl(model, windows, pattern, progress)
        calls = Calls(model, windows)
    progress.stage("prune", len(blocks))
    for index, parts in units(model, windows, granularity if reconstruct else "block"):
        job.pattern = patterns[index]
        if calls is None:
            job.prune(parts[0], {})
        else:
            job.calibrated(parts, calls.hidden, partial(calls.arguments, index), last=index + 1 == len(blocks))
        progress.unit(f"{prefix}.{index}", **job.figures(parts))
    progress.done()
    if job.unread:
        warnings.warn(
            f"{len(job.unread)} linears read no token of the calibration text and were pruned by magnitude, such as "
            f"{job.unread[0]}; use more windows.",
            stacklevel=2,
        )
    if kept := [name for name, refined in job.refined.items() if refined.steps == 0]:
        warnings.warn(
            f"refinement found no better mask on the windows held out for {len(kept)} of {len(job.refined)} linears, "
            f"such as {kept[0]}; they keep the one of {method}.",
            stacklevel=2,
        )
    shares = [float(pattern.sparsity) for pattern in patterns] if allocate == "owl" else []
    return Pruned(job.masks, job.losses, time.monotonic() - started, job.refined, shares)


def check(method: str, pattern: Pattern, refine: RefineSettings | None, refit: bool, allocate: str) -> None:
    """Refuse what contradicts itself: UserError or PatternError."""
    allocation.check(allocate, pattern)
    if refine and pattern.scope == "slab":
        raise PatternError(
            f'masks of slabs cannot be refined: write "{str(pattern).removesuffix("/slab")}/row", or refine nothing.'
        )
    if refine and method == "sparsegpt" and not refit:
        raise UserError(
            "another mask undoes what sparsegpt compensated for; refit the kept weights too, or begin from wanda."
        )


def _check(model: PreTrainedModel, pattern: Pattern, reconstruct: ReconstructSettings | None) -> None:
    """Refuse what cannot be pruned; warn of weights in the blocks that are not an nn.Linear's."""
    prefix, blocks = find_blocks(model)
    linears = all_prunable(model)
    if not linears:
        raise UserError(f"the blocks of {type(model).__name__} hold no nn.Linear to prune.")
    for name, linear in linears.items():
        if linear.weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"the weight of {name} is {linear.weight.dtype}; load the model unquantised to prune it.")
        pattern.check(linear.in_features, name)
    check_finite(model, type(model).__name__)
    weightless = reconstruct and not {"kept", "mask_lora"} & set(reconstruct.parts)
    if reconstruct and weightless and not trainable(blocks.modules(), reconstruct.parts):
        raise UserError(f"the blocks have no {' or '.join(sorted(reconstruct.parts))} to reconstruct with; add kept.")
    covered = {id(linear.weight) for linear in linears.values()}
    others = [name for name, weight in blocks.named_parameters() if weight.ndim > 1 and id(weight) not in covered]
    if others:
        warnings.warn(
            f"{len(others)} weights of the blocks are not an nn.Linear's and stay dense, such as {prefix}.{others[0]}.",
            stacklevel=3,
        )


class _Job:
    """One run of `prune_model`: the method, and what it has given so far."""

    def __init__(
        self,
        pruner: Pruner,
        pattern: Pattern,
        settings: ReconstructSettings | None,
        refine: RefineSettings | None,
        refit: bool,
    ) -> None:
        self.pruner, self.pattern, self.settings = pruner, pattern, settings
        self.refine, self.refit = refine, refit
        self.held_out: Collection[int] = ()
        self.needs: Kind | None = "gram" if refine or refit else pruner.NEEDS
        self.refined: dict[str, Refined] = {}
        self.masks: dict[str, Tensor] = {}
        self.losses: dict[str, Losses] = {}
        self.unread: list[str] = []

    def calibrated(
        self,
        parts: Sequence[Unit],
        hidden: list[Tensor],
        arguments: ArgumentsOf,
        last: bool,
    ) -> None:
        """Prune (and reconstruct) the units of a block; unless it is the `last`, `hidden` becomes its outputs."""
        statistics, targets = self._observe(parts, hidden, arguments)
        given: list[Tensor] = []
        for unit in parts:
            if self.settings and unit.follows:
                hidden[:] = given
                targets[unit.name] = list(outputs(unit, hidden, arguments))
            self.prune(unit, statistics)
            if self.settings:
                given = targets.pop(unit.name)
                if unit.linear_names:
                    self.losses[unit.name] = fit(unit, self.masks, hidden, given, arguments, self.settings)
        if self.settings and parts[-1].end is None:
            hidden[:] = given
        elif not last:
            for window, output in enumerate(outputs(partial(run_block, parts[0].block), hidden, arguments)):
                hidden[window] = output

    def _observe(
        self, parts: Sequence[Unit], hidden: Sequence[Tensor], arguments: ArgumentsOf
    ) -> tuple[dict[str, Statistics], dict[str, list[Tensor]]]:
        """From the dense block: its linears' statistics, and the targets of the units that read the block's input.

        One pass gives both. The targets of parallel branches have to be taken before the first of them is fitted, since
        a norm that they share is trained with it.
        """
        first = [unit for unit in parts if self.settings and not unit.follows]
        if self.needs is None:
            return {}, {unit.name: list(outputs(unit, hidden, arguments)) for unit in first}
        targets: dict[str, list[Tensor]] = {unit.name: [] for unit in first}
        with ExitStack() as taps:
            for unit in first:
                taps.enter_context(unit.tapped(partial(_keep, targets[unit.name]), hidden[0].shape))
            linears = prunable(parts[0].block, parts[0].prefix)
            return collect(parts[0].block, linears, hidden, arguments, self.needs, self.held_out), targets

    def prune(self, unit: Unit, statistics: Mapping[str, Statistics]) -> None:
        """Prune the unit's linears in place."""
        for name, linear in unit.linears.items():
            read = statistics.get(name)
            if self.needs and not (read and read.tokens):
                self.unread.append(name)
                weight, mask = magnitude.prune(linear.weight, None, self.pattern)
            else:
                weight, mask = self.choose(name, linear.weight, read)
            linear.weight.copy_(weight)
            self.masks[name] = mask.cpu()

    def choose(self, name: str, dense: Tensor, read: Statistics | None) -> tuple[Tensor, Tensor]:
        """The linear's new weight and mask: pruned, the mask refined, the kept weights refitted."""
        pooled = read.pooled() if read else None
        weight, mask = self.pruner.prune(dense, pooled, self.pattern)
        if self.refine and read:
            held_out = read.held_out.sums if read.held_out and read.held_out.tokens else None
            found = improve(dense, mask, read.sums, self.pattern, self.refine, held_out)
            mask, self.refined[name] = found.mask, replace(found, mask=found.mask.cpu())
            weight = dense.masked_fill(~mask, 0)
        if self.refit and pooled:
            weight = masked_refit(dense, mask, pooled.sums, damp=DAMP)
        return weight, mask

    def figures(self, parts: Sequence[Unit]) -> dict[str, float]:
        """The mean losses of the block's units, for the progress."""
        losses = [self.losses[unit.name] for unit in parts if unit.name in self.losses]
        if not losses:
            return {}
        before, after = (
            sum(values) / len(losses) for values in zip(*((x.before, x.after) for x in losses), strict=True)
        )
        return {"before": before, "after": after}


def _keep(targets: list[Tensor], output: Tensor) -> None:
    # A copy, since the block goes on and may write its later results into the same memory.
    targets.append(to_store(output.clone()))
