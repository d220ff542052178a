"""One row in a process of its own, so that its peak memory is its own: `python -m bench.quality.worker JOB.json`.

The job names the row, the protocol and the files; the result is written into the job's folder.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import perp
from bench.quality.protocol import Protocol
from bench.quality.rows import Row, Training
from bench.results import write_json
from perp import machine, manifest, precision
from perp.blocks import all_prunable
from perp.iterate import divided, schedule
from perp.progress import Progress, choose
from perp.refine.watch import Refinement
from perp.retrain import drawn

# Both are raised by the row's own seed.
CALIBRATION_SEED, TRAINING_SEED = 0, 1
STAGES = "all stages"


@dataclass(frozen=True)
class Job:
    """A row to run; start and save are the directories of the model it continues and of the one it leaves, if any."""

    row: Row
    protocol: Protocol
    validate: bool
    start: Path | None
    save: Path | None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "start": self.start and str(self.start), "save": self.save and str(self.save)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Job:
        row = dict(content["row"], anchor=None)
        for stage in ("reconstruct", "retrain"):
            if row[stage]:
                row[stage] = Training(**{**row[stage], "parts": tuple(row[stage]["parts"])})
        return cls(
            Row(**row),
            Protocol(**content["protocol"]),
            content["validate"],
            content["start"] and Path(content["start"]),
            content["save"] and Path(content["save"]),
        )


def execute(job: Job, progress: Progress) -> dict[str, Any]:
    """Makes the row's model and judges it.

    Returns perplexity by text; the shares of zeros (of the prunable weights) and of retrained parameters (of all); what
    refining masks did to the local error; seconds of pruning, reconstruction and retraining, the start's included; the
    process's peak bytes.
    """
    row, protocol = job.row, job.protocol
    model, tokenizer = perp.load(str(job.start) if job.start else protocol.model)
    masks = perp.load_masks(job.start) if job.start else {}
    windows = protocol.training_windows(tokenizer)
    judged = protocol.judged_windows(tokenizer, job.validate)
    training = _training(row, protocol)
    if training and row.windows:
        windows = windows[torch.cat(drawn(len(windows), training))]
    calibration = perp.sample(windows, row.windows or protocol.windows, CALIBRATION_SEED + row.seed)
    retrained, local_error = 0.0, None

    started = time.monotonic()
    teacher = None
    if training and training.distil:
        with precision.narrowed(model, precision.get(training.precision)):
            teacher = perp.Teacher(model, windows, weight=training.distil)
    if row.method:
        *earlier, pattern = schedule(row.pattern or "", row.cycles)
        choice = _choice(row)
        if training:
            *before, training = divided(training, row.cycles)
            perp.prune_retrain(
                model, calibration, windows, earlier, before, row.method, progress=progress, teacher=teacher, **choice
            )
        pruned = perp.prune_model(model, calibration, row.method, pattern, progress=progress, **choice)
        masks, local_error = pruned.masks, _change(pruned.refined.values())
    if training:
        perp.swap_linears(model, masks or _everything(model))
        perp.retrain_model(model, windows, training, progress, teacher)
        trained, total = perp.count_trainable(model)
        retrained = trained / total
        perp.merge(model)
        perp.unswap(model)
    seconds = time.monotonic() - started + (manifest.read(job.start)["seconds"][STAGES] if job.start else 0.0)

    perplexity = {}
    for name, chosen in judged.items():
        progress.stage(f"perplexity {name}", len(chosen))
        perplexity[name] = perp.perplexity(model, chosen, progress)
        progress.done()
    if job.save:
        saved = manifest.build(
            method=row.method or "none",
            pattern=row.pattern or "none",
            masks=masks,
            data=perp.documents(protocol.text).identity,
            seeds={"calibration": CALIBRATION_SEED + row.seed, "training": TRAINING_SEED + row.seed},
            settings=row.settings(protocol),
            seconds={STAGES: seconds},
        )
        perp.save(model, tokenizer, job.save, masks, saved, overwrite=True)
    weights = [linear.weight.detach() for linear in all_prunable(model).values()]
    return {
        "perplexity": perplexity,
        "zeros": sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights),
        "retrained": retrained,
        "local_error": local_error,
        "seconds": seconds,
        "peak_bytes": round(machine.peak() * 1e9),
    }


def _training(row: Row, protocol: Protocol) -> perp.RetrainSettings | None:
    if row.retrain is None:
        return None
    return perp.RetrainSettings(
        parts=set(row.retrain.parts),
        lr=row.retrain.lr,
        steps=protocol.steps,
        batch=protocol.batch,
        seed=TRAINING_SEED + row.seed,
        checkpointing=False,  # the same gradients a quarter sooner, in 2 GB more
        distil=row.retrain.distil,
        precision=row.retrain.precision,
    )


def _choice(row: Row) -> dict[str, Any]:
    """How the row prunes, the method and the pattern aside."""
    stage = row.reconstruct
    return {
        "reconstruct": stage
        and perp.ReconstructSettings(
            parts=set(stage.parts),
            lr=stage.lr,
            epochs=stage.epochs,
            precision=stage.precision,
            seed=CALIBRATION_SEED + row.seed,
        ),
        "granularity": row.granularity,
        "refine": perp.RefineSettings(row.refine) if row.refine else None,
        "refit": row.refit,
        "allocate": row.allocate,
    }


def _change(refined: Iterable[Refinement]) -> float | None:
    """The mean over the linears of the relative change of the local error, as in the papers; None where none is."""
    changes = [found.after / found.before - 1 for found in refined if found.before]
    return statistics.fmean(changes) if changes else None


def _everything(model: Any) -> dict[str, torch.Tensor]:
    """Masks that keep every weight: under them mask_lora is plain LoRA."""
    return {name: torch.ones_like(linear.weight, dtype=torch.bool) for name, linear in all_prunable(model).items()}


def main(path: Path) -> None:
    job = Job.from_json(json.loads(path.read_text()))
    write_json(path.with_name("result.json"), execute(job, choose()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
