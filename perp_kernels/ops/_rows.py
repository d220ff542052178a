"""Output rows of a packed weight, a few at a time: what the references are built from."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from perp_kernels.ops.bits import unpack_mask_rows

# A chunk of effective weight of 1 MiB stays in a core's L2 cache between the pass that forms it and the matrix product
# that reads it, and is large enough for that product to run at full rate.
_CHUNK_BYTES = 1 << 20
_MIN_ROWS = 16

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def row_chunks(N: int, K: int, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Bounds (start, stop) that cut N rows of K elements into chunks of about equal size."""
    most = max(_MIN_ROWS, _CHUNK_BYTES // (dtype.itemsize * max(K, 1)))
    count = -(-N // most)
    for i in range(count):
        yield N * i // count, N * (i + 1) // count


def mask_rows(index: Tensor, K: int, layout: str, start: int, stop: int) -> Tensor:
    """Mask of rows start..stop, bool [rows, K]."""
    return unpack_mask_rows(index[start:stop], K, layout)


def value_rows(values: Tensor, row_ptr: Tensor | None, start: int, stop: int) -> Tensor:
    """The stored values of rows start..stop, a view."""
    return values[start:stop] if row_ptr is None else values[int(row_ptr[start]) : int(row_ptr[stop])]


def dense_rows(
    values: Tensor, index: Tensor, row_ptr: Tensor | None, K: int, layout: str, start: int, stop: int
) -> Tensor:
    """Rows start..stop of the dense weight [rows, K]: a view of `values` in the layout dense, else a new tensor."""
    if layout == "dense":
        return values[start:stop]
    kept = mask_rows(index, K, layout, start, stop)
    return values.new_zeros(stop - start, K).masked_scatter_(kept, value_rows(values, row_ptr, start, stop))


def clear_pruned_(rows: Tensor, kept: Tensor) -> Tensor:
    """Set rows[~kept] to +0 in place, whatever stood there.

    By a bitwise and with 0 or -1, which on the CPU takes a twentieth of the time of masked_fill_ and, unlike a product
    with the mask, leaves neither NaN nor -0.
    """
    rows.view(_INTEGER[rows.dtype.itemsize]).bitwise_and_(kept.view(torch.int8).neg())
    return rows
