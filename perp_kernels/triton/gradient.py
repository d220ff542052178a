"""What is learned from a weight's gradient G = dY^T X, without G: a tile of it is formed on the chip and used up there.

    value_gradient     the entries of G at kept columns, in the order of the packed values
    adapter_gradients  dA and dB of an adapter: with Q = scale M G, or W G,  dB = Q A^T  and  dA = B^T Q

Each tile of Q gives a share of dA, over its rows, and of dB, over its columns. Shares go to buffers of their own and
are summed in a fixed order: there are no atomics, and a repeated call has the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from perp_kernels.ops._rows import PackedRows
from perp_kernels.triton import decode
from perp_kernels.triton.decode import DENSE, index_tile, kept_columns, locate, tile_start
from perp_kernels.triton.effective import ADDED, Adapter
from perp_kernels.triton.launch import Config, Target, bucket, configure, launch, target
from perp_kernels.triton.product import grouped, transposed_product


@triton.jit
def value_gradient_kernel(
    out, dy, x, values, index, row_ptr, tokens, N, K, width, row_stride, dy_stride, x_stride,
    LAYOUT: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    i, j = grouped(tl.program_id(0), tl.cdiv(N, BN), tl.cdiv(K, BK), 8)
    G = transposed_product(dy, x, 0, tokens, i * BN, j * BK, N, K, dy_stride, x_stride, BN, BK, BT, PRECISION)
    rows = i * BN + tl.arange(0, BN)
    inside = rows < N
    start = tile_start(index, row_ptr, rows, inside, j * BK, width, row_stride, LAYOUT, RAGGED, BN)
    kept, rank, _ = locate(index_tile(index, rows, inside, j * BK, width, BK), start, LAYOUT, BN, BK)
    if LAYOUT == DENSE:
        # A pruned weight has a stored zero, and its gradient too.
        columns = j * BK + tl.arange(0, BK)
        G = tl.where(kept, G, 0.0)
        kept = inside[:, None] & (columns < K)[None, :]
    tl.store((out + start)[:, None] + rank, G.to(out.dtype.element_ty), mask=kept)


@triton.jit
def adapter_gradients_kernel(
    dA_shares, dB_shares, dy, x, values, index, row_ptr, A, B, scale, tokens, first_row, N, K, width, row_stride,
    dy_stride, x_stride, r, row_tiles,
    LAYOUT: tl.constexpr, RAGGED: tl.constexpr, MODE: tl.constexpr, R: tl.constexpr,
    NEEDS_A: tl.constexpr, NEEDS_B: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """dA_shares float32 [row_tiles, r, K], dB_shares float32 [column_tiles, row_tiles * BN, r], of the rows from
    `first_row`."""
    i, j = grouped(tl.program_id(0), row_tiles, tl.cdiv(K, BK), 8)
    rows, columns = first_row + i * BN + tl.arange(0, BN), j * BK + tl.arange(0, BK)
    Q = transposed_product(
        dy, x, 0, tokens, first_row + i * BN, j * BK, N, K, dy_stride, x_stride, BN, BK, BT, PRECISION
    )
    inside = rows < N
    byte = index_tile(index, rows, inside, j * BK, width, BK)
    if MODE == ADDED:
        kept = kept_columns(byte, LAYOUT, BN, BK)
        Q = tl.where(kept, Q * scale, 0.0)
    else:
        start = tile_start(index, row_ptr, rows, inside, j * BK, width, row_stride, LAYOUT, RAGGED, BN)
        kept, rank, _ = locate(byte, start, LAYOUT, BN, BK)
        Q = tl.where(kept, Q * tl.load((values + start)[:, None] + rank, mask=kept, other=0.0).to(tl.float32), 0.0)
    # The shares' own products are a fraction r / tokens of the work. In bfloat16 where all factors are, as a layer in
    # plain torch would round G: a 16-bit tile of Q goes through shared memory once for both, and at half the bytes.
    # Otherwise in TF32, which errs less than that and cannot overflow as fp16 could.
    FACTOR: tl.constexpr = tl.bfloat16 if HALF else tl.float32
    Q = Q.to(FACTOR)
    i_r = tl.arange(0, R)
    known = i_r < r
    if NEEDS_B:
        a = tl.load(
            A + i_r.to(tl.int64)[None, :] * K + columns[:, None],
            mask=(columns < K)[:, None] & known[None, :],
            other=0.0,
        )
        share = tl.dot(Q, a.to(FACTOR), input_precision=PRECISION)
        line = (j.to(tl.int64) * row_tiles + i) * BN + tl.arange(0, BN)
        tl.store(dB_shares + line[:, None] * r + i_r[None, :], share, mask=inside[:, None] & known[None, :])
    if NEEDS_A:
        b = tl.load(B + rows.to(tl.int64)[:, None] * r + i_r[None, :], mask=inside[:, None] & known[None, :], other=0.0)
        share = tl.dot(tl.trans(Q), b.to(FACTOR), input_precision=PRECISION)
        line = i.to(tl.int64) * r + i_r
        tl.store(dA_shares + line[None, :] * K + columns[:, None], share, mask=(columns < K)[:, None] & known[None, :])


def _config(kernel: str, gpu: Target, w: PackedRows, tokens: int, rank: int, addresses: bool) -> Config:
    """`addresses`: whether the kernel forms an address in the packed values for each entry of its tile."""
    if w.values.dtype == torch.float32:
        default = Config({"BN": 32, "BK": 32, "BT": 32}, num_warps=4, num_stages=2)
    else:
        # Addresses, or the accumulators of a high rank, leave no room for a larger tile: Triton 3.7 and 3.9 spill.
        narrow = addresses or rank > 64
        default = Config({"BN": 128, "BK": 64 if narrow else 128, "BT": 64}, num_warps=8, num_stages=3)
    return configure(kernel, gpu, f"{w.values.dtype} {w.layout} T={bucket(tokens)} r={rank}", default)


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"


def value_gradient(dy: Tensor, x: Tensor, w: PackedRows, out: Tensor) -> None:
    """Write the gradient of the packed values into `out`, laid out like them."""
    config = _config("value_gradient", target(x), w, len(x), 0, addresses=True)
    tiles = triton.cdiv(len(w.index), config.tiles["BN"]) * triton.cdiv(w.K, config.tiles["BK"])
    launch(
        value_gradient_kernel,
        (tiles,),
        {
            "out": out,
            "dy": dy,
            "x": x,
            **decode.arguments(w),
            "tokens": len(x),
            "dy_stride": dy.stride(0),
            "x_stride": x.stride(0),
        },
        {**decode.switches(w), "PRECISION": _precision(x.dtype)},
        config,
    )


def adapter_gradients(
    dy: Tensor, x: Tensor, w: PackedRows, adapter: Adapter, dA: Tensor | None, dB: Tensor | None
) -> None:
    """Add to dA [r, K] and dB [N, r], float32, those of dy [T, N] and x [T, K]; None where not needed.

    The buffers of shares together take at most a byte per weight: rows are taken in runs that keep them so.
    """
    N, K, r, device = len(w.index), w.K, adapter.rank, x.device
    addresses = adapter.effect.name == "multiply"
    config = _config("adapter_gradients", target(x), w, len(x), adapter.padded_rank(), addresses)
    BN, BK = config.tiles["BN"], config.tiles["BK"]
    row_tiles, column_tiles = triton.cdiv(N, BN), triton.cdiv(K, BK)
    needs_A, needs_B = dA is not None, dB is not None
    bytes_per_tile_row = 4 * r * (K * needs_A + column_tiles * BN * needs_B)
    at_once = max(1, min(row_tiles, N * K // bytes_per_tile_row))
    to_A = torch.empty(at_once * r * K if needs_A else 0, dtype=torch.float32, device=device)
    to_B = torch.empty(column_tiles * at_once * BN * r if needs_B else 0, dtype=torch.float32, device=device)
    for first in range(0, row_tiles, at_once):
        count = min(at_once, row_tiles - first)
        dA_shares = to_A[: count * r * K].view(-1, r, K)
        dB_shares = to_B[: column_tiles * count * BN * r].view(-1, count * BN, r)
        launch(
            adapter_gradients_kernel,
            (count * column_tiles,),
            {
                "dA_shares": dA_shares,
                "dB_shares": dB_shares,
                "dy": dy,
                "x": x,
                **decode.arguments(w),
                "A": adapter.A,
                "B": adapter.B,
                "scale": adapter.effect.scale,
                "tokens": len(x),
                "first_row": first * BN,
                "dy_stride": dy.stride(0),
                "x_stride": x.stride(0),
                "r": r,
                "row_tiles": count,
            },
            {
                **decode.switches(w),
                "MODE": adapter.mode,
                "R": adapter.padded_rank(),
                "NEEDS_A": needs_A,
                "NEEDS_B": needs_B,
                "HALF": x.dtype == adapter.A.dtype == adapter.B.dtype == torch.bfloat16,
                "PRECISION": _precision(x.dtype),
            },
            config,
        )
        if dA is not None:
            dA += dA_shares.sum(0)
        if dB is not None:
            rows = slice(first * BN, min((first + count) * BN, N))
            dB[rows] += dB_shares[:, : rows.stop - rows.start].sum(0)
