"""`python -m bench.streaming`: memory and time of pruning and fitting a model that streams from its shards.

Wanda 2:4 with half-block reconstruction and the saving of the result, each in a fresh process. On a CPU: the 1.1B
shape (RssAnon beyond the imports), and SmolLM2-135M streamed against in memory, in turns. On a GPU: blocks of larger
shapes at their true size, seconds multiplied to all blocks. The rows are kept in bench/results/streaming.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import machine, results, table
from bench.results import Row
from bench.streaming import group
from bench.streaming.subjects import SUBJECTS, Subject, demo_directory
from bench.streaming.worker import Job
from perp import demo

OP = "stream"
# Tells what the worker takes before its job.
_IMPORTS = "from bench.streaming import worker; from perp import machine; print(machine.resident_parts()[0])"
WIDTH = 180
# At most so many times as long as the same work with the model in memory.
OVERHEAD = 1.15


def in_a_process_of_its_own(job: Job, before: Sequence[str] = ()) -> dict[str, Any]:
    """What `bench.streaming.worker` measures; CalledProcessError where it fails. `before`: the command that runs it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(asdict(job)))
        command = [*before, sys.executable, "-m", "bench.streaming.worker", str(path)]
        subprocess.run(command, cwd=machine.ROOT, check=True)
        found: dict[str, Any] = json.loads(path.with_name("result.json").read_text())
    planned = found["planned"]
    print(
        f"{Path(job.directory).name}, {'streamed' if job.stream else 'in memory'}: {found['seconds']:.1f} s "
        f"(planned {planned['seconds']:.1f}), RssAnon {found['host_bytes'] / 1e6:.0f} MB "
        f"(planned {planned['host_bytes'] / 1e6:.0f}), GPU {found['device_bytes'] / 1e9:.2f} GB "
        f"(planned {planned['device_bytes'] / 1e9:.2f})",
        file=sys.stderr,
    )
    return found


def memory_rows(subject: Subject, found: dict[str, Any], job: Job) -> list[Row]:
    """Peak memory, and on a GPU the time that all blocks would take."""
    peak = found["device_bytes"] if subject.gpu else found["host_bytes"]
    done = f"{found['blocks']} of {subject.blocks} blocks"
    shape = f"{subject.name} {subject.method} 2:4, {job.windows} x {job.seqlen}, {job.epochs} epochs, {done}"
    rows = [_row("peak memory, streamed", shape, found["device"], peak, {}, "bytes", subject.memory, peak)]
    if subject.gpu:
        seconds = found["seconds"] / found["blocks"] * subject.blocks
        rows.append(_row("all blocks, predicted", shape, found["device"], seconds, {}, "s", subject.seconds, peak))
    return rows


def within(limit: int, job: Job) -> dict[str, Any] | None:
    """As `in_a_process_of_its_own`, in a control group of `limit` bytes beyond the imports, or why there is none."""
    imports = subprocess.run([sys.executable, "-c", _IMPORTS], cwd=machine.ROOT, check=True, capture_output=True)
    try:
        with group.limited(int(imports.stdout) + limit) as before:
            return in_a_process_of_its_own(job, before)
    except group.Unavailable as error:
        print(f"not within a limit: {error}.", file=sys.stderr)
        return None


def overhead_row(directory: Path, windows: int, epochs: int, rounds: int, threads: int, scratch: str) -> Row:
    """SmolLM2-135M streamed against in memory, in turns; medians."""
    taken: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for _ in range(rounds):
        for stream, found in taken.items():
            found.append(
                in_a_process_of_its_own(
                    Job(str(directory), windows, 512, epochs, "wanda", stream, "cpu", threads, scratch)
                )
            )
    seconds = {stream: statistics.median(one["seconds"] for one in found) for stream, found in taken.items()}
    peak = round(statistics.median(one["host_bytes"] for one in taken[True]))
    shape = f"SmolLM2-135M wanda 2:4, {windows} x 512, {epochs} epochs"
    device = taken[True][0]["device"]
    target = OVERHEAD * seconds[False]
    peers = {"in memory": seconds[False]}
    return _row("time, streamed", shape, device, seconds[True], peers, "s", target, peak, "float32")


def _row(
    kernel: str,
    shape: str,
    device: str,
    ours: float,
    peers: dict[str, float],
    unit: str,
    target: float | None,
    peak: int,
    dtype: str = "bfloat16",
) -> Row:
    return Row(OP, kernel, shape, dtype, device, machine.commit(), ours, peers, unit, "lower", target, None, peak, True)


def merge(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """`new`, and the `old` rows of other devices, kernels and shapes."""
    replaced = {(row.device, row.kernel, row.shape) for row in new}
    kept = [row for row in old if (row.device, row.kernel, row.shape) not in replaced]
    return sorted([*kept, *new], key=lambda row: (row.device, row.kernel, row.shape))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where a row misses its target, 2 for a wrong option."""
    options = _parser().parse_args(arguments)
    known = [*SUBJECTS, "overhead"]
    names = options.rows.split(",")
    if unknown := [name for name in names if name not in known]:
        print(f"there is no row {unknown[0]!r}: choose among {', '.join(known)}.", file=sys.stderr)
        return 2
    cache = options.cache or demo.cache_dir() / "bench" / "streaming"
    cache.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for name in names:
        if name == "overhead":
            rows.append(
                overhead_row(
                    demo_directory(), options.windows or 16, options.epochs, options.rounds, options.threads, str(cache)
                )
            )
        elif SUBJECTS[name].gpu and not torch.cuda.is_available():
            print(f"{name}: not measured, there is no GPU.", file=sys.stderr)
        else:
            rows += _measure(SUBJECTS[name], options, cache)
    results.write(options.out, merge(results.read(options.out), rows))
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    for shown in table.tables(rows):
        console.print(shown)
    console.print(f"The rows are in {options.out}.")
    return 1 if any(row.met() is False for row in rows) else 0


def _measure(subject: Subject, options: argparse.Namespace, cache: Path) -> list[Row]:
    blocks = options.blocks or (1 if subject.gpu else subject.blocks)
    windows = options.windows or subject.windows
    device = "cuda" if subject.gpu else "cpu"
    directory = subject.directory(cache, blocks)
    job = Job(
        str(directory),
        windows,
        subject.seqlen,
        options.epochs,
        subject.method,
        True,
        device,
        options.threads,
        str(cache),
    )
    if options.limit and not subject.gpu and subject.memory:
        found = within(round(subject.memory), job)
        return (
            [replace(row, kernel=f"{row.kernel}, limited") for row in memory_rows(subject, found, job)] if found else []
        )
    return memory_rows(subject, in_a_process_of_its_own(job), job)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.streaming", description=__doc__)
    known = [*SUBJECTS, "overhead"]
    parser.add_argument("--rows", default=",".join(known), help=f"of {', '.join(known)} (default: all)")
    parser.add_argument("--blocks", type=int, help="blocks of the model (default: all on a CPU, 1 on a GPU)")
    parser.add_argument(
        "--limit", action="store_true", help="run the 1.1b row in a control group of its imports and its target"
    )
    parser.add_argument("--windows", type=int, help="calibration windows (default: those of the row)")
    parser.add_argument("--epochs", type=int, default=3, help="passes of the reconstruction (default: 3)")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes of each contestant (default: 3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of everybody (default: torch's)")
    parser.add_argument("--cache", type=Path, help="where models and outputs are put (default: perp's cache)")
    parser.add_argument(
        "--out", type=Path, default=results.FOLDER / "streaming.json", help="results file (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
