"""The Gram of calibration inputs: H += xᵀ x, H fp32 [K, K], x [T, K]."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import perp_kernels as pk
from bench import device, peers
from bench.inputs import check_close, generator, normal
from bench.registry import Case, Op, Target, Work

PRODUCT = "full product"
BF16_PRODUCT = "bf16 product, fp32 out"


@dataclass(frozen=True)
class Arguments:
    H: Tensor
    x: Tensor


def ours(arguments: Arguments) -> Tensor:
    return pk.gram_(arguments.H, arguments.x)


def product(arguments: Arguments) -> Tensor:
    return peers.gram(arguments.H, arguments.x)


def check(arguments: Arguments) -> None:
    x = arguments.x.double()
    mine, plain = (run(Arguments(torch.zeros_like(arguments.H), arguments.x)) for run in (ours, product))
    check_close(["the Gram"], [mine], [plain], [x.T @ x])


def bf16_product(arguments: Arguments) -> Tensor:
    return peers.bf16_gram(arguments.H, arguments.x)


def case(T: int, K: int, dtype: torch.dtype, targets: tuple[Target, ...] = (), quick: bool = False) -> Case:
    return Case(
        op="gram_",
        shape=f"T={T} K={K}",
        dtype=dtype,
        make=lambda seed: Arguments(torch.zeros(K, K, device=device.current()), normal((T, K), dtype, generator(seed))),
        ours=ours,
        peers={PRODUCT: product},
        # H is symmetric: half of the 2 T K² of a full product.
        work=Work(bytes=T * K * dtype.itemsize + 2 * K * K * 4, flops=T * K * (K + 1)),
        check=check,
        targets=targets,
        quick=quick,
    )


def gpu_case(T: int, K: int, ratio: float | None = None) -> Case:
    """`ratio`: the least times that ours is faster than a 16-bit product of the full square."""
    targets = () if ratio is None else (Target(PRODUCT, 1 / 18), Target(BF16_PRODUCT, 1 / ratio))
    general = case(T, K, torch.bfloat16, targets, quick=ratio is None)
    return replace(general, peers={PRODUCT: product, BF16_PRODUCT: bf16_product})


GPU_CASES = [
    gpu_case(64, 48),
    gpu_case(16384, 4096, 1.4),
    gpu_case(16384, 8192, 1.6),
    gpu_case(16384, 14336, 1.6),
]
OPS = [
    Op(
        "gram_",
        [
            case(512, 576, torch.float32, quick=True),
            *(case(2048, K, dtype) for dtype in (torch.float32, torch.bfloat16) for K in (576, 1536)),
            case(2048, 4096, torch.float32, (Target(PRODUCT, 1 / 1.6),)),
            case(2048, 4096, torch.bfloat16),
        ],
        tests=("test_gram.py", "test_native_gram.py"),
        gpu_cases=GPU_CASES,
        gpu_tests=("test_gram.py", "test_launched.py"),
    )
]
