"""Pruning a model block by block, each on the outputs of the blocks already pruned, with or without reconstruction."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping, MutableSequence, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from perp import pruners
from perp.activations import fill
from perp.adapters import trainable
from perp.blocks import ArgumentsOf, all_prunable, find_blocks, outputs, prunable, run_block
from perp.errors import UserError
from perp.models import check_finite
from perp.progress import Progress, Silent
from perp.pruners import Pruner, magnitude
from perp.reconstruct import Losses, ReconstructSettings
from perp.reconstruct import reconstruct as fit
from perp.residence import Residence, Resident
from perp.statistics import Statistics, collect
from perp.units import Unit, units
from perp_kernels import Pattern


@dataclass(frozen=True)
class Pruned:
    """What pruning a model gave.

    `masks`: by qualified name of the linear, bool [out, in] on the CPU, True = kept. `losses`: by name of the unit, of
    those that were reconstructed. `seconds`: wall-clock time.
    """

    masks: Mapping[str, Tensor]
    losses: dict[str, Losses]
    seconds: float


@torch.no_grad()
def prune_model(
    model: PreTrainedModel,
    windows: Tensor | None,
    method: str = "wanda",
    pattern: str | Pattern = "0.5",
    reconstruct: ReconstructSettings | None = None,
    granularity: str = "half-block",
    progress: Progress | None = None,
    residence: Residence | None = None,
) -> Pruned:
    """Prune every nn.Linear of the decoder's blocks in place; embeddings, head and norms are not pruned.

    `windows`: calibration token ids, int64 [n, T]; None will do for a method without statistics where nothing is
    reconstructed. `pattern` takes the method's scope where it names none. `granularity`: "half-block" or "block", the
    unit of reconstruction.

    Each block is fed by the pruned blocks before it. One pass with its dense weights gives the statistics of all its
    linears; then each unit in turn is pruned and, with `reconstruct`, fitted to what its dense weights compute from the
    same inputs. `residence`: where the blocks and the activations are, for those not in memory; units that it has from
    an earlier run are not computed again. The model is put in eval mode. What can be refused is refused before any
    weight changes: UserError, or PatternError for a layer whose inputs do not divide by M.
    """
    started = time.monotonic()
    progress = progress or Silent()
    pruner, pattern = pruners.resolve(method, pattern)
    prefix, blocks = find_blocks(model.eval())
    _check(model, pattern, reconstruct)
    residence = residence or Resident()
    job = _Job(pruner, pattern, reconstruct, residence)
    calls = None
    if pruner.NEEDS or reconstruct:
        if windows is None:
            raise UserError(f"{method} needs windows of calibration text here; give some.")
        calls = residence.calls(model, windows)
    progress.stage("prune", len(blocks))
    for index, parts in units(model, windows, granularity if reconstruct else "block", calls, residence.enter):
        if calls is not None:
            job.calibrated(parts, calls.hidden, partial(calls.arguments, index), last=index + 1 == len(blocks))
        elif not residence.has(parts[0]):
            job.prune(parts[0], {})
        residence.leave(index, parts, job.losses)
        progress.unit(f"{prefix}.{index}", **job.figures(parts))
    progress.done()
    if job.unread:
        warnings.warn(
            f"{len(job.unread)} linears read no token of the calibration text and were pruned by magnitude, such as "
            f"{job.unread[0]}; use more windows.",
            stacklevel=2,
        )
    return Pruned(job.masks, job.losses, time.monotonic() - started)


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
        self, pruner: Pruner, pattern: Pattern, settings: ReconstructSettings | None, residence: Residence
    ) -> None:
        self.pruner, self.pattern, self.settings, self.residence = pruner, pattern, settings, residence
        self.masks = residence.masks
        self.losses: dict[str, Losses] = {}
        self.unread: list[str] = []

    def calibrated(
        self,
        parts: Sequence[Unit],
        hidden: MutableSequence[Tensor],
        arguments: ArgumentsOf,
        last: bool,
    ) -> None:
        """Prune (and reconstruct) the units of a block; unless it is the `last`, `hidden` becomes its outputs."""
        # Asked before any of them is restored, since the others are observed in the dense block.
        known = {unit.name for unit in parts if self.residence.has(unit)}
        new = [unit for unit in parts if unit.name not in known]
        statistics, targets = self._observe(new, hidden, arguments) if new else ({}, {})
        given = self.residence.states()
        for unit in parts:
            if self.settings and unit.follows:
                hidden[:] = given
                if unit.name not in known:
                    targets[unit.name] = self._states(outputs(unit, hidden, arguments))
            if unit.name in known:
                losses = self.residence.restore(unit)
                given = self._states(outputs(unit, hidden, arguments) if self.settings else ())
            else:
                losses = None
                self.prune(unit, statistics)
                if self.settings:
                    given = targets.pop(unit.name)
                    if unit.linear_names:
                        losses = fit(unit, self.masks, hidden, given, arguments, self.settings)
            if losses:
                self.losses[unit.name] = losses
            # The last one is kept with the block.
            if unit.name not in known and unit is not parts[-1]:
                self.residence.keep(unit, losses)
        if self.settings and parts[-1].end is None:
            hidden[:] = given
        elif not last:
            for window, output in enumerate(outputs(partial(run_block, parts[0].block), hidden, arguments)):
                hidden[window] = output

    def _observe(
        self, parts: Sequence[Unit], hidden: Sequence[Tensor], arguments: ArgumentsOf
    ) -> tuple[dict[str, Statistics], dict[str, MutableSequence[Tensor]]]:
        """From the dense block: its linears' statistics, and the targets of the units that read the block's input.

        One pass gives both. The targets of parallel branches have to be taken before the first of them is fitted, since
        a norm that they share is trained with it.
        """
        first = [unit for unit in parts if self.settings and not unit.follows]
        if self.pruner.NEEDS is None:
            return {}, {unit.name: self._states(outputs(unit, hidden, arguments)) for unit in first}
        targets = {unit.name: self.residence.states() for unit in first}
        with ExitStack() as taps:
            for unit in first:
                taps.enter_context(unit.tapped(partial(_keep, targets[unit.name]), hidden[0].shape))
            linears = prunable(parts[0].block, parts[0].prefix)
            return collect(parts[0].block, linears, hidden, arguments, self.pruner.NEEDS), targets

    def _states(self, given: Iterable[Tensor]) -> MutableSequence[Tensor]:
        """These activations, put where activations are kept."""
        return fill(self.residence.states(), given)

    def prune(self, unit: Unit, statistics: Mapping[str, Statistics]) -> None:
        """Prune the unit's linears in place."""
        for name, linear in unit.linears.items():
            read = statistics.get(name)
            pruner: Pruner = self.pruner
            if pruner.NEEDS and not (read and read.tokens):
                self.unread.append(name)
                pruner = magnitude
            weight, mask = pruner.prune(linear.weight, read, self.pattern)
            # Not copied into the old one, which may be mapped from a file and would stay in memory for the copy.
            linear.weight.data = weight
            self.masks[name] = mask.cpu()

    def figures(self, parts: Sequence[Unit]) -> dict[str, float]:
        """The mean losses of the block's units, for the progress."""
        losses = [self.losses[unit.name] for unit in parts if unit.name in self.losses]
        if not losses:
            return {}
        before, after = (
            sum(values) / len(losses) for values in zip(*((x.before, x.after) for x in losses), strict=True)
        )
        return {"before": before, "after": after}


def _keep(targets: MutableSequence[Tensor], output: Tensor) -> None:
    # A copy, since the block goes on and may write its later results into the same memory.
    targets.append(output.clone())
