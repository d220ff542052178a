"""One measurement in a process of its own: `python -m bench.streaming.worker JOB.json`, the result beside the job."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import machine as bench_machine
from bench.results import write_json
from bench.streaming.retraining import retrained
from bench.streaming.shared import PATTERN, Clock, NoTokenizer, random_windows
from perp import checkpoints, machine, manifest, models, streamed_save
from perp.activations import Place
from perp.finished import Finished
from perp.plan import predict
from perp.planning import measure, model_shape, work_of
from perp.prune import prune_model
from perp.reconstruct import ReconstructSettings
from perp.residence import Streamed
from perp.settings import RunSettings
from perp.stream import Stream
from perp_kernels import dispatch


@dataclass(frozen=True)
class Job:
    """A model directory; windows of random tokens to calibrate on; streamed or in memory; where it is staged.

    With `steps` the model is retrained for so many, and neither calibrated nor fitted.
    """

    directory: str
    windows: int
    seqlen: int
    epochs: int
    method: str
    stream: bool
    device: str
    threads: int
    scratch: str
    steps: int = 0


def execute(job: Job) -> dict[str, Any]:
    """What the job took, with the device and the implementations that served; AssertionError for a wrong result."""
    torch.set_num_threads(job.threads)
    models.check_model(job.directory)  # imports the model's code
    scratch = Path(tempfile.mkdtemp(dir=job.scratch))
    try:
        with dispatch.served() as served:
            if job.steps:
                found = retrained(job.directory, job.method, job.windows, job.seqlen, job.steps, job.device, scratch)
            else:
                found = _fitted(job, scratch)
    finally:
        shutil.rmtree(scratch)
    device = torch.cuda.get_device_name() if job.device != "cpu" else bench_machine.device()
    return {**found, "device": device, "served": sorted(served)}


def _fitted(job: Job, scratch: Path) -> dict[str, Any]:
    """Seconds and peak memory of pruning, fitting and saving, beyond the imports, and what the plan had said.

    `each`: the seconds of pruning and fitting each block.
    """
    shape, settings = model_shape(job.directory, None), _settings(job)
    rates = measure(settings, shape, job.device)
    plan = predict(shape, replace(work_of(settings, job.device), judged=0), rates, job.stream, "memory")
    if plan.gives_back:
        machine.give_back_memory()
    machine.trim()
    before = machine.resident_parts()[0]
    machine.reset_peak(job.device)
    clock, started = Clock(job.device), time.perf_counter()
    with machine.AnonymousPeak() as anonymous:
        masks = (_streamed if job.stream else _in_memory)(job, scratch, clock)
    seconds = time.perf_counter() - started
    used = round(1e9 * machine.peak(job.device)) if job.device != "cpu" else 0
    for name, mask in masks.items():
        assert bool((mask.view(-1, 4).sum(1, dtype=torch.uint8) == 2).all()), f"{name} does not keep 2 of 4"
    return {
        "seconds": seconds,
        "each": clock.each,
        "host_bytes": anonymous.most - before,
        "device_bytes": used,
        "blocks": len(clock.each),
        "planned": {"seconds": plan.seconds, "host_bytes": plan.host, "device_bytes": plan.device},
        "rates": asdict(rates),
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


def _streamed(job: Job, scratch: Path, clock: Clock) -> Mapping[str, Tensor]:
    stream = Stream(job.directory, device=job.device)
    stage = Finished(scratch / "stage")
    residence = Streamed(stream, stage, Place("memory", job.windows, scratch))
    windows = random_windows(stream.model, job.windows, job.seqlen)
    prune_model(stream.model, windows, job.method, PATTERN, _fit(job), progress=clock, residence=residence)
    masks = stage.all_masks(len(stream.blocks))
    streamed_save.save(stream, stage, NoTokenizer(), scratch / "out", _manifest(masks))
    return masks


def _in_memory(job: Job, scratch: Path, clock: Clock) -> Mapping[str, Tensor]:
    from transformers import AutoModelForCausalLM

    model = models.load_weights(job.directory, AutoModelForCausalLM, None).to(job.device)
    windows = random_windows(model, job.windows, job.seqlen)
    pruned = prune_model(model, windows, job.method, PATTERN, _fit(job), progress=clock)
    checkpoints.save(model, NoTokenizer(), scratch / "out", pruned.masks, _manifest(pruned.masks))
    return pruned.masks


def _fit(job: Job) -> ReconstructSettings:
    return ReconstructSettings(epochs=job.epochs)


def _manifest(masks: Mapping[str, Tensor]) -> dict[str, Any]:
    return manifest.build(method="wanda", pattern=PATTERN, masks=masks, data={}, seeds={})


def main(path: Path) -> None:
    write_json(path.with_name("result.json"), execute(Job(**json.loads(path.read_text()))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
