"""One measurement in a process of its own: `python -m bench.streaming.worker JOB.json`, the result beside the job."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import machine as bench_machine
from bench.results import write_json
from perp import checkpoints, machine, manifest, models, streamed_save
from perp.activations import Place
from perp.blocks import find_blocks
from perp.finished import Finished
from perp.plan import predict
from perp.planning import measure, model_shape, work_of
from perp.prune import prune_model
from perp.reconstruct import ReconstructSettings
from perp.residence import Streamed
from perp.settings import RunSettings
from perp.stream import Stream

PATTERN = "2:4"


@dataclass(frozen=True)
class Job:
    """A model directory; windows of random tokens to calibrate on; streamed or in memory; where it is staged."""

    directory: str
    windows: int
    seqlen: int
    epochs: int
    method: str
    stream: bool
    device: str
    threads: int
    scratch: str


class _NoTokenizer:
    def save_pretrained(self, directory: Path) -> None: ...


def execute(job: Job) -> dict[str, Any]:
    """Seconds and peak memory of pruning, fitting and saving, beyond the imports, and what the plan had said."""
    torch.set_num_threads(job.threads)
    models.check_model(job.directory)  # imports the model's code
    shape, settings = model_shape(job.directory, None), _settings(job)
    rates = measure(settings, shape, job.device)
    plan = predict(shape, replace(work_of(settings, job.device), judged=0), rates, job.stream, "memory")
    if plan.gives_back:
        machine.give_back_memory()
    machine.trim()
    before = machine.resident_parts()[0]
    machine.reset_peak(job.device)
    scratch = Path(tempfile.mkdtemp(dir=job.scratch))
    try:
        started = time.perf_counter()
        with machine.AnonymousPeak() as anonymous:
            blocks = _streamed(job, scratch) if job.stream else _in_memory(job, scratch)
        seconds = time.perf_counter() - started
    finally:
        shutil.rmtree(scratch)
    used = round(1e9 * machine.peak(job.device)) if job.device != "cpu" else 0
    return {
        "seconds": seconds,
        "host_bytes": anonymous.most - before,
        "device_bytes": used,
        "blocks": blocks,
        "planned": {"seconds": plan.seconds, "host_bytes": plan.host, "device_bytes": plan.device},
        "rates": asdict(rates),
        "device": torch.cuda.get_device_name() if job.device != "cpu" else bench_machine.device(),
    }


def _settings(job: Job) -> RunSettings:
    return RunSettings(
        model=job.directory,
        out=Path(job.scratch),
        pattern=PATTERN,
        method=job.method,
        epochs=job.epochs,
        windows=job.windows,
        seqlen=job.seqlen,
        retrain=(),
        compare=(),
    )


def _streamed(job: Job, scratch: Path) -> int:
    stream = Stream(job.directory, device=job.device)
    stage = Finished(scratch / "stage")
    residence = Streamed(stream, stage, Place("memory", job.windows, scratch))
    prune_model(stream.model, _windows(job, stream.model), job.method, PATTERN, _fit(job), residence=residence)
    masks = stage.all_masks(len(stream.blocks))
    streamed_save.save(stream, stage, _NoTokenizer(), scratch / "out", _manifest(masks))
    return len(stream.blocks)


def _in_memory(job: Job, scratch: Path) -> int:
    from transformers import AutoModelForCausalLM

    model = models.load_weights(job.directory, AutoModelForCausalLM, None).to(job.device)
    pruned = prune_model(model, _windows(job, model), job.method, PATTERN, _fit(job))
    checkpoints.save(model, _NoTokenizer(), scratch / "out", pruned.masks, _manifest(pruned.masks))
    return len(find_blocks(model)[1])


def _windows(job: Job, model: Any) -> Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(3, vocabulary, (job.windows, job.seqlen), generator=torch.Generator().manual_seed(0))


def _fit(job: Job) -> ReconstructSettings:
    return ReconstructSettings(epochs=job.epochs)


def _manifest(masks: Any) -> dict[str, Any]:
    return manifest.build(method="wanda", pattern=PATTERN, masks=masks, data={}, seeds={})


def main(path: Path) -> None:
    write_json(path.with_name("result.json"), execute(Job(**json.loads(path.read_text()))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
