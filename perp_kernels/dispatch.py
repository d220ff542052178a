"""Which implementation serves a call of an op.

Every op has a `reference` in plain torch and may have faster implementations. Each call takes the first in the order
of `PREFERENCE` that is available on this machine and supports the call's arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

PREFERENCE = ("cuda", "triton", "cpu", "reference")


@dataclass(frozen=True)
class Implementation:
    """One implementation of one op; `unavailable` says why this machine cannot run it, None where it can."""

    backend: str
    function: Callable[..., Any]
    supports: Callable[..., bool]
    unavailable: str | None
    on_request: bool  # serves only where `backend` names it


_implementations: dict[str, list[Implementation]] = {}

# Of the process, not of the thread: autograd runs the backward pass of CUDA tensors in threads of its own, which
# would not see a thread's override and would quietly mix backends.
_forced: list[str] = []

_served: list[set[tuple[str, str]]] = []


def register(
    op: str,
    backend: str,
    function: Callable[..., Any],
    supports: Callable[..., bool] = lambda *arguments: True,
    unavailable: str | None = None,
    on_request: bool = False,
) -> None:
    """Add an implementation of `op`. `supports` gets the call's arguments and must only look at their properties
    (device, dtype, shape), never at their values."""
    found = _implementations.setdefault(op, [])
    found.append(Implementation(backend, function, supports, unavailable, on_request))
    found.sort(key=lambda implementation: PREFERENCE.index(implementation.backend))


def select(op: str, *arguments: Any) -> Callable[..., Any]:
    """The function that serves `op` for these arguments, under the override where there is one."""
    forced = _forced[-1] if _forced else None
    for implementation in _implementations[op]:
        if implementation.backend != forced and (forced is not None or implementation.on_request):
            continue
        if implementation.unavailable is None and implementation.supports(*arguments):
            for record in _served:
                record.add((op, implementation.backend))
            return implementation.function
    raise ValueError(f"No {forced} implementation serves this call of {op}: leave backend({forced!r}) around it.")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Let only the implementations of one backend serve: "reference", "cpu", "triton" or "cuda".

    Holds for all threads of the process until the block ends. It is read when an op runs, so it also governs a
    compiled function, without recompilation. A call that the backend does not serve raises ValueError.
    """
    if name not in PREFERENCE:
        raise ValueError(f"There is no backend {name!r}: choose one of {', '.join(PREFERENCE)}.")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


@contextmanager
def served() -> Iterator[set[tuple[str, str]]]:
    """Collects (op, backend) of the calls made in the block, by any thread."""
    record: set[tuple[str, str]] = set()
    _served.append(record)
    try:
        yield record
    finally:
        _served.pop()


def active() -> dict[str, tuple[str, str]]:
    """For each op, the backend that this machine prefers, and why no faster one is in its place ("" if none exists)."""
    report = {}
    for op, implementations in sorted(_implementations.items()):
        passed_over = [f"{i.backend}: {i.unavailable}" for i in implementations if i.unavailable is not None]
        first = next(i for i in implementations if i.unavailable is None and not i.on_request)
        report[op] = (first.backend, "; ".join(passed_over))
    return report
