"""What the PTX ISA manual says of the operands of the sparse products, in NumPy; no code of the kernels' is used here.

Sections: "Sparse matrix storage"; "Matrix Fragments for sparse mma.m16n8k32 with .f16 and .bf16 types" and "... for
sparse wgmma.mma_async.m64nNk32" (the two share one figure of the metadata); "Shared Memory Matrix Layout"; "Matrix
Descriptor Format". Memory is an array of bytes, an address an index into it; 16-bit elements are uint16 bit patterns.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Halves = NDArray[np.uint16]

PAIRS = {0b0100: (0, 1), 0b1000: (0, 2), 0b1100: (0, 3), 0b1001: (1, 2), 0b1101: (1, 3), 0b1110: (2, 3)}
"""The meaningful values of ordered metadata for four columns, and the positions they keep."""


def mma_a(lane: int, i: int) -> tuple[int, range]:
    """Kept element a_i, i = 0..7, of the 16 x 32 sparse A: its row, and the four columns it is one of."""
    group, thread = lane >> 2, lane % 4
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    first = thread * 4 if i < 4 else thread * 4 + 16
    return row, range(first, first + 4)


def mma_b(lane: int, i: int) -> tuple[int, int]:
    """Element b_i, i = 0..7, of the 32 x 8 B: row and column."""
    return 2 * (lane % 4) + i % 2 + 8 * (i // 2), lane >> 2


def mma_c(lane: int, i: int) -> tuple[int, int]:
    """Element c_i, i = 0..3, of the 16 x 8 C: row and column."""
    return (lane >> 2) + (8 if i >= 2 else 0), 2 * (lane % 4) + i % 2


def metadata(words: list[int], selector: int, row: int, first_column: int) -> int:
    """The nibble of columns first_column .. + 3 of a row of a 16 x 32 strip, from the words of a warp's 32 lanes: lanes
    4 g + 2 selector and the next hold columns 0-15 and 16-31, bits 0-15 for row g, bits 16-31 for row g + 8."""
    word = words[4 * (row % 8) + 2 * selector + first_column // 16]
    return (word >> (16 * (row // 8)) >> (first_column % 16)) & 0xF


def swizzled(address: int, width: int) -> int:
    """Swizzle<3,4,3>, <2,4,3>, <1,4,3> of an address for rows of 128, 64, 32 bytes."""
    chunks = width // 16
    return address ^ ((address >> 7 & (chunks - 1)) << 4)


def operand(memory: Bytes, descriptor: int, rows: int, elements: int) -> Halves:
    """[rows, elements]: a K-major operand by its descriptor; canonical layout ((8, m), (T, 2k)) : ((w T, SBO), (1, T))
    for rows of w chunks, swizzled."""
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    width = {1: 128, 2: 64, 3: 32}[descriptor >> 62]
    found = np.empty((rows, elements), dtype=np.uint16)
    for row in range(rows):
        for chunk in range(elements // 8):
            at = swizzled(start + row % 8 * width + row // 8 * stride + 16 * chunk, width)
            found[row, 8 * chunk : 8 * chunk + 8] = memory[at : at + 16].view(np.uint16)
    return found


def dense(kept: Halves, nibbles: NDArray[np.int64]) -> Halves:
    """[rows, 2 n] with zeros from kept elements [rows, n] and the nibble of each pair [rows, n / 2]."""
    rows, count = kept.shape
    out = np.zeros((rows, 2 * count), dtype=np.uint16)
    for row in range(rows):
        for four in range(count // 2):
            first, second = PAIRS[int(nibbles[row, four])]
            out[row, 4 * four + first], out[row, 4 * four + second] = kept[row, 2 * four : 2 * four + 2]
    return out


def wgmma_a(memory: Bytes, descriptor: int, words: NDArray[np.uint32], selector: int) -> Halves:
    """[64, 32]: the A of wgmma.mma_async.sp.m64nNk32; words [4, 32] are the metadata of the four warps' lanes."""
    kept = operand(memory, descriptor, 64, 16)
    nibbles = [
        [metadata([int(w) for w in words[row // 16]], selector, row % 16, 4 * four) for four in range(8)]
        for row in range(64)
    ]
    return dense(kept, np.array(nibbles))
