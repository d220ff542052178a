"""Packed weights that wait in memory, and are on the device two blocks at a time: the one in hand and the next.

A block that is computed with checkpoints runs twice in a step: forward, and again for its backward pass, which reads
the weights of that second run. So when the block before it runs for the second time, its own place is free. On a GPU
the next block comes on a stream of its own while the one in hand computes: the one after it on the way up, the one
before it on the way down.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from perp.adapters import merge
from perp.linear import SparseLinear

_COMPONENTS = ("values", "index", "row_ptr")
# Bytes to a multiple of which each tensor begins, as where it is allocated on its own.
_ALIGNED = 256

# A block's packed weights: the layer, the component's name, and the parameter in memory.
_Held = list[tuple[SparseLinear, str, nn.Parameter]]


class Offload:
    """The packed weights of a model's blocks, in memory (pinned for a GPU), and the two places on its device."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], device: torch.device | str) -> None:
        """Move `model` to the device, all but the packed weights of these blocks."""
        self._blocks, self._device = blocks, torch.device(device)
        gpu = self._device.type == "cuda"
        self._held = [_components(block) for block in blocks]
        for held in self._held:
            for layer, name, _ in held:
                layer._parameters[name] = None
        model.to(self._device)
        for held in self._held:
            for layer, name, parameter in held:
                parameter.data = parameter.data.pin_memory() if gpu else parameter.data
                layer._parameters[name] = parameter
        most = max(sum(map(_room, held)) for held in self._held)
        self._slots = [torch.empty(most, dtype=torch.uint8, device=self._device) for _ in range(2)]
        # Which block is in each, and which of them was used last.
        self._holds: list[int | None] = [None, None]
        self._current = 0
        # The block in hand, and the one that was so last.
        self._inside: int | None = None
        self._last = 0
        self._stream = torch.cuda.Stream(self._device) if gpu else None

    @contextmanager
    def running(self) -> Iterator[None]:
        """For the duration, every run of a block has its packed weights on the device."""
        handles = [
            # Of the layers: a block that runs again runs its forward alone, without hooks of its own.
            layer.register_forward_pre_hook(lambda _, args, index=index: self._enter(index))
            for index, held in enumerate(self._held)
            for layer in {layer for layer, _, _ in held}
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._leave()

    @torch.no_grad()
    def merge(self) -> None:
        """Merge the blocks' adapters on the device, a block at a time, into the weights in memory."""
        for index, block in enumerate(self._blocks):
            self._put(index)
            merged = [layer._parameters[name] for layer, name, _ in self._held[index]]
            merge(block)
            self._leave()
            for (_, _, parameter), found in zip(self._held[index], merged, strict=True):
                assert found is not None
                parameter.copy_(found)
        self._holds = [None, None]

    def _enter(self, index: int) -> None:
        if index == self._inside:
            return
        up = index > self._last or index == 0
        self._last = index
        self._leave()
        self._put(index)
        following = index + 1 if up else index - 1
        if 0 <= following < len(self._blocks) and following not in self._holds:
            self._bring(following, 1 - self._current)

    def _leave(self) -> None:
        """The layers of the block in hand have their weights in memory again."""
        for layer, name, parameter in self._held[self._inside] if self._inside is not None else ():
            layer._parameters[name] = parameter
        self._inside = None

    def _put(self, index: int) -> None:
        """Have the block's layers compute on its place, to which it is brought now unless it is there."""
        if index not in self._holds:
            self._bring(index, 1 - self._current)
        self._current = self._holds.index(index)
        self._inside = index
        if self._stream:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        for (layer, name, _), there in zip(self._held[index], self._places(index, self._current), strict=True):
            layer._parameters[name] = nn.Parameter(there, requires_grad=False)

    def _bring(self, index: int, slot: int) -> None:
        """Copy the block to the place, behind all that has been asked of the device up to now and may read it."""
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for (_, _, parameter), there in zip(self._held[index], self._places(index, slot), strict=True):
                there.copy_(parameter.data, non_blocking=True)
        self._holds[slot] = index

    def _places(self, index: int, slot: int) -> Iterator[Tensor]:
        begin = 0
        for held in self._held[index]:
            parameter = held[2].data
            there = self._slots[slot][begin : begin + parameter.nbytes]
            yield there.view(parameter.dtype).view(parameter.shape)
            begin += _room(held)


def _components(block: nn.Module) -> _Held:
    layers = [module for module in block.modules() if isinstance(module, SparseLinear)]
    found: list[tuple[SparseLinear, str, Any]] = [
        (layer, name, layer._parameters[name]) for layer in layers for name in _COMPONENTS
    ]
    return [(layer, name, parameter) for layer, name, parameter in found if parameter is not None]


def _room(held: tuple[SparseLinear, str, nn.Parameter]) -> int:
    return math.ceil(held[2].nbytes / _ALIGNED) * _ALIGNED
