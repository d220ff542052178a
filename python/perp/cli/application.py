"""The application that commands register with, and the options that several of them have.

Nothing heavy is imported before a command runs, so that --help answers at once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

import perp
from perp import boundary, machine
from perp.errors import UserError

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


def command(example: str, ranks: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command whose help ends with `example`, and whose errors end as one sentence and an exit code.

    `ranks`: torchrun may start several processes of it.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def guarded(*arguments: Any, **options: Any) -> None:
            with boundary.command():
                if not ranks and machine.processes() > 1:
                    raise UserError(f"perp {function.__name__} is one process; start it without torchrun.")
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


def given(context: typer.Context) -> set[str]:
    """The parameters that the command line sets."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def names(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(part.strip() for part in text.split(",") if part.strip())


@contextmanager
def progress_of(quiet: bool) -> Iterator[Any]:
    from perp.progress import Silent, choose

    progress = Silent() if quiet else choose()
    try:
        yield progress
    finally:
        progress.done()
