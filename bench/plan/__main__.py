"""`python -m bench.plan`: what `perp plan` says of a job against what the job takes, for several small models.

Each job is planned and done in a fresh process. Time is that in which the job's thread computes, which other work on
the machine does not lengthen; time on the clock stands beside it. Memory is RssAnon beyond the imports and the text.
The rows are kept in bench/results/plan.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import machine, results, table
from bench.plan.subjects import SUBJECTS, Subject, directory
from bench.results import Row
from perp import demo

OP = "plan"
WIDTH = 150
# What is promised of a plan: time within this factor, memory within this share.
TIME, MEMORY = 1.5, 0.15
# What every job is told, unless its own settings say otherwise.
COMMON: dict[str, Any] = {"windows": 4, "seqlen": 256, "eval_windows": 2, "epochs": 1, "reconstruct_batch": 2}


def in_a_process_of_its_own(name: str, subject: Subject, threads: int, cache: Path, device: str) -> dict[str, Any]:
    """What `bench.plan.worker` measures; CalledProcessError where it fails."""
    model = directory(name, subject, cache)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        told = {
            "model": str(model),
            "data": str(model / "text.jsonl"),
            "device": device,
            "out": f"{folder}/out",
            **COMMON,
            **subject.settings,
        }
        path = Path(folder) / "job.json"
        path.write_text(json.dumps({"settings": told, "threads": threads}))
        subprocess.run([sys.executable, "-m", "bench.plan.worker", str(path)], cwd=machine.ROOT, check=True)
        found: dict[str, Any] = json.loads(path.with_name("result.json").read_text())
    return found


def rows(name: str, subject: Subject, found: dict[str, Any]) -> list[Row]:
    """Time and memory as planned, against what was taken."""
    taken = found["taken"]
    shape = f"{name} (fitted to)" if subject.seen else name
    common = OP, shape, found["dtype"], found["device"], machine.commit()
    host, device = taken["host"], taken["device"]
    made = [
        _row("time", common, found["seconds"], {"taken": taken["own"], "on the clock": taken["seconds"]}, "s", host),
        _row("memory", common, found["host"], {"taken": host}, "bytes", host),
    ]
    if device:
        made.append(_row("GPU memory", common, found["device_bytes"], {"taken": device}, "bytes", device))
    return made


def _row(
    kernel: str, common: tuple[str, str, str, str, str], ours: float, peers: dict[str, float], unit: str, peak: int
) -> Row:
    op, shape, dtype, device, commit = common
    return Row(op, kernel, shape, dtype, device, commit, ours, peers, unit, "lower", None, None, peak, True)


def kept(row: Row) -> bool:
    """Whether the plan is as near as is promised."""
    taken = row.peers["taken"]
    if row.unit == "s":
        return taken / TIME <= row.ours <= taken * TIME
    return abs(row.ours - taken) <= MEMORY * taken


def merge(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """`new`, and the `old` rows of other devices, kernels and jobs."""
    replaced = {(row.device, row.kernel, row.shape) for row in new}
    others = [row for row in old if (row.device, row.kernel, row.shape) not in replaced]
    return sorted([*others, *new], key=lambda row: (row.device, row.kernel, row.shape))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where a plan is further off than is promised, 2 for a wrong option."""
    options = _parser().parse_args(arguments)
    names = options.jobs.split(",")
    if unknown := [name for name in names if name not in SUBJECTS]:
        print(f"there is no job {unknown[0]!r}: choose among {', '.join(SUBJECTS)}.", file=sys.stderr)
        return 2
    cache = options.cache or demo.cache_dir() / "bench" / "plan"
    cache.mkdir(parents=True, exist_ok=True)
    new: list[Row] = []
    for name in names:
        found = in_a_process_of_its_own(name, SUBJECTS[name], options.threads, cache, options.device)
        if options.stages:
            print(json.dumps({"planned": found["planned"], "rates": found["rates"]}), file=sys.stderr)
        made = rows(name, SUBJECTS[name], found)
        print(
            "; ".join(f"{name} {row.kernel}: {row.ours:.4g} for {row.peers['taken']:.4g}" for row in made),
            file=sys.stderr,
        )
        new += made
        results.write(options.out, merge(results.read(options.out), made))
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    for shown in table.tables(new):
        console.print(shown)
    off = [f"{row.shape} ({row.kernel})" for row in new if not kept(row)]
    console.print(f"Further off than {TIME}x in time or {MEMORY:.0%} in memory: {', '.join(off) or 'none'}.")
    console.print(f"The rows are in {options.out}.")
    return 1 if off else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.plan", description=__doc__)
    parser.add_argument("--jobs", default=",".join(SUBJECTS), help=f"of {', '.join(SUBJECTS)} (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's")
    parser.add_argument("--stages", action="store_true", help="print the stages of each plan, too")
    parser.add_argument("--cache", type=Path, help="where models and outputs are put (default: perp's cache)")
    parser.add_argument(
        "--out", type=Path, default=results.FOLDER / "plan.json", help="results file (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
