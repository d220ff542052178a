"""Packed weights that wait in memory and are on the device a block at a time, with the next one on its way.

A block that is computed with checkpoints runs twice in a step: forward, and again for its backward pass. Each time its
packed weights are brought for it; what the backward pass reads, the graph of the second run keeps until it is used. So
two blocks are there at most: the one in hand and the one that comes next, the one after it on the way up and the one
before it on the way down.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from perp.adapters import merge
from perp.linear import SparseLinear

_COMPONENTS = ("values", "index", "row_ptr")

# A block's packed weights: the layer, the component's name, and the parameter.
_Held = list[tuple[SparseLinear, str, nn.Parameter]]
_Copies = list[nn.Parameter]


class Offload:
    """`most`: the most blocks whose packed weights were on the device at once, told by tests."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], device: torch.device | str) -> None:
        """Move `model` to the device, but the packed weights of its blocks, which stay in memory (pinned for a GPU)."""
        self._blocks, self._device = blocks, torch.device(device)
        self._held = [_components(block) for block in blocks]
        gpu = self._device.type == "cuda"
        for held in self._held:
            for layer, name, _ in held:
                layer._parameters[name] = None
        model.to(self._device)
        for held in self._held:
            for layer, name, parameter in held:
                parameter.data = parameter.data.pin_memory() if gpu else parameter.data
                layer._parameters[name] = parameter
        self._stream = torch.cuda.Stream(self._device) if gpu else None
        self._next: tuple[int, _Copies] | None = None
        self._last = 0
        self._alive: list[tuple[int, weakref.ref[Tensor]]] = []
        self.most = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """For the duration, every run of a block has its packed weights on the device."""
        handles = []
        for index, block in enumerate(self._blocks):
            handles += [
                block.register_forward_pre_hook(lambda _, args, index=index: self._enter(index)),
                # Always: a second run ends early, by an exception, once it has made what the backward pass needs.
                block.register_forward_hook(lambda _, args, output, index=index: self._leave(index), always_call=True),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for index in range(len(self._blocks)):
                self._leave(index)
            self._next = None

    @torch.no_grad()
    def merge(self) -> None:
        """Merge the blocks' adapters on the device, a block at a time, into the weights in memory."""
        for index, block in enumerate(self._blocks):
            copies = self._brought(index)
            self._put(index, copies)
            merge(block)
            self._leave(index)
            for (_, _, parameter), copied in zip(self._held[index], copies, strict=True):
                parameter.copy_(copied)

    def _enter(self, index: int) -> None:
        up = index > self._last or index == 0
        self._last = index
        self._put(index, self._brought(index))
        following = index + 1 if up else index - 1
        if 0 <= following < len(self._blocks):
            self._next = following, self._copied(following)

    def _leave(self, index: int) -> None:
        for layer, name, parameter in self._held[index]:
            layer._parameters[name] = parameter

    def _put(self, index: int, copies: _Copies) -> None:
        for (layer, name, _), copied in zip(self._held[index], copies, strict=True):
            layer._parameters[name] = copied

    def _brought(self, index: int) -> _Copies:
        """The block's packed weights on the device: the copies begun before, else made now."""
        (number, copies), self._next = self._next or (-1, []), None
        if number != index:
            del copies
            copies = self._copied(index)
        if self._stream:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for copied in copies:
                # Allocated for one stream and freed after use on another, which the allocator has to be told.
                copied.data.record_stream(current)
        return copies

    def _copied(self, index: int) -> _Copies:
        copies = []
        with torch.cuda.stream(self._stream):
            for _, _, parameter in self._held[index]:
                there = parameter.data.to(self._device, non_blocking=True, copy=True)
                copies.append(nn.Parameter(there, requires_grad=False))
        self._alive = [(number, one) for number, one in self._alive if one() is not None]
        self._alive += [(index, weakref.ref(copied)) for copied in copies]
        self.most = max(self.most, len({number for number, _ in self._alive}))
        return copies


def _components(block: nn.Module) -> _Held:
    layers = [module for module in block.modules() if isinstance(module, SparseLinear)]
    found: list[tuple[SparseLinear, str, Any]] = [
        (layer, name, layer._parameters[name]) for layer in layers for name in _COMPONENTS
    ]
    return [(layer, name, parameter) for layer, name, parameter in found if parameter is not None]
