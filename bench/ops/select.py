"""Choosing which weights to prune from their scores."""

from __future__ import annotations

import torch

import perp_kernels as pk
from bench import peers
from bench.inputs import check_equal, generator, normal
from bench.registry import Case, Op, Work

SORT = "stable sort"


def case(N: int, K: int, text: str, quick: bool = False) -> Case:
    pattern = pk.Pattern.parse(text)
    return Case(
        op="select",
        shape=f"N={N} K={K} pattern={text}",
        dtype=torch.float32,
        make=lambda seed: normal((N, K), torch.float32, generator(seed)).abs(),
        ours=lambda scores: pk.select(scores, pattern),
        peers={SORT: lambda scores: peers.select(scores, pattern)},
        work=Work(bytes=N * K * (4 + 1)),
        check=lambda scores: check_equal("the mask", pk.select(scores, pattern), peers.select(scores, pattern)),
        quick=quick,
    )


PATTERNS = ("0.5/row", "0.5/matrix", "0.5/slab", "2:4")
OPS = [
    Op(
        "select",
        [case(576, 1536, "0.5/row", quick=True), *(case(4096, 4096, text) for text in PATTERNS)],
        tests=("test_select.py", "test_native_select.py"),
        gpu_cases=[
            case(96, 256, "2:4", quick=True),
            *(case(N, K, text) for N, K in ((4096, 4096), (14336, 4096), (4096, 14336)) for text in ("2:4", "0.5/row")),
        ],
        gpu_tests=("test_pruning.py",),
    )
]
