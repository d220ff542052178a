"""The harness interleaves, rotates, warms up, and takes medians; shown by counting on a clock of its own."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest

from bench.timing import Effort, interleave, last_level_cache_bytes, sets_needed

ROUNDS = Effort(seconds=0, rounds=6, warmup=2, most_seconds=1e9)


class Machine:
    """Two contestants on a clock that only they advance."""

    def __init__(self, **costs: list[float]) -> None:
        self.now = 0.0
        self.calls: list[tuple[str, object]] = []
        self.costs = {name: itertools.cycle(values) for name, values in costs.items()}

    def contestants(self):
        return {name: lambda arguments, name=name: self.run(name, arguments) for name in self.costs}

    def run(self, name: str, arguments: object) -> None:
        self.calls.append((name, arguments))
        self.now += next(self.costs[name])

    def clock(self) -> float:
        return self.now


def test_contestants_take_turns_and_every_call_gets_the_next_set() -> None:
    machine = Machine(a=[1], b=[1])
    interleave(machine.contestants(), ["x", "y", "z"], ROUNDS, machine.clock)
    names, sets = zip(*machine.calls, strict=True)
    assert names == ("a", "b") * 8
    assert sets == tuple(itertools.islice(itertools.cycle("xyz"), 16))
    assert {(name, used) for name, used in machine.calls} == set(itertools.product("ab", "xyz"))


def test_medians_in_milliseconds_without_the_warm_up() -> None:
    machine = Machine(a=[50, 50, 1, 2, 3, 4, 5, 600], b=[9])
    medians = interleave(machine.contestants(), ["x"], ROUNDS, machine.clock)
    assert medians == {"a": 3500, "b": 9000}


def test_runs_until_both_the_time_and_the_rounds_are_reached() -> None:
    machine = Machine(a=[0.25])
    interleave(machine.contestants(), ["x"], Effort(seconds=5, rounds=2, warmup=0, most_seconds=100), machine.clock)
    assert len(machine.calls) == 20


def test_a_slow_call_is_not_repeated_for_ever() -> None:
    machine = Machine(a=[40])
    interleave(machine.contestants(), ["x"], Effort(seconds=1, rounds=7, warmup=0, most_seconds=60), machine.clock)
    assert len(machine.calls) == 2


def test_a_rotation_that_leaves_a_contestant_with_half_the_sets_is_refused() -> None:
    machine = Machine(a=[1], b=[1])
    with pytest.raises(ValueError, match="every set"):
        interleave(machine.contestants(), ["x", "y"], ROUNDS, machine.clock)


@pytest.mark.parametrize("touched", [1 << 10, 5 << 20, 32 << 20, 33 << 20, 500 << 20])
@pytest.mark.parametrize("contestants", [1, 2, 3, 6])
def test_other_sets_push_a_set_out_of_three_caches(touched: int, contestants: int) -> None:
    cache = 32 << 20
    sets = sets_needed(touched, contestants, cache)
    assert (sets - 1) * touched > 3 * cache
    assert math.gcd(sets, contestants) == 1


def test_last_level_cache_is_the_largest(tmp_path: Path) -> None:
    for index, size in enumerate(["32K", "32K", "1024K", "32M"]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert last_level_cache_bytes(tmp_path) == 32 << 20
    assert last_level_cache_bytes(tmp_path / "absent") > 0
