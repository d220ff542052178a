"""Products with a weight that is formed a tile at a time and never whole: the walk that all implementations share.

`form(expert, tile)` gives that tile of the expert's matrix in the dtype of x. It may return the same memory each time:
a tile is used before the next one is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from perp_kernels.ops._rows import accumulation_dtype, add_product_, expert_spans


class Tile(NamedTuple):
    """Rows and columns of one matrix [N, K]; every slice has a start and a stop."""

    rows: slice
    columns: slice


Form = Callable[[int, Tile], Tensor]
Fold = Callable[[int, Tile, Tensor, Tensor], None]


def row_tiles(bounds: Iterable[tuple[int, int]], K: int) -> list[Tile]:
    """Tiles of whole rows from the bounds of their rows."""
    return [Tile(slice(start, stop), slice(0, K)) for start, stop in bounds]


def multiply(
    x: Tensor, shape: list[int], bias: Tensor | None, offsets: Tensor | None, tiles: Sequence[Tile], form: Form
) -> Tensor:
    """y [..., N] = x W^T + bias of x [..., K]; the tiles hold whole rows."""
    N, K = shape[-2:]
    tokens = x.reshape(-1, K)
    # What an autograd.Function returns must be no view: blocks add to it in place.
    y = x.new_empty(*x.shape[:-1], N)
    rows = y.view(len(tokens), N)
    for expert, begin, end in expert_spans(shape, len(tokens), offsets):
        if begin == end:
            continue
        for tile in tiles:
            torch.mm(tokens[begin:end], form(expert, tile).t(), out=rows[begin:end, tile.rows])
        if bias is not None:
            rows[begin:end] += bias if offsets is None else bias[expert]
    return y


def multiply_transposed(
    dy: Tensor, shape: list[int], offsets: Tensor | None, tiles: Sequence[Tile], form: Form
) -> Tensor:
    """dx [T, K] = dy W of dy [T, N]. Where the tiles do not hold whole columns, dx is a sum over tiles, in float32."""
    N, K = shape[-2:]
    whole = all(tile.rows == slice(0, N) for tile in tiles)
    # Whole columns are written, partial ones added to; without rows there are no tiles to do either.
    make = dy.new_empty if whole and tiles else dy.new_zeros
    dx = make((len(dy), K), dtype=dy.dtype if whole else accumulation_dtype(dy.dtype))
    for expert, begin, end in expert_spans(shape, len(dy), offsets):
        if begin == end:
            continue
        for tile in tiles:
            out = dx[begin:end, tile.columns]
            if whole:
                torch.mm(dy[begin:end], form(expert, tile), out=out)
            else:
                add_product_(out, dy[begin:end, tile.rows], form(expert, tile))
    return dx.to(dy.dtype)


def fold_gradient(
    dy: Tensor, x: Tensor, shape: list[int], offsets: Tensor | None, tiles: Sequence[Tile], fold: Fold
) -> None:
    """`fold(expert, tile, dy, x)` for each tile of the gradient dy^T x of dy [T, N] and x [T, K]; an expert without
    tokens is passed over."""
    for expert, begin, end in expert_spans(shape, len(dy), offsets):
        if begin == end:
            continue
        for tile in tiles:
            fold(expert, tile, dy[begin:end, tile.rows], x[begin:end, tile.columns])


def bias_gradient(dy: Tensor, shape: list[int], offsets: Tensor | None) -> Tensor:
    """The sum of dy [T, N] over the tokens, [N] or [E, N], in the accumulation dtype."""
    dbias = dy.new_empty(shape[:-1], dtype=accumulation_dtype(dy.dtype))
    for expert, begin, end in expert_spans(shape, len(dy), offsets):
        own = dbias if offsets is None else dbias[expert]
        own.copy_(dy[begin:end].sum(0, dtype=dbias.dtype))
    return dbias
