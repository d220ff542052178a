"""SparseGPT on one layer: which weights go, and what the rest becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import perp_kernels as pk
from bench import peers
from bench.inputs import generator, normal
from bench.registry import Case, Op, Target, Work
from perp_kernels.ops.sparsegpt import inverse, reversed_factor, sparsegpt_block_

LOOP = "column loop"
TOKENS_PER_INPUT = 4
"""Calibration tokens per input of the layer: enough for a Gram of full rank."""


@dataclass(frozen=True)
class Arguments:
    weight: Tensor
    H: Tensor


def make(N: int, K: int, seed: int) -> Arguments:
    random = generator(seed)
    # Inputs with directions of unlike size, as hidden states have; a Gram near the identity leaves nothing to solve.
    x = normal((TOKENS_PER_INPUT * K, K), torch.float32, random) @ normal((K, K), torch.float32, random) / K**0.5
    return Arguments(normal((N, K), torch.float32, random) / K**0.5, x.T @ x)


def check(arguments: Arguments, pattern: pk.Pattern) -> None:
    """The mask has the pattern, zeros are zeros, and the layer's squared error is within 1 % of the loop's in float64.

    Equal masks are too much to ask: a rounding that tips one near tie changes all columns after it.
    """
    new, mask = pk.sparsegpt(arguments.weight, arguments.H, pattern)
    true, true_mask = peers.sparsegpt(arguments.weight.double(), arguments.H.double(), pattern)
    counts = [kept.sum().item() for kept in (mask, true_mask)]
    if counts[0] != counts[1] or new[~mask].any():
        raise AssertionError(
            f"the mask keeps {counts[0]} weights where {counts[1]} are due, or a pruned one is not zero"
        )
    error, due = (squared_error(arguments, result) for result in (new, true))
    if not error <= 1.01 * due:
        raise AssertionError(f"the layer's squared error is {error:.6g}, the loop's {due:.6g}")


def squared_error(arguments: Arguments, new: Tensor) -> float:
    change = arguments.weight.double() - new.double()
    return ((change @ arguments.H.double()) * change).sum().item()


@dataclass(frozen=True)
class Blocks:
    """The column loop alone, the factor given: 128 columns of the weight [N, 128] at a time, and the factor's block."""

    weights: list[Tensor]
    factors: list[Tensor]


@dataclass(frozen=True)
class Pruned:
    weights: Tensor
    errors: Tensor
    kept: Tensor


def make_blocks(N: int, K: int, seed: int) -> Blocks:
    parts = [make(N, peers.SLAB, seed * K + column) for column in range(0, K, peers.SLAB)]
    return Blocks(
        [part.weight for part in parts],
        [inverse(reversed_factor(part.H, torch.float32, 0.01).flip(0, 1)) for part in parts],
    )


def prune_blocks(blocks: Blocks, pattern: pk.Pattern) -> list[Pruned]:
    results = []
    for weight, factor in zip(blocks.weights, blocks.factors, strict=True):
        kept = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
        result = Pruned(weight.clone(), torch.empty_like(weight), kept)
        sparsegpt_block_(result.weights, factor, str(pattern), result.errors, result.kept)
        results.append(result)
    return results


def prune_blocks_in_torch(blocks: Blocks, pattern: pk.Pattern) -> list[Pruned]:
    results = []
    for weight, factor in zip(blocks.weights, blocks.factors, strict=True):
        new = weight.clone()
        results.append(Pruned(new, *peers.sparsegpt_block(new, factor, pattern)))
    return results


def check_blocks(blocks: Blocks, pattern: pk.Pattern) -> None:
    """As `check`: the squared error of the layer is that of the columns."""
    wide = Blocks([W.double() for W in blocks.weights], [U.double() for U in blocks.factors])
    for mine, true in zip(prune_blocks(blocks, pattern), prune_blocks_in_torch(wide, pattern), strict=True):
        if mine.kept.sum() != true.kept.sum() or mine.weights[~mine.kept].any() or mine.errors[mine.kept].any():
            raise AssertionError("a mask keeps more or fewer weights than due, or a pruned one is not zero")
        error, due = (result.errors.double().square().sum().item() for result in (mine, true))
        if not error <= 1.01 * due:
            raise AssertionError(f"a block's squared error is {error:.6g}, the loop's {due:.6g}")


