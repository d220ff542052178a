"""`make gpu`: the kernels' tests on this machine's GPU, a memory checker, then the benchmark; short tables last.

    python -m bench.gpu                                every op, nine minutes each at most
    python -m bench.gpu --ops gram,sparsegpt           these, nine minutes together
    python -m bench.gpu --device cpu --out FILE        a rehearsal without a GPU: the smallest shapes, no tests

It installs nothing and takes the torch and the Triton of the Python that runs it, from the source tree: the native CPU
kernels need not be built. Each step is a process of its own, so that a kernel that brings the GPU's context down takes
nothing else with it. The rows go to bench/results/DEVICE.json as each op is done.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from rich.console import Console

from bench import device, machine, registry, results, table

TESTS = machine.ROOT / "tests" / "perp_kernels" / "triton" / "kernels"
STREAMED = "../../../perp/test_streamed_device.py"
MINUTES = 9.0
SANITIZER_SECONDS = 150.0
WIDTH = 200

# Of whole models, measured by programs of their own.
MODEL, STREAM = "prune_model", "stream"
# What a model that streams is pruned, fitted and retrained with.
STREAMS = (
    "gram_",
    "select",
    "wanda_select",
    "sparsegpt",
    "sparsegpt_block_",
    "unpack",
    "sparse_linear",
    "masked_lora_linear",
    "add_lowrank_",
)

PASSED, FAILED, ABSENT = "passed", "FAILED", "not run"


@dataclass
class Outcome:
    """What the steps of one op came to."""

    tests: str = ABSENT
    memory_check: str = ABSENT
    benchmark: str = ABSENT

    def failed(self) -> bool:
        return FAILED in (self.tests, self.memory_check, self.benchmark)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where a step failed, 2 for a wrong option or without a GPU."""
    options = _parser().parse_args(arguments)
    device.use(options.device)
    if device.on_gpu() and not torch.cuda.is_available():
        print("there is no GPU that torch sees: run this where there is one.", file=sys.stderr)
        return 2
    gpu_tests = tests_of_all()
    chosen = _named(options.ops, gpu_tests)
    if chosen is None:
        print(f"there is no op among {options.ops!r}: choose of {', '.join(gpu_tests)}.", file=sys.stderr)
        return 2
    print("\n".join(_machine()), flush=True)
    out = options.out or results.FOLDER / machine.results_name()
    deadline = time.monotonic() + 60 * options.minutes * (1 if options.ops else len(chosen))
    outcomes = {name: _run(name, gpu_tests[name], out, deadline) for name in chosen}
    return _report(outcomes, out)


def tests_of_all() -> dict[str, tuple[str, ...]]:
    """What can be measured, with the test files that gate it."""
    found = {name: op.gpu_tests for name, op in registry.load().items() if op.gpu_cases}

    def together(*ops: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(test for op in ops for test in found[op]))

    return {**found, MODEL: together("gram_", "sparsegpt"), STREAM: (*together(*STREAMS), STREAMED)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ops", help="these ops only, separated by commas; a last _ may be left out")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for the ops named together, or for each of all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--out", type=Path, help="results file (default: bench/results/DEVICE.json)")
    return parser


def _named(asked: str | None, known: Mapping[str, object]) -> list[str] | None:
    """The ops asked for, None where one is not known."""
    if not asked:
        return list(known)
    found = [next((n for n in known if name.strip() in (n, n.rstrip("_"))), None) for name in asked.split(",")]
    return None if None in found else [name for name in found if name]


def _machine() -> list[str]:
    """What the figures were made with, a line each."""
    versions = []
    for package in ("torch", "triton", "cupy-cuda13x"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} is not installed")
    tools = [f"{tool}: {_tool(tool) or 'not here'}" for tool in ("nvcc", "compute-sanitizer")]
    return [f"{machine.device()}, commit {machine.commit()}", ", ".join(versions), ", ".join(tools)]


