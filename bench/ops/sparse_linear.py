"""The forward pass of a pruned linear layer, from one token (decode) to thousands (prefill)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import perp_kernels as pk
from bench.inputs import PrunedWeight, check_close, generator, normal, pruned_weight
from bench.registry import Case, Op, Work

DENSE = "torch dense"
TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096)
PATTERNS = {"bitmap": "0.5", "semi24": "2:4"}


@dataclass(frozen=True)
class Arguments:
    x: Tensor
    weight: PrunedWeight


@torch.no_grad()
def ours(arguments: Arguments) -> Tensor:
    return pk.sparse_linear(arguments.x, arguments.weight.packed)


@torch.no_grad()
def dense(arguments: Arguments) -> Tensor:
    return F.linear(arguments.x, arguments.weight.dense)


def check(arguments: Arguments) -> None:
    exact = arguments.x.double() @ arguments.weight.dense.double().T
    check_close(["the output"], [ours(arguments)], [dense(arguments)], [exact])


def case(T: int, N: int, K: int, dtype: torch.dtype, layout: str, quick: bool = False) -> Case:
    def make(seed: int) -> Arguments:
        random = generator(seed)
        return Arguments(normal((T, K), dtype, random), pruned_weight(N, K, PATTERNS[layout], layout, dtype, random))

    return Case(
        op="sparse_linear",
        shape=f"T={T} N={N} K={K} pattern={PATTERNS[layout]} layout={layout}",
        dtype=dtype,
        make=make,
        ours=ours,
        peers={DENSE: dense},
        work=Work(bytes=(N * K // 2 + T * (N + K)) * dtype.itemsize + N * K // 8, flops=T * N * K),
        check=check,
        quick=quick,
    )


OPS = [
    Op(
        "sparse_linear",
        [
            case(8, 576, 1536, torch.float32, "bitmap", quick=True),
            *(
                case(T, N, 4096, dtype, layout)
                for N in (4096, 11008)
                for dtype in (torch.float32, torch.bfloat16)
                for layout in PATTERNS
                for T in TOKENS
            ),
        ],
        tests=("test_sparse_linear.py",),
    )
]
