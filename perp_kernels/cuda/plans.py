"""Which kernels a call launches, on which grid: arithmetic only, so that it runs and is tested without a GPU.

The shapes here are those of csrc/cuda/sm80_entries.cuh and sm90_entries.cuh. How many parts, and which of two shapes,
is chosen by the arithmetic given beside it; nothing here is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from perp_kernels.ops._tiled24 import TILE, padded_rows

Argument = Tensor | None | np.number
BIAS_NONE, BIAS_SAME, BIAS_FLOAT = 0, 1, 2

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
# Shared memory begins where a 1,024-byte swizzle pattern does; its start is aligned inside the kernel.
SHARED_ALIGNMENT = 1024
_TILE_BYTES = TILE * TILE // 2 * 2
_TILE_INDEX_BYTES = TILE * TILE // 8
_TOKEN_BYTES = TILE * 2


@dataclass(frozen=True)
class Gpu:
    """A GPU as the plans see it."""

    arch: int  # 10 * major + minor of the compute capability
    processors: int  # streaming multiprocessors


@dataclass(frozen=True)
class Launch:
    """A kernel of a source file, and its grid; grid[0] counts whole clusters. None is a null pointer."""

    source: str
    kernel: str
    grid: tuple[int, int]
    threads: int
    arguments: Sequence[Argument]
    shared: int = 0
    cluster: int = 1


@dataclass(frozen=True)
class Shape80:
    """sm80_semi24_gemm.cuh: a block's outputs and tokens, its threads, its stages, the blocks a processor holds."""

    suffix: str
    rows: int
    tokens: int
    threads: int
    stages: int
    blocks: int

    @property
    def shared(self) -> int:
        stage = self.rows // TILE * (_TILE_BYTES + _TILE_INDEX_BYTES) + self.tokens * _TOKEN_BYTES
        return self.stages * -(-stage // 1024) * 1024 + SHARED_ALIGNMENT

    def grid(self, N: int, tokens: int) -> int:
        """Blocks, over all outputs and tokens."""
        return -(-N // self.rows) * -(-tokens // self.tokens)


SHAPES_80 = (Shape80("t16", 64, 16, 128, 5, 4), Shape80("t64", 64, 64, 128, 4, 3), Shape80("t128", 128, 128, 256, 3, 2))


@dataclass(frozen=True)
class Shape90:
    """sm90_semi24_gemm.cuh: a block's tokens, tiles a warp group, stages; a cluster's parts of the inputs, or those of
    its blocks that share a weight."""

    suffix: str
    tokens: int
    tiles: int
    stages: int
    parts: int
    sharers: int = 1

    @property
    def rows(self) -> int:
        return 2 * self.tiles * TILE

    @property
    def cluster(self) -> int:
        return self.parts * self.sharers

    def grid(self, N: int, tokens: int) -> int:
        """Blocks, a whole number of clusters."""
        return self.cluster * -(-N // self.rows) * -(-tokens // (self.sharers * self.tokens))

    @property
    def shared(self) -> int:
        stage = 2 * self.tiles * (_TILE_BYTES + _TILE_INDEX_BYTES) + self.tokens * _TOKEN_BYTES
        return self.stages * (stage + 16) + SHARED_ALIGNMENT


SHAPES_90 = {
    suffix: Shape90(suffix, *numbers)
    for suffix, *numbers in (
        ("t16_p2", 16, 1, 8, 2),
        ("t16_p4", 16, 1, 8, 4),
        ("t64_p2", 64, 1, 6, 2),
        ("t64_p4", 64, 1, 6, 4),
        ("t128_p4", 128, 1, 6, 4),
        ("t128_p1", 128, 1, 6, 1),
        ("t128_wide", 128, 2, 6, 1),
        ("t128_pair", 128, 2, 6, 1, 2),
    )
}
_THREADS_90 = 384


def choose_90(N: int, tokens: int, gpu: Gpu) -> Shape90:
    """The shape for y [tokens, N] on Hopper.

    Few tokens: four parts while the blocks then fit the GPU at once, two on a processor; else two. More: the least
    number of rounds times what a block costs, where 1 is 128 x 128 over all inputs. The wide block counts twice and
    reads less for it, for which the others pay 15 %; a pair reads less still. A part of four costs a quarter, and a
    tenth for adding the sums.
    """
    if tokens <= 64:
        width = "t16" if tokens <= 16 else "t64"
        four = SHAPES_90[f"{width}_p4"]
        return four if four.grid(N, tokens) <= 2 * gpu.processors else SHAPES_90[f"{width}_p2"]

    def cost(shape: Shape90, block: float) -> float:
        return -(-shape.grid(N, tokens) // gpu.processors) * block

    costs = {"t128_pair": 1.9, "t128_wide": 2.0, "t128_p1": 1.15, "t128_p4": 0.39}
    return SHAPES_90[min(costs, key=lambda suffix: cost(SHAPES_90[suffix], costs[suffix]))]


def choose_80(N: int, K: int, tokens: int, gpu: Gpu) -> tuple[Shape80, int]:
    """The shape for y [tokens, N] elsewhere, and in how many parts the inputs are summed: as many as fill the GPU once,
    since a part writes and reads a float for every output; at least two tiles each, so that its copies overlap."""
    shape = SHAPES_80[0 if tokens <= 16 else 1 if tokens <= 64 else 2]
    room = gpu.processors * shape.blocks // max(shape.grid(N, tokens), 1)
    return shape, max(1, min(8, room, K // TILE // 2))


def bias_arguments(bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, np.int32]:
    """The bias of an output of `dtype` and its kind, as product.cuh takes them."""
    kind = BIAS_NONE if bias is None else BIAS_SAME if bias.dtype == dtype else BIAS_FLOAT
    return bias, np.int32(kind)


def linear(
    x: Tensor, values: Tensor, index: Tensor, shape: Sequence[int], bias: Tensor | None, y: Tensor, gpu: Gpu
) -> list[Launch]:
    """y [T, N] = x W^T + bias. x [T, K] has 16-byte aligned rows; a bias has the dtype of y or float32."""
    (N, K), tokens, type_name = shape, len(x), TYPES[x.dtype]
    if 0 in (N, tokens):
        return []
    numbers = (np.int32(tokens), np.int32(N), np.int32(K))
    arguments = (values, index, x, np.int64(x.stride(0)), y, *bias_arguments(bias, y.dtype), *numbers)
    if gpu.arch == 90:
        on_90 = choose_90(N, tokens, gpu)
        source = f"sm90_{type_name}_semi24_gemm"
        grid = (on_90.grid(N, tokens), 1)
        return [Launch(source, f"{source}_{on_90.suffix}", grid, _THREADS_90, arguments, on_90.shared, on_90.cluster)]
    chosen, parts = choose_80(N, K, tokens, gpu)
    source = f"sm80_{type_name}_semi24_gemm"
    sums = None if parts == 1 else torch.empty((parts, tokens, N), dtype=torch.float32, device=x.device)
    grid = (chosen.grid(N, tokens), parts)
    product = Launch(
        source, f"{source}_{chosen.suffix}", grid, chosen.threads, (*arguments, sums, np.int32(parts)), chosen.shared
    )
    if parts == 1:
        return [product]
    assert sums is not None
    return [product, adding_parts(source, y, bias, sums)]


def adding_parts(source: str, y: Tensor, bias: Tensor | None, sums: Tensor) -> Launch:
    """y [T, N] = sums [parts, T, N] in their order, and the bias; a kernel of each source that sums in parts."""
    parts, tokens, N = sums.shape
    arguments = (y, *bias_arguments(bias, y.dtype), np.int32(tokens), np.int32(N), sums, np.int32(parts))
    return Launch(source, f"{source}_sum", (-(-tokens * N // 256), 1), 256, arguments)


def _per_tile(kernel: str, shape: Sequence[int], arguments: Sequence[Argument]) -> list[Launch]:
    N, K = shape
    tiles = padded_rows(N) // TILE * (K // TILE)
    sizes = (np.int32(N), np.int32(K))
    return [Launch("semi24_pack", kernel, (tiles, 1), 128, (*arguments, *sizes))] if tiles else []


def compress(values: Tensor, index: Tensor, weight: Tensor, bits: Tensor) -> list[Launch]:
    """values and index of a dense weight [N, K] with 16-byte aligned rows under mask bits, two of each four set."""
    arguments = (values, index, weight, np.int64(weight.stride(0)), bits)
    return _per_tile("semi24_compress", weight.shape, arguments)


def repack(values: Tensor, index: Tensor, weight: Tensor) -> list[Launch]:
    """values of a dense weight [N, K] with 16-byte aligned rows under the index that is there."""
    return _per_tile("semi24_repack", weight.shape, (values, index, weight, np.int64(weight.stride(0))))


def add_lowrank(
    values: Tensor, index: Tensor, shape: Sequence[int], A: Tensor, B: Tensor, scale: float, to: Tensor
) -> list[Launch]:
    """The values of W + scale M (B A) into `to`, which may be `values`; A [r, K], B [N, r] are float32, contiguous."""
    arguments = (values, index, A, B, np.int32(len(A)), np.float32(scale), to)
    return _per_tile(f"semi24_add_lowrank_{TYPES[values.dtype]}", shape, arguments)
