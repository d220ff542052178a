"""From a case to its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from bench import device, limits, machine, memory, timing
from bench.registry import LIMIT, Arguments, Case, Contestant, Target
from bench.results import Row
from perp_kernels import cpu, dispatch

OURS = "ours"
REFERENCE = "reference"


def measure(case: Case, effort: timing.Effort, tests_passed: bool) -> tuple[list[Row], str | None]:
    """The case's rows, and what its check found wrong with ours (None where it is right)."""
    contestants = {OURS: case.ours, **case.peers, **({LIMIT: case.bound} if case.bound else {})}
    count = timing.sets_needed(case.work.bytes, len(contestants), timing.cache_bytes())
    sets = [case.make(seed) for seed in range(count)]
    complaint = _complaint(case, sets[0])
    times = timing.interleave(contestants, sets, effort, elapsed=timing.stopwatch())
    limit = times.pop(LIMIT, None) or limits.milliseconds(case.work, case.dtype)
    subject = sets[0]
    del sets
    kernel, spent = _memory({OURS: case.ours}, subject)
    if case.memory:
        kernel, spent = _memory({OURS: case.memory.ours, **case.memory.peers}, case.memory.make(0))

    def row(figures: Mapping[str, float], unit: str, targets: Sequence[Target], limit: float | None) -> Row:
        known = {**figures, **({} if limit is None else {LIMIT: limit})}
        due = [target.ratio * known[target.peer] for target in targets]
        if case.most is not None and unit == "ms":
            due.append(case.most)
        return Row(
            op=case.op,
            kernel=kernel,
            shape=case.shape,
            dtype=str(case.dtype).removeprefix("torch."),
            device=machine.device(),
            commit=machine.commit(),
            ours=figures[OURS],
            peers={name: figure for name, figure in figures.items() if name != OURS},
            unit=unit,
            better="lower",
            target=min(due, default=None),
            limit=limit,
            peak_bytes=spent[OURS],
            verified=tests_passed and complaint is None,
        )

    rows = [row(times, "ms", case.targets, limit)]
    if case.memory:
        rows.append(row(spent, "bytes", case.memory.targets, None))
    return rows, complaint


def _complaint(case: Case, arguments: Arguments) -> str | None:
    try:
        case.check(arguments)
    except AssertionError as error:
        return str(error)
    return None


def _memory(contestants: Mapping[str, Contestant], arguments: Arguments) -> tuple[str, dict[str, int]]:
    """Which implementations served ours, and each contestant's extra bytes."""
    with dispatch.served() as served:
        contestants[OURS](arguments)
    kernel = "+".join(sorted({_named(backend) for _, backend in served}))
    calls = {name: partial(call, arguments) for name, call in contestants.items()}
    extra = {name: memory.extra_bytes(call) for name, call in calls.items()}
    if kernel != REFERENCE and not device.on_gpu():
        # Native scratch is not torch's to count: where the process grew by more, that counts, for every contestant.
        extra = {name: max(extra[name], memory.native_extra_bytes(call)) for name, call in calls.items()}
    return kernel, extra


def _named(backend: str) -> str:
    return f"cpu/{cpu.active_path()}" if backend == "cpu" else backend
