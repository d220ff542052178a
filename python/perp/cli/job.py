"""The options of a job: perp run does it, perp plan says beforehand what it takes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from perp.cli.application import (
    GPU_WINDOWS,
    MACHINE,
    OUTPUT,
    PRUNING,
    RECOVERY,
    TEXT,
    TEXT_KINDS,
    Device,
    Dtype,
    Model,
    Seqlen,
    TrustRemoteCode,
    command,
    count,
    given,
    names,
    option,
)


def settings_of(
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
    skip: Annotated[
        str,
        option(
            "--skip",
            help="Linears to leave dense, by their names or the ends of them: down_proj,layers.0.*; or none.",
            panel=PRUNING,
            metavar="NAMES",
        ),
    ] = "none",
    refine: Annotated[
        str,
        option("--refine", help="Improve the masks: sparseswaps or sparsefw; or none.", panel=PRUNING, metavar="NAME"),
    ] = "none",
    refine_steps: Annotated[
        int | None, count("--refine-steps", help="Its rounds at most.", panel=PRUNING, show_default="by its method")
    ] = None,
    refine_alpha: Annotated[
        float | None,
        option(
            "--refine-alpha",
            help="Of sparsefw: the share of the kept weights, the highest scores, that stay kept.",
            panel=PRUNING,
            metavar="X",
            show_default="0.9; 0.5 for N:M",
        ),
    ] = None,
    refit: Annotated[
        bool, option("--refit", help="Fit each linear's kept weights to its dense output.", panel=PRUNING)
    ] = False,
    best: Annotated[
        bool,
        option(
            "--best",
            help="The best quality for the time: SparseGPT, half-blocks fitted to 96 windows once, MaskLoRA and norms "
            "retrained with distillation, in bf16 where the device has it; options given beside it win.",
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
    optimizer: Annotated[
        str,
        option(
            "--optimizer",
            help="AdamW of retraining: adamw, or adamw8bit, whose moments take 2 bytes a trained number instead of 8.",
            panel=RECOVERY,
            metavar="NAME",
        ),
    ] = "adamw",
    precision: Annotated[
        str,
        option(
            "--precision",
            help="Train in the model's own dtype (model), or with products in bf16 and what trains in fp32 (bf16).",
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
    calibration: Annotated[
        str,
        option(
            "--calibration",
            help="What they are drawn from: the joined text, or, as in the papers, single documents longer than they.",
            panel=TEXT,
            metavar="NAME",
        ),
    ] = "joined",
    seqlen: Seqlen = None,
    eval_windows: Annotated[int, count("--eval-windows", help="Windows to judge on.", panel=TEXT)] = 32,
    seed: Annotated[int, count("--seed", help="Seed of every random choice.", panel=TEXT)] = 0,
    out: Annotated[Path, option("--out", "-o", help="Directory for the pruned model.", panel=OUTPUT, metavar="DIR")],
    overwrite: Annotated[bool, option("--overwrite", help="Replace what is in --out.", panel=OUTPUT)] = False,
    packed: Annotated[
        bool, option("--packed", help="Write the packed file too, for perp generate.", panel=OUTPUT)
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
    stream: Annotated[
        bool | None,
        option(
            "--stream/--no-stream",
            help="Have one block of the model in memory at a time.",
            panel=MACHINE,
            show_default="where the model is too large",
        ),
    ] = None,
    gpu_memory: Annotated[
        str | None,
        option(
            "--gpu-memory", help="GPU memory it may take.", panel=MACHINE, metavar="SIZE", show_default="what is free"
        ),
    ] = None,
    cpu_memory: Annotated[
        str | None,
        option("--cpu-memory", help="Memory it may take.", panel=MACHINE, metavar="SIZE", show_default="what is free"),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
) -> Any:
    """The RunSettings that the command line asks for."""
    from perp import settings
    from perp.settings import RunSettings

    job = RunSettings(
        model=model,
        out=out,
        pattern=pattern,
        method=method,
        allocate=allocate,
        skip=names(skip),
        refine=refine,
        refine_steps=refine_steps,
        refine_alpha=refine_alpha,
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
        optimizer=optimizer,
        precision=precision,
        shard=shard,
        keep_adapters=keep_adapters,
        rank=rank,
        alpha=alpha,
        data=data,
        eval_data=tuple(eval_data or ()),
        windows=windows,
        calibration=calibration,
        seqlen=seqlen,
        eval_windows=eval_windows,
        compare=names(compare),
        seed=seed,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
        packed=packed,
        stream=stream,
        gpu_memory=gpu_memory,
        cpu_memory=cpu_memory,
    )
    return settings.best(job, given(context)) if best else job


def job_command(
    example: str, ranks: bool = False, **defaults: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command (`ranks`: see `command`) that has the options above, with these `defaults`, and its own.

    It is called with the settings of the job, and by name with what is its own.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        shared = inspect.signature(settings_of, eval_str=True).parameters.values()
        _, *own = inspect.signature(function, eval_str=True).parameters.values()
        parameters = [one.replace(default=defaults.get(one.name, one.default)) for one in shared] + own

        @functools.wraps(function)
        def whole(**options: Any) -> None:
            chosen = {one.name: options.pop(one.name) for one in own}
            function(settings_of(**options), **chosen)

        whole.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        whole.__annotations__ = {one.name: one.annotation for one in parameters}
        return command(example, ranks)(whole)

    return register
