"""Random inputs and the check that every case shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import perp_kernels as pk
from bench import device

DISTINCT_ROWS = 64
"""Row masks drawn per weight and dealt at random: ranking a whole weight would take longer than measuring it."""


@dataclass(frozen=True)
class PrunedWeight:
    """A pruned weight in every form a contestant may want: dense [N, K] with zeros, its mask, packed."""

    dense: Tensor
    mask: Tensor
    packed: pk.SparseWeight


def generator(seed: int) -> torch.Generator:
    """Random numbers of the device that is measured."""
    return torch.Generator(device.current()).manual_seed(seed)


def normal(shape: Sequence[int], dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """Standard normal values: data of one sign or of zeros would run at other clocks than real data."""
    return torch.randn(*shape, generator=random, device=random.device).to(dtype)


def mask(N: int, K: int, pattern: pk.Pattern, random: torch.Generator) -> Tensor:
    """Bool [N, K] with as many kept in each row (share) or in each group of M (N:M)."""
    group = pattern.m or K
    order = torch.rand(DISTINCT_ROWS, K // group, group, generator=random, device=random.device).argsort(-1)
    rows = (order >= pattern.pruned(group)).flatten(1)
    return rows[torch.randint(DISTINCT_ROWS, (N,), generator=random, device=random.device)]


def pruned_weight(
    N: int, K: int, pattern: str, layout: str, dtype: torch.dtype, random: torch.Generator
) -> PrunedWeight:
    """A random weight scaled so that outputs are of the size of inputs, under a random mask."""
    kept = mask(N, K, pk.Pattern.parse(pattern), random)
    dense = (normal((N, K), torch.float32, random) * kept / K**0.5).to(dtype)
    return PrunedWeight(dense, kept, pk.pack(dense, kept, layout=layout))


def check_close(names: Sequence[str], ours: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """Asserts that no largest error of `ours` exceeds four times that of `plain`, plain torch at the same dtype.

    Four: two correct orders of summation differ by about that much at worst. The floor of one rounding covers results
    that plain torch happens to get exactly.
    """
    for name, mine, usual, true in zip(names, ours, plain, exact, strict=True):
        error = (mine.double() - true).abs().max().item()
        rounding = torch.finfo(usual.dtype).eps * true.abs().max().item()
        bound = 4 * max((usual.double() - true).abs().max().item(), rounding)
        if not error <= bound:
            raise AssertionError(f"{name} is off by {error:.3g}, the bound is {bound:.3g}")


def check_equal(name: str, ours: Tensor, exact: Tensor) -> None:
    """Asserts that two tensors are the same in dtype, shape and every value."""
    if ours.dtype != exact.dtype or not torch.equal(ours, exact):
        raise AssertionError(f"{name} differs from the definition's")
