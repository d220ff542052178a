"""tiled24: the order of a semi24 weight that sparse tensor cores read as it lies in memory.

A weight [N, K], K % 64 == 0, is cut into tiles of 64 rows by 64 inputs, row blocks outermost, rows padded to whole
tiles. A tile's values and its index are each one record; `csrc/cuda/tiled24.h` says why they are ordered as they are:

    values, 16 bits [P, K/2]      64 rows of 32 kept values; the chunk c of eight values of row r is where chunk
                                  c ^ (r >> 1 & 3) would be (the 64-byte swizzle of the PTX manual)
    index, uint8 [P, K/8]         a word for each of 4 x 32 lanes: lane 4 g + t of strip w holds the canonical nibbles
                                  of inputs 16 t .. 16 t + 15, in its low half those of row 16 w + g, in its high half
                                  those of row 16 w + g + 8

with P = N rounded up to 64. Rows past N hold zeros, kept at positions 0 and 1. Both tensors take the bytes that the
canonical form takes, and either is computed from the other exactly.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

TILED24 = "tiled24"
TILE = 64
DTYPES = (torch.bfloat16, torch.float16)

# The nibble of positions 0 and 1, twice.
_PADDING = 0x44


def padded_rows(N: int) -> int:
    return -(-N // TILE) * TILE


@functools.cache
def _swizzled(device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows [64, 1] and chunks [64, 4] whose chunk comes to lie at each place; the map is its own inverse."""
    rows = torch.arange(TILE, device=device)[:, None]
    return rows, torch.arange(4, device=device) ^ (rows >> 1 & 3)


def tile_values(values: Tensor) -> Tensor:
    """Canonical semi24 values [N, K/2] -> tiled [P, K/2]."""
    N, half = values.shape
    P = padded_rows(N)
    padded = torch.nn.functional.pad(values, (0, 0, 0, P - N))
    tiles = padded.view(P // TILE, TILE, half // 32, 4, 8).transpose(1, 2)
    rows, chunks = _swizzled(values.device)
    return tiles[:, :, rows, chunks].reshape(P, half)


def untile_values(values: Tensor, N: int) -> Tensor:
    """The inverse of `tile_values` for a weight of N rows."""
    P, half = values.shape
    rows, chunks = _swizzled(values.device)
    tiles = values.view(P // TILE, half // 32, TILE, 4, 8)[:, :, rows, chunks]
    return tiles.transpose(1, 2).reshape(P, half)[:N]


def tile_index(index: Tensor) -> Tensor:
    """Canonical semi24 index [N, K/8] -> tiled [P, K/8]."""
    N, width = index.shape
    P = padded_rows(N)
    padded = torch.nn.functional.pad(index, (0, 0, 0, P - N), value=_PADDING)
    # row block, strip, half, g | tile of inputs, t -> row block, tile, strip, g, t, half
    halves = padded.view(torch.int16).view(P // TILE, 4, 2, 8, width // 8, 4)
    return halves.permute(0, 4, 1, 3, 5, 2).reshape(P, width // 2).view(torch.uint8)


def untile_index(index: Tensor, N: int) -> Tensor:
    """The inverse of `tile_index` for a weight of N rows."""
    P, width = index.shape
    halves = index.view(torch.int16).view(P // TILE, width // 8, 4, 8, 4, 2)
    return halves.permute(0, 2, 5, 3, 1, 4).reshape(P, width // 2).view(torch.uint8)[:N]


def check_tileable(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    """Raise ValueError or TypeError unless a weight can be brought into the order tiled24."""
    if layout != "semi24":
        raise ValueError(f"Only a weight of layout semi24 has the order {TILED24}, not one of layout {layout}.")
    if len(shape) != 2 or shape[1] % TILE:
        raise ValueError(f"The order {TILED24} needs a weight [N, K] with K a multiple of {TILE}, not {list(shape)}.")
    if dtype not in DTYPES:
        raise TypeError(f"The order {TILED24} holds bfloat16 or float16 values, not {dtype}.")
