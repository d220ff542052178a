"""The whole job on a model that is never in memory as a whole, and that a second run goes on with."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

import perp
from perp import checkpoints, models, packed_retrain, record, report, shards, streamed_save
from perp.activations import Place
from perp.blocks import Calls, prunable
from perp.errors import UserError
from perp.evaluate import perplexity
from perp.finished import Finished, Masks
from perp.modes import MODES
from perp.parts import adapter_mode, trainable
from perp.prune import prune_model
from perp.reconstruct import ReconstructSettings
from perp.report import Report, Row
from perp.residence import Streamed
from perp.run import Job, count_kept
from perp.settings import RunSettings
from perp.stream import Stream


class StreamedJob(Job):
    """`made`: the blocks and units that this process has finished."""

    def __init__(self, job: RunSettings, *others: Any) -> None:
        _check(job)
        self.made = 0
        super().__init__(job, *others)
        self.record = self._record()

    def load(self) -> None:
        job = self.job
        self.tokenizer = models.load_tokenizer(job.model, job.trust_remote_code)
        self.stream = Stream(job.model, job.dtype, self.device, job.trust_remote_code, self.plan.ahead)
        self.model = self.stream.model

    def check_output(self) -> None:
        job = self.job
        overwrite = job.overwrite or record.unfinished(job.out)
        checkpoints.check_output(job.out, overwrite, checkpoints.size(self.model, job.packed))

    def run(self, dense: Sequence[Row]) -> Report:
        job = self.job
        rows = list(dense) or [self.known(report.DENSE, lambda: self.row(report.DENSE))]
        if "pruned" in job.compare and job.reconstruct != "none":
            stage = self.stage(report.PRUNED)
            rows.append(self.known(report.PRUNED, partial(self.pruned, stage, None)))
            shutil.rmtree(stage.directory)
        last = report.PRUNED if job.reconstruct == "none" else report.RECONSTRUCTED
        self.last = self.stage(last)
        rows.append(self.known(last, partial(self.pruned, self.last, job.for_reconstruct)))
        if job.retrain:
            self.last, before = self.stage(report.RETRAINED), self.last
            rows.append(self.known(report.RETRAINED, partial(self.retrained, before, self.last)))
            packed_retrain.adopt_outside(self.stream, self.last)
        found = self.finish(rows, self.masks(self.last))
        record.forget(job.out)
        return found

    def known(self, stage: str, make: Callable[[], Row]) -> Row:
        """The row, from an earlier process or made now."""
        row = self.record.row(stage)
        if row is None:
            row = make()
            self.record.add(row)
        return row

    def stage(self, name: str) -> Finished:
        return Finished(record.stage(self.job.out, name))

    def masks(self, stage: Finished) -> Masks:
        return stage.all_masks(len(self.stream.blocks))

    def pruned(self, stage: Finished, reconstruct: ReconstructSettings | None) -> Row:
        job = self.job
        with self.cost() as cost:
            prune_model(
                self.model,
                self.calibration,
                job.method,
                self.pattern,
                reconstruct=reconstruct,
                granularity="block" if job.reconstruct == "none" else job.reconstruct,
                progress=self.progress,
                residence=Streamed(self.stream, stage, self.place(len(self.calibration))),
                refine=job.for_refine,
                refit=job.refit,
            )
        self.made += stage.made
        with self.stream.reading(stage.tensors):
            if reconstruct is None:
                return self.row(report.PRUNED, cost)
            trained = trained_count(self.stream, self.masks(stage), reconstruct.parts, job.rank)
            return self.row(report.RECONSTRUCTED, cost, trained)

    def retrained(self, before: Finished, stage: Finished) -> Row:
        job = self.job
        assert job.for_retrain is not None
        with self.cost() as cost:
            share = packed_retrain.retrain(
                self.stream,
                before,
                stage,
                self.tokenizer,
                self.training,
                job.for_retrain,
                self.progress,
                self.plan.offload,
            )
        with self.stream.reading(stage.tensors):
            return self.row(report.RETRAINED, cost, share)

    def place(self, count: int) -> Place:
        """Where the hidden states of so many windows are kept."""
        return Place(self.plan.activations, count, self.job.out / "perp")

    def judge(self) -> tuple[dict[str, float], float]:
        return judge(self.stream, self.held_out, self.place, self.progress)

    def save(self, content: dict[str, Any], masks: Mapping[str, Tensor]) -> None:
        job = self.job
        streamed_save.save(self.stream, self.last, self.tokenizer, job.out, content, job.packed)

    def _record(self) -> record.Record:
        files = {**self.stream.shards.identity(), "config.json": shards.checksum(self.stream.directory / "config.json")}
        told = {**vars(self.job), "text": self.identity}
        versions = {
            "perp": perp.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        return record.Record(self.job.out, told, files, versions, self.job.overwrite)


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
            trained += rank * sum(mask.shape)
    return trained, sum(weight.numel() for weight in stream.model.parameters())


def _check(job: RunSettings) -> None:
    """Refuse what only a model in memory can do."""
    inexact = {name for name, mode in MODES.items() if not mode.exact}
    for refused, what in (
        (job.retrain and "dense-retrained" in job.compare, "retrain the dense model; leave dense-retrained out"),
        (job.cycles > 1, "prune in cycles; pass --cycles 1"),
        (job.allocate != "uniform", "spread zeros over all blocks before it prunes one; pass --allocate uniform"),
        (bool(job.retrain) and job.distil > 0, "distil, which needs the dense model beside it; pass --distil 0"),
        (bool(inexact & set(job.retrain)), "retrain adapters that lose something when merged; retrain mask_lora"),
        (bool({"kept", "full", "head"} & set(job.retrain)), "retrain all weights; retrain mask_lora, norms or biases"),
    ):
        if refused:
            raise UserError(f"a streamed run cannot {what}, or pass --no-stream where the model fits in memory.")
