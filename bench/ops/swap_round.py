"""One round of SparseSwaps over one layer: each row trades its best pair of a kept and a pruned weight.

On a GPU the kernel forms all N K^2 pairs of a layer, those of two kept or two pruned weights too: two multiplications
and a minimum each. Over the layers of LLaMA-3.1-8B (per block N x K: 2 of 4096 x 4096, 2 of 1024 x 4096, 2 of 14336 x
4096, 1 of 4096 x 14336) that is 4.8e13 pairs and 1.4e14 instructions: 4.9 s of an H100 at best (132 processors, 128
lanes, 1.76 GHz), beside which half a byte a pair from L2 takes some 4 s. Its time: not measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import perp_kernels as pk
from bench import peers
from bench.inputs import generator, normal
from bench.registry import Case, Op, Target, Work

PAIRS = "pairs in torch"


@dataclass(frozen=True)
class Arguments:
    weight: Tensor
    mask: Tensor
    correlation: Tensor
    H: Tensor


def make(N: int, K: int, pattern: pk.Pattern, seed: int) -> Arguments:
    """The state before the first round, from Wanda's mask."""
    random = generator(seed)
    x = normal((2 * K, K), torch.float32, random) @ normal((K, K), torch.float32, random) / K**0.5
    weight, H = normal((N, K), torch.float32, random) / K**0.5, x.T @ x
    mask = pk.select(weight.abs() * H.diagonal().sqrt(), pattern)
    return Arguments(weight, mask, weight.masked_fill(mask, 0) @ H, H)


def ours(arguments: Arguments, pattern: pk.Pattern) -> Arguments:
    """A round on copies, which cost little beside it, so that every repetition finds the same state."""
    mask, correlation = arguments.mask.clone(), arguments.correlation.clone()
    pk.swap_round_(arguments.weight, mask, correlation, arguments.H, pattern)
    return Arguments(arguments.weight, mask, correlation, arguments.H)


def in_torch(arguments: Arguments, pattern: pk.Pattern) -> Arguments:
    mask, correlation = arguments.mask.clone(), arguments.correlation.clone()
    peers.swap_round(arguments.weight, mask, correlation, arguments.H, pattern.m)
    return Arguments(arguments.weight, mask, correlation, arguments.H)


def check(arguments: Arguments, pattern: pk.Pattern) -> None:
    """Each row's exact loss falls by as much as under the best pair in float64, to float32's rounding of the scores."""
    wide = Arguments(arguments.weight.double(), arguments.mask, arguments.correlation.double(), arguments.H.double())
    before, mine, due = (
        losses(wide, mask) for mask in (arguments.mask, ours(arguments, pattern).mask, in_torch(wide, pattern).mask)
    )
    if not (mine <= due + 1e-5 * before).all():
        raise AssertionError(f"a row's loss is {(mine - due).max().item():.3g} above the one its best pair leaves")


def losses(arguments: Arguments, mask: Tensor) -> Tensor:
    residual = arguments.weight.masked_fill(mask, 0)
    return ((residual @ arguments.H) * residual).sum(1)


def case(N: int, K: int, text: str, quick: bool = False) -> Case:
    pattern = pk.Pattern.parse(text)
    pairs = K * pattern.m if pattern.m else K * K
    share = float(pattern.sparsity * (1 - pattern.sparsity))
    return Case(
        op="swap_round_",
        shape=f"N={N} K={K} pattern={text}",
        dtype=torch.float32,
        make=lambda seed: make(N, K, pattern, seed),
        ours=lambda arguments: ours(arguments, pattern),
        peers={PAIRS: lambda arguments: in_torch(arguments, pattern)},
        # The weight, correlation and mask are read; a pair of one kept and one pruned weight takes four operations.
        work=Work(bytes=N * K * (4 + 4 + 1) + K * K * 4, flops=int(4 * share * N * pairs)),
        check=lambda arguments: check(arguments, pattern),
        targets=() if quick else (Target(PAIRS, 1 / 4),),
        quick=quick,
    )


# Of the 10 s asked for a round over all layers of LLaMA-3.1-8B, a layer's share by its pairs, N K^2, in milliseconds.
_PAIRS = 32 * (2 * 4096 * 4096**2 + 2 * 1024 * 4096**2 + 2 * 14336 * 4096**2 + 4096 * 14336**2)


def gpu_case(N: int, K: int) -> Case:
    pattern, first = pk.Pattern.parse("0.6"), slice(0, 64)

    def check_rows(arguments: Arguments) -> None:
        """Rows know nothing of each other: the first are looked at, since all their pairs in float64 take minutes."""
        weight, mask, correlation = arguments.weight[first], arguments.mask[first], arguments.correlation[first]
        check(Arguments(weight, mask, correlation, arguments.H), pattern)

    return replace(case(N, K, "0.6"), check=check_rows, targets=(), most=10_000 * N * K**2 / _PAIRS)


OPS = [
    Op(
        "swap_round_",
        [
            case(96, 192, "0.6", quick=True),
            *(case(N, K, text) for N, K in ((576, 576), (576, 1536)) for text in ("0.6", "2:4")),
        ],
        tests=("test_swap_round.py",),
        gpu_cases=[
            case(96, 192, "2:4", quick=True),
            *(gpu_case(N, K) for N, K in ((1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336))),
        ],
        gpu_tests=("test_refining.py",),
    )
]
