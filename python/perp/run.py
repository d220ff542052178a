"""The whole job: evaluate, prune, reconstruct, retrain, merge, evaluate each state on held-out text, save."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from perp import distributed, machine, record, report, settings, texts
from perp.errors import UserError
from perp.lock import locked
from perp.plan import Plan
from perp.planning import Taken, plan_job, told
from perp.progress import Progress, Silent
from perp.report import Report, Row
from perp.resident_run import ResidentJob
from perp.settings import RunSettings
from perp.streamed_run import StreamedJob
from perp_kernels import Pattern

logger = logging.getLogger("perp")


def run(job: RunSettings, progress: Progress | None = None, dense: Sequence[Row] = ()) -> Report:
    """Do the job and leave the model in `job.out`, with its manifest, the rows and their picture under perp/.

    A run that did not come to its end is gone on with when it is called again the same way, to the same bits (of
    `perp.record`); with `job.overwrite` it begins anew. `dense`: rows of the dense model from an earlier job on the
    same text, not measured again. All that can be checked is checked before the first long step; UserError or
    PatternError say what is wrong. Where there are several ranks (`perp.distributed`), all call this alike, and the
    first writes; such a run begins anew each time.
    """
    with distributed.together():
        pattern = settings.check(job)
    progress = progress if progress and distributed.leads() else Silent()
    # The packaged text has a second one to be judged on, of another kind.
    eval_data = job.eval_data or (("demo:sotu",) if job.data == "demo" else ())
    job = replace(job, device=machine.find_device(job.device), eval_data=eval_data)
    with ExitStack() as held:
        with distributed.together():
            if distributed.leads():
                held.enter_context(locked(job.out))
            job, plan = _prepared(job, bool(dense))
        found, taken = carry_out(job, pattern, plan, progress, dense)
        logger.info(told(plan, taken))
        return found


def carry_out(
    job: RunSettings, pattern: Pattern, plan: Plan, progress: Progress, dense: Sequence[Row] = ()
) -> tuple[Report, Taken]:
    """Do a job that has been checked as it was planned; its report, and what it took."""
    with distributed.together():
        text = texts.read(job.data, job.eval_data)
    # What the plan's probe or an earlier job has freed is not to serve this one uncounted.
    if plan.gives_back:
        machine.give_back_memory()
    else:
        machine.trim()
    before, started, own = machine.resident_parts()[0], time.monotonic(), time.thread_time()
    kind = StreamedJob if plan.stream else ResidentJob
    try:
        with machine.AnonymousPeak() as peak:
            with distributed.together():
                made = kind(job, pattern, text, progress, plan)
            found = made.run(dense)
    finally:
        if distributed.size() == 1:
            record.tidy(job.out)
    used = round(machine.peak(job.device or "cpu") * 1e9) if plan.device else 0
    return found, Taken(peak.most - before, used, time.monotonic() - started, time.thread_time() - own)


def _prepared(job: RunSettings, dense: bool) -> tuple[RunSettings, Plan]:
    """The job, and how it is to be done where rows of the `dense` model are known; UserError for what cannot be."""
    if distributed.size() > 1 and record.unfinished(job.out) and not job.overwrite:
        raise UserError(
            f"{job.out} holds an unfinished run of one process; finish it without torchrun, or pass --overwrite to "
            "begin anew."
        )
    if job.stream is None and not job.overwrite:
        # Else a machine with more memory free, or less, would not go on.
        job = replace(job, stream=record.was_streamed(job.out))
    planned = plan_job(job, dense=dense)
    if job.stream is not False and not planned.fits:
        raise UserError(f"{job.model} does not fit on this machine so; {planned.advice}, or see perp plan.")
    if planned.plan.stream and distributed.size() > 1:
        raise UserError(
            f"{job.model} does not fit in the memory of each of {distributed.size()} ranks, and a streamed run is one "
            "process; start it without torchrun."
        )
    if planned.plan.stream:
        settings.check_streamed(job)
    return job, planned.plan


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
