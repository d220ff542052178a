"""Packing a pruned weight and unpacking it again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import perp_kernels as pk
from bench import peers
from bench.inputs import PrunedWeight, check_equal, generator, normal, pruned_weight
from bench.registry import Case, Op, Work

BOOLEAN = "boolean indexing"
PATTERNS = {"bitmap": "0.5", "semi24": "2:4"}


@dataclass(frozen=True)
class Arguments:
    """A weight with nothing zeroed yet, what it becomes, and the peer's own packed form of it."""

    full: Tensor
    pruned: PrunedWeight
    values: Tensor
    bits: Tensor


def check_pack(arguments: Arguments, layout: str) -> None:
    packed = pk.pack(arguments.full, arguments.pruned.mask, layout=layout)
    check_equal("the mask", packed.mask(), arguments.pruned.mask)
    check_equal("the weight", packed.unpack(), arguments.full * arguments.pruned.mask)


def check_unpack(arguments: Arguments) -> None:
    check_equal("the weight", arguments.pruned.packed.unpack(), arguments.pruned.dense)


def cases(N: int, K: int, dtype: torch.dtype, layout: str, quick: bool = False) -> tuple[Case, Case]:
    def make(seed: int) -> Arguments:
        random = generator(seed)
        pruned = pruned_weight(N, K, PATTERNS[layout], layout, dtype, random)
        return Arguments(normal((N, K), dtype, random), pruned, *peers.boolean_pack(pruned.dense, pruned.mask))

    shape = f"N={N} K={K} pattern={PATTERNS[layout]} layout={layout}"
    dense, packed, boolean = N * K * dtype.itemsize, N * K * dtype.itemsize // 2 + N * K // 8, N * K
    pack = Case(
        op="pack",
        shape=shape,
        dtype=dtype,
        make=make,
        ours=lambda arguments: pk.pack(arguments.full, arguments.pruned.mask, layout=layout).components(),
        peers={BOOLEAN: lambda arguments: peers.boolean_pack(arguments.full, arguments.pruned.mask)},
        work=Work(bytes=dense + boolean + packed),
        check=lambda arguments: check_pack(arguments, layout),
        quick=quick,
    )
    unpack = Case(
        op="unpack",
        shape=shape,
        dtype=dtype,
        make=make,
        ours=lambda arguments: arguments.pruned.packed.unpack(),
        peers={BOOLEAN: lambda arguments: peers.boolean_unpack(arguments.values, arguments.bits)},
        work=Work(bytes=packed + dense),
        check=check_unpack,
        quick=quick,
    )
    return pack, unpack


BOTH = [
    cases(576, 1536, torch.float32, "bitmap", quick=True),
    *(cases(4096, 4096, dtype, layout) for dtype in (torch.float32, torch.bfloat16) for layout in ("bitmap", "semi24")),
    cases(11008, 4096, torch.bfloat16, "bitmap"),
]
ON_GPU = [
    cases(96, 256, torch.bfloat16, "bitmap", quick=True),
    *(cases(N, K, torch.bfloat16, "bitmap") for N, K in ((4096, 4096), (4096, 11008), (8192, 28672))),
    cases(4096, 11008, torch.bfloat16, "semi24"),
]
OPS = [
    Op("pack", [pack for pack, _ in BOTH], tests=("test_layouts.py", "test_native_pack.py")),
    Op(
        "unpack",
        [unpack for _, unpack in BOTH],
        tests=("test_layouts.py", "test_native_pack.py"),
        gpu_cases=[unpack for _, unpack in ON_GPU],
        gpu_tests=("test_linear.py", "test_launched.py"),
    ),
]
