"""One job in a process of its own, planned and then done: `python -m bench.plan.worker JOB.json`, the result beside."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import machine as bench_machine
from bench.results import write_json
from perp import run, settings
from perp.lock import locked
from perp.planning import plan_job
from perp.progress import Silent
from perp.settings import RunSettings


def execute(told: dict[str, Any], threads: int) -> dict[str, Any]:
    """What was planned, stage by stage, and what was taken."""
    torch.set_num_threads(threads)
    lists = {name: tuple(value) for name, value in told.items() if isinstance(value, list)}
    job = RunSettings(**{**told, **lists, "out": Path(told["out"])})
    pattern = settings.check(job)
    planned = plan_job(job)
    with locked(job.out):
        _, taken = run.carry_out(job, pattern, planned.plan, Silent())
    return {
        "planned": {stage.name: asdict(stage) for stage in planned.plan.stages},
        "seconds": planned.plan.seconds,
        "host": planned.plan.host,
        "device_bytes": planned.plan.device,
        "rates": asdict(planned.rates),
        "taken": asdict(taken),
        "device": torch.cuda.get_device_name() if job.device == "cuda" else bench_machine.device(),
        "dtype": {2: "16 bit", 4: "32 bit"}[planned.shape.itemsize],
    }


def main(path: Path) -> None:
    asked = json.loads(path.read_text())
    write_json(path.with_name("result.json"), execute(asked["settings"], asked["threads"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
