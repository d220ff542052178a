"""The forward pass of a pruned linear layer, from one token (decode) to thousands (prefill)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import perp_kernels as pk
from bench.inputs import PrunedWeight, check_close, generator, normal, pruned_weight
from bench.registry import LIMIT, Case, Op, Target, Work
from perp_kernels import cpu

DENSE = "torch dense"
OWN_DENSE = "own dense"
TRITON = "our Triton kernel"
DTYPES = (torch.float32, torch.bfloat16)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
SOME_TOKENS = (1, 4, 8, 64, 512)
PATTERNS = {"bitmap": "0.5", "semi24": "2:4"}

# Torch's product of one token in bf16 runs at a third of the memory's bandwidth here: our own dense product is the
# stricter peer. It reads 1.78 times the bytes of the packed weight, in fp32 1.88 times.
FEW_TOKENS = {
    (1, torch.bfloat16): (Target(DENSE, 1 / 2.5), Target(OWN_DENSE, 1 / 1.4), Target(LIMIT, 1 / 0.75)),
    (1, torch.float32): (Target(DENSE, 1 / 1.5),),
    (4, torch.bfloat16): (Target(DENSE, 1 / 1.5),),
    (8, torch.bfloat16): (Target(DENSE, 1 / 1.5),),
}


def targets(T: int, dtype: torch.dtype) -> tuple[Target, ...]:
    """Never slower than torch on the dense weight by more than 10 % at 32 to 256 tokens and 5 % elsewhere."""
    return FEW_TOKENS.get((T, dtype), (Target(DENSE, 1.10 if 32 <= T <= 256 else 1.05),))


@dataclass(frozen=True)
class Arguments:
    """x [T, K], the pruned weight, and its dense form for our own kernel (with an index of its own: handles are kept by
    index)."""

    x: Tensor
    weight: PrunedWeight
    own: pk.SparseWeight


@torch.no_grad()
def ours(arguments: Arguments) -> Tensor:
    return pk.sparse_linear(arguments.x, arguments.weight.packed)


@torch.no_grad()
def dense(arguments: Arguments) -> Tensor:
    return F.linear(arguments.x, arguments.weight.dense)


@torch.no_grad()
def own_dense(arguments: Arguments) -> Tensor:
    """The same kernel on the dense weight, which the dispatch leaves to torch."""
    w = arguments.own
    return cpu.sparse_linear.sparse_linear(arguments.x, w.values, w.index, None, w.layout, [*w.shape], None, None)


@torch.no_grad()
def by_triton(arguments: Arguments) -> Tensor:
    """What serves few tokens on a GPU without CuPy."""
    with pk.backend("triton"):
        return ours(arguments)


def check(arguments: Arguments) -> None:
    exact = arguments.x.double() @ arguments.weight.dense.double().T
    check_close(["the output"], [ours(arguments)], [dense(arguments)], [exact])


def case(T: int, N: int, K: int, dtype: torch.dtype, layout: str, quick: bool = False) -> Case:
    def make(seed: int) -> Arguments:
        random = generator(seed)
        weight = pruned_weight(N, K, PATTERNS[layout], layout, dtype, random)
        own = pk.SparseWeight(weight.dense, pk.pack_bits(weight.mask), None, (N, K), "dense")
        return Arguments(normal((T, K), dtype, random), weight, own)

    return Case(
        op="sparse_linear",
        shape=f"T={T} N={N} K={K} pattern={PATTERNS[layout]} layout={layout}",
        dtype=dtype,
        make=make,
        ours=ours,
        peers={DENSE: dense} | ({OWN_DENSE: own_dense} if T == 1 and cpu.available else {}),
        work=Work(bytes=(N * K // 2 + T * (N + K)) * dtype.itemsize + N * K // 8, flops=T * N * K),
        check=check,
        targets=() if quick or not cpu.available else targets(T, dtype),
        quick=quick,
    )


# Where the dense weight is much larger than a GPU's cache, its bytes are what a few tokens wait for.
LARGE_BYTES = 80 << 20


def gpu_case(T: int, N: int, K: int, layout: str = "bitmap", quick: bool = False) -> Case:
    general = case(T, N, K, torch.bfloat16, layout, quick)
    if T <= 16:
        ratio = 1.3 if 2 * N * K >= LARGE_BYTES else 1.0
    else:
        ratio = 0.92 if T >= 4096 else 0.84
    with_triton = {TRITON: by_triton} if T <= 16 and layout == "bitmap" and torch.cuda.is_available() else {}
    return replace(general, peers={DENSE: dense} | with_triton, targets=() if quick else (Target(DENSE, 1 / ratio),))


GPU_SHAPES = ((4096, 4096), (11008, 4096), (8192, 28672))
GPU_CASES = [
    gpu_case(8, 96, 256, quick=True),
    *(gpu_case(T, N, K) for N, K in GPU_SHAPES for T in (1, 2, 4, 8, 16, 2048, 4096)),
    *(gpu_case(T, 4096, 4096, "semi24") for T in (1, 16, 4096)),
]

ROUNDS = 8
TOGETHER = "the same calls, torch's first"


@dataclass(frozen=True)
class Mixed:
    """A product for the packed kernel and an element-wise job for torch, each large enough for all threads."""

    linear: Arguments
    other: Tensor


@torch.no_grad()
def alternating(arguments: Mixed) -> Tensor:
    for _ in range(ROUNDS):
        torch.neg(arguments.other)
        y = ours(arguments.linear)
    return y


@torch.no_grad()
def grouped(arguments: Mixed) -> Tensor:
    for _ in range(ROUNDS):
        torch.neg(arguments.other)
    for _ in range(ROUNDS):
        y = ours(arguments.linear)
    return y


def pool_case(N: int, K: int) -> Case:
    """Two OpenMP runtimes in the process would spin on the same cores at every change from one to the other."""
    single = case(1, N, K, torch.bfloat16, "bitmap")

    def make(seed: int) -> Mixed:
        return Mixed(single.make(seed), normal((1 << 18,), torch.float32, generator(seed)))

    return Case(
        op="sparse_linear",
        shape=f"T=1 N={N} K={K} calls={ROUNDS} between=torch.neg",
        dtype=torch.bfloat16,
        make=make,
        ours=alternating,
        peers={TOGETHER: grouped},
        work=Work(bytes=ROUNDS * single.work.bytes, flops=ROUNDS * single.work.flops),
        check=lambda arguments: check(arguments.linear),
        targets=(Target(TOGETHER, 1.25),),
    )


OPS = [
    Op(
        "sparse_linear",
        [
            case(8, 576, 1536, torch.float32, "bitmap", quick=True),
            *(case(T, 4096, 4096, dtype, "bitmap") for dtype in DTYPES for T in TOKENS),
            *(case(T, 4096, 4096, dtype, "semi24") for dtype in DTYPES for T in SOME_TOKENS),
            *(case(T, 11008, 4096, dtype, "bitmap") for dtype in DTYPES for T in SOME_TOKENS),
            pool_case(4096, 4096),
        ],
        tests=("test_sparse_linear.py", "test_native_sparse_linear.py"),
        gpu_cases=GPU_CASES,
        gpu_tests=("test_linear.py", "test_registered.py", "test_launched.py", "../../cuda/launched/test_bitmap.py"),
    )
]
