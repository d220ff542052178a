"""perp run and perp demo: make a pruned model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console

from perp.cli.application import OUTPUT, Quiet, command, option, progress_of
from perp.cli.job import job_command

if TYPE_CHECKING:
    from perp.report import Report


@job_command("perp run demo --pattern 2:4 --data demo --out runs/smaller", ranks=True)
def run(job: Any, *, quiet: Quiet = False) -> None:
    """Prune a model, recover it, judge every state on held-out text, and save it.

    --out becomes an ordinary Hugging Face directory with exact zeros where weights were pruned: any tool loads it
    without perp. Its perp.json tells how it was made. No article that is judged on is calibrated or trained on. A run
    that was interrupted goes on from its last finished unit when the same command is given again.

    On several GPUs: torchrun --nproc-per-node N -m perp run MODEL ...
    """
    from perp import distributed
    from perp.run import run as run_job

    started = time.monotonic()
    with distributed.joined(job.device) as own, progress_of(quiet or not distributed.leads()) as progress:
        found = run_job(replace(job, device=own), progress)
        if distributed.leads():
            _show([found], job.out, job.out / "perp", started)


@command("perp demo --out runs/demo")
def demo(
    *,
    out: Annotated[
        Path, option("--out", "-o", help="Directory for the models and the report.", panel=OUTPUT, metavar="DIR")
    ] = Path("runs/demo"),
    quiet: Quiet = False,
) -> None:
    """Prune, recover and judge the packaged model at 50 % and at 2:4: a quarter of an hour on two CPU cores.

    Leaves two models, a table and a picture in --out. They are small on purpose: 16 windows of 512 tokens to calibrate
    on, 8 and 8 to judge on.
    """
    from perp.run import run_demo

    started = time.monotonic()
    with progress_of(quiet) as progress:
        reports = run_demo(out, progress)
    _show(reports, out, out, started)


def _show(reports: Sequence[Report], out: Path, written: Path, started: float) -> None:
    from perp import report
    from perp.progress import duration

    drawn = report.PICTURE if (written / report.PICTURE).exists() else report.ROWS
    console = Console()
    console.print(report.table(reports))
    for line in (f"{out}: saved after {duration(time.monotonic() - started)}", f"{written / drawn}: the report"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