def _tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def _run(name: str, tests: tuple[str, ...], out: Path, deadline: float) -> Outcome:
    outcome = Outcome()
    if device.on_gpu():
        outcome.tests = _tests(tests, deadline)
        # The rows of streaming need the minutes; its kernels are checked with their ops.
        checked = outcome.tests == PASSED and name != STREAM
        outcome.memory_check = _memory_check(tests, deadline) if checked else ABSENT
    verified = outcome.tests == PASSED and outcome.memory_check != FAILED
    left = deadline - time.monotonic()
    if left < 20:
        return outcome
    command = [sys.executable, "-m", *_program(name, left), "--out", str(out)]
    command += ["--tests-passed"] if verified else []
    outcome.benchmark = _step(command, left, {})
    return outcome


def _program(name: str, seconds: float) -> list[str]:
    """What measures an op or a whole model in so many seconds; rehearsed, at the smallest shapes."""
    on_gpu = device.on_gpu()
    if name == STREAM:
        # What it has to import, and a model that is being written when the time is up.
        size = ["--seconds", str(seconds - 40)] if on_gpu else ["--size", "tiny"]
        return ["bench.streaming", "--rows", "gpu", *size]
    if name == MODEL:
        return ["bench.model", "--device", device.current().type, *([] if on_gpu else ["--size", "tiny"])]
    # The case in hand when the time is up is still finished.
    own = ["bench", "--device", device.current().type, "--op", name, "--seconds", str(seconds - 30)]
    return [*own, *([] if on_gpu else ["--gpu-cases", "--quick"])]


@cache
def _tests(files: tuple[str, ...], deadline: float) -> str:
    workers = ["-n", "8", "--dist", "loadgroup"] if importlib.util.find_spec("xdist") else []
    return _step([*_pytest(files), *workers], deadline - time.monotonic(), {"PERP_GPU": "1"})


@cache
def _memory_check(files: tuple[str, ...], deadline: float) -> str:
    """compute-sanitizer over the same tests at their smallest shapes, each allocation one of the driver's: in torch's
    pool a neighbour's memory is not out of bounds."""
    tool = _tool("compute-sanitizer")
    if tool is None:
        return "compute-sanitizer is not here"
    command = [tool, "--tool", "memcheck", "--error-exitcode", "99", "--print-limit", "5"]
    environment = {"PERP_GPU": "small", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    seconds = min(SANITIZER_SECONDS, (deadline - time.monotonic()) / 3)
    small = tuple(name for name in files if name not in ("test_launched.py", "test_registered.py"))
    return _step([*command, *_pytest(small)], seconds, environment, overdue="not finished in time")


def _pytest(files: tuple[str, ...]) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(TESTS / name) for name in files)]


def _step(command: list[str], seconds: float, environment: Mapping[str, str], overdue: str = FAILED) -> str:
    # Without it torch calls cuBLAS uncertain from run to run, and says so.
    settings = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", **environment}
    paths = os.pathsep.join(
        filter(None, [str(machine.ROOT), str(machine.ROOT / "python"), os.environ.get("PYTHONPATH")])
    )
    try:
        done = subprocess.run(
            command, cwd=machine.ROOT, env={**os.environ, **settings, "PYTHONPATH": paths}, timeout=max(seconds, 1)
        )
    except subprocess.TimeoutExpired:
        print(f"stopped after {seconds:.0f} s: {' '.join(command)}", flush=True)
        return overdue
    return PASSED if done.returncode == 0 else FAILED


def _report(outcomes: Mapping[str, Outcome], out: Path) -> int:
    console = Console(width=WIDTH)
    rows = [row for row in results.read(out) if row.op in outcomes and row.device == machine.device()]
    for shown in table.tables(rows):
        console.print(shown)
    for name, outcome in outcomes.items():
        steps = f"tests {outcome.tests}, memory check {outcome.memory_check}, benchmark {outcome.benchmark}"
        console.print(f"{name}: {steps}, {sum(row.op == name for row in rows)} rows")
    console.print(f"The rows are in {out}.")
    return 1 if any(outcome.failed() for outcome in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
