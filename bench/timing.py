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
from pathlib import Path

from bench.registry import Arguments, Contestant

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
FALLBACK_CACHE_BYTES = 32 << 20
"""Assumed where the system does not say."""


def last_level_cache_bytes(caches: Path = CACHES) -> int:
    """Size of the largest cache the first core sees, in bytes."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [path.read_text().strip() for path in sorted(caches.glob("index*/size"))]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=FALLBACK_CACHE_BYTES)


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
) -> dict[str, float]:
    """Median milliseconds of one call, per contestant."""
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
            start = clock()
            result = call(arguments)
            elapsed = clock() - start
            del result
            if record:
                times[name].append(1e3 * elapsed)

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
