"""perp plan: what a run would take, before it is begun."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich import box
from rich.console import Console
from rich.table import Table

from perp.cli.application import (
    GPU_WINDOWS,
    OUTPUT,
    PRUNING,
    RECOVERY,
    TEXT,
    CpuMemory,
    Device,
    Dtype,
    GpuMemory,
    Model,
    Seqlen,
    Stream,
    TrustRemoteCode,
    command,
    count,
    names,
    option,
)


@command("perp plan demo --pattern 2:4 --cpu-memory 2GB")
def plan(
    model: Model,
    *,
    pattern: Annotated[str, option("--pattern", "-p", help="As for perp run.", panel=PRUNING)] = "0.5",
    method: Annotated[str, option("--method", "-m", help="As for perp run.", panel=PRUNING)] = "wanda",
    reconstruct: Annotated[
        str,
        option("--granularity", "--reconstruct", help="half-block, block or none.", panel=RECOVERY, metavar="UNIT"),
    ] = "half-block",
    reconstruct_parts: Annotated[
        str, option("--reconstruct-parts", help="Trained in it.", panel=RECOVERY, metavar="PARTS")
    ] = "kept,norms",
    reconstruct_batch: Annotated[
        int, count("--reconstruct-batch", help="Windows in a step of it.", panel=RECOVERY)
    ] = 2,
    epochs: Annotated[int, count("--epochs", help="Its passes over the windows.", panel=RECOVERY)] = 3,
    retrain: Annotated[
        str, option("--retrain", help="Trained afterwards; or none.", panel=RECOVERY, metavar="PARTS")
    ] = "mask_lora,norms",
    steps: Annotated[int, count("--steps", help="Steps of retraining.", panel=RECOVERY)] = 64,
    batch: Annotated[int, count("--batch", help="Windows in a step of retraining.", panel=RECOVERY)] = 4,
    rank: Annotated[int, count("--rank", help="Rank of the adapters.", panel=RECOVERY)] = 16,
    windows: Annotated[
        int | None, count("--windows", help="Calibration windows.", panel=TEXT, show_default=GPU_WINDOWS)
    ] = None,
    seqlen: Seqlen = None,
    eval_windows: Annotated[int, count("--eval-windows", help="Windows to judge on.", panel=TEXT)] = 32,
    compare: Annotated[
        str, option("--compare", help="Further lines to measure: pruned; or none.", panel=OUTPUT, metavar="LINES")
    ] = "pruned",
    out: Annotated[Path, option("--out", "-o", help="Where it would go.", panel=OUTPUT, metavar="DIR")] = Path(
        "perp-out"
    ),
    packed: Annotated[bool, option("--packed", help="Write the packed file too.", panel=OUTPUT)] = False,
    stream: Stream = None,
    gpu_memory: GpuMemory = None,
    cpu_memory: CpuMemory = None,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Say what perp run would take on this machine: memory, disk and time of each stage.

    Memory is that beyond a process with torch and transformers imported; mapped files do not count. Time is that of a
    machine that does nothing else. Only the model's config.json is read, and a second or two of pruning and training a
    small block shows how fast this machine is.
    """
    from perp import machine, settings
    from perp.planning import SHARED, plan_job
    from perp.progress import duration
    from perp.settings import RunSettings

    job = RunSettings(
        model=model,
        out=out,
        pattern=pattern,
        method=method,
        reconstruct=reconstruct,
        reconstruct_parts=names(reconstruct_parts),
        reconstruct_batch=reconstruct_batch,
        epochs=epochs,
        retrain=names(retrain),
        steps=steps,
        batch=batch,
        rank=rank,
        windows=windows,
        seqlen=seqlen,
        eval_windows=eval_windows,
        compare=names(compare),
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        overwrite=True,
        packed=packed,
        stream=stream,
        gpu_memory=gpu_memory,
        cpu_memory=cpu_memory,
    )
    settings.check(job, weights=False)
    found = plan_job(job)
    told = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0))
    for column in ("stage", "GPU", "memory", "disk", "time"):
        told.add_column(column, justify="left" if column == "stage" else "right")
    for stage in found.plan.stages:
        sizes = (machine.told(size) for size in (stage.device, stage.host, stage.disk))
        told.add_row(stage.name, *sizes, duration(stage.seconds))
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