def block_case(N: int, K: int, text: str, quick: bool = False, share: float = 1 / 10) -> Case:
    """`share` of the loop's time is what ours may take at most."""
    pattern = pk.Pattern.parse(text)
    return Case(
        op="sparsegpt_block_",
        shape=f"N={N} K={K} pattern={text}",
        dtype=torch.float32,
        make=lambda seed: make_blocks(N, K, seed),
        ours=lambda blocks: prune_blocks(blocks, pattern),
        peers={LOOP: lambda blocks: prune_blocks_in_torch(blocks, pattern)},
        # Weights are read and written, errors and masks written; each column is subtracted from those after it.
        work=Work(bytes=N * K * (3 * 4 + 1), flops=N * K * (peers.SLAB - 1)),
        check=lambda blocks: check_blocks(blocks, pattern),
        targets=() if quick else (Target(LOOP, share),),
        quick=quick,
    )


def case(N: int, K: int, text: str, targets: tuple[Target, ...] = (), quick: bool = False) -> Case:
    pattern = pk.Pattern.parse(text)
    return Case(
        op="sparsegpt",
        shape=f"N={N} K={K} pattern={text}",
        dtype=torch.float32,
        make=lambda seed: make(N, K, seed),
        ours=lambda arguments: pk.sparsegpt(arguments.weight, arguments.H, pattern),
        peers={LOOP: lambda arguments: peers.sparsegpt(arguments.weight, arguments.H, pattern)},
        # One Cholesky factorisation; each column is subtracted from those after it.
        work=Work(bytes=2 * N * K * 4 + N * K + K * K * 4, flops=K**3 // 3 + N * K * K),
        check=lambda arguments: check(arguments, pattern),
        targets=targets,
        quick=quick,
    )


# The linears of a decoder block of a model of 7B parameters, N x K.
BLOCK_7B = (*(4 * ((4096, 4096),)), *(2 * ((11008, 4096),)), (4096, 11008))
BLOCKS_7B = 32
MODEL_MS = 12_000.0
"""What all linears of such a model may take."""


def whole_block_case(shapes: Sequence[tuple[int, int]], text: str, name: str, most: float | None = None) -> Case:
    """The solves of every linear of a decoder block."""
    pattern = pk.Pattern.parse(text)
    parts = [case(N, K, text) for N, K in shapes]

    def check_each(linears: Sequence[Arguments]) -> None:
        for linear in linears:
            check(linear, pattern)

    return Case(
        op="sparsegpt",
        shape=f"layers={name} pattern={text}",
        dtype=torch.float32,
        make=lambda seed: [part.make(len(parts) * seed + index) for index, part in enumerate(parts)],
        ours=lambda linears: [pk.sparsegpt(linear.weight, linear.H, pattern) for linear in linears],
        peers={LOOP: lambda linears: [peers.sparsegpt(linear.weight, linear.H, pattern) for linear in linears]},
        work=Work(bytes=sum(p.work.bytes for p in parts), flops=sum(p.work.flops for p in parts)),
        check=check_each,
        most=most,
    )


GPU_SHAPES = ((4096, 4096), (4096, 11008))
GPU_CASES = [
    case(96, 128, "2:4", quick=True),
    *(case(N, K, text, (Target(LOOP, 1 / (15 if N == K else 6)),)) for N, K in GPU_SHAPES for text in ("0.5", "2:4")),
    *(whole_block_case(BLOCK_7B, text, "7B-block", MODEL_MS / BLOCKS_7B) for text in ("0.5", "2:4")),
]
GPU_BLOCK_CASES = [
    block_case(96, 256, "2:4", quick=True),
    *(block_case(N, K, text, share=1 / 20) for N, K in GPU_SHAPES for text in ("0.5", "2:4")),
]
GPU_TESTS = ("test_pruning.py",)
TESTS = ("test_sparsegpt.py", "test_native_sparsegpt.py")
OPS = [
    Op(
        "sparsegpt",
        [
            case(576, 576, "0.5", quick=True),
            *(case(N, K, text) for N, K in ((576, 1536), (2048, 2048)) for text in ("0.5", "2:4")),
            *(case(4096, 4096, text, (Target(LOOP, 1 / 3),)) for text in ("0.5", "2:4")),
        ],
        tests=TESTS,
        gpu_cases=GPU_CASES,
        gpu_tests=GPU_TESTS,
    ),
    Op(
        "sparsegpt_block_",
        [block_case(576, 256, "0.5", quick=True), *(block_case(4096, 4096, text) for text in ("0.5", "2:4"))],
        tests=TESTS,
        gpu_cases=GPU_BLOCK_CASES,
        gpu_tests=GPU_TESTS,
    ),
]
