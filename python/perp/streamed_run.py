"""The whole job on a model that is never in memory as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from perp import checkpoints, models, packed_retrain, record, report, streamed_save
from perp.activations import Place
from perp.blocks import Calls, prunable
from perp.distil import Teacher, separate_head
from perp.evaluate import perplexity
from perp.finished import Finished, Masks
from perp.job import Job, count_kept
from perp.parts import adapter_mode, trainable
from perp.progress import Progress
from perp.prune import Pruned
from perp.reconstruct import ReconstructSettings
from perp.report import Row
from perp.residence import Streamed
from perp.retrain import RetrainSettings
from perp.stream import Stream
from perp_kernels import Pattern


class StreamedJob(Job):
    # What is pruned next, where that is not the model's own blocks: those that a cycle has left.
    source: Finished | None = None

    def load(self) -> None:
        """Once: the blocks that are pruned are written elsewhere."""
        job = self.job
        if not hasattr(self, "stream"):
            self.tokenizer = models.load_tokenizer(job.model, job.trust_remote_code)
            self.stream = Stream(job.model, job.dtype, self.device, job.trust_remote_code, self.plan.ahead)
            self.model, self.directory = self.stream.model, self.stream.directory

    def check_output(self) -> None:
        job = self.job
        overwrite = job.overwrite or record.unfinished(job.out)
        checkpoints.check_output(job.out, overwrite, checkpoints.size(self.model, job.packed))

    def residence(self, stage: Finished) -> Streamed:
        return Streamed(self.stream, stage, self.place(len(self.calibration)))

    def holding(self, stage: Finished) -> AbstractContextManager[None]:
        return self.stream.reading(stage.tensors)

    def masks(self, stage: Finished, pruned: Pruned | None = None) -> Masks:
        return stage.all_masks(len(self.stream.blocks))

    def judge(self) -> tuple[dict[str, float], float]:
        return judge(self.stream, self.held_out, self.place, self.progress)

    def reconstructed_count(self, masks: Mapping[str, Tensor]) -> tuple[int, int]:
        return trained_count(self.stream, masks, self.unit_parts, self.job.rank)

    def prepare_teacher(self) -> None:
        """The dense blocks can be read whenever they are wanted."""
        if self.job.retrain and self.job.distil:
            calls = self.stream.calls(self.training[:1, :2])
            with self.stream.rest_on_device(), calls.ended():
                separate_head(self.stream.model)

    @cached_property
    def taught(self) -> Teacher | None:  # type: ignore[override]
        """Made when it is first asked for, which is before a cycle trains something outside the blocks."""
        settings = self.job.for_retrain
        if settings is None or not settings.distil:
            return None
        return make_teacher(self.stream, self.training, self.drawn(), settings, self.place, self.progress)

    def cycles(self, patterns: list[Pattern]) -> None:
        """A cycle's blocks are there until the next cycle has ended."""
        names = [(f"cycle-{number}", f"cycle-{number}-retrained") for number in range(1, len(patterns) + 1)]
        stages = [Finished(record.stage(self.job.out, name)) for _, name in names]
        last = max((n for n, stage in enumerate(stages) if packed_retrain.ended(self.stream, stage)), default=-1)
        if patterns:
            _ = self.taught
        for number, (pattern, settings) in enumerate(zip(patterns, self.trainings, strict=False)):
            if number < last:
                continue
            pruned, retrained = map(self.stage, names[number])
            if number > last:
                self.prune(pruned, self.job.for_reconstruct, pattern)
            self.train(pruned, retrained, settings)
            self.source = retrained
            self.drop(names[number][0])
            if number:
                self.drop(names[number - 1][1])

    def prune(self, stage: Finished, reconstruct: ReconstructSettings | None, pattern: Pattern) -> Pruned:
        with self.holding(self.source) if self.source else nullcontext():
            return super().prune(stage, reconstruct, pattern)

    def retrain(self, pruned: Finished, masks: Mapping[str, Tensor]) -> list[Row]:
        stage = self.stage(report.RETRAINED)
        with self.cost() as cost:
            trained = self.train(pruned, stage, self.trainings[-1])
        with self.holding(stage):
            return [self.known(report.RETRAINED, partial(self.row, report.RETRAINED, cost, trained))]

    def train(self, pruned: Finished, stage: Finished, settings: RetrainSettings) -> tuple[int, int]:
        """From one stage into another; how many parameters were trained, of how many."""
        found = packed_retrain.retrain(
            self.stream,
            pruned,
            stage,
            self.tokenizer,
            self.training,
            settings,
            self.progress,
            self.plan.offload,
            lambda: self.taught,
        )
        self.made += stage.made
        return found

    def place(self, count: int) -> Place:
        """Where the hidden states of so many windows are kept."""
        return Place(self.plan.activations, count, self.job.out / "perp")

    def save(self, content: dict[str, Any], masks: Mapping[str, Tensor]) -> None:
        job = self.job
        last = report.RETRAINED if job.retrain else report.PRUNED if job.reconstruct == "none" else report.RECONSTRUCTED
        streamed_save.save(self.stream, self.stage(last), self.tokenizer, job.out, content, job.packed)


