"""2:4 weights on a GPU's sparse tensor cores: products from one token to thousands, and packing under a fixed mask.

The cases are for one H100 in bf16; docs/sparse-tensor-cores.md derives what can be expected of them. cuSPARSELt is a
peer through torch, with its algorithm searched for each shape beforehand. Our kernels serve inside `backend("cuda")`,
so that no other implementation can be timed in their name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import perp_kernels as pk
from bench.inputs import PrunedWeight, check_close, check_equal, generator, normal, pruned_weight
from bench.registry import Case, Op, Target, Work

DENSE = "torch dense"
CUSPARSELT = "cuSPARSELt"
COPY = "copy of the bytes"

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (14336, 14336))
FEW = (1, 8, 16, 32, 64)
MANY = (512, 1024, 2048, 4096, 8192, 16384)
LARGE = 80 << 20
"""Bytes of a dense weight from which reading it outweighs everything else about a product of a few tokens."""


@dataclass(frozen=True)
class Arguments:
    """x [T, K]; the weight dense, canonical and in the order tiled24; for cuSPARSELt its own form, tokens padded to the
    multiple of eight that it takes, and its best algorithm for them (None without a GPU)."""

    x: Tensor
    weight: PrunedWeight
    prepared: pk.SparseWeight
    peer: tuple[Tensor, Tensor, int] | None


def _peer(dense: Tensor, x: Tensor) -> tuple[Tensor, Tensor, int] | None:
    if not x.is_cuda or not torch.backends.cusparselt.is_available():
        return None
    compressed = torch._cslt_compress(dense)
    tokens = F.pad(x, (0, 0, 0, -len(x) % 8)).t()
    return compressed, tokens, torch._cslt_sparse_mm_search(compressed, tokens, transpose_result=True)


def make(T: int, N: int, K: int, seed: int) -> Arguments:
    random = generator(seed)
    weight = pruned_weight(N, K, "2:4", "semi24", torch.bfloat16, random)
    x = normal((T, K), torch.bfloat16, random)
    return Arguments(x, weight, weight.packed.prepare(), _peer(weight.dense, x))


def _ours_by(x: Tensor) -> str:
    return "cuda" if x.is_cuda else "reference"


@torch.no_grad()
def ours(arguments: Arguments) -> Tensor:
    with pk.backend(_ours_by(arguments.x)):
        return pk.sparse_linear(arguments.x, arguments.prepared)


@torch.no_grad()
def dense(arguments: Arguments) -> Tensor:
    return F.linear(arguments.x, arguments.weight.dense)


@torch.no_grad()
def cusparselt(arguments: Arguments) -> Tensor:
    assert arguments.peer is not None
    compressed, tokens, algorithm = arguments.peer
    return torch._cslt_sparse_mm(compressed, tokens, transpose_result=True, alg_id=algorithm)


def check(arguments: Arguments) -> None:
    exact = arguments.x.double() @ arguments.weight.dense.double().T
    check_close(["the output"], [ours(arguments)], [dense(arguments)], [exact])


def targets(T: int, N: int, K: int) -> tuple[Target, ...]:
    """Few tokens: 1.3 times dense, 1.5 where the dense weight is large, and faster than cuSPARSELt. Many: 1.1 times
    dense from 4,096 on, and 0.95 times cuSPARSELt at each, which is more than the geometric mean that is asked for."""
    if T in FEW:
        return Target(DENSE, 1 / (1.5 if 2 * N * K >= LARGE else 1.3)), Target(CUSPARSELT, 1.0)
    to_dense = (Target(DENSE, 1 / 1.10),) if T >= 4096 else ()
    return *to_dense, Target(CUSPARSELT, 1 / 0.95)


def case(T: int, N: int, K: int, quick: bool = False) -> Case:
    return Case(
        op="tiled24_linear",
        shape=f"T={T} N={N} K={K} pattern=2:4",
        dtype=torch.bfloat16,
        make=lambda seed: make(T, N, K, seed),
        ours=ours,
        peers={DENSE: dense} if quick else {DENSE: dense, CUSPARSELT: cusparselt},
        work=Work(bytes=2 * (N * K // 2 + T * (N + K)) + N * K // 8, flops=T * N * K),
        check=check,
        targets=() if quick else targets(T, N, K),
        quick=quick,
    )


@dataclass(frozen=True)
class Packing:
    """A dense weight, a prepared one with its mask, and the bytes a pass over both moves, to be copied."""

    dense: Tensor
    prepared: pk.SparseWeight
    source: Tensor
    target: Tensor


def assign(arguments: Packing) -> Tensor:
    with pk.backend(_ours_by(arguments.dense)):
        return arguments.prepared.assign_(arguments.dense).values


def copy(arguments: Packing) -> Tensor:
    return arguments.target.copy_(arguments.source)


def check_assigned(arguments: Packing) -> None:
    assign(arguments)
    check_equal("the weight", arguments.prepared.unpack(), arguments.dense)


def assign_case(N: int, K: int, quick: bool = False) -> Case:
    moved = 2 * N * K + N * K // 8 + N * K  # the dense weight and the index read, the values written

    def make(seed: int) -> Packing:
        random = generator(seed)
        weight = pruned_weight(N, K, "2:4", "semi24", torch.bfloat16, random)
        source = normal((moved // 4,), torch.bfloat16, random)  # a copy moves each byte twice
        return Packing(weight.dense, weight.packed.prepare(), source, torch.zeros_like(source))

    return Case(
        op="tiled24_assign_",
        shape=f"N={N} K={K} pattern=2:4",
        dtype=torch.bfloat16,
        make=make,
        ours=assign,
        peers={COPY: copy},
        work=Work(bytes=moved),
        check=check_assigned,
        targets=() if quick else (Target(COPY, 1.5),),
        quick=quick,
    )


CASES = [
    case(8, 128, 256, quick=True),
    assign_case(128, 256, quick=True),
    *(case(T, N, K) for N, K in SHAPES for T in (*FEW, *MANY)),
    assign_case(4096, 4096),
]

# On a CPU, where every call restores the canonical form first, nothing of this is measured.
OPS = [
    Op(
        name,
        gpu_cases=[case for case in CASES if case.op == name],
        gpu_tests=("../../cuda/launched/test_semi24.py",),
    )
    for name in ("tiled24_linear", "tiled24_assign_")
]
