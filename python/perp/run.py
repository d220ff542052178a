"""The whole job: evaluate, prune, reconstruct, retrain, merge, evaluate each state on held-out text, save."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perp import checkpoints, data, machine, manifest, models, record, report, settings
from perp.adapters import Adapter, attach, detach, merge
from perp.blocks import all_prunable, find_blocks
from perp.distil import Teacher
from perp.errors import UserError
from perp.evaluate import perplexity, window_length
from perp.iterate import divided, prune_retrain, schedule
from perp.linear import SparseLinear, swap_linears, unswap
from perp.lock import locked
from perp.modes import MODES
from perp.parts import adapter_mode, count_trainable, select_trainable
from perp.plan import Plan
from perp.planning import Taken, plan_job, told
from perp.progress import Progress, Silent
from perp.prune import Pruned, prune_model
from perp.reconstruct import ReconstructSettings
from perp.report import Report, Row
from perp.retrain import RetrainSettings, drawn, retrain
from perp.settings import RunSettings
from perp.stages import Stages
from perp_kernels import Pattern

logger = logging.getLogger("perp")


@dataclass
class Cost:
    seconds: float = 0.0
    memory: float = 0.0


def run(job: RunSettings, progress: Progress | None = None, dense: Sequence[Row] = ()) -> Report:
    """Do the job and leave the model in `job.out`, with its manifest, the rows and their picture under perp/.

    `dense`: rows of the dense model from an earlier job on the same text, not measured again. All that can be checked
    is checked before the first long step; UserError or PatternError say what is wrong.
    """
    pattern = settings.check(job)
    # The packaged text has a second one to be judged on, of another kind.
    eval_data = job.eval_data or (("demo:sotu",) if job.data == "demo" else ())
    job = replace(job, device=machine.find_device(job.device), eval_data=eval_data)
    with locked(job.out):
        planned = plan_job(job, dense=bool(dense))
        if job.stream is not False and not planned.fits:
            raise UserError(f"{job.model} does not fit on this machine so; {planned.advice}, or see perp plan.")
        found, taken = carry_out(job, pattern, planned.plan, progress or Silent(), dense)
        logger.info(told(planned.plan, taken))
        return found


def carry_out(
    job: RunSettings, pattern: Pattern, plan: Plan, progress: Progress, dense: Sequence[Row] = ()
) -> tuple[Report, Taken]:
    """Do a job that has been checked as it was planned; its report, and what it took."""
    texts = _read(job)
    if plan.gives_back:
        machine.give_back_memory()
    # What the plan's probe or an earlier job has freed is not to serve this one uncounted.
    machine.trim()
    before, started, own = machine.resident_parts()[0], time.monotonic(), time.thread_time()
    with machine.AnonymousPeak() as peak:
        found = _kind(job, plan)(job, pattern, texts, progress, plan).run(dense)
    used = round(machine.peak(job.device or "cpu") * 1e9) if plan.device else 0
    return found, Taken(peak.most - before, used, time.monotonic() - started, time.thread_time() - own)


def _kind(job: RunSettings, plan: Plan) -> type[Job]:
    """How the job is done: with the model in memory, or streamed."""
    from perp.streamed_run import StreamedJob

    if plan.stream:
        return StreamedJob
    if record.unfinished(job.out):
        if not job.overwrite:
            raise UserError(
                f"{job.out} holds an unfinished streamed run; finish it with --stream, or pass --overwrite to begin "
                "again."
            )
        record.forget(job.out)
    return Job


@dataclass(frozen=True)
class Texts:
    train: list[str]
    held_out: dict[str, list[str]]
    identity: dict[str, Any]


def _read(job: RunSettings) -> Texts:
    source = data.documents(job.data)
    parts = data.split(source)
    held_out = {source.label: parts.test}
    identity: dict[str, Any] = {"train": {**source.identity, "split_by": parts.by}, "evaluate": []}
    for other in map(data.documents, job.eval_data):
        if other.identity["sha256"] == source.identity["sha256"]:
            raise UserError(
                f"{other.name} is the text trained on, whose test part is judged anyway; give another text."
            )
        held_out[other.name if other.label in held_out else other.label] = other.texts
        identity["evaluate"].append(other.identity)
    return Texts(parts.train, held_out, identity)


class Job:
    def __init__(self, job: RunSettings, pattern: Pattern, texts: Texts, progress: Progress, plan: Plan) -> None:
        self.job, self.pattern, self.progress, self.identity = job, pattern, progress, texts.identity
        self.plan = plan
        self.device = job.device or "cpu"
        self.model: Any
        self.tokenizer: Any
        self.adapters: dict[str, Adapter] = {}
        # What refining did to each linear's mask, as the manifest tells it.
        self.refined: dict[str, dict[str, float]] = {}
        self.load()
        self.check_output()
        for name, linear in all_prunable(self.model).items():
            pattern.check(linear.in_features, name)
            if linear.weight.ndim > 2 and job.keep_adapters:
                raise UserError(
                    f"{name} is of several experts, whose adapters no tool loads; retrain mask_lora instead."
                )
        count = job.windows or machine.usual_sizes(self.device)[0]
        seqlen = window_length(self.model, job.seqlen)
        enough = max(count, job.steps * job.batch if job.retrain else 0)
        self.training = data.training_windows(self.tokenizer, texts.train, seqlen, enough)
        self.calibration = data.sample(self.training, count, job.seed)
        if len(self.calibration) < count:
            warnings.warn(
                f"the text gives {len(self.training)} windows of {seqlen} tokens, fewer than {count}.", stacklevel=2
            )
        self.held_out = {
            name: data.windows(self.tokenizer, text, seqlen, job.eval_windows) for name, text in texts.held_out.items()
        }
        self.check_tokens()
        # As the manifest is to tell them.
        self.job = replace(job, windows=len(self.calibration), seqlen=seqlen)

    def run(self, dense: Sequence[Row]) -> Report:
        job, stages = self.job, Stages(self.job, self.identity)
        begun = job.resume and stages.begun()
        rows = [] if begun else self.comparison(dense)
        teacher = self.teacher()
        masks: Mapping[str, Tensor]
        if begun:
            rows, masks, self.refined = stages.read(self.model)
        else:
            row, masks = self.prune_in_cycles(teacher)
            rows.append(row)
            if job.resume and job.retrain:
                stages.write(self.model, rows, masks, self.refined)
        if job.retrain:
            rows += self.retrain(report.RETRAINED, masks, teacher, stages.retraining if job.resume else None)
        found = self.finish(rows, masks)
        stages.remove()
        return found

    def finish(self, rows: list[Row], masks: Mapping[str, Tensor]) -> Report:
        """Save the model and the report of these rows."""
        found = Report(self.job.title, rows)
        machine.trim()
        self.save(self.manifest(rows, masks), masks)
        report.write([found], self.job.out / "perp")
        return found

    def comparison(self, dense: Sequence[Row]) -> list[Row]:
        """The rows of the dense model and of what it is compared with; the model is the dense one again at the end."""
        job = self.job
        rows = list(dense) or [self.row(report.DENSE)]
        if "dense-retrained" in job.compare and job.retrain and not dense:
            everything = {
                name: torch.ones_like(linear.weight, dtype=torch.bool)
                for name, linear in all_prunable(self.model).items()
            }
            rows += self.retrain(report.DENSE_RETRAINED, everything)
            self.load()
        if "pruned" in job.compare and job.reconstruct != "none":
            rows.append(self.prune(None, self.pattern)[0])
            self.load()
        return rows

    def prune_in_cycles(self, teacher: Teacher | None) -> tuple[Row, Mapping[str, Tensor]]:
        """Prune to the pattern, after the earlier cycles of an iterative pruning; the row and the masks."""
        *earlier, pattern = schedule(self.pattern, self.job.cycles, self.job.schedule)
        with self.cost() as cost:
            self.cycles(earlier, teacher)
        row, pruned = self.prune(self.job.for_reconstruct, pattern)
        self.refined = {
            name: {"before": layer.before, "after": layer.after, "steps": layer.steps}
            for name, layer in pruned.refined.items()
        }
        return replace(row, seconds=cost.seconds + row.seconds, memory=max(cost.memory, row.memory)), pruned.masks

    def load(self) -> None:
        """The dense model, from its files again; the one before is released first."""
        job = self.job
        self.model = None
        machine.trim()
        self.model, self.tokenizer = models.load(job.model, job.dtype, self.device, job.trust_remote_code)

    def check_output(self) -> None:
        job = self.job
        checkpoints.check_output(job.out, job.overwrite, checkpoints.size(self.model, job.packed, job.resume))

    def check_tokens(self) -> None:
        vocabulary = self.model.get_input_embeddings().num_embeddings
        highest = max(int(tokens.max()) for tokens in (self.training, *self.held_out.values()))
        if highest >= vocabulary:
            raise UserError(
                f"the tokenizer of {self.job.model} gives token {highest} where the model has {vocabulary} "
                "embeddings; put the model's own tokenizer beside it."
            )

    def cycles(self, patterns: list[Pattern], teacher: Teacher | None) -> None:
        """All cycles of an iterative pruning but the last."""
        job, trainings = self.job, self.trainings
        if patterns:
            prune_retrain(
                self.model,
                self.calibration,
                self.training,
                patterns,
                trainings[:-1],
                job.method,
                job.for_reconstruct,
                "block" if job.reconstruct == "none" else job.reconstruct,
                self.progress,
                teacher,
                refine=job.for_refine,
                refit=job.refit,
                allocate=job.allocate,
            )

    @property
    def trainings(self) -> list[RetrainSettings]:
        """The retraining of each cycle."""
        settings = self.job.for_retrain
        return divided(settings, self.job.cycles) if settings else []

    def prune(self, reconstruct: ReconstructSettings | None, pattern: Pattern) -> tuple[Row, Pruned]:
        job = self.job
        with self.cost() as cost:
            pruned = prune_model(
                self.model,
                self.calibration,
                job.method,
                pattern,
                reconstruct=reconstruct,
                granularity="block" if job.reconstruct == "none" else job.reconstruct,
                progress=self.progress,
                refine=job.for_refine,
                refit=job.refit,
                allocate=job.allocate,
            )
        if reconstruct is None:
            return self.row(report.PRUNED, cost), pruned
        return self.row(report.RECONSTRUCTED, cost, self.reconstructed_count(pruned.masks)), pruned

    def reconstructed_count(self, masks: Mapping[str, Tensor]) -> tuple[int, int]:
        """How many of the model's parameters reconstruction trains, a unit at a time, and how many there are."""
        _, blocks = find_blocks(self.model)
        # A single matrix has no norms.
        parts = set(self.job.reconstruct_parts) - ({"norms"} if self.job.reconstruct == "matrix" else set())
        swap_linears(self.model, masks)
        if mode := adapter_mode(parts):
            attach(self.model, mode, self.job.rank)
        select_trainable(blocks, parts)
        found = count_trainable(blocks)[0], count_trainable(self.model)[1]
        detach(self.model)
        unswap(self.model)
        return found

    def teacher(self) -> Teacher | None:
        """What the dense model, which is the one loaded, makes of the windows that retraining will draw."""
        settings = self.job.for_retrain
        if settings is None or not settings.distil:
            return None
        orders = [drawn(len(self.training), training) for training in self.trainings]
        numbers = torch.cat([numbers for order in orders for numbers in order]).tolist()
        return Teacher(self.model, self.training, numbers, settings.distil, settings.temperature, self.progress)

    def retrain(
        self, stage: str, masks: Mapping[str, Tensor], teacher: Teacher | None = None, checkpoint: Path | None = None
    ) -> list[Row]:
        """Train under these masks and merge; masks that keep everything train the dense model the same way.

        One row; before it, where the merge loses something (lora_prune), one of the model as it was trained.
        """
        settings = self.job.for_retrain if stage == report.DENSE_RETRAINED else self.trainings[-1]
        assert settings is not None
        mode = MODES.get(adapter_mode(settings.parts) or "")
        rows = []
        with self.cost() as cost:
            swap_linears(self.model, masks)
            retrain(
                self.model,
                self.training,
                settings if teacher else replace(settings, distil=0.0),
                self.progress,
                teacher,
                checkpoint,
            )
            trained = count_trainable(self.model)
        if mode and not mode.exact:
            rows.append(self.row(report.UNMERGED if mode.merge_ else stage, cost, trained))
        if mode and not mode.merge_:
            self.adapters = detach(self.model)
        merge(self.model)
        unswap(self.model)
        if not mode or mode.merge_:
            rows.append(self.row(stage, cost, trained))
        return rows

    def row(self, stage: str, cost: Cost | None = None, trained: tuple[int, int] = (0, 1)) -> Row:
        """The model as it is now; `trained`: how many parameters were trained to get here, of how many."""
        found, zeros = self.judge()
        cost = cost or Cost()
        count, total = trained
        return Row(stage, found, zeros, count / total, cost.seconds, cost.memory, count)

    def judge(self) -> tuple[dict[str, float], float]:
        """The perplexity on each held-out text, and the share of zeros in the weights to prune."""
        found = {}
        for name, windows in self.held_out.items():
            self.progress.stage(f"perplexity {name}", len(windows))
            found[name] = perplexity(self.model, windows, self.progress)
            self.progress.done()
        return found, _zeros(self.model)

    @contextmanager
    def cost(self) -> Iterator[Cost]:
        """Measures seconds and peak memory of its block."""
        machine.trim()
        cost, started = Cost(), time.monotonic()
        machine.reset_peak(self.device)
        yield cost
        cost.seconds, cost.memory = time.monotonic() - started, machine.peak(self.device)

    def save(self, content: dict[str, Any], masks: Mapping[str, Tensor]) -> None:
        job = self.job
        checkpoints.save(self.model, self.tokenizer, job.out, masks, content, job.overwrite, job.packed, self.adapters)

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


def _zeros(model: Any) -> float:
    """The share of exact zeros among the weights to prune, which may be swapped: adapters beside them do not count."""
    swapped = [m.sparse_weight.unpack() for m in model.modules() if isinstance(m, SparseLinear)]
    weights = swapped or [linear.weight for linear in all_prunable(model).values()]
    kept, total = count_kept(weights)
    return 1 - kept / total


def count_kept(weights: Iterable[Tensor]) -> tuple[int, int]:
    """How many of these weights are not zero, and how many they are."""
    counts = [(int(weight.count_nonzero()), weight.numel()) for weight in weights]
    return sum(kept for kept, _ in counts), sum(total for _, total in counts)


def run_demo(out: Path, progress: Progress | None = None) -> list[Report]:
    """Wanda at 50 % and at 2:4 on the packaged model, into directories under `out`, with the report over both."""
    jobs = settings.demo(out)
    for job in jobs:
        settings.check(job)
    reports: list[Report] = []
    for job in jobs:
        dense = [row for row in reports[0].rows if row.is_dense] if reports else []
        reports.append(run(job, progress, dense))
    report.write(reports, out)
    return reports
