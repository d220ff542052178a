"""Shared by the tests of the native kernels: every code path by force, and definitions to test against."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import perp_kernels as pk
from perp_kernels import cpu

needs_native = pytest.mark.skipif(not cpu.available, reason=cpu.why)
# The fastest last.
PATHS = ("portable", "avx2", "avx512")
SERVERS = ("reference", *PATHS)


def force(path: str) -> Iterator[str]:
    """Body of a fixture: runs a test with one code path, and restores the automatic choice."""
    try:
        cpu.set_path(path)
    except ValueError as error:
        pytest.skip(str(error))
    yield path
    cpu.set_path("auto")


def serve(server: str) -> Iterator[str]:
    """Body of a fixture: runs a test on the reference, or on one code path of the native kernels."""
    if server == "reference":
        with pk.backend("reference"):
            yield server
        return
    if not cpu.available:
        pytest.skip(cpu.why)
    with pk.backend("cpu"):
        yield from force(server)


def bits_of(mask: Tensor) -> Tensor:
    """The packed bits of a bool mask [R, K], by their definition: bit j of byte i is column 8i + j."""
    rows, columns = mask.shape
    bits = torch.zeros(rows, (columns + 7) // 8, dtype=torch.uint8)
    for column in range(columns):
        bits[:, column // 8] |= mask[:, column].to(torch.uint8) << (column % 8)
    return bits


def random_mask(rows: int, columns: int, kept: float, seed: int = 0) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < kept


def nm_mask(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A random 2:4 mask."""
    order = torch.rand(rows, columns // 4, 4, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return (order < 2).reshape(rows, columns)


def random_weight(rows: int, columns: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Normal values with exact zeros of both signs among them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    weight[torch.rand(rows, columns, generator=generator) < 0.05] = 0.0
    weight[torch.rand(rows, columns, generator=generator) < 0.05] = -0.0
    return weight.to(dtype)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equality of bit patterns: tells -0.0 from 0.0, and one NaN from another."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    return torch.equal(left.contiguous().view(integer), right.contiguous().view(integer))
