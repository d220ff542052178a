"""Which kernel of csrc/cuda/bitmap_linear.cuh a call launches, on which grid: arithmetic only, as in `plans`.

The shapes are those of csrc/cuda/bitmap_entries.cuh. Nothing here is measured; docs/gpu.md has the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from perp_kernels.cuda.plans import TYPES, Gpu, Launch, adding_parts, bias_arguments

MAX_TOKENS = 16
THREADS = 256

# Shared memory of a processor (CUDA C++ Programming Guide, technical specifications): 228 KB of Hopper and of the
# data-centre Blackwells, 164 of an A100; of all others 100, where a block has 99.
_LARGE, _MEDIUM = (90, 100, 103), (80, 87)


@dataclass(frozen=True)
class Shape:
    """A block's tokens, its outputs, the inputs of a step, and the stages of shared memory."""

    tokens: int
    rows: int
    columns: int
    stages: int

    @property
    def suffix(self) -> str:
        return f"t{self.tokens}_r{self.rows}_s{self.stages}"

    @property
    def shared(self) -> int:
        row = 2 * self.columns + 16
        table = 8 * (self.columns // 32 + 1)
        return self.stages * (self.rows * (row + table) + self.tokens * row)


SHAPES = tuple(Shape(*size, stages) for size in ((8, 32, 256), (8, 16, 512), (16, 32, 256)) for stages in (3, 4))


def choose(N: int, K: int, tokens: int, gpu: Gpu) -> tuple[Shape, int]:
    """The shape for y [tokens, N], and in how many parts the inputs are summed.

    The most outputs with which the blocks still fill the GPU, to a tenth. Where those of the fewest outputs do not, as
    many parts as do, two steps each at least: a part costs a second launch, and counts all the bits before its first
    step again.
    """
    stages = 4 if gpu.arch in _LARGE else 3
    slots = gpu.processors * (2 if gpu.arch in (*_LARGE, *_MEDIUM) else 1)
    width = 8 if tokens <= 8 else 16
    shapes = [shape for shape in SHAPES if (shape.tokens, shape.stages) == (width, stages)]
    shape = next((shape for shape in shapes if -(-N // shape.rows) >= 0.9 * slots), shapes[-1])
    return shape, max(1, min(8, slots // -(-N // shape.rows), -(-K // shape.columns) // 2))


def linear(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor | None,
    K: int,
    bias: Tensor | None,
    y: Tensor,
    gpu: Gpu,
) -> list[Launch]:
    """y [T, N] = x W^T + bias, T at most `MAX_TOKENS`. x [T, K] has 16-byte aligned rows, zero up to a multiple of
    eight inputs; the values begin at a multiple of 16 bytes; a bias has the dtype of y or float32."""
    tokens, N = y.shape
    if 0 in (tokens, N):
        return []
    shape, parts = choose(N, K, tokens, gpu)
    source = f"sm80_{TYPES[x.dtype]}_bitmap_linear"
    sums = None if parts == 1 else torch.empty((parts, tokens, N), dtype=torch.float32, device=x.device)
    row_stride = 0 if row_ptr is not None else values.shape[1]
    weight = (values, index, row_ptr, np.int64(row_stride), np.int64(values.numel()))
    numbers = (np.int32(tokens), np.int32(N), np.int32(K))
    arguments = (*weight, x, np.int64(x.stride(0)), y, *bias_arguments(bias, y.dtype), *numbers, sums, np.int32(parts))
    grid = (-(-N // shape.rows), parts)
    product = Launch(source, f"{source}_{shape.suffix}", grid, THREADS, arguments, shape.shared)
    return [product] if sums is None else [product, adding_parts(source, y, bias, sums)]
