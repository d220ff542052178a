"""Merging an adapter into the packed weight: W += s M ⊙ (B A), in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import perp_kernels as pk
from bench import peers
from bench.inputs import PrunedWeight, check_close, generator, normal, pruned_weight
from bench.registry import Case, Op, Work

RANK, SCALE = 16, 2.0
PATTERN = "0.5"
DENSE = "dense merge"


@dataclass(frozen=True)
class Arguments:
    weight: PrunedWeight
    A: Tensor
    B: Tensor


def ours(arguments: Arguments) -> Tensor:
    return arguments.weight.packed.add_lowrank_(arguments.A, arguments.B, SCALE).values


def dense(arguments: Arguments) -> Tensor:
    return peers.merged(arguments.weight.dense, arguments.weight.mask, arguments.A, arguments.B, SCALE)


def check(arguments: Arguments) -> None:
    weight, A, B = arguments.weight, arguments.A, arguments.B
    exact = weight.dense.double() + SCALE * weight.mask * (B.double() @ A.double())
    plain = peers.merged(weight.dense.clone(), weight.mask, A, B, SCALE)
    packed = pk.pack(weight.dense, weight.mask, layout=weight.packed.layout)
    check_close(["the merged weight"], [packed.add_lowrank_(A, B, SCALE).unpack()], [plain], [exact])


def case(N: int, K: int, dtype: torch.dtype, quick: bool = False) -> Case:
    def make(seed: int) -> Arguments:
        random = generator(seed)
        weight = pruned_weight(N, K, PATTERN, "bitmap", dtype, random)
        # Small, since every call adds the same again.
        A, B = (normal(shape, dtype, random) / K for shape in ((RANK, K), (N, RANK)))
        return Arguments(weight, A, B)

    return Case(
        op="add_lowrank_",
        shape=f"N={N} K={K} r={RANK} pattern={PATTERN} layout=bitmap",
        dtype=dtype,
        make=make,
        ours=ours,
        peers={DENSE: dense},
        work=Work(bytes=N * K * dtype.itemsize + N * K // 8, flops=N * K * RANK),
        check=check,
        quick=quick,
    )


OPS = [
    Op(
        "add_lowrank_",
        [case(576, 1536, torch.float32, quick=True)],
        tests=("test_merge.py",),
        gpu_cases=[
            case(96, 256, torch.bfloat16, quick=True),
            *(case(N, K, torch.bfloat16) for N, K in ((4096, 4096), (4096, 11008), (8192, 28672))),
        ],
        gpu_tests=("test_adapted.py",),
    )
]
