"""Rows of a packed weight, a few at a time, and the products that go with them: what the references are built from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perp_kernels.ops.bits import unpack_mask_rows

# Chunks bound the scratch of a layer of any size. At 2 MiB of float32 the products run as fast as on whole matrices
# (measured at K = 576 and 1536 with 2,048 tokens; at 1 MiB up to 10 % slower).
_CHUNK_BYTES = 2 << 20
_MIN_ROWS = 16

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class PackedRows:
    """The components of a packed weight, read by rows: start is the first row, stop the one after the last."""

    values: Tensor
    index: Tensor
    row_ptr: Tensor | None
    layout: str
    K: int

    def mask(self, start: int, stop: int) -> Tensor:
        """bool [rows, K]."""
        return unpack_mask_rows(self.index[start:stop], self.K, self.layout)

    def stored(self, start: int, stop: int) -> Tensor:
        """A view of their values, flat where the rows keep different counts."""
        if self.row_ptr is None:
            return self.values[start:stop]
        return self.values[int(self.row_ptr[start]) : int(self.row_ptr[stop])]

    def dense(self, start: int, stop: int) -> Tensor:
        """The weight [rows, K]: a view of the values in the layout dense, else a new tensor."""
        if self.layout == "dense":
            return self.values[start:stop]
        zeros = self.values.new_zeros(stop - start, self.K)
        return zeros.masked_scatter_(self.mask(start, stop), self.stored(start, stop))

    def store(self, start: int, stop: int, weight: Tensor) -> None:
        """Overwrite the values by those of `weight` [rows, K] under the mask; zero in the layout dense elsewhere."""
        kept, out = self.mask(start, stop), self.stored(start, stop)
        out.copy_(clear_pruned_(weight, kept) if self.layout == "dense" else weight[kept].view(out.shape))


def clear_pruned_(rows: Tensor, kept: Tensor) -> Tensor:
    """Set rows[~kept] to +0 in place, whatever stood there.

    By a bitwise and with 0 or -1, which on the CPU takes a twentieth of the time of masked_fill_ and, unlike a product
    with the mask, leaves neither NaN nor -0. In eighths, since torch widens the mask to the dtype of the rows first.
    """
    integer = _INTEGER[rows.dtype.itemsize]
    for part, part_kept in zip(rows.chunk(8), kept.chunk(8), strict=True):
        part.view(integer).bitwise_and_(part_kept.view(torch.int8).neg())
    return rows


def row_chunks(N: int, K: int) -> Iterator[tuple[int, int]]:
    """Bounds (first, last + 1) that cut N rows of K inputs into chunks of about equal size."""
    most = max(_MIN_ROWS, _CHUNK_BYTES // (torch.float32.itemsize * K))
    count = -(-N // most)
    for i in range(count):
        yield N * i // count, N * (i + 1) // count


def expert_spans(shape: list[int], tokens: int, offsets: Tensor | None) -> list[tuple[int, int, int]]:
    """(expert, first token, last token + 1) for each matrix of the weight; a weight [N, K] is expert 0 of all tokens.

    Raises ValueError unless `offsets` rises to the number of tokens.
    """
    if offsets is None:
        return [(0, 0, tokens)]
    ends = offsets.tolist()
    *starts, last = [0, *ends]
    if last != tokens or any(start > end for start, end in zip(starts, ends, strict=True)):
        raise ValueError(f"Offsets must rise to the number of tokens, {tokens}, not {ends}.")
    return list(zip(range(shape[0]), starts, ends, strict=True))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over values of `dtype` are formed: fp64 for fp64, fp32 for all else."""
    return torch.promote_types(dtype, torch.float32)


def add_product_(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out += a @ b in place, where `out` may be wider than a and b: their product is then rounded to their dtype once,
    which lets 16-bit operands use the hardware's 16-bit product."""
    return out.addmm_(a, b) if a.dtype == out.dtype else out.add_(a @ b)


def linear_fake(
    x: Tensor, values: Tensor, index: Tensor, row_ptr: Tensor | None, layout: str, shape: list[int], *rest: Any
) -> Tensor:
    """The fake of every linear op: their schemas begin with these arguments."""
    return x.new_empty([*x.shape[:-1], shape[-2]])
