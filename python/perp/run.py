"""The whole job: evaluate, prune, reconstruct, retrain, merge, evaluate each state on held-out text, save."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perp import checkpoints, data, machine, manifest, models, pruners, report
from perp.adapters import PARTS, attach, count_trainable, merge, select_trainable
from perp.blocks import find_blocks, prunable
from perp.errors import UserError
from perp.evaluate import perplexity, window_length
from perp.linear import swap_linears, unswap
from perp.progress import Progress, Silent
from perp.prune import Pruned, prune_model
from perp.reconstruct import ReconstructSettings
from perp.report import Report, Row
from perp.retrain import RetrainSettings, retrain
from perp_kernels import Pattern

RECONSTRUCT = ("none", "half-block", "block")
COMPARE = ("pruned", "dense-retrained")
# 23 steps of one window of 512 tokens: 11,776 tokens a retraining.
DEMO_STEPS = 23


@dataclass(frozen=True)
class RunSettings:
    """One job. Windows and lengths left at None become 128 x 2048 on a GPU and 32 x 512 on a CPU.

    `retrain` names the parts trained on the language-model loss (empty: none); `compare` the further lines measured:
    "pruned" (no recovery) and "dense-retrained" (the dense model trained on the same text). Learning rates left at None
    are the defaults of the settings they go to. `eval_data` is judged whole, `data` on its test part.
    """

    model: str
    out: Path
    pattern: str = "0.5"
    method: str = "wanda"
    reconstruct: str = "half-block"
    reconstruct_parts: tuple[str, ...] = ("kept", "norms")
    reconstruct_lr: float | None = None
    epochs: int = 3
    retrain: tuple[str, ...] = ("mask_lora", "norms")
    retrain_lr: float | None = None
    steps: int = 64
    batch: int = 4
    checkpointing: bool = True
    rank: int = 16
    alpha: float = 32.0
    data: str = "demo"
    eval_data: tuple[str, ...] = ()
    windows: int | None = None
    seqlen: int | None = None
    eval_windows: int = 32
    compare: tuple[str, ...] = ("pruned",)
    seed: int = 0
    dtype: str | None = None
    device: str | None = None
    trust_remote_code: bool = False
    overwrite: bool = False

    @property
    def title(self) -> str:
        return f"{self.method} {self.pattern}"


@dataclass
class Cost:
    seconds: float = 0.0
    memory: float = 0.0


def run(settings: RunSettings, progress: Progress | None = None, dense: Sequence[Row] = ()) -> Report:
    """Do the job and leave the model in `settings.out`, with its manifest, the rows and their picture under perp/.

    `dense`: rows of the dense model from an earlier job on the same text, not measured again. All that can be checked
    is checked before the first long step; UserError, PatternError or ValueError say what is wrong.
    """
    pattern = check(settings)
    device = machine.find_device(settings.device)
    # The packaged text has a second one to be judged on, of another kind.
    eval_data = settings.eval_data or (("demo:sotu",) if settings.data == "demo" else ())
    settings = replace(settings, device=device, eval_data=eval_data)
    return _Job(settings, pattern, _read(settings), progress or Silent()).run(dense)


def check(settings: RunSettings) -> Pattern:
    """Refuse what cannot work before any weight or text is read; gives the parsed pattern."""
    pattern = Pattern.parse(settings.pattern)
    pruners.get(settings.method)
    for name, given, known in (
        ("reconstruct", [settings.reconstruct], RECONSTRUCT),
        ("reconstruct parts", settings.reconstruct_parts, PARTS),
        ("retrain", settings.retrain, PARTS),
        ("compare", settings.compare, COMPARE),
    ):
        if unknown := sorted(set(given) - set(known)):
            raise UserError(f"{name} cannot be {unknown[0]!r}; choose among {', '.join(known)}.")
    for name in ("windows", "seqlen", "eval_windows", "epochs", "steps", "batch", "rank"):
        least = 2 if name == "seqlen" else 1
        value = getattr(settings, name)
        if value is not None and value < least:
            raise UserError(f"{name.replace('_', ' ')} is {value}; it must be at least {least}.")
    for name in ("reconstruct_lr", "retrain_lr", "alpha"):
        value = getattr(settings, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"{name.replace('_lr', ' learning rate')} is {value}; it must be a positive number.")
    machine.find_device(settings.device)
    machine.check_dtype(settings.dtype)
    _reconstruct_settings(settings)
    checkpoints.check_output(settings.out, settings.overwrite)
    models.check_model(settings.model, settings.trust_remote_code)
    return pattern


def _reconstruct_settings(settings: RunSettings) -> ReconstructSettings | None:
    if settings.reconstruct == "none":
        return None
    return ReconstructSettings(
        parts=settings.reconstruct_parts,
        lr=settings.reconstruct_lr,
        epochs=settings.epochs,
        r=settings.rank,
        alpha=settings.alpha,
        seed=settings.seed,
    )


def _retrain_settings(settings: RunSettings) -> RetrainSettings:
    found = RetrainSettings(
        parts=settings.retrain,
        steps=settings.steps,
        batch=settings.batch,
        checkpointing=settings.checkpointing,
        r=settings.rank,
        alpha=settings.alpha,
        seed=settings.seed + 1,
    )
    return found if settings.retrain_lr is None else replace(found, lr=settings.retrain_lr)


@dataclass(frozen=True)
class _Texts:
    train: list[str]
    held_out: dict[str, list[str]]
    identity: dict[str, Any]


def _read(settings: RunSettings) -> _Texts:
    source = data.documents(settings.data)
    parts = data.split(source)
    held_out = {source.label: parts.test}
    identity: dict[str, Any] = {"train": {**source.identity, "split_by": parts.by}, "evaluate": []}
    for other in map(data.documents, settings.eval_data):
        if other.identity["sha256"] == source.identity["sha256"]:
            raise UserError(
                f"{other.name} is the text trained on, whose test part is judged anyway; give another text."
            )
        held_out[other.name if other.label in held_out else other.label] = other.texts
        identity["evaluate"].append(other.identity)
    return _Texts(parts.train, held_out, identity)


class _Job:
    def __init__(self, settings: RunSettings, pattern: Pattern, texts: _Texts, progress: Progress) -> None:
        self.settings, self.pattern, self.progress, self.identity = settings, pattern, progress, texts.identity
        self.device = settings.device or "cpu"
        self.model: Any = None
        self.tokenizer: Any = None
        self.load()
        for name, linear in self.linears().items():
            pattern.check(linear.in_features, name)
        count = settings.windows or machine.usual_sizes(self.device)[0]
        seqlen = window_length(self.model, settings.seqlen)
        enough = max(count, settings.steps * settings.batch if settings.retrain else 0)
        self.training = data.training_windows(self.tokenizer, texts.train, seqlen, enough)
        self.calibration = data.sample(self.training, count, settings.seed)
        self.held_out = {
            name: data.windows(self.tokenizer, text, seqlen, settings.eval_windows)
            for name, text in texts.held_out.items()
        }
        self.check_tokens()
        # As the manifest is to tell them.
        self.settings = replace(settings, windows=len(self.calibration), seqlen=seqlen)

    def run(self, dense: Sequence[Row]) -> Report:
        settings = self.settings
        rows = list(dense) or [self.row(report.DENSE)]
        if "dense-retrained" in settings.compare and settings.retrain and not dense:
            everything = {
                name: torch.ones_like(linear.weight, dtype=torch.bool) for name, linear in self.linears().items()
            }
            rows.append(self.retrain(report.DENSE_RETRAINED, everything))
            self.load()
        if "pruned" in settings.compare and settings.reconstruct != "none":
            rows.append(self.prune(None)[0])
            self.load()
        row, pruned = self.prune(_reconstruct_settings(settings))
        rows.append(row)
        if settings.retrain:
            rows.append(self.retrain(report.RETRAINED, pruned.masks))
        found = Report(settings.title, rows)
        self.save(found, pruned)
        report.write([found], settings.out / "perp")
        return found

    def load(self) -> None:
        """The dense model, from its files again; the one before is released first."""
        settings = self.settings
        self.model = None
        gc.collect()
        self.model, self.tokenizer = models.load(
            settings.model, settings.dtype, self.device, settings.trust_remote_code
        )

    def linears(self) -> dict[str, nn.Linear]:
        name, blocks = find_blocks(self.model)
        return {key: linear for i, block in enumerate(blocks) for key, linear in prunable(block, f"{name}.{i}").items()}

    def check_tokens(self) -> None:
        vocabulary = self.model.get_input_embeddings().num_embeddings
        highest = max(int(tokens.max()) for tokens in (self.training, *self.held_out.values()))
        if highest >= vocabulary:
            raise UserError(
                f"the tokenizer of {self.settings.model} gives token {highest} where the model has {vocabulary} "
                "embeddings; put the model's own tokenizer beside it."
            )

    def prune(self, reconstruct: ReconstructSettings | None) -> tuple[Row, Pruned]:
        settings = self.settings
        with self.cost() as cost:
            pruned = prune_model(
                self.model,
                self.calibration,
                settings.method,
                self.pattern,
                reconstruct=reconstruct,
                granularity="block" if settings.reconstruct == "block" else "half-block",
                progress=self.progress,
            )
        if reconstruct is None:
            return self.row(report.PRUNED, cost), pruned
        return self.row(report.RECONSTRUCTED, cost, self.reconstructed_share(pruned.masks)), pruned

    def reconstructed_share(self, masks: dict[str, Tensor]) -> float:
        """The share of the model's parameters that reconstruction trains, a unit at a time."""
        _, blocks = find_blocks(self.model)
        swap_linears(self.model, masks)
        if "mask_lora" in self.settings.reconstruct_parts:
            attach(self.model, r=self.settings.rank)
        select_trainable(blocks, self.settings.reconstruct_parts)
        share = count_trainable(blocks)[0] / count_trainable(self.model)[1]
        merge(self.model)
        unswap(self.model)
        return share

    def retrain(self, stage: str, masks: dict[str, Tensor]) -> Row:
        with self.cost() as cost:
            swap_linears(self.model, masks)
            retrain(self.model, self.training, _retrain_settings(self.settings), self.progress)
            trained, total = count_trainable(self.model)
            merge(self.model)
            unswap(self.model)
        return self.row(stage, cost, trained / total)

    def row(self, stage: str, cost: Cost | None = None, trained: float = 0.0) -> Row:
        found = {}
        for name, windows in self.held_out.items():
            self.progress.stage(f"perplexity {name}", len(windows))
            found[name] = perplexity(self.model, windows, self.progress)
            self.progress.done()
        cost = cost or Cost()
        return Row(stage, found, _zeros(self.linears().values()), trained, cost.seconds, cost.memory)

    @contextmanager
    def cost(self) -> Iterator[Cost]:
        """Measures seconds and peak memory of its block."""
        cost, started = Cost(), time.monotonic()
        machine.reset_peak(self.device)
        yield cost
        cost.seconds, cost.memory = time.monotonic() - started, machine.peak(self.device)

    def save(self, found: Report, pruned: Pruned) -> None:
        settings = self.settings
        content = manifest.build(
            method=settings.method,
            pattern=str(self.pattern),
            parts=settings.retrain,
            masks=pruned.masks,
            data=self.identity,
            seeds={"calibration": settings.seed, "training": settings.seed + 1},
            settings=json.loads(json.dumps(dataclasses.asdict(settings), default=str)),
            perplexity={row.stage: row.perplexity for row in found.rows},
            seconds={row.stage: row.seconds for row in found.rows},
        )
        checkpoints.save(self.model, self.tokenizer, settings.out, pruned.masks, content, settings.overwrite)


