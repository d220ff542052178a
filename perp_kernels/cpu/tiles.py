"""Tiles of a packed weight formed by the native kernels, for torch's products."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from perp_kernels.cpu import native
from perp_kernels.ops import _walk
from perp_kernels.ops._adapted import Effect, widened
from perp_kernels.ops._walk import Tile

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# A tile is an eighth of the weight, within these bounds: with smaller ones torch's product spends too much of its time
# on packing the tokens again for each, larger ones leave the last-level cache (measured on Zen 4 at 4096 x 4096).
_LEAST_BYTES = 2 << 20
_MOST_BYTES = 8 << 20

# Tiles of whole columns are at least this wide; of a taller weight the backward pass takes tiles of whole rows too.
_LEAST_COLUMNS = 64
_ROWS = 8


# A tile's memory outlives the call. Taken anew by every layer it leaves holes in the heap that the layer's outputs then
# fall into, and the process grows by a tile per layer (measured: 130 MB over 8 layers of 4096 x 4096, with 8 MB tiles).
_kept = threading.local()


def _kept_memory(size: int) -> Tensor:
    """uint8 [size], the same each time for a thread."""
    if getattr(_kept, "size", -1) < size:
        release_memory()  # before more is taken
        with torch.inference_mode(False):  # memory first used under inference mode has to serve outside it too
            _kept.memory, _kept.size = torch.empty(size, dtype=torch.uint8), size
    kept: Tensor = _kept.memory
    return kept[:size]


def release_memory() -> None:
    """Give up the memory that this thread keeps between calls, at most a few MB."""
    _kept.memory, _kept.size = None, -1


def supported(values: Tensor, index: Tensor) -> bool:
    """Whether the native kernels read these components of a packed weight."""
    on_cpu = values.device.type == index.device.type == "cpu"
    return on_cpu and values.dtype in DTYPES and values.is_contiguous() and index.is_contiguous()


class Tiles:
    """A packed weight [N, K] or [E, N, K] in tiles of either kind, all in one block of memory."""

    def __init__(self, values: Tensor, index: Tensor, row_ptr: Tensor | None, layout: str, shape: list[int]) -> None:
        N, K = shape[-2:]
        self._handle = native.weight(values, index, row_ptr, K, layout)
        self._values, self._N = values, N
        budget = min(max(N * K * values.itemsize // 8, _LEAST_BYTES), _MOST_BYTES) // values.itemsize
        self.row_tiles = _walk.row_tiles(_cut(N, budget // K, _ROWS), K)
        if budget >= _LEAST_COLUMNS * N:
            self.sum_tiles = [Tile(slice(0, N), slice(*c)) for c in _cut(K, budget // max(N, 1), _LEAST_COLUMNS)]
        else:
            self.sum_tiles = self.row_tiles

    def at(self, expert: int, tile: Tile) -> tuple[int, int]:
        """The tile's first row and column among all rows of the weight."""
        return expert * self._N + tile.rows.start, tile.columns.start

    def buffer(self, tile: Tile) -> Tensor:
        """[rows, columns] to hold the tile: undefined, and the same memory for every tile of this thread."""
        rows, columns = tile.rows.stop - tile.rows.start, tile.columns.stop - tile.columns.start
        return _kept_memory(rows * columns * self._values.itemsize).view(self._values.dtype).view(rows, columns)

    def store(self, expert: int, tile: Tile, W: Tensor, values: Tensor | None = None) -> None:
        """Overwrite the values, or others of their form, by W where kept; the tile holds whole rows."""
        out = native.view("values", self._values if values is None else values)
        native.extension().store_rows(self._handle, self.at(expert, tile)[0], native.view("in", W), out)


class AdaptedTiles(Tiles):
    """The effective weight of an adapter in tiles."""

    def __init__(
        self,
        effect: Effect,
        values: Tensor,
        index: Tensor,
        row_ptr: Tensor | None,
        layout: str,
        shape: list[int],
        A: Tensor,
        B: Tensor,
    ) -> None:
        super().__init__(values, index, row_ptr, layout, shape)
        self._effect = effect
        self._A, self._B = (factor.contiguous() for factor in widened(A, B, shape, values.dtype))

    def form(self, expert: int, tile: Tile) -> Tensor:
        out = self.buffer(tile)
        self._call(native.extension().form_tile, expert, tile, native.view("out", out))
        return out

    def fold(self, expert: int, tile: Tile, dy: Tensor, x: Tensor, dA: Tensor | None, dB: Tensor | None) -> None:
        G = torch.mm(dy.t(), x, out=self.buffer(tile))
        sums = (None if d is None else native.view(name, d) for name, d in (("dA", dA), ("dB", dB)))
        self._call(native.extension().fold_tile, expert, tile, native.view("G", G), *sums)

    def _call(self, kernel: Callable[..., None], expert: int, tile: Tile, *views: object) -> None:
        A = native.view("A", self._A[expert, :, tile.columns])
        B = native.view("B", self._B[expert, tile.rows])
        kernel(self._handle, *self.at(expert, tile), self._effect.name, self._effect.scale, A, B, *views)


class DecodedTiles(Tiles):
    """The packed weight itself in tiles."""

    def __init__(self, values: Tensor, index: Tensor, row_ptr: Tensor | None, layout: str, shape: list[int]) -> None:
        super().__init__(values, index, row_ptr, layout, shape)
        self._decoded = layout == "dense"
        if self._decoded:
            self.sum_tiles = _walk.row_tiles([(0, self._N)], shape[-1])

    def form(self, expert: int, tile: Tile) -> Tensor:
        if self._decoded:
            first, _ = self.at(expert, tile)
            return self._values[first : first + tile.rows.stop - tile.rows.start]
        out = self.buffer(tile)
        native.extension().unpack_tile(self._handle, *self.at(expert, tile), native.view("out", out))
        return out

    def fold(self, expert: int, tile: Tile, dy: Tensor, x: Tensor, dvalues: Tensor) -> None:
        self.store(expert, tile, torch.mm(dy.t(), x, out=self.buffer(tile)), dvalues)


def _cut(count: int, most: int, unit: int) -> list[tuple[int, int]]:
    """Bounds that cut `count` into runs of about equal length, each but the last a multiple of `unit` and all at most
    `most` long, or `unit` where that is more."""
    parts = max(1, -(-count // max(most // unit * unit, unit)))
    length = -(-count // (parts * unit)) * unit
    return [(start, min(start + length, count)) for start in range(0, count, length)] if count else []
