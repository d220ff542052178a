"""SparseGPT on one layer: which weights go, and what the rest becomes."""

from __future__ import annotations

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
        result = Pruned(weight.clone(), torch.empty_like(weight), torch.empty(weight.shape, dtype=torch.bool))
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


def block_case(N: int, K: int, text: str, quick: bool = False) -> Case:
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
        targets=() if quick else (Target(LOOP, 1 / 10),),
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
    ),
    Op(
        "sparsegpt_block_",
        [block_case(576, 256, "0.5", quick=True), *(block_case(4096, 4096, text) for text in ("0.5", "2:4"))],
        tests=TESTS,
    ),
]
