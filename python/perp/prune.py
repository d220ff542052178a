"""Pruning a model block by block, each on the outputs of the blocks already pruned, with or without reconstruction."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, MutableSequence, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from perp import allocate as allocation
from perp import distributed, machine, pruners
from perp.activations import fill
from perp.blocks import Arguments, ArgumentsOf, Calls, all_prunable, find_blocks, outputs, prunable, run_block
from perp.choice import Choice, check
from perp.errors import UserError
from perp.experts import opened, routers
from perp.figures import Figures
from perp.flow import Flow, run
from perp.granularity import Granularity
from perp.models import check_finite
from perp.parts import WEIGHTS, trainable
from perp.progress import Progress, Silent
from perp.reconstruct import Losses, ReconstructSettings
from perp.reconstruct import reconstruct as fit
from perp.refine import RefineSettings
from perp.refine.watch import Refinement
from perp.residence import Residence, Resident
from perp.skipped import find as find_skipped
from perp.spans import Matrix, Span, matrices, spans
from perp.statistics import Statistics, collect
from perp.units import Unit, units
from perp_kernels import Pattern


@dataclass(frozen=True)
class Pruned:
    """What pruning a model gave.

    `masks`: by qualified name of the linear, bool [out, in] on the CPU, True = kept. `losses`: by name of the unit, of
    those that were reconstructed. `seconds`: wall-clock time. `refined`: by name of the linear, what refining its mask
    did to its error on the windows held out. `shares`: of zeros, by block, where they differ.
    """

    masks: Mapping[str, Tensor]
    losses: dict[str, Losses]
    seconds: float
    refined: dict[str, Refinement] = field(default_factory=dict)
    shares: list[float] = field(default_factory=list)


@torch.no_grad()
def prune_model(
    model: PreTrainedModel,
    windows: Tensor | None,
    method: str = "wanda",
    pattern: str | Pattern = "0.5",
    reconstruct: ReconstructSettings | None = None,
    granularity: str | int | Granularity = "half-block",
    progress: Progress | None = None,
    residence: Residence | None = None,
    *,
    refine: RefineSettings | None = None,
    refit: bool = False,
    allocate: str = "uniform",
    skip: Collection[str] = (),
) -> Pruned:
    """Prune every linear of the decoder's blocks in place, experts' included (`perp.experts`), and nothing else.

    `windows`: calibration token ids, int64 [n, T]; None will do for a method without statistics where nothing is
    reconstructed. `pattern` takes the method's scope where it names none. `granularity`: the unit of reconstruction
    (`perp.granularity`); what it reads and is fitted to: `perp.flow`. `refine`: improve each linear's mask, on the
    calibration windows that it does not hold out; `refit`: fit the kept weights of each linear to what its dense
    weights compute, in closed form; both come before any reconstruction. `allocate`: "uniform", or "owl" for a share
    of zeros by block. `skip`: linears that stay dense, by names (`perp.skipped`); their masks keep everything, and
    recovery trains them as the others.

    Each block is fed by the pruned blocks before it, unless the settings ask for dense inputs. One pass with its dense
    weights gives the statistics of all its linears; then each unit in turn is pruned and, with `reconstruct`, fitted to
    its target. `residence`: where blocks and activations are, and what is written down; units that it has from an
    earlier run are not computed again. The model is put in eval mode. Where there are several ranks
    (`perp.distributed`), all call this alike and end with the same model. What can be refused is refused before any
    weight changes: UserError, or PatternError for a layer whose inputs do not divide by M.
    """
    started = time.monotonic()
    pruner, pattern = pruners.resolve(method, pattern)
    size = Granularity.parse(granularity) if reconstruct else Granularity("block")
    check(method, pattern, refine, refit, allocate)
    residence, progress = residence or Resident(), progress or Silent()
    shares = allocate == "owl"

    def done(figures: Figures, patterns: Sequence[Pattern]) -> Pruned:
        told = [float(one.sparsity) for one in patterns] if shares else []
        return Pruned(residence.masks, figures.losses, time.monotonic() - started, figures.refined, told)

    with opened(model.eval()):
        choice = Choice(pruner, refine, refit, residence.masks, _check(model, pattern, reconstruct, size, skip))
        count = len(find_blocks(model)[1])
        calls, patterns = None, [pattern] * count
        if choice.needs or reconstruct or shares:
            if windows is None:
                raise UserError(f"{method} needs windows of calibration text here; give some.")
            distributed.check_windows(len(windows))
            own = distributed.part(windows)
            choice.held_out = refine.windows(len(windows)) if refine else ()
            if shares:
                patterns = residence.patterns(
                    partial(allocation.owl, model, own, pattern, progress, residence, choice.skipped)
                )
            if not residence.complete(count):
                with distributed.together():
                    calls = residence.calls(model, own)
        if residence.complete(count):
            return done(residence.adopt(count), patterns)
        job = _Job(choice, patterns, reconstruct, calls, residence)
        job.run(model, windows, size, progress)
    choice.report(method)
    return done(job.figures, patterns)


def _check(
    model: PreTrainedModel,
    pattern: Pattern,
    reconstruct: ReconstructSettings | None,
    size: Granularity,
    skip: Collection[str],
) -> frozenset[str]:
    """Refuse what cannot be pruned; warn of weights in the blocks that are not an nn.Linear's. The names skipped."""
    prefix, blocks = find_blocks(model)
    linears = all_prunable(model)
    for name, linear in linears.items():
        if linear.weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"the weight of {name} is {linear.weight.dtype}; load the model unquantised to prune it.")
        if size.name == "matrix" and linear.weight.ndim > 2 and reconstruct and reconstruct.two_models:
            raise UserError(
                f"{name} is of several experts, to which the pruned and the dense model send other tokens; choose "
                "dense-weights, dense inputs, or half-block or more."
            )
    skipped = find_skipped(model, pattern, skip)
    check_finite(model, type(model).__name__)
    weightless = reconstruct and not set(WEIGHTS) & set(reconstruct.parts)
    if reconstruct and weightless and not trainable(blocks.modules(), reconstruct.parts):
        raise UserError(f"the blocks have no {' or '.join(sorted(reconstruct.parts))} to reconstruct with; add kept.")
    covered = {id(weight) for linear in linears.values() for weight in linear.parameters()}
    covered |= {id(weight) for block in blocks for router in routers(block) for weight in router.parameters()}
    others = [name for name, weight in blocks.named_parameters() if weight.ndim > 1 and id(weight) not in covered]
    if others:
        warnings.warn(
            f"{len(others)} weights of the blocks are not an nn.Linear's and stay dense, such as {prefix}.{others[0]}.",
            stacklevel=3,
        )
    return skipped


