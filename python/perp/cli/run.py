"""perp run and perp demo: make a pruned model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from perp.cli.application import (
    GPU_WINDOWS,
    OUTPUT,
    PRUNING,
    RECOVERY,
    TEXT,
    TEXT_KINDS,
    CpuMemory,
    Device,
    Dtype,
    GpuMemory,
    Model,
    Quiet,
    Seqlen,
    Stream,
    TrustRemoteCode,
    command,
    count,
    given,
    names,
    option,
    progress_of,
)

if TYPE_CHECKING:
    from perp.report import Report


@command("perp run demo --pattern 2:4 --data demo --out runs/smaller", ranks=True)
def run(
    context: typer.Context,
    model: Model,
    *,
    pattern: Annotated[
        str,
        option(
            "--pattern",
            "-p",
            help="Share of zeros (0.5; /row, /matrix or /slab behind it force a scope), or N kept of every M (2:4).",
            panel=PRUNING,
            metavar="PATTERN",
        ),
    ] = "0.5",
    method: Annotated[
        str, option("--method", "-m", help="magnitude, wanda, ria or sparsegpt.", panel=PRUNING, metavar="NAME")
    ] = "wanda",
    allocate: Annotated[
        str,
        option("--allocate", help="A share of zeros for each block: uniform or owl.", panel=PRUNING, metavar="NAME"),
    ] = "uniform",
    refine: Annotated[
        str,
        option("--refine", help="Improve the masks: sparseswaps or sparsefw; or none.", panel=PRUNING, metavar="NAME"),
    ] = "none",
    refine_steps: Annotated[
        int | None, count("--refine-steps", help="Its rounds at most.", panel=PRUNING, show_default="by its method")
    ] = None,
    refit: Annotated[
        bool, option("--refit", help="Fit each linear's kept weights to its dense output.", panel=PRUNING)
    ] = False,
    best: Annotated[
        bool,
        option(
            "--best",
            help="The best quality for the time: SparseGPT, half-blocks fitted to 96 windows once, MaskLoRA and norms "
            "retrained in bf16 with distillation; options given beside it win.",
            panel=PRUNING,
        ),
    ] = False,
    cycles: Annotated[
        int, count("--cycles", help="Prune and retrain so many times, dividing the steps.", panel=PRUNING)
    ] = 1,
    schedule: Annotated[
        str,
        option(
            "--schedule",
            help="Each cycle prunes the same share of what is left (geometric) or of all weights (linear).",
            panel=PRUNING,
            metavar="NAME",
        ),
    ] = "geometric",
    reconstruct: Annotated[
        str,
        option(
            "--granularity",
            "--reconstruct",
            help="What is fitted at once, as it is pruned, to what it gave when dense: matrix, half-block, block, a "
            "number of blocks (4-blocks) or model; or none.",
            panel=RECOVERY,
            metavar="UNIT",
        ),
    ] = "half-block",
    reconstruct_parts: Annotated[
        str,
        option(
            "--reconstruct-parts",
            help="Trained in it: kept, full, mask_lora, scale_lora, spp or lora_prune, with norms, biases.",
            panel=RECOVERY,
            metavar="PARTS",
        ),
    ] = "kept,norms",
    inputs: Annotated[
        str,
        option(
            "--inputs",
            help="What it reads there: sparse, from the blocks already pruned, or dense, from the dense model.",
            panel=RECOVERY,
            metavar="NAME",
        ),
    ] = "sparse",
    targets: Annotated[
        str,
        option(
            "--targets",
            help="What it is fitted to: dense-weights, its own dense weights on those inputs, or dense-model, what the "
            "dense model gives there.",
            panel=RECOVERY,
            metavar="NAME",
        ),
    ] = "dense-weights",
    loss: Annotated[
        str,
        option(
            "--loss",
            help="How far it is from that: mse, nmse (relative to the target) or cosine.",
            panel=RECOVERY,
            metavar="NAME",
        ),
    ] = "mse",
    reconstruct_lr: Annotated[
        float | None,
        option(
            "--reconstruct-lr", help="Its learning rate.", panel=RECOVERY, metavar="LR", show_default="by its parts"
        ),
    ] = None,
    reconstruct_batch: Annotated[
        int, count("--reconstruct-batch", help="Windows in a step of it.", panel=RECOVERY)
    ] = 2,
    epochs: Annotated[int, count("--epochs", help="Its passes over the windows.", panel=RECOVERY)] = 3,
    retrain: Annotated[
        str,
        option(
            "--retrain",
            help="Trained afterwards on the language-model loss: mask_lora, scale_lora, spp, lora_prune, lora, kept or "
            "full (every parameter), with norms, biases, head; or none.",
            panel=RECOVERY,
            metavar="PARTS",
        ),
    ] = "mask_lora,norms",
    steps: Annotated[int, count("--steps", help="Steps of retraining.", panel=RECOVERY)] = 64,
    batch: Annotated[int, count("--batch", help="Windows in a step of retraining.", panel=RECOVERY)] = 4,
    lr: Annotated[
        float | None,
        option("--lr", help="Learning rate of retraining.", panel=RECOVERY, metavar="LR", show_default="by its parts"),
    ] = None,
    checkpointing: Annotated[
        bool,
        option(
            "--checkpointing/--no-checkpointing",
            help="Recompute activations in retraining: a third more time, far less memory.",
            panel=RECOVERY,
        ),
    ] = True,
    distil: Annotated[
        float,
        option(
            "--distil",
            help="Weight of the dense model's predictions in the loss of retraining, 0 to 1.",
            panel=RECOVERY,
            metavar="W",
        ),
    ] = 0.0,
    temperature: Annotated[
        float, option("--temperature", help="Temperature of both in distillation.", panel=RECOVERY, metavar="T")
    ] = 1.0,
    precision: Annotated[
        str,
        option(
            "--precision",
            help="Retrain in the model's own dtype (model), or with frozen weights in bf16 and what trains in fp32 "
            "(bf16).",
            panel=RECOVERY,
            metavar="NAME",
        ),
    ] = "model",
    shard: Annotated[
        bool,
        option(
            "--shard",
            help="Share the frozen weights out among the processes of torchrun while retraining (FSDP2).",
            panel=RECOVERY,
        ),
    ] = False,
    keep_adapters: Annotated[
        bool,
        option("--keep-adapters", help="Save lora adapters beside the model, since they do not merge.", panel=RECOVERY),
    ] = False,
    rank: Annotated[int, count("--rank", help="Rank of the adapters.", panel=RECOVERY)] = 16,
    alpha: Annotated[
        float, option("--alpha", help="Adapters are scaled by alpha / rank.", panel=RECOVERY, metavar="X")
    ] = 32.0,
    data: Annotated[
        str,
        option("--data", help=f"Text to calibrate, train and judge on: {TEXT_KINDS}.", panel=TEXT, metavar="TEXT"),
    ] = "demo",
    eval_data: Annotated[
        list[str] | None,
        option("--eval-data", help="Further text to judge on, whole; may be repeated.", panel=TEXT, metavar="TEXT"),
    ] = None,
    windows: Annotated[
        int | None, count("--windows", help="Calibration windows.", panel=TEXT, show_default=GPU_WINDOWS)
    ] = None,
    seqlen: Seqlen = None,
    eval_windows: Annotated[int, count("--eval-windows", help="Windows to judge on.", panel=TEXT)] = 32,
    seed: Annotated[int, count("--seed", help="Seed of every random choice.", panel=TEXT)] = 0,
    out: Annotated[Path, option("--out", "-o", help="Directory for the pruned model.", panel=OUTPUT, metavar="DIR")],
    overwrite: Annotated[bool, option("--overwrite", help="Replace what is in --out.", panel=OUTPUT)] = False,
    packed: Annotated[
        bool, option("--packed", help="Write the packed file too, for perp generate.", panel=OUTPUT)
    ] = False,
    resume: Annotated[
        bool,
        option(
            "--resume",
            help="Write down in --out what is done, and go on from there if an earlier run was interrupted.",
            panel=OUTPUT,
        ),
    ] = False,
    compare: Annotated[
        str,
        option(
            "--compare",
            help="Further lines to measure: pruned (without recovery), dense-retrained; or none.",
            panel=OUTPUT,
            metavar="LINES",
        ),
    ] = "pruned",
    quiet: Quiet = False,
    stream: Stream = None,
    gpu_memory: GpuMemory = None,
    cpu_memory: CpuMemory = None,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Prune a model, recover it, judge every state on held-out text, and save it.

    --out becomes an ordinary Hugging Face directory with exact zeros where weights were pruned: any tool loads it
    without perp. Its perp.json tells how it was made. No article that is judged on is calibrated or trained on.

    On several GPUs: torchrun --nproc-per-node N -m perp run MODEL ...
    """
    from perp import distributed, settings
    from perp.run import run as run_job
    from perp.settings import RunSettings

    job = RunSettings(
        model=model,
        out=out,
        pattern=pattern,
        method=method,
        allocate=allocate,
        refine=refine,
        refine_steps=refine_steps,
        refit=refit,
        cycles=cycles,
        schedule=schedule,
        reconstruct=reconstruct,
        reconstruct_parts=names(reconstruct_parts),
        inputs=inputs,
        targets=targets,
        loss=loss,
        reconstruct_lr=reconstruct_lr,
        reconstruct_batch=reconstruct_batch,
        epochs=epochs,
        retrain=names(retrain),
        retrain_lr=lr,
        steps=steps,
        batch=batch,
        checkpointing=checkpointing,
        distil=distil,
        temperature=temperature,
        precision=precision,
        shard=shard,
        keep_adapters=keep_adapters,
        rank=rank,
        alpha=alpha,
        data=data,
        eval_data=tuple(eval_data or ()),
        windows=windows,
        seqlen=seqlen,
        eval_windows=eval_windows,
        compare=names(compare),
        seed=seed,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
        packed=packed,
        resume=resume,
        stream=stream,
        gpu_memory=gpu_memory,
        cpu_memory=cpu_memory,
    )
    if best:
        job = settings.best(job, given(context))
    started = time.monotonic()
    with distributed.joined(device) as own, progress_of(quiet or not distributed.leads()) as progress:
        found = run_job(replace(job, device=own), progress)
        if distributed.leads():
            _show([found], out, out / "perp", started)


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
