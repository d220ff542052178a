"""What is measured: every op file lists its cases here, and everything else only walks the list."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Arguments = Any
"""One complete set of arguments of a case: whatever its `make` builds and its contestants read."""
Contestant = Callable[[Arguments], Any]

LAYERS = 8
"""Chained layers behind every figure of extra memory: one layer would hide what each keeps for its backward pass."""


@dataclass(frozen=True)
class Work:
    """What any implementation must do at least.

    bytes: compulsory traffic, each operand read or written once in the smallest form the contract allows.
    flops: multiplications and additions of the definition, bounded by the matrix rate at the case's dtype.
    """

    bytes: int
    flops: int = 0


LIMIT = "limit"
"""Stands in a target for the case's physical limit, which is no peer."""


@dataclass(frozen=True)
class Target:
    """Ours should be at most `ratio` times the peer's figure, or the limit's."""

    peer: str
    ratio: float


@dataclass(frozen=True)
class Memory:
    """Extra memory over `LAYERS` equal chained layers, forward and backward.

    make: builds the chain's input and parameters from a seed. The contestants return every tensor that is not extra
    (outputs of each layer, gradients); inputs and parameters exist before they run.
    """

    make: Callable[[int], Arguments]
    ours: Contestant
    peers: Mapping[str, Contestant]
    targets: tuple[Target, ...] = ()


@dataclass(frozen=True)
class Case:
    """An op at one shape and dtype: a line of the table, and a second one in bytes where `memory` is given.

    op: the name perp_kernels knows it by; shape: `KEY=VALUE` words (T tokens, N outputs, K inputs, r rank).
    make: builds an argument set from a seed; no two sets share a storage. ours and peers take one and return what they
    computed. check: raises AssertionError where ours is wrong against a float64 reference on a given argument set.
    targets: all of them are to be met. quick: part of the short selection. bound: what any implementation has to do,
    timed beside the contestants; it is the limit then, in the place of `work`. most: milliseconds that ours may take.
    """

    op: str
    shape: str
    dtype: torch.dtype
    make: Callable[[int], Arguments]
    ours: Contestant
    peers: Mapping[str, Contestant]
    work: Work
    check: Callable[[Arguments], None]
    targets: tuple[Target, ...] = ()
    memory: Memory | None = None
    quick: bool = False
    bound: Contestant | None = None
    most: float | None = None


@dataclass(frozen=True)
class Op:
    """An op's cases, and the test files under tests/perp_kernels that must be green for its speed-ups to count.

    gpu_cases are measured by `make gpu`, and gpu_tests, under tests/perp_kernels/triton/kernels, gate them.
    """

    name: str
    cases: Sequence[Case] = ()
    tests: tuple[str, ...] = ()
    gpu_cases: Sequence[Case] = ()
    gpu_tests: tuple[str, ...] = ()


def load() -> dict[str, Op]:
    """Every op of `bench/ops`, by name, in the order of the file names."""
    from bench import ops

    found: dict[str, Op] = {}
    for module in sorted(pkgutil.iter_modules(ops.__path__), key=lambda module: module.name):
        for op in importlib.import_module(f"{ops.__name__}.{module.name}").OPS:
            if op.name in found:
                raise ValueError(f"two op files list {op.name!r}: list it in one.")
            found[op.name] = op
    return found
