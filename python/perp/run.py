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
from perp.planning import plan_job, told
from perp.progress import Progress, Silent
from perp.report import Report, Row
from perp.resident_run import ResidentJob
from perp.settings import RunSettings
from perp.streamed_run import StreamedJob
from perp.texts import Texts

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
            job, plan, text = _prepared(job)
        if plan.gives_back:
            machine.give_back_memory()
        before, started = machine.resident_parts()[0], time.monotonic()
        kind = StreamedJob if plan.stream else ResidentJob
        if distributed.size() == 1:
            held.callback(record.tidy, job.out)
        with machine.AnonymousPeak() as taken:
            with distributed.together():
                made = kind(job, pattern, text, progress, plan)
            found = made.run(dense)
        used = round(machine.peak(job.device or "cpu") * 1e9) if plan.device else 0
        logger.info(told(plan, taken.most - before, used, time.monotonic() - started))
        return found


def _prepared(job: RunSettings) -> tuple[RunSettings, Plan, Texts]:
    """How the job is to be done, and its text; UserError for what cannot be."""
    if distributed.size() > 1 and record.unfinished(job.out) and not job.overwrite:
        raise UserError(
            f"{job.out} holds an unfinished run of one process; finish it without torchrun, or pass --overwrite to "
            "begin anew."
        )
    if job.stream is None and not job.overwrite:
        # Else a machine with more memory free, or less, would not go on.
        job = replace(job, stream=record.was_streamed(job.out))
    planned = plan_job(job)
    if job.stream is not False and not planned.fits:
        raise UserError(f"{job.model} does not fit on this machine so; {planned.advice}, or see perp plan.")
    if planned.plan.stream and distributed.size() > 1:
        raise UserError(
            f"{job.model} does not fit in the memory of each of {distributed.size()} ranks, and a streamed run is one "
            "process; start it without torchrun."
        )
    if planned.plan.stream:
        settings.check_streamed(job)
    return job, planned.plan, texts.read(job.data, job.eval_data)


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
