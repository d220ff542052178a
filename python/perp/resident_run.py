"""The whole job on a model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from perp import checkpoints, distributed, machine, models, precision, record, report
from perp.adapters import Adapter, attach, detach, merge
from perp.blocks import all_prunable, find_blocks
from perp.distil import Teacher
from perp.evaluate import perplexity
from perp.finished import Finished
from perp.iterate import prune_retrain
from perp.job import Job, count_kept
from perp.linear import SparseLinear, swap_linears, unswap
from perp.modes import MODES
from perp.parts import adapter_mode, count_trainable, select_trainable
from perp.prune import Pruned
from perp.report import Row
from perp.residence import Recorded, Resident
from perp.retrain import RetrainSettings, retrain
from perp_kernels import Pattern


class ResidentJob(Job):
    adapters: dict[str, Adapter] | None = None
    taught: Teacher | None = None

    def load(self) -> None:
        """The model before is released first."""
        job = self.job
        if self.model is not None:
            self.model = None
            machine.trim()
        self.model, self.tokenizer = models.load(job.model, job.dtype, self.device, job.trust_remote_code)
        self.directory = models.directory(job.model)

    def check_output(self) -> None:
        job = self.job
        needed = checkpoints.size(self.model, job.packed, stages=job.cycles)
        checkpoints.check_output(job.out, job.overwrite or record.unfinished(job.out), needed)

    def residence(self, stage: Finished) -> Resident:
        return Recorded(self.model, stage) if self.record else Resident()

    def holding(self, stage: Finished) -> AbstractContextManager[None]:
        return nullcontext()

    def masks(self, stage: Finished, pruned: Pruned) -> Mapping[str, Tensor]:
        return pruned.masks

    def judge(self) -> tuple[dict[str, float], float]:
        found = {}
        for name, windows in self.held_out.items():
            self.progress.stage(f"perplexity {name}", distributed.most(len(windows)))
            found[name] = perplexity(self.model, windows, self.progress)
            self.progress.done()
        return found, _zeros(self.model)

    def reconstructed_count(self, masks: Mapping[str, Tensor]) -> tuple[int, int]:
        _, blocks = find_blocks(self.model)
        parts = self.unit_parts
        swap_linears(self.model, masks)
        if mode := adapter_mode(parts):
            attach(self.model, mode, self.job.rank)
        select_trainable(blocks, parts)
        found = count_trainable(blocks)[0], count_trainable(self.model)[1]
        detach(self.model)
        unswap(self.model)
        return found

    def prepare_teacher(self) -> None:
        """Soon there will be no dense model any more."""
        settings = self.job.for_retrain
        if settings is None or not settings.distil:
            return
        with precision.narrowed(self.model, precision.get(settings.precision)):
            self.taught = Teacher(
                self.model, self.training, self.drawn(), settings.distil, settings.temperature, self.progress
            )

    def cycles(self, patterns: list[Pattern]) -> None:
        job = self.job
        if not patterns:
            return
        stages = [self.stage(f"cycle-{number + 1}") for number in range(len(patterns) if self.record else 0)]
        prune_retrain(
            self.model,
            self.calibration,
            self.training,
            patterns,
            self.trainings[:-1],
            job.method,
            job.for_reconstruct,
            "block" if job.reconstruct == "none" else job.reconstruct,
            self.progress,
            self.taught,
            stages,
            refine=job.for_refine,
            refit=job.refit,
            allocate=job.allocate,
            skip=job.skip,
        )
        self.made += sum(stage.made for stage in stages)

    def dense_retrained(self) -> Row:
        """Under masks that keep everything; without distillation, since the teacher is the model itself."""
        assert self.job.for_retrain is not None
        everything = {
            name: torch.ones_like(linear.weight, dtype=torch.bool) for name, linear in all_prunable(self.model).items()
        }
        settings = replace(self.job.for_retrain, distil=0.0)
        with self.cost() as cost:
            trained = self.train(report.DENSE_RETRAINED, everything, settings, None)
        # With its adapters, which under such masks a merge would not change.
        row = self.row(report.DENSE_RETRAINED, cost, trained)
        self.load()
        return row

    def retrain(self, pruned: Finished, masks: Mapping[str, Tensor]) -> list[Row]:
        """One row; before it, where the merge loses something (lora_prune), one of the model as it was trained."""
        settings = self.trainings[-1]
        mode = MODES.get(adapter_mode(settings.parts) or "")
        rows = []
        with self.cost() as cost:
            trained = self.train(report.RETRAINED, masks, settings, self.taught)
        if mode and not mode.exact:
            name = report.UNMERGED if mode.merge_ else report.RETRAINED
            rows.append(self.known(name, partial(self.row, name, cost, trained)))
        if mode and not mode.merge_:
            self.adapters = detach(self.model)
        merge(self.model)
        unswap(self.model)
        if not mode or mode.merge_:
            rows.append(self.known(report.RETRAINED, partial(self.row, report.RETRAINED, cost, trained)))
        return rows

    def train(
        self, name: str, masks: Mapping[str, Tensor], settings: RetrainSettings, teacher: Teacher | None
    ) -> tuple[int, int]:
        """Train under these masks, from where an earlier process came to; how many parameters train, of how many."""
        swap_linears(self.model, masks)
        checkpoint = self.stage(name).training if self.record else None
        retrain(self.model, self.training, settings, self.progress, teacher, checkpoint)
        return count_trainable(self.model)

    def save(self, content: dict[str, Any], masks: Mapping[str, Tensor]) -> None:
        packed = self.job.packed
        checkpoints.save(self.model, self.tokenizer, self.job.out, masks, content, True, packed, self.adapters)


def _zeros(model: Any) -> float:
    """The share of exact zeros among the weights to prune, which may be swapped: adapters beside them do not count."""
    swapped = [m.sparse_weight.unpack() for m in model.modules() if isinstance(m, SparseLinear)]
    weights = swapped or [linear.weight for linear in all_prunable(model).values()]
    kept, total = count_kept(weights)
    return 1 - kept / total
