"""SparseGPT on one layer: which weights go, and what the rest becomes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import perp_kernels as pk
from bench import peers
from bench.inputs import generator, normal
from bench.registry import Case, Op, Work

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


def case(N: int, K: int, text: str, quick: bool = False) -> Case:
    pattern = pk.Pattern.parse(text)
    return Case(
        op="sparsegpt",
        shape=f"N={N} K={K} pattern={text}",
        dtype=torch.float32,
        make=lambda seed: make(N, K, seed),
        ours=lambda arguments: pk.sparsegpt(arguments.weight, arguments.H, pattern),
        peers={LOOP: lambda arguments: peers.sparsegpt(arguments.weight, arguments.H, pattern)},
        # One Cholesky and one triangular inverse give the factor; each column is subtracted from those after it.
        work=Work(bytes=2 * N * K * 4 + N * K + K * K * 4, flops=2 * K**3 // 3 + N * K * K),
        check=lambda arguments: check(arguments, pattern),
        quick=quick,
    )


OPS = [
    Op(
        "sparsegpt",
        [
            case(576, 576, "0.5", quick=True),
            *(case(N, K, text) for N, K in ((576, 1536), (2048, 2048)) for text in ("0.5", "2:4")),
        ],
        tests=("test_sparsegpt.py",),
    )
]