def _zeros(linears: Iterable[nn.Linear]) -> float:
    """The share of exact zeros among these weights."""
    counts = [(linear.weight.numel(), int(linear.weight.count_nonzero())) for linear in linears]
    return 1 - sum(kept for _, kept in counts) / sum(total for total, _ in counts)


def run_demo(out: Path, progress: Progress | None = None) -> list[Report]:
    """Wanda at 50 % and at 2:4 on the packaged model, at sizes for two CPU cores, into directories under `out`.

    The report over both is left in `out`. An earlier demo's models are replaced, anything else there is refused.
    """
    jobs = [
        RunSettings(
            model="demo",
            out=out / f"wanda-{pattern.replace(':', '-')}",
            pattern=pattern,
            epochs=2,
            steps=DEMO_STEPS,
            batch=1,
            checkpointing=False,
            windows=16,
            seqlen=512,
            eval_windows=8,
            compare=COMPARE,
            device="cpu",
            overwrite=(out / f"wanda-{pattern.replace(':', '-')}" / manifest.NAME).exists(),
        )
        for pattern in ("0.5", "2:4")
    ]
    for job in jobs:
        check(job)
    reports: list[Report] = []
    for job in jobs:
        dense = (
            [row for row in reports[0].rows if row.stage in (report.DENSE, report.DENSE_RETRAINED)] if reports else []
        )
        reports.append(run(job, progress, dense))
    report.write(reports, out)
    return reports
