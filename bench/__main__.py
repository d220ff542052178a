"""`python -m bench`: measure the ops, print a table of each, keep the rows in bench/results/DEVICE.json."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from rich.console import Console

from bench import device, limits, machine, registry, results, table
from bench.measure import measure
from bench.registry import Case
from bench.timing import Effort

# A GPU's clock needs fewer seconds; the published column loop takes seconds a call.
ON_GPU = Effort(seconds=0.3, rounds=11, warmup=2, most_seconds=10)
QUICK = Effort(seconds=0.1, rounds=3, warmup=1, most_seconds=5)
WIDTH = 180
TESTS = machine.ROOT / "tests" / "perp_kernels"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where an op's own check failed, 2 for a wrong option."""
    started = time.monotonic()
    options = _parser().parse_args(arguments)
    device.use(options.device)
    ops = registry.load()
    chosen = options.op.split(",") if options.op else list(ops)
    if unknown := [name for name in chosen if name not in ops]:
        print(f"there is no op {unknown[0]!r} to measure: choose among {', '.join(ops)}.", file=sys.stderr)
        return 2
    on_gpu = options.gpu_cases or device.on_gpu()
    listed = {name: ops[name].gpu_cases if on_gpu else ops[name].cases for name in chosen}
    # The smallest shape of a GPU's is there to rehearse with.
    cases = {
        name: [case for case in of_op if case.quick == options.quick or (case.quick and not on_gpu)]
        for name, of_op in listed.items()
    }
    if options.list:
        for case in (case for name in chosen for case in cases[name]):
            print(_named(case), "against", ", ".join(case.peers))
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    # A quick run's figures are rough: they never replace those of a full one unasked.
    out = options.out or (None if options.quick else results.FOLDER / machine.results_name())
    # A table that wraps is no table: away from a terminal there is no width to keep to.
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)

    complaints: list[str] = []
    effort = QUICK if options.quick else ON_GPU if device.on_gpu() else Effort()
    for name in filter(cases.get, chosen):
        tests_passed = options.tests_passed or (options.verify and _tests_pass(ops[name].tests))
        rows: list[results.Row] = []
        for case in cases[name]:
            if options.seconds and time.monotonic() - started > options.seconds:
                complaints.append(f"{_named(case)} is not measured: the time was up.")
                continue
            print(_named(case), file=sys.stderr)
            try:
                found, complaint = measure(case, effort, tests_passed)
            except RuntimeError as error:
                if not device.on_gpu():
                    raise
                # Of many shapes one may be too large for this GPU; the others are still worth their time.
                complaints.append(f"{_named(case)} is not measured: {type(error).__name__}: {error}")
                continue
            rows += found
            complaints += [f"{_named(case)} is wrong: {complaint}"] if complaint else []
            if out:
                results.write(out, results.merge(results.read(out), rows))
        for shown in table.tables(rows):
            console.print(shown)
    computing = {case.dtype: None for name in chosen for case in cases[name] if case.work.flops}
    console.print(f"Limits are those of {limits.described(computing)}.")
    if not options.verify and not options.tests_passed:
        console.print("Ratios are printed only with --verify, which runs each op's tests first.")
    if out:
        console.print(f"The rows are in {out}.")
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


def _named(case: Case) -> str:
    return f"{case.op} {str(case.dtype).removeprefix('torch.')} {case.shape}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, epilog="example: python -m bench --op gram_,select --verify"
    )
    parser.add_argument("--op", help="measure these ops only, separated by commas")
    parser.add_argument("--quick", action="store_true", help="one small shape per op; writes only where --out says")
    parser.add_argument("--list", action="store_true", help="list what would be measured, and measure nothing")
    parser.add_argument("--verify", action="store_true", help="run each op's tests first: ratios need them green")
    parser.add_argument("--out", type=Path, help="results file (default: bench/results/DEVICE.json)")
    parser.add_argument("--threads", type=int, help="threads of every contestant (default: torch's)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what is measured (default: cpu)")
    parser.add_argument("--gpu-cases", action="store_true", help="the shapes of a GPU, on a CPU too: with --quick")
    parser.add_argument("--tests-passed", action="store_true", help="the tests are known to pass: bench.gpu ran them")
    parser.add_argument("--seconds", type=float, help="begin no case after so many")
    return parser


@cache
def _tests_pass(names: tuple[str, ...]) -> bool:
    files = [TESTS / name for name in names]
    if absent := [file for file in files if not file.exists()]:
        print(f"not verified: {absent[0]} does not exist.", file=sys.stderr)
        return False
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *map(str, files)], cwd=machine.ROOT)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