@torch.no_grad()
def judge(
    stream: Stream, texts: Mapping[str, Tensor], place: Callable[[int], Place], progress: Any
) -> tuple[dict[str, float], float]:
    """The perplexity on each text (windows int64 [n, T]), and the share of zeros in the weights to prune.

    Every block is read once, for all texts. With them goes the check that the model is a decoder.
    """
    probe = models.causal_probe(stream.model.config.get_text_config().vocab_size)
    calls: dict[str, Calls] = {}
    for name, windows in texts.items():
        calls[name] = stream.calls(windows[:, :-1], place(len(windows)))
    ends = stream.calls(probe)
    kept, total = 0, 0
    progress.stage("perplexity", len(stream.blocks))
    for index, block in enumerate(stream.blocks):
        with stream.enter(index):
            for one in (*calls.values(), ends):
                one.advance(index)
            counted = count_kept(linear.weight for linear in prunable(block, "").values())
            kept, total = kept + counted[0], total + counted[1]
        progress.unit(f"{stream.prefix}.{index}")
    progress.done()
    model = stream.model
    with stream.rest_on_device(), ends.ended():
        logits = []
        for window, ids in enumerate(probe.to(model.device).split(1)):
            with ends.ended(window):
                logits.append(model(input_ids=ids, use_cache=False).logits[0, :-1].float())
        models.check_logits(logits[0], logits[1], model.dtype, stream.name)
        found = {name: perplexity(model, windows, None, calls[name].ended) for name, windows in texts.items()}
    return found, 1 - kept / total


@torch.no_grad()
def make_teacher(
    stream: Stream,
    windows: Tensor,
    numbers: Collection[int],
    settings: RetrainSettings,
    place: Callable[[int], Place],
    progress: Progress,
) -> Teacher:
    """As `Teacher` is made of a model in memory: what the model's blocks, each read once, make of those windows.

    It computes in the model's dtype, whatever the precision of `settings`. The states are never on the device: they
    stay while the model is trained, and are asked for a window at a time.
    """
    chosen = sorted(set(numbers))
    where = place(len(chosen))
    calls = stream.calls(windows[chosen], replace(where, kind="memory") if where.kind == "device" else where)
    progress.stage("dense model's states", len(stream.blocks))
    for index in range(len(stream.blocks)):
        with stream.enter(index):
            calls.advance(index)
        progress.unit(f"{stream.prefix}.{index}")
    progress.done()
    with stream.rest_on_device(), calls.ended():
        head = separate_head(stream.model)
        for index, number in enumerate(chosen):
            with calls.ended(index):
                calls.hidden[index] = head.states(windows[number][None].to(stream.model.device))
    return Teacher.of(chosen, calls.hidden, settings.distil, settings.temperature)


def trained_count(stream: Stream, masks: Mapping[str, Tensor], parts: Collection[str], rank: int) -> tuple[int, int]:
    """How many of the model's parameters reconstruction trains, a unit at a time, and how many there are."""
    trained = sum(weight.numel() for weight in trainable(stream.blocks.modules(), set(parts) & {"norms", "biases"}))
    for mask in masks.values():
        if "kept" in parts:
            trained += int(mask.sum())
        if adapter_mode(parts):
            *experts, outputs, inputs = mask.shape
            trained += rank * math.prod(experts) * (outputs + inputs)
    return trained, sum(weight.numel() for weight in stream.model.parameters())
