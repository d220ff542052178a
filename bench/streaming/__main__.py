"""`python -m bench.streaming`: memory and time of pruning, fitting and retraining a model that streams from its shards.

Wanda 2:4 with half-block reconstruction and the saving of the result, each in a fresh process. On a CPU: the 1.1B
shape (RssAnon beyond the imports), and SmolLM2-135M streamed against in memory, in turns. On a GPU: a few blocks of
larger shapes at their true size, of which all are predicted. The rows are kept in bench/results/streaming.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import machine, results, table
from bench.results import Row
from bench.streaming import group, rows, worker
from bench.streaming.subjects import SUBJECTS, Subject, demo_directory, write_random
from bench.streaming.worker import Job
from perp import demo

OVERHEAD = "overhead"
# What stands for all rows of a GPU.
GPU = "gpu"
TESTS = [str(machine.ROOT / "tests" / "perp" / name) for name in ("test_stream.py", "test_streamed_run.py")]
# Tells what the worker takes before its job.
_IMPORTS = "from bench.streaming import worker; from perp import machine; print(machine.resident_parts()[0])"
WIDTH = 180


class Bench:
    """The rows of one call; `deadline`, in seconds of time.monotonic, ends a worker that is still busy."""

    def __init__(self, options: argparse.Namespace, cache: Path, verified: bool) -> None:
        self.options, self.cache, self.verified = options, cache, verified
        self.deadline = time.monotonic() + options.seconds if options.seconds else None

    def measure(self, name: str) -> list[Row]:
        """Of a subject or of the overhead; a failed worker's CalledProcessError, and a TimeoutError of either kind."""
        if name == OVERHEAD:
            return [self._overhead()]
        subject = SUBJECTS[name]
        if self.options.size == "tiny":
            subject = subject.rehearsed()
        if subject.gpu and not torch.cuda.is_available():
            print(f"{name}: not measured, there is no GPU.", file=sys.stderr)
            return []
        options = self.options
        windows, epochs = options.windows or subject.windows, options.epochs or subject.epochs
        counts = options.blocks or subject.measured or (subject.blocks,)
        if subject.steps:
            runs = {count: self._found(subject, count, windows, epochs) for count in counts}
            return rows.retrained(subject, runs, self.verified)
        limit = round(subject.memory) if options.limit and subject.memory and not subject.gpu else None
        made = []
        for count in counts:
            if found := self._found(subject, count, windows, epochs, limit):
                made += rows.fitted(subject, found, epochs, windows, self.verified)
        return [replace(row, kernel=f"{row.kernel}, limited") for row in made] if limit else made

    def _found(
        self, subject: Subject, blocks: int, windows: int, epochs: int, limit: int | None = None
    ) -> dict[str, Any]:
        """What the worker measures of the subject with so many blocks; nothing where it cannot be limited as asked."""
        self._left()
        with tempfile.TemporaryDirectory(dir=self.cache) as place:
            directory = Path(place) / subject.name
            directory.mkdir()
            write_random(subject.config(blocks), directory)
            job = Job(
                str(directory),
                windows,
                subject.seqlen,
                epochs,
                subject.method,
                True,
                "cuda" if subject.gpu else "cpu",
                self.options.threads,
                place,
                subject.steps,
            )
            if self.options.size == "tiny":
                return worker.execute(job)
            return self._within(limit, job) if limit else self._in_a_process_of_its_own(job)

    def _overhead(self) -> Row:
        options, directory = self.options, demo_directory()
        windows, epochs = options.windows or 16, options.epochs or 3
        taken: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for _ in range(options.rounds):
            for stream, found in taken.items():
                job = Job(
                    str(directory), windows, 512, epochs, "wanda", stream, "cpu", options.threads, str(self.cache)
                )
                found.append(self._in_a_process_of_its_own(job))
        return rows.overhead(windows, epochs, taken[True], taken[False], self.verified)

    def _within(self, limit: int, job: Job) -> dict[str, Any]:
        """Measured in a control group of `limit` bytes beyond the imports; nothing where there is none."""
        imports = subprocess.run([sys.executable, "-c", _IMPORTS], cwd=machine.ROOT, check=True, capture_output=True)
        try:
            with group.limited(int(imports.stdout) + limit) as before:
                return self._in_a_process_of_its_own(job, before)
        except group.Unavailable as error:
            print(f"not within a limit: {error}.", file=sys.stderr)
            return {}

    def _in_a_process_of_its_own(self, job: Job, before: Sequence[str] = ()) -> dict[str, Any]:
        """What `bench.streaming.worker` measures. `before`: the command that runs it."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "job.json"
            path.write_text(json.dumps(asdict(job)))
            command = [*before, sys.executable, "-m", "bench.streaming.worker", str(path)]
            subprocess.run(command, cwd=machine.ROOT, check=True, timeout=self._left())
            found: dict[str, Any] = json.loads(path.with_name("result.json").read_text())
        print(_told(job, found), file=sys.stderr)
        return found

    def _left(self) -> float | None:
        """Seconds until the deadline; TimeoutError behind it."""
        if self.deadline is None:
            return None
        if (left := self.deadline - time.monotonic()) <= 0:
            raise TimeoutError
        return left


def _told(job: Job, found: dict[str, Any]) -> str:
    served = ", ".join(f"{op} by {backend}" for op, backend in found["served"])
    if job.steps:
        peaks = ", ".join(f"{phase} {peak / 1e9:.2f} GB" for phase, peak in found["peaks"].items())
        figures = (
            f"{found['blocks']} blocks retrained, {peaks}, loss {found['losses'][0]:.3f} to {found['losses'][-1]:.3f}"
        )
    else:
        planned = found["planned"]
        figures = (
            f"{'streamed' if job.stream else 'in memory'}, {found['seconds']:.1f} s "
            f"(planned {planned['seconds']:.1f}), RssAnon {found['host_bytes'] / 1e6:.0f} MB "
            f"(planned {planned['host_bytes'] / 1e6:.0f}), GPU {found['device_bytes'] / 1e9:.2f} GB "
            f"(planned {planned['device_bytes'] / 1e9:.2f})"
        )
    each = ", ".join(f"{seconds:.3g}" for seconds in found["each"])
    return f"{Path(job.directory).name}: {figures}; seconds each {each}; served: {served}"


def merge(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """`new`, and the `old` rows of other ops, devices, kernels and shapes, each op's rows together."""
    replaced = {(row.op, row.device, row.kernel, row.shape) for row in new}
    kept = [row for row in old if (row.op, row.device, row.kernel, row.shape) not in replaced]
    return sorted([*kept, *new], key=lambda row: (row.device, row.op))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where a row could not be measured or its result is not one, 2 for a wrong option."""
    options = _parser().parse_args(arguments)
    of_a_gpu = [name for name, subject in SUBJECTS.items() if subject.gpu]
    names = of_a_gpu if options.rows == GPU else options.rows.split(",")
    known = of_a_gpu if options.size == "tiny" else [*SUBJECTS, OVERHEAD]
    if unknown := [name for name in names if name not in known]:
        print(f"there is no row {unknown[0]!r}: choose among {', '.join(known)}.", file=sys.stderr)
        return 2
    if options.blocks and len(options.blocks) != 2 and any(name in SUBJECTS and SUBJECTS[name].steps for name in names):
        print("what retraining takes is told of two numbers of blocks: give --blocks 1,3.", file=sys.stderr)
        return 2
    cache = options.cache or demo.cache_dir() / "bench" / "streaming"
    cache.mkdir(parents=True, exist_ok=True)
    bench = Bench(options, cache, options.tests_passed or (options.verify and _tests_pass()))
    made: list[Row] = []
    complaints = []
    for name in names:
        try:
            found = bench.measure(name)
        except (TimeoutError, subprocess.TimeoutExpired):
            complaints.append(f"{name} is not measured: the time was up.")
            continue
        except subprocess.CalledProcessError as error:
            # Of many shapes one may be too large for this GPU; the others are still worth their time.
            complaints.append(f"{name} is not measured: its process ended with {error.returncode}, see above.")
            continue
        made += found
        results.write(options.out, merge(results.read(options.out), found))
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    for shown in table.tables(made):
        console.print(shown)
    console.print(f"The rows are in {options.out}.")
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


def _tests_pass() -> bool:
    return subprocess.run([sys.executable, "-m", "pytest", "-q", *TESTS], cwd=machine.ROOT).returncode == 0


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(count) for count in text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.streaming", description=__doc__)
    known = [*SUBJECTS, OVERHEAD]
    parser.add_argument("--rows", default=",".join(known), help=f"of {', '.join(known)}, or {GPU} (default: all)")
    parser.add_argument(
        "--size", choices=("full", "tiny"), default="full", help="tiny: rehearse the rows of a GPU on the CPU, here"
    )
    parser.add_argument("--blocks", type=_counts, help="blocks of the model, such as 1,3 (default: those of the row)")
    parser.add_argument(
        "--limit", action="store_true", help="run the 1.1b row in a control group of its imports and its target"
    )
    parser.add_argument("--windows", type=int, help="calibration windows (default: those of the row)")
    parser.add_argument("--epochs", type=int, help="passes of the reconstruction (default: those of the row)")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes of each contestant (default: 3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of everybody (default: torch's)")
    parser.add_argument(
        "--verify", action="store_true", help="run the tests of streaming first: ratios need them green"
    )
    parser.add_argument("--tests-passed", action="store_true", help="the tests are known to pass: bench.gpu ran them")
    parser.add_argument("--seconds", type=float, help="end after so many, with the rows that are done")
    parser.add_argument(
        "--cache", type=Path, help="where models and outputs are put for the time (default: perp's cache)"
    )
    parser.add_argument(
        "--out", type=Path, default=results.FOLDER / "streaming.json", help="results file (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
