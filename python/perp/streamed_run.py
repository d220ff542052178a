"""The whole job on a model that is never in memory as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from perp import checkpoints, models, packed_retrain, record, report, streamed_save
from perp.activations import Place
from perp.blocks import Calls, prunable
from perp.distil import Teacher
from perp.evaluate import perplexity
from perp.finished import Finished, Masks
from perp.job import Job, count_kept
from perp.parts import adapter_mode, trainable
from perp.prune import Pruned
from perp.report import Row
from perp.residence import Streamed
from perp.stream import Stream


class StreamedJob(Job):
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

    def retrain(self, pruned: Finished, masks: Mapping[str, Tensor], teacher: Teacher | None) -> list[Row]:
        settings, stage = self.job.for_retrain, self.stage(report.RETRAINED)
        assert settings is not None
        with self.cost() as cost:
            trained = packed_retrain.retrain(
                self.stream,
                pruned,
                stage,
                self.tokenizer,
                self.training,
                settings,
                self.progress,
                self.plan.offload,
            )
        self.made += stage.made
        with self.holding(stage):
            return [self.known(report.RETRAINED, partial(self.row, report.RETRAINED, cost, trained))]

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
