"""perp eval and perp doctor: look at a model, or at the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.console import Console

from perp.cli.application import (
    TEXT,
    TEXT_KINDS,
    Device,
    Dtype,
    Model,
    Quiet,
    Seqlen,
    TrustRemoteCode,
    command,
    count,
    names,
    option,
    progress_of,
)


@command("perp eval runs/smaller --data demo")
def eval(
    model: Model,
    *,
    data: Annotated[
        list[str] | None,
        option(
            "--data",
            help=f"Text to judge on: {TEXT_KINDS}; may be repeated.",
            panel=TEXT,
            metavar="TEXT",
            show_default="demo",
        ),
    ] = None,
    part: Annotated[
        str,
        option(
            "--part",
            help="test (what perp run holds out), validation, train or all of each text.",
            panel=TEXT,
            metavar="NAME",
        ),
    ] = "test",
    windows: Annotated[
        int, count("--windows", help="The first so many windows of each text; 0: all.", panel=TEXT)
    ] = 32,
    seqlen: Seqlen = None,
    tasks: Annotated[
        str | None,
        option(
            "--tasks",
            help="Tasks of lm_eval instead of --data, such as hellaswag,arc_easy.",
            panel="Tasks",
            metavar="NAMES",
        ),
    ] = None,
    limit: Annotated[int | None, count("--limit", help="Only so many examples of each task.", panel="Tasks")] = None,
    quiet: Quiet = False,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Judge a model: perplexity on text, or accuracy on tasks.

    Adapters kept beside the model (perp run --keep-adapters) take part. Perplexity is that of the papers:
    non-overlapping windows, each token but a window's first predicted from those before it in the window.
    """
    from perp import adapter_files, evaluate, machine, models, report

    device = machine.find_device(device)
    machine.check_dtype(dtype)
    if tasks is not None:
        evaluate.check_tasks(names(tasks))
    models.check_model(model, trust_remote_code)
    texts = evaluate.read_texts(data or ["demo"], part) if tasks is None else {}
    subject, tokenizer = models.load(model, dtype, device, trust_remote_code)
    if (Path(model) / adapter_files.ADAPTER).is_dir():
        adapter_files.load(subject, model)
    if tasks is not None:
        found = report.pairs("task", evaluate.on_tasks(subject, tokenizer, names(tasks), limit))
    else:
        with progress_of(quiet) as progress:
            rows = evaluate.on_texts(subject, tokenizer, texts, seqlen, windows or None, progress)
        found = report.pairs("perplexity", rows)
    Console().print(found)


@command("perp doctor")
def doctor() -> None:
    """Show versions, processor, GPU, and which implementation serves each kernel and why."""
    from perp.doctor import examine

    Console().print(examine())
