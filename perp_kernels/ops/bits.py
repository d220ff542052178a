"""Masks as packed bits.

Bit j of byte i of a row is column 8 i + j, 1 = kept; the bits past the last column are 0. The layout `semi24` stores
each group of four as the two positions it keeps instead, one nibble p0 | p1 << 2 with p0 < p1. Both take a byte per
eight columns, so the second is a recoding of the first, byte by byte.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from perp_kernels.arrays import as_tensor
from perp_kernels.ops._library import define


def _semi24_byte(bits: int) -> int:
    """The semi24 byte of eight mask bits; 0, which no pair of positions gives, for a group that does not keep two."""
    byte = 0
    for nibble in (0, 1):
        kept = [p for p in range(4) if bits >> (4 * nibble + p) & 1]
        if len(kept) == 2:
            byte |= (kept[0] | kept[1] << 2) << (4 * nibble)
    return byte


@functools.cache
def _bits_to_semi24(device: torch.device) -> Tensor:
    """uint8 [256]: mask bits to semi24 positions."""
    return torch.tensor([_semi24_byte(bits) for bits in range(256)], dtype=torch.uint8, device=device)


@functools.cache
def _kept_of_byte(layout: str, device: torch.device) -> Tensor:
    """int64 [256]: the eight bools of an index byte, in memory order, as one word.

    A gather of words is 10 times as fast as a gather of rows of eight bools.
    """
    kept = torch.zeros(256, 8, dtype=torch.bool)
    for byte in range(256):
        if layout == "semi24":
            nibbles = ((0, byte & 15), (4, byte >> 4))
            columns = [first + p for first, n in nibbles if (n & 3) < (n >> 2) for p in (n & 3, n >> 2)]
        else:
            columns = [j for j in range(8) if byte >> j & 1]
        kept[byte, columns] = True
    return kept.view(torch.int64).flatten().to(device)


@functools.cache
def _count_of_byte(layout: str, device: torch.device) -> Tensor:
    """uint8 [256]: how many columns an index byte keeps; none for a semi24 nibble that is no rising pair."""
    kept = _kept_of_byte(layout, device).view(torch.bool).view(256, 8)
    return kept.sum(1, dtype=torch.uint8)


def kept_in_rows(index: Tensor, layout: str) -> Tensor:
    """int64 [R]: how many columns each row of an index [R, W] keeps, without unpacking it."""
    return _count_of_byte(layout, index.device).index_select(0, index.flatten().int()).view(index.shape).sum(1)


def unpack_mask_rows(index: Tensor, K: int, layout: str) -> Tensor:
    """Index bytes [..., ceil(K/8)] to a bool mask [..., K]; the reference, for use inside other references."""
    words = _kept_of_byte(layout, index.device).index_select(0, index.flatten().int())
    return words.view(torch.bool).view(*index.shape[:-1], 8 * index.shape[-1])[..., :K]


def bits_to_semi24(bits: Tensor) -> Tensor:
    """The semi24 index of packed mask bits [..., ceil(K/8)] whose every group of four keeps exactly two."""
    return _bits_to_semi24(bits.device).index_select(0, bits.flatten().int()).view(bits.shape)


def _pack_reference(mask: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(mask.view(torch.uint8), (0, -mask.shape[-1] % 8))
    place = torch.tensor([1 << j for j in range(8)], dtype=torch.uint8, device=mask.device)
    return (padded.unflatten(-1, (-1, 8)) * place).sum(-1, dtype=torch.uint8)


def _pack_fake(mask: Tensor) -> Tensor:
    return mask.new_empty([*mask.shape[:-1], (mask.shape[-1] + 7) // 8], dtype=torch.uint8)


def _unpack_reference(index: Tensor, K: int, layout: str) -> Tensor:
    return unpack_mask_rows(index, K, layout).contiguous()


def _unpack_fake(index: Tensor, K: int, layout: str) -> Tensor:
    return index.new_empty([*index.shape[:-1], K], dtype=torch.bool)


_pack_op = define("pack_bits(Tensor mask) -> Tensor", _pack_reference, _pack_fake)
unpack_mask = define("unpack_mask(Tensor index, SymInt K, str layout) -> Tensor", _unpack_reference, _unpack_fake)


def pack_bits(mask: Any) -> Tensor:
    """Pack a bool mask [..., K] into uint8 [..., ceil(K/8)]: bit j of byte i = column 8 i + j, padding bits 0."""
    mask = as_tensor(mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"A mask is a bool tensor, True = kept, not {mask.dtype}.")
    return _pack_op(mask)


def unpack_bits(bits: Any, K: int) -> Tensor:
    """The bool mask [..., K] that `pack_bits` packed into uint8 [..., ceil(K/8)]."""
    bits = as_tensor(bits)
    if bits.dtype != torch.uint8 or bits.shape[-1] != (K + 7) // 8:
        raise ValueError(
            f"Packed bits of {K} columns are uint8 [..., {(K + 7) // 8}], not {bits.dtype} {list(bits.shape)}."
        )
    return unpack_mask(bits, K, "bitmap")