class _Job:
    """One run of `prune_model`: the method, and what it has given so far."""

    def __init__(
        self,
        choice: Choice,
        patterns: Sequence[Pattern],
        settings: ReconstructSettings | None,
        calls: Calls | None,
        residence: Residence,
    ) -> None:
        self.choice, self.patterns, self.settings, self.calls = choice, patterns, settings, calls
        self.pattern = patterns[0]
        self.residence = residence
        how = {"inputs": settings.inputs, "targets": settings.targets} if settings else {}
        self.flow = Flow(calls.hidden if calls else [], states=residence.states, **how)
        self.figures = Figures(refined=choice.refined)

    def run(self, model: PreTrainedModel, windows: Tensor | None, size: Granularity, progress: Progress) -> None:
        """Prune all blocks, and reconstruct them by units of this size."""
        prefix, blocks = find_blocks(model)
        progress.stage("prune", len(blocks))
        if size.blocks != 1:
            for span in spans(model, size.blocks):
                with ExitStack() as entered:
                    for index in span.indices:
                        entered.enter_context(self.residence.enter(index))
                    self.span(span, last=span.indices.stop == len(blocks))
                for index in span.indices:
                    progress.unit(f"{prefix}.{index}", **self.told([span]))
            progress.done()
            return
        unit = "half-block" if size.name == "half-block" else "block"
        for index, parts in units(model, windows, unit, self.calls, self.residence.enter):
            last, self.pattern = index + 1 == len(blocks), self.patterns[index]
            if self.calls is None:
                for one in parts:
                    if self.residence.has(one):
                        self._restore(one)
                    else:
                        self.choice.prune(one, {}, self.pattern)
            elif size.name == "matrix":
                alone = matrices(parts[0])
                self.matrices(alone, partial(self.calls.arguments, index), last)
                parts = [*alone]
            else:
                self.block(parts, partial(self.calls.arguments, index), last)
            self.residence.leave(index, parts, self.figures.of(parts))
            # What stays in the heap would grow from block to block: by 45 MB over the 30 of a 135M model.
            machine.release()
            progress.unit(f"{prefix}.{index}", **self.told(parts))
        progress.done()

    def block(self, parts: Sequence[Unit], arguments: ArgumentsOf, last: bool) -> None:
        """Prune (and reconstruct) the units of a block; unless it is the `last`, the flow goes on behind it."""
        flow, whole = self.flow, partial(run_block, parts[0].block)
        # Asked before any of them is restored, since the others are observed in the dense block.
        known = {unit.name for unit in parts if self.residence.has(unit)}
        if not self.settings:
            if known:
                self._restore(parts[0])
            else:
                self.choice.prune(parts[0], self._statistics(parts, arguments), self.pattern)
            if not last:
                run(whole, flow.hidden, arguments)
            return
        # Units that follow each other end with the block; parallel ones have to be put together by the block itself.
        chained = parts[-1].end is None
        after = self._states(outputs(whole, flow.taught, arguments)) if flow.keeps_targets and not chained else None
        taught = [unit for unit in parts if flow.keeps_targets or unit.name not in known]
        statistics, targets = self._observe(taught, arguments) if taught else ({}, {})
        for unit in parts:
            if unit.follows and unit in taught:
                targets[unit.name] = self._states(outputs(unit, flow.taught, arguments))
            if unit.name in known:
                self._restore(unit)
                given = targets.pop(unit.name, None) or self._states(outputs(unit, flow.hidden, arguments))
            else:
                self.choice.prune(unit, statistics, self.pattern)
                given = targets.pop(unit.name)
                self.fit(unit, flow.hidden, given, arguments)
                if unit is not parts[-1]:  # which is kept with the block
                    self.residence.keep(unit, self.figures.of([unit]))
            if chained and not (last and unit is parts[-1]):
                flow.follow(unit, given, arguments)
        if not chained and not last:
            self._join(whole, after, arguments)

    def _restore(self, unit: Unit) -> None:
        self.figures.add(self.residence.restore(unit))

    def _states(self, given: Iterable[Tensor]) -> MutableSequence[Tensor]:
        """These activations, put where activations are kept."""
        return fill(self.residence.states(), given)

    def matrices(self, parts: Sequence[Matrix], arguments: ArgumentsOf, last: bool) -> None:
        """Prune the linears of a block and fit each to its own output, in order."""
        flow, block = self.flow, parts[0].block
        known = {unit.name for unit in parts if self.residence.has(unit)}
        statistics = self._statistics(parts, arguments) if len(known) < len(parts) else {}
        dense = copy.deepcopy(block) if flow.keeps_targets else block
        for unit in parts:
            if unit.name in known:
                self._restore(unit)
                continue
            inputs = self._states(unit.reads(dense if flow.dense_inputs else block, flow.hidden, arguments))
            taught = inputs if flow.dense is None else unit.reads(dense, flow.dense, arguments)
            own = unit.arguments(arguments)
            targets = self._states(outputs(unit, taught, own))
            self.choice.prune(unit, statistics, self.pattern)
            if _read_everywhere(unit, len(inputs), len(flow.hidden)):
                self.fit(unit, inputs, targets, own)
            if unit is not parts[-1]:  # which is kept with the block
                self.residence.keep(unit, self.figures.of([unit]))
        if not last:
            whole = partial(run_block, dense)
            after = self._states(outputs(whole, flow.taught, arguments)) if flow.keeps_targets else None
            self._join(partial(run_block, block), after, arguments)

    def span(self, span: Span, last: bool) -> None:
        """Prune the blocks of a span one after the other and fit them together."""
        flow, calls = self.flow, self.calls
        assert calls is not None

        def arguments(ids: Sequence[int]) -> list[Arguments]:
            return [calls.arguments(index, ids) for index in span.indices]

        if all(map(self.residence.has, span.parts)):
            targets = self._states(outputs(span, flow.taught, arguments)) if flow.keeps_targets and not last else None
            for unit in span.parts:
                self._restore(unit)
            if not last:
                given = self._states(outputs(span, flow.hidden, arguments)) if targets is None else targets
                flow.follow(span, given, arguments)
        else:
            targets = None if flow.dense_inputs else self._states(outputs(span, flow.taught, arguments))
            path = self._states(flow.hidden)
            for index, unit in zip(span.indices, span.parts, strict=True):
                own, self.pattern = partial(calls.arguments, index), self.patterns[index]
                statistics = self._statistics([unit], own, path)
                if flow.dense_inputs:
                    run(unit, path, own)
                self.choice.prune(unit, statistics, self.pattern)
                if self.choice.needs and not flow.dense_inputs:
                    run(unit, path, own)
            given = path if targets is None else targets
            del path
            self.fit(span, flow.hidden, given, arguments)
            if not last:
                flow.follow(span, given, arguments)
        for index, unit in zip(span.indices, span.parts, strict=True):
            # The last of its blocks makes the span finished: it has the figures of all.
            own_figures = self.figures.of([span]) if index == span.indices[-1] else Figures()
            self.residence.leave(index, [unit], own_figures)

    def fit(
        self,
        unit: Unit,
        inputs: Sequence[Tensor],
        targets: MutableSequence[Tensor],
        arguments: Callable[..., Any],
    ) -> None:
        """Fit a pruned unit, if anything is to be made good: of it, or of the blocks before it."""
        if self.settings and (self.choice.pruned(unit.linears) or (unit.linear_names and self.settings.two_models)):
            keep = self.flow.keeps_targets
            self.figures.losses[unit.name] = fit(
                unit, self.choice.masks, inputs, targets, arguments, self.settings, keep
            )

    def _join(
        self, block: Callable[..., Tensor], after: MutableSequence[Tensor] | None, arguments: ArgumentsOf
    ) -> None:
        """Go on behind a block whose units do not follow each other; `after`: what it gave when it was dense."""
        if self.flow.dense_inputs:
            self.flow.hidden[:] = after or []
            return
        if self.flow.dense is not None:
            self.flow.dense[:] = after or []
        run(block, self.flow.hidden, arguments)

    def _statistics(
        self, parts: Sequence[Unit], arguments: ArgumentsOf, hidden: Sequence[Tensor] | None = None
    ) -> dict[str, Statistics]:
        """What the linears of a block read, from its dense weights on `hidden` (the flow's)."""
        choice, block = self.choice, parts[0].block
        if choice.needs is None:
            return {}
        hidden = self.flow.hidden if hidden is None else hidden
        linears = choice.pruned(prunable(block, parts[0].prefix))
        return collect(block, linears, hidden, arguments, choice.needs, choice.held_out)

    def _observe(
        self, parts: Sequence[Unit], arguments: ArgumentsOf
    ) -> tuple[dict[str, Statistics], dict[str, MutableSequence[Tensor]]]:
        """From the dense block: its linears' statistics, and the targets of the units that read the block's input.

        One pass gives both where both are of the same inputs. The targets of parallel branches have to be taken before
        the first of them is fitted, since a norm that they share is trained with it.
        """
        first = [unit for unit in parts if not unit.follows]
        if self.choice.needs is None or self.flow.dense is not None:
            targets = {unit.name: self._states(outputs(unit, self.flow.taught, arguments)) for unit in first}
            return self._statistics(parts, arguments), targets
        targets = {unit.name: self.residence.states() for unit in first}
        with ExitStack() as taps:
            for unit in first:
                taps.enter_context(unit.tapped(partial(_keep, targets[unit.name]), self.flow.hidden[0].shape))
            return self._statistics(parts, arguments), targets

    def told(self, parts: Sequence[Unit]) -> dict[str, float]:
        """The mean losses of the block's units, for the progress."""
        losses = [*self.figures.of(parts).losses.values()]
        if not losses:
            return {}
        before, after = (
            sum(values) / len(losses) for values in zip(*((x.before, x.after) for x in losses), strict=True)
        )
        return {"before": before, "after": after}


def _read_everywhere(unit: Unit, read: int, windows: int) -> bool:
    """Whether `unit` runs at all; UserError where ranks would have to fit it to other windows than their own."""
    found = distributed.total(read)
    if distributed.size() > 1 and 0 < found < distributed.total(windows):
        raise UserError(f"{unit.name} does not run in every window; choose half-block, or start one process.")
    return found > 0


def _keep(targets: MutableSequence[Tensor], output: Tensor) -> None:
    # A copy, since the block goes on and may write its later results into the same memory.
    targets.append(output.clone())
