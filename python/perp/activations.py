"""Where the hidden states of the windows wait for their turn: on the device, in memory, or in a file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, MutableSequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PLACES = ("device", "memory", "disk")


class InMemory(list[Tensor]):
    """Hidden states in CPU memory, pinned when they come from a GPU."""

    def append(self, state: Tensor) -> None:
        super().append(to_memory(state))

    def __setitem__(self, index: Any, state: Any) -> None:
        super().__setitem__(index, state if isinstance(index, slice) else to_memory(state))


class InFile(MutableSequence[Tensor]):
    """Hidden states of one shape in a mapped file, of which the system keeps in memory what there is room for.

    The file has no name, so that nothing is left of it however the process ends. `states[:] = others` takes over the
    file of the others instead of copying it.
    """

    def __init__(self, directory: Path, count: int) -> None:
        """For up to `count` states, in a file on the disk of `directory`."""
        self._directory, self._count = directory, count
        self._all: Tensor | None = None
        self._filled = 0

    def __len__(self) -> int:
        return self._filled

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._filled:
            raise IndexError(index)
        assert self._all is not None
        return self._all[index]

    def __setitem__(self, index: Any, state: Any) -> None:
        if isinstance(index, slice):
            self._all, self._filled = state._all, state._filled
        else:
            self[index].copy_(state)

    def insert(self, index: int, state: Tensor) -> None:
        """At the end only."""
        if index != self._filled or index >= self._count:
            raise IndexError(index)
        if self._all is None:
            self._all = _mapped(self._directory, (self._count, *state.shape), state.dtype)
        self._all[index].copy_(state)
        self._filled += 1

    def __delitem__(self, index: Any) -> None:
        raise TypeError("hidden states are overwritten, never removed")


@dataclass(frozen=True)
class Place:
    """One of `PLACES` for the hidden states of `count` windows; calling it gives an empty sequence of them."""

    kind: str = "memory"
    count: int = 0
    directory: Path = Path()

    def __call__(self) -> MutableSequence[Tensor]:
        if self.kind == "disk":
            return InFile(self.directory, self.count)
        return InMemory() if self.kind == "memory" else []


def fill(states: MutableSequence[Tensor], given: Iterable[Tensor]) -> MutableSequence[Tensor]:
    """`states` with those given appended."""
    for state in given:
        states.append(state)
    return states


def to_memory(state: Tensor) -> Tensor:
    """`state` in CPU memory, pinned when it comes from a GPU."""
    if state.device.type == "cpu":
        return state
    stored = torch.empty(state.shape, dtype=state.dtype, pin_memory=True)
    return stored.copy_(state)


def _mapped(directory: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor over a new file; OSError where the disk has no room for it."""
    numel = torch.Size(shape).numel()
    descriptor, name = tempfile.mkstemp(dir=directory)
    try:
        # Reserved now: a full disk met while writing through the mapping would kill the process.
        os.posix_fallocate(descriptor, 0, max(1, numel * dtype.itemsize))
        return torch.from_file(name, shared=True, size=numel, dtype=dtype).view(shape)
    finally:
        os.close(descriptor)
        Path(name).unlink()
