"""One job: its model, windows and stages, and what is common to doing it in memory and streamed."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perp import data, distributed, machine, manifest, record, report, skipped
from perp.blocks import all_prunable
from perp.distil import Teacher
from perp.errors import UserError
from perp.evaluate import window_length
from perp.finished import Finished
from perp.iterate import divided, schedule
from perp.plan import Plan
from perp.progress import Progress
from perp.prune import Pruned, prune_model
from perp.reconstruct import ReconstructSettings
from perp.report import Report, Row
from perp.residence import Residence
from perp.retrain import RetrainSettings, drawn
from perp.settings import RunSettings
from perp.texts import Texts
from perp_kernels import Pattern


@dataclass
class Cost:
    seconds: float = 0.0
    memory: float = 0.0


class Job:
    """The model is dense when it is loaded. Each stage writes what it has finished, and is gone on with from there.

    `made`: the blocks and units that this process has finished; `taught`: the teacher of all retraining, None without
    distillation.
    """

    taught: Teacher | None

    def __init__(self, job: RunSettings, pattern: Pattern, texts: Texts, progress: Progress, plan: Plan) -> None:
        self.job, self.pattern, self.progress, self.identity = job, pattern, progress, texts.identity
        self.plan = plan
        self.device = job.device or "cpu"
        self.model: Any = None
        self.tokenizer: Any
        self.directory: Path
        self.made = 0
        # What refining did to each linear's mask, as the manifest tells it.
        self.refined: dict[str, dict[str, float]] = {}
        self.load()
        self.check_output()
        skipped.find(self.model, pattern, job.skip)
        for name, linear in all_prunable(self.model).items():
            if linear.weight.ndim > 2 and job.keep_adapters:
                raise UserError(
                    f"{name} is of several experts, whose adapters no tool loads; retrain mask_lora instead."
                )
        count = job.windows or machine.usual_sizes(self.device)[0]
        seqlen = window_length(self.model, job.seqlen)
        enough = max(count, job.steps * job.batch if job.retrain else 0)
        self.training = data.training_windows(self.tokenizer, texts.train, seqlen, enough)
        if job.calibration == "documents":
            self.calibration = data.document_windows(self.tokenizer, texts.train, seqlen, count, job.seed)
        else:
            self.calibration = data.sample(self.training, count, job.seed)
        if len(self.calibration) < count:
            warnings.warn(
                f"the text gives {len(self.training)} windows of {seqlen} tokens, fewer than {count}.", stacklevel=2
            )
        distributed.check_windows(len(self.calibration))
        self.held_out = {
            name: data.windows(self.tokenizer, text, seqlen, job.eval_windows) for name, text in texts.held_out.items()
        }
        self.check_tokens()
        # As the manifest is to tell them.
        self.job = replace(job, windows=len(self.calibration), seqlen=seqlen)
        asked = {**dataclasses.asdict(self.job), "text": self.identity}
        self.record: record.Record | None = None
        if distributed.size() == 1:
            self.record = record.Record(job.out, asked, plan.stream, self.directory, job.overwrite)

    @property
    def unit_parts(self) -> set[str]:
        """What of a unit is trained: of a single matrix no norms, which it does not have."""
        return set(self.job.reconstruct_parts) - ({"norms"} if self.job.reconstruct == "matrix" else set())

    @property
    def trainings(self) -> list[RetrainSettings]:
        """The retraining of each cycle."""
        settings = self.job.for_retrain
        return divided(settings, self.job.cycles) if settings else []

    def drawn(self) -> list[int]:
        """The training windows that retraining will draw on this rank, all cycles together; some more than once."""
        orders = [drawn(len(self.training), settings) for settings in self.trainings]
        return torch.cat([distributed.part(numbers) for order in orders for numbers in order]).tolist()

    def load(self) -> None:
        """The dense model, from its files again."""
        raise NotImplementedError

    def check_output(self) -> None:
        """UserError where the output directory has no room, or holds something else."""
        raise NotImplementedError

    def residence(self, stage: Finished) -> Residence:
        raise NotImplementedError

    def holding(self, stage: Finished) -> AbstractContextManager[None]:
        """For the duration, the model's blocks are those of a finished stage."""
        raise NotImplementedError

    def masks(self, stage: Finished, pruned: Pruned) -> Mapping[str, Tensor]:
        raise NotImplementedError

    def judge(self) -> tuple[dict[str, float], float]:
        """The perplexity on each held-out text, and the share of zeros in the weights to prune."""
        raise NotImplementedError

    def reconstructed_count(self, masks: Mapping[str, Tensor]) -> tuple[int, int]:
        """How many of the model's parameters reconstruction trains, a unit at a time, and how many there are."""
        raise NotImplementedError

    def prepare_teacher(self) -> None:
        """Have ready what `taught` needs of the dense model, which is the one loaded; UserError where it has none."""
        raise NotImplementedError

    def cycles(self, patterns: list[Pattern]) -> None:
        """All cycles of an iterative pruning but the last."""
        raise NotImplementedError

    def dense_retrained(self) -> Row:
        """The row of the dense model trained the same way."""
        raise NotImplementedError

    def retrain(self, pruned: Finished, masks: Mapping[str, Tensor]) -> list[Row]:
        """Retrain what is finished in that stage."""
        raise NotImplementedError

    def save(self, content: dict[str, Any], masks: Mapping[str, Tensor]) -> None:
        raise NotImplementedError

    def run(self, dense: Sequence[Row]) -> Report:
        job = self.job
        rows = self.comparison(dense)
        self.prepare_teacher()
        name = report.PRUNED if job.reconstruct == "none" else report.RECONSTRUCTED
        stage = self.stage(name)
        *earlier, pattern = schedule(self.pattern, job.cycles, job.schedule)
        with self.cost() as cost:
            self.cycles(earlier)
            pruned = self.prune(stage, job.for_reconstruct, pattern)
        masks = self.masks(stage, pruned)
        rows.append(self.known(name, partial(self.pruned_row, name, stage, cost, masks)))
        self.refined = {layer: dataclasses.asdict(found) for layer, found in pruned.refined.items()}
        if job.retrain:
            rows += self.retrain(stage, masks)
        found = Report(job.title, rows)
        machine.trim()
        if distributed.leads():
            self.save(self.manifest(rows, masks), masks)
            report.write([found], job.out / "perp")
            record.forget(job.out)
        return found

    def comparison(self, dense: Sequence[Row]) -> list[Row]:
        """The rows of the dense model and of what it is compared with; the model is the dense one again at the end."""
        job = self.job
        rows = list(dense) or [self.known(report.DENSE, partial(self.row, report.DENSE))]
        if "dense-retrained" in job.compare and job.retrain and not dense:
            rows.append(self.known(report.DENSE_RETRAINED, self.dense_retrained))
            self.drop(report.DENSE_RETRAINED)
        if "pruned" in job.compare and job.reconstruct != "none":
            rows.append(self.known(report.PRUNED, self.only_pruned))
            self.drop(report.PRUNED)
        return rows

    def only_pruned(self) -> Row:
        """The row of the model without recovery."""
        stage = self.stage(report.PRUNED)
        with self.cost() as cost:
            pruned = self.prune(stage, None, self.pattern)
        row = self.pruned_row(report.PRUNED, stage, cost, self.masks(stage, pruned))
        self.load()
        return row

    def known(self, name: str, make: Callable[[], Row]) -> Row:
        """The row of this stage, from an earlier process or made now."""
        row = self.record.row(name) if self.record else None
        if row is None:
            row = make()
            if self.record:
                self.record.add(row)
        return row

    def stage(self, name: str) -> Finished:
        stage = Finished(record.stage(self.job.out, name))
        if self.record:
            stage.begin()
        return stage

    def drop(self, name: str) -> None:
        """Nothing more is wanted of this stage than its row."""
        shutil.rmtree(record.stage(self.job.out, name), ignore_errors=True)

    def prune(self, stage: Finished, reconstruct: ReconstructSettings | None, pattern: Pattern) -> Pruned:
        job = self.job
        pruned = prune_model(
            self.model,
            self.calibration,
            job.method,
            pattern,
            reconstruct=reconstruct,
            granularity="block" if job.reconstruct == "none" else job.reconstruct,
            progress=self.progress,
            residence=self.residence(stage),
            refine=job.for_refine,
            refit=job.refit,
            allocate=job.allocate,
            skip=job.skip,
        )
        self.made += stage.made
        return pruned

    def pruned_row(self, name: str, stage: Finished, cost: Cost, masks: Mapping[str, Tensor]) -> Row:
        with self.holding(stage):
            if name == report.PRUNED:
                return self.row(name, cost)
            return self.row(name, cost, self.reconstructed_count(masks))

    def row(self, stage: str, cost: Cost | None = None, trained: tuple[int, int] = (0, 1)) -> Row:
        """The model as it is now; `trained`: how many parameters were trained to get here, of how many."""
        found, zeros = self.judge()
        cost = cost or Cost()
        count, total = trained
        return Row(stage, found, zeros, count / total, cost.seconds, cost.memory, count)

    @contextmanager
    def cost(self) -> Iterator[Cost]:
        """Measures seconds and peak memory of its block."""
        machine.trim()
        cost, started = Cost(), time.monotonic()
        machine.reset_peak(self.device)
        yield cost
        cost.seconds, cost.memory = time.monotonic() - started, machine.peak(self.device)

    def check_tokens(self) -> None:
        vocabulary = self.model.get_input_embeddings().num_embeddings
        highest = max(int(tokens.max()) for tokens in (self.training, self.calibration, *self.held_out.values()))
        if highest >= vocabulary:
            raise UserError(
                f"the tokenizer of {self.job.model} gives token {highest} where the model has {vocabulary} "
                "embeddings; put the model's own tokenizer beside it."
            )

    def manifest(self, rows: list[Row], masks: Mapping[str, Tensor]) -> dict[str, Any]:
        job = self.job
        return manifest.build(
            method=job.method,
            pattern=str(self.pattern),
            parts=job.retrain,
            masks=masks,
            refined=self.refined,
            data=self.identity,
            seeds={"calibration": job.seed, "training": job.seed + 1},
            settings=json.loads(json.dumps(dataclasses.asdict(job), default=str)),
            perplexity={row.stage: row.perplexity for row in rows},
            seconds={row.stage: row.seconds for row in rows},
        )


def count_kept(weights: Iterable[Tensor]) -> tuple[int, int]:
    """How many of these weights are not zero, and how many they are."""
    counts = [(int(weight.count_nonzero()), weight.numel()) for weight in weights]
    return sum(kept for kept, _ in counts), sum(total for _, total in counts)
