"""Interleaved medians over rotated arguments.

Contestants take turns (A B C A B C ...), so that a slow spell of the machine falls on all of them, and every call gets
the next argument set, so that nobody finds its data in a cache that the call before it warmed.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import device
from bench.registry import Arguments, Contestant

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
FALLBACK_CACHE_BYTES = 32 << 20
"""Assumed where the system does not say."""


def last_level_cache_bytes(caches: Path = CACHES) -> int:
    """Size of the largest cache the first core sees, in bytes."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [path.read_text().strip() for path in sorted(caches.glob("index*/size"))]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=FALLBACK_CACHE_BYTES)


def cache_bytes() -> int:
    """Size of the cache before the memory of the device that is measured."""
    if device.on_gpu():
        return int(torch.cuda.get_device_properties(device.current()).L2_cache_size)
    return last_level_cache_bytes()


Stopwatch = Callable[[Callable[[], Any]], float]
"""Seconds that one call takes."""

SPIN_CYCLES = 3_000_000
"""Two milliseconds of a GPU: longer than the host takes to queue any call that does not wait for the GPU itself."""


def wall(call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    result = call()
    elapsed = clock() - start
    del result
    return elapsed


def between_events(call: Callable[[], Any]) -> float:
    """By the GPU's clock, without the host's work: the GPU is kept busy until the call's kernels are queued."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SPIN_CYCLES)
    start.record()
    result = call()
    end.record()
    end.synchronize()
    del result
    return start.elapsed_time(end) / 1e3


def stopwatch() -> Stopwatch:
    """That of the device that is measured."""
    return between_events if device.on_gpu() else wall


def sets_needed(bytes_touched: int, contestants: int, cache_bytes: int) -> int:
    """How many argument sets to rotate through, when each call touches at least `bytes_touched` bytes of its own.

    Between two uses of a set every other is used once: (sets - 1) * bytes_touched must exceed three times the cache.
    The count has no factor in common with the number of contestants, so that each of them meets every set.
    """
    sets = 3 * cache_bytes // max(bytes_touched, 1) + 2
    while math.gcd(sets, contestants) != 1:
        sets += 1
    return sets


@dataclass(frozen=True)
class Effort:
    """Measure for `seconds` and `rounds` rounds at least, after `warmup` untimed ones.

    Past `most_seconds` the round in hand is the last.
    """

    seconds: float = 1.0
    rounds: int = 7
    warmup: int = 1
    most_seconds: float = 30.0


def interleave(
    contestants: Mapping[str, Contestant],
    sets: Sequence[Arguments],
    effort: Effort,
    clock: Callable[[], float] = time.perf_counter,
    elapsed: Stopwatch | None = None,
) -> dict[str, float]:
    """Median milliseconds of one call, per contestant, by `elapsed`, or by the clock that the effort is counted on."""
    elapsed = elapsed or partial(wall, clock=clock)
    if math.gcd(len(sets), len(contestants)) != 1:
        raise ValueError(
            f"{len(sets)} argument sets shared by {len(contestants)} contestants: each must meet every set."
        )
    times: dict[str, list[float]] = {name: [] for name in contestants}
    turn = 0

    def round_of_calls(record: bool) -> None:
        nonlocal turn
        for name, call in contestants.items():
            arguments = sets[turn % len(sets)]
            turn += 1
            seconds = elapsed(partial(call, arguments))
            if record:
                times[name].append(1e3 * seconds)

    for _ in range(effort.warmup):
        round_of_calls(record=False)
    start = clock()
    rounds = 0
    while True:
        round_of_calls(record=True)
        rounds += 1
        spent = clock() - start
        if (rounds >= effort.rounds and spent >= effort.seconds) or spent >= effort.most_seconds:
            break
    return {name: statistics.median(values) for name, values in times.items()}
