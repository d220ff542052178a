"""Rows from what the workers measured, and what a few blocks tell of all."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bench import machine
from bench.results import Row
from bench.streaming.retraining import RANK
from bench.streaming.shared import PATTERN
from bench.streaming.subjects import Subject

OP = "stream"
# Steps that have the kernels compiled and the moments made.
WARM_UP = 2
# At most so many times as long as the same work with the model in memory.
OVERHEAD = 1.15


def fitted(subject: Subject, found: Mapping[str, Any], epochs: int, windows: int, verified: bool) -> list[Row]:
    """Peak memory and, of a timed subject, what all blocks would take."""
    peak = found["device_bytes"] or found["host_bytes"]
    done = f"{found['blocks']} of {subject.blocks} blocks"
    shape = f"{subject.name} {subject.method} {PATTERN}, {windows} x {subject.seqlen}, {epochs} epochs, {done}"
    rows = [_row("peak memory, streamed", shape, found, peak, "bytes", subject.memory, peak, verified)]
    if subject.timed:
        seconds = all_blocks(found["seconds"], found["each"], subject.blocks)
        rows.append(_row("all blocks, predicted", shape, found, seconds, "s", subject.seconds, peak, verified))
    return rows


def retrained(subject: Subject, runs: Mapping[int, Mapping[str, Any]], verified: bool) -> list[Row]:
    """Peak memory and tokens per second of all blocks, from runs of the model with two numbers of blocks."""
    counts, last = sorted(runs), runs[max(runs)]
    shape = (
        f"{subject.name} {subject.method} {PATTERN}, mask_lora r={RANK}, {subject.steps} steps of {subject.seqlen}, "
        f"{' and '.join(map(str, counts))} blocks run, {subject.blocks} extrapolated"
    )
    # Each phase grows by steps of its own, and another one may be the largest with all blocks.
    peak = max(
        extrapolated({count: one["peaks"][phase] for count, one in runs.items()}, subject.blocks)
        for phase in last["peaks"]
    )
    step = extrapolated(
        {count: statistics.median(one["each"][WARM_UP:]) for count, one in runs.items()}, subject.blocks
    )
    rate, held = subject.seqlen / step, round(peak)
    return [
        _row("peak memory, retraining, predicted", shape, last, peak, "bytes", subject.memory, held, verified),
        _row("retraining, predicted", shape, last, rate, "tokens/s", subject.rate, held, verified, better="higher"),
    ]


def overhead(
    windows: int, epochs: int, streamed: list[dict[str, Any]], in_memory: list[dict[str, Any]], verified: bool
) -> Row:
    """SmolLM2-135M streamed against in memory; medians."""
    ours, peer = (statistics.median(one["seconds"] for one in found) for found in (streamed, in_memory))
    peak = round(statistics.median(one["host_bytes"] for one in streamed))
    shape = f"SmolLM2-135M wanda {PATTERN}, {windows} x 512, {epochs} epochs"
    row = _row("time, streamed", shape, streamed[0], ours, "s", OVERHEAD * peer, peak, verified)
    return replace(row, dtype="float32", peers={"in memory": peer})


def all_blocks(seconds: float, each: list[float], blocks: int) -> float:
    """Seconds that `blocks` would take: one more is the median of `each`, and as much of the rest as each has."""
    more = statistics.median(each) + (seconds - sum(each)) / len(each)
    return seconds + (blocks - len(each)) * more


def extrapolated(found: Mapping[int, float], blocks: int) -> float:
    """At `blocks`, the line through what two numbers of blocks have given."""
    few, many = sorted(found)
    return found[few] + (found[many] - found[few]) / (many - few) * (blocks - few)


def _row(
    kernel: str,
    shape: str,
    found: Mapping[str, Any],
    ours: float,
    unit: str,
    target: float | None,
    peak: int,
    verified: bool,
    better: str = "lower",
) -> Row:
    return Row(
        op=OP,
        kernel=kernel,
        shape=shape,
        dtype="bfloat16",
        device=found["device"],
        commit=machine.commit(),
        ours=ours,
        peers={},
        unit=unit,
        better=better,
        target=target,
        limit=None,
        peak_bytes=peak,
        verified=verified,
    )
