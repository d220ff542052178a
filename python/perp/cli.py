"""The command line: commands, their options and their help.

Nothing heavy is imported before a command runs, so that --help answers at once.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

import perp
from perp import boundary

if TYPE_CHECKING:
    from perp.report import Report

app = typer.Typer(
    name="perp",
    help="Prune a language model, win its quality back on one GPU (or none), keep every zero.",
    epilog="Start with [bold]perp demo[/bold], or [bold]perp run MODEL --pattern 2:4 --out DIR[/bold].",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

PRUNING, RECOVERY, TEXT, OUTPUT, MACHINE = "Pruning", "Recovery", "Text", "Output", "Machine"


def option(*names: str, help: str, panel: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def count(*names: str, help: str, panel: str, **more: Any) -> Any:
    return option(*names, help=help, panel=panel, metavar="N", **more)


TEXT_KINDS = "a .txt, .jsonl or .parquet file, a directory of them, a datasets name (owner/name/config:split) or demo"
GPU_SEQLEN = "2048 on a GPU, 512 on a CPU"
GPU_WINDOWS = "128 on a GPU, 32 on a CPU"

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model directory, a Hugging Face id, or demo: the packaged model.")
]
Seqlen = Annotated[int | None, count("--seqlen", help="Tokens in a window.", panel=TEXT, show_default=GPU_SEQLEN)]
Device = Annotated[
    str | None,
    option(
        "--device", help="Such as cpu or cuda:1.", panel=MACHINE, metavar="NAME", show_default="a GPU if there is one"
    ),
]
Dtype = Annotated[
    str | None,
    option(
        "--dtype",
        help="Compute in float32, bfloat16 or float16.",
        panel=MACHINE,
        metavar="NAME",
        show_default="the checkpoint's own",
    ),
]
TrustRemoteCode = Annotated[
    bool, option("--trust-remote-code", help="Run Python code that comes with the model.", panel=MACHINE)
]
Quiet = Annotated[bool, option("--quiet", "-q", help="Show no progress.", panel=OUTPUT)]


def command(example: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command whose help ends with `example`, and whose errors end as one sentence and an exit code."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def guarded(*arguments: Any, **options: Any) -> None:
            with boundary.command():
                function(*arguments, **options)

        # The help wraps by itself: each paragraph of the docstring becomes one line.
        paragraphs = (inspect.getdoc(function) or "").split("\n\n")
        told = "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)
        return app.command(help=told, epilog=f"[dim]Example:[/dim]  [bold]{example}[/bold]")(guarded)

    return register


def _version(on: bool) -> None:
    if on:
        typer.echo(f"perp {perp.__version__}")
        raise typer.Exit


@app.callback()
def _application(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    pass


@command("perp run demo --pattern 2:4 --data demo --out runs/smaller")
def run(
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
        str, option("--method", "-m", help="magnitude, wanda or sparsegpt.", panel=PRUNING, metavar="NAME")
    ] = "wanda",
    reconstruct: Annotated[
        str,
        option(
            "--reconstruct",
            help="Fit each half-block or block to its dense output as it is pruned; or none.",
            panel=RECOVERY,
            metavar="UNIT",
        ),
    ] = "half-block",
    reconstruct_parts: Annotated[
        str,
        option(
            "--reconstruct-parts",
            help="Trained in it: kept, norms, biases, mask_lora.",
            panel=RECOVERY,
            metavar="PARTS",
        ),
    ] = "kept,norms",
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
            help="Trained afterwards on the language-model loss: mask_lora, norms, biases, kept; or none.",
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
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Prune a model, recover it, judge every state on held-out text, and save it.

    --out becomes an ordinary Hugging Face directory with exact zeros where weights were pruned: any tool loads it
    without perp. Its perp.json tells how it was made. No article that is judged on is calibrated or trained on.
    """
    from perp.run import run as run_job
    from perp.settings import RunSettings

    job = RunSettings(
        model=model,
        out=out,
        pattern=pattern,
        method=method,
        reconstruct=reconstruct,
        reconstruct_parts=_list(reconstruct_parts),
        reconstruct_lr=reconstruct_lr,
        reconstruct_batch=reconstruct_batch,
        epochs=epochs,
        retrain=_list(retrain),
        retrain_lr=lr,
        steps=steps,
        batch=batch,
        checkpointing=checkpointing,
        rank=rank,
        alpha=alpha,
        data=data,
        eval_data=tuple(eval_data or ()),
        windows=windows,
        seqlen=seqlen,
        eval_windows=eval_windows,
        compare=_list(compare),
        seed=seed,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
    )
    started = time.monotonic()
    with _progress(quiet) as progress:
        found = run_job(job, progress)
    _show([found], out, out / "perp", started)


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

    Perplexity is that of the papers: non-overlapping windows, each token but a window's first predicted from those
    before it in the window.
    """
    from perp import evaluate, machine, models, report

    device = machine.find_device(device)
    machine.check_dtype(dtype)
    if tasks is not None:
        evaluate.check_tasks(_list(tasks))
    models.check_model(model, trust_remote_code)
    texts = evaluate.read_texts(data or ["demo"], part) if tasks is None else {}
    subject, tokenizer = models.load(model, dtype, device, trust_remote_code)
    if tasks is not None:
        found = report.pairs("task", evaluate.on_tasks(subject, tokenizer, _list(tasks), limit))
    else:
        with _progress(quiet) as progress:
            rows = evaluate.on_texts(subject, tokenizer, texts, seqlen, windows or None, progress)
        found = report.pairs("perplexity", rows)
    Console().print(found)


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
    with _progress(quiet) as progress:
        reports = run_demo(out, progress)
    _show(reports, out, out, started)


@command("perp doctor")
def doctor() -> None:
    """Show versions, processor, GPU, and which implementation serves each kernel and why."""
    from perp.doctor import examine

    Console().print(examine())


def _show(reports: Sequence[Report], out: Path, written: Path, started: float) -> None:
    from perp import report
    from perp.progress import duration

    drawn = report.PICTURE if (written / report.PICTURE).exists() else report.ROWS
    console = Console()
    console.print(report.table(reports))
    for line in (f"{out}: saved after {duration(time.monotonic() - started)}", f"{written / drawn}: the report"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _list(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(part.strip() for part in text.split(",") if part.strip())


@contextmanager
def _progress(quiet: bool) -> Iterator[Any]:
    from perp.progress import Silent, choose

    progress = Silent() if quiet else choose()
    try:
        yield progress
    finally:
        progress.done()


def main() -> None:
    with boundary.process():
        app()
