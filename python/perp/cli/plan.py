"""perp plan: what a run would take, before it is begun."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from perp.cli.job import job_command


@job_command("perp plan demo --pattern 2:4 --cpu-memory 2GB", out=Path("perp-out"))
def plan(job: Any) -> None:
    """Say what perp run would take with these options on this machine: memory, disk and time of each stage.

    Memory is that beyond a process with torch and transformers imported; mapped files do not count. Time is that of a
    machine that does nothing else. Only the model's config.json is read, and a second or two of pruning and training a
    small block shows how fast this machine is.
    """
    from perp import machine, settings
    from perp.planning import SHARED, plan_job
    from perp.progress import duration

    # Nothing is written: whatever is in its output directory may stay.
    job = replace(job, overwrite=True)
    settings.check(job, weights=False)
    found = plan_job(job)
    if found.plan.stream:
        settings.check_streamed(job)
    told = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0))
    for column in ("stage", "GPU", "memory", "disk", "time"):
        told.add_column(column, justify="left" if column == "stage" else "right")
    for stage in found.plan.stages:
        sizes = (machine.told(size) for size in (stage.device, stage.host, stage.disk))
        cycles = 1 + len(found.work.earlier) if stage.name in ("prune", "retrain") else 1
        name = f"{stage.name}, {cycles} cycles" if cycles > 1 else stage.name
        told.add_row(name, *sizes, duration(stage.seconds))
    if len(found.plan.stages) > 1:
        plan = found.plan
        sizes = (machine.told(size) for size in (plan.device, plan.host, plan.disk))
        told.add_row("in all", *sizes, duration(plan.seconds), style="bold")
    budget = found.budget
    told.add_row("may take", *(machine.told(size) for size in (budget.device, budget.host, budget.disk)), "")
    console = Console()
    console.print(told)
    way = "streamed, a block at a time" if found.plan.stream else "with the model in memory"
    kept = (
        f"hidden states on {found.plan.activations}"
        if found.plan.activations != "memory"
        else "hidden states in memory"
    )
    verdict = f"It fits: {way}, {kept}." if found.fits else f"It does not fit; {found.advice}."
    if found.rates.busy > SHARED:
        verdict += (
            f" The machine has other work: beside it all takes {found.rates.busy:.1f} times as long now, "
            f"{duration(found.rates.busy * found.plan.seconds)}."
        )
    console.print(verdict, markup=False, highlight=False)
