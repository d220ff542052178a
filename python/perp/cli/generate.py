"""perp generate and perp pack: text from a pruned model, and its packed file."""

from __future__ import annotations

from typing import Annotated

import typer

from perp.cli.application import MACHINE, Dtype, command, count, option

PACKED, SAMPLING = "Weights", "Sampling"

Directory = Annotated[str, typer.Argument(metavar="DIR", help="A directory that perp run has left.")]


@command("perp generate runs/smaller --prompt 'The river'")
def generate(
    directory: Directory,
    *,
    prompt: Annotated[str, option("--prompt", "-p", help="The text to continue.", panel=SAMPLING, metavar="TEXT")],
    tokens: Annotated[int, count("--tokens", help="At most so many more tokens.", panel=SAMPLING)] = 64,
    temperature: Annotated[
        float, option("--temperature", help="0: the likeliest token; else sample.", panel=SAMPLING, metavar="X")
    ] = 0.0,
    seed: Annotated[int, count("--seed", help="Seed of the sampling.", panel=SAMPLING)] = 0,
    dense: Annotated[bool, option("--dense", help="Run the plain model instead, to compare.", panel=PACKED)] = False,
    dtype: Dtype = None,
    threads: Annotated[
        int | None, count("--threads", help="Threads to compute with.", panel=MACHINE, show_default="one per core")
    ] = None,
) -> None:
    """Continue a text with the packed model, and tell tokens/s, memory and the size of the weights.

    The dense weights are never made: pruned layers compute on the packed file (perp run --packed, or perp pack).
    """
    from perp.generate import generate as write
    from perp.machine import use_threads

    use_threads(threads)
    cost = write(directory, prompt, tokens, dense, dtype, temperature, seed)
    typer.echo(f"{cost}, {'dense' if dense else 'packed'}")


@command("perp pack runs/smaller")
def pack(
    directory: Directory,
    *,
    mask: Annotated[
        str,
        option(
            "--mask",
            help="saved: the masks that perp run has left; from-zeros: what is zero in a model pruned elsewhere.",
            panel=PACKED,
            metavar="NAME",
        ),
    ] = "saved",
) -> None:
    """Write the packed file of a pruned model beside its plain files, for perp generate."""
    from perp.packed_model import pack as write

    path = write(directory, mask)
    typer.echo(f"{path}: {path.stat().st_size / 1e9:.3f} GB")
