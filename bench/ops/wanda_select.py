"""Choosing which weights to prune from the weight and the norms of its inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import perp_kernels as pk
from bench import peers
from bench.inputs import check_equal, generator, normal
from bench.registry import Case, Op, Work

SORT = "scores, stable sort"


@dataclass(frozen=True)
class Arguments:
    weight: Tensor
    norms: Tensor


def make(N: int, K: int, dtype: torch.dtype, seed: int) -> Arguments:
    random = generator(seed)
    return Arguments(normal((N, K), dtype, random), normal((K,), torch.float32, random).abs())


def sorted_scores(arguments: Arguments, pattern: pk.Pattern) -> Tensor:
    return peers.select(arguments.weight.float().abs() * arguments.norms, pattern)


def case(N: int, K: int, text: str, dtype: torch.dtype = torch.float32, quick: bool = False) -> Case:
    pattern = pk.Pattern.parse(text)

    def ours(arguments: Arguments) -> Tensor:
        return pk.wanda_select(arguments.weight, arguments.norms, pattern)

    return Case(
        op="wanda_select",
        shape=f"N={N} K={K} pattern={text}",
        dtype=dtype,
        make=lambda seed: make(N, K, dtype, seed),
        ours=ours,
        peers={SORT: lambda arguments: sorted_scores(arguments, pattern)},
        work=Work(bytes=N * K * (dtype.itemsize + 1)),
        check=lambda arguments: check_equal("the mask", ours(arguments), sorted_scores(arguments, pattern)),
        quick=quick,
    )


OPS = [
    Op(
        "wanda_select",
        [
            case(576, 1536, "0.5/row", quick=True),
            *(
                case(4096, 4096, text, dtype)
                for dtype in (torch.float32, torch.bfloat16)
                for text in ("0.5/row", "2:4")
            ),
        ],
        tests=("test_wanda_select.py",),
        gpu_cases=[
            case(96, 256, "2:4", quick=True),
            *(case(4096, 14336, text, torch.bfloat16) for text in ("0.5/row", "2:4")),
        ],
        gpu_tests=("test_refining.py",),
    )
]
