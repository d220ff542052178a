"""sparse_linear by Triton.

Few tokens are bound by the bytes of the weight, so it is multiplied as it is stored: a tile is decoded in registers and
goes to the tensor cores from there, or without them for a single token. The inputs are cut into parts where the rows
alone would leave processors idle; each part writes a sum of its own, and the sums are added in their order. For many
tokens the decoding would be done again for every tile of tokens: one pass writes the dense weight into a temporary of
the call, which torch multiplies.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from perp_kernels.ops._rows import PackedRows, accumulation_dtype, expert_spans
from perp_kernels.triton import decode
from perp_kernels.triton.decode import contiguous, index_tile, read_tile, slice_rows, tile_start
from perp_kernels.triton.effective import effective_weight
from perp_kernels.triton.gradient import value_gradient
from perp_kernels.triton.launch import Config, Target, bucket, configure, launch, rows_of, target

# Tokens up to which the packed weight is multiplied as it is: an analytical default, not measured.
FUSED_TOKENS = 64

# Most parts the inputs are cut into: each costs a float32 per output, written and read.
_MOST_PARTS = 8

# Bytes of the weight that each processor has to have asked for at any time to draw all of the memory's bandwidth:
# 3 TB/s for 0.7 us, over 132 processors.
_IN_FLIGHT = 16 << 10


@triton.jit
def few_tokens_kernel(
    out, x, bias, values, index, row_ptr, tokens, N, K, width, row_stride, x_stride, span,
    LAYOUT: tl.constexpr, RAGGED: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [tokens, N] in the dtype of x where PARTS is 1; else out float32 [PARTS, tokens, N], without the bias."""
    rows, part = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1)
    inside = rows < N
    t = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    first = part * span
    end = tl.minimum(first + span, K)
    start = tile_start(index, row_ptr, rows, inside, first, width, row_stride, LAYOUT, RAGGED, BN)
    byte = index_tile(index, rows, inside, first, width, BK)
    sum = tl.zeros((BN, TOKENS), dtype=tl.float32)
    for column in range(first, end, BK):
        weight, start = read_tile(values, byte, start, LAYOUT, BN, BK)
        # The values' addresses wait for these bytes: asked for a tile ahead, they are there.
        byte = index_tile(index, rows, inside, column + BK, width, BK)
        k = column + tl.arange(0, BK)
        if TOKENS == 1:
            x_row = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
            sum += tl.sum(weight.to(tl.float32) * x_row[None, :], axis=1)[:, None]
        else:
            x_tile = tl.load(
                x + t.to(tl.int64)[None, :] * x_stride + k[:, None],
                mask=(t < tokens)[None, :] & (k < K)[:, None],
                other=0.0,
            )
            sum = tl.dot(weight, x_tile, sum, input_precision=PRECISION)
    wanted = inside[:, None] & (t < tokens)[None, :]
    if PARTS == 1:
        if BIAS:
            sum += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)[:, None]
        tl.store(out + t.to(tl.int64)[None, :] * N + rows[:, None], sum.to(x.dtype.element_ty), mask=wanted)
    else:
        line = part.to(tl.int64) * tokens + t
        tl.store(out + line[None, :] * N + rows[:, None], sum, mask=wanted)


@triton.jit
def add_parts_kernel(out, parts, bias, count, N, PARTS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """out [tokens, N] = the sum of parts [PARTS, tokens, N] in their order, and the bias; count = tokens * N."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    sum = tl.load(parts + at, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        sum += tl.load(parts + count * part + at, mask=inside, other=0.0)
    if BIAS:
        sum += tl.load(bias + at % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, sum.to(out.dtype.element_ty), mask=inside)


def _config(gpu: Target, w: PackedRows, tokens: int) -> Config:
    """PARTS 0 stands for as many parts as fill the GPU. One program decodes all that a row tile has for its tokens, so
    that a tile is as large as the registers allow."""
    if w.values.dtype == torch.float32:
        tiles = {"BN": 8, "BK": 256} if tokens == 1 else {"BN": 16, "BK": 64}
    else:
        tiles = {"BN": 32, "BK": 256} if tokens <= 16 else {"BN": 32, "BK": 128}
    count = 1 if tokens == 1 else max(16, min(64, bucket(tokens)))
    default = Config({"TOKENS": count, **tiles, "PARTS": 0}, num_warps=4, num_stages=2)
    return configure("few_tokens", gpu, f"{w.values.dtype} {w.layout} T={bucket(tokens)}", default)


def few_tokens(x: Tensor, w: PackedRows, bias: Tensor | None, out: Tensor) -> None:
    """out [T, N] = x W^T + bias, from the packed weight."""
    gpu, (tokens, N) = target(x), out.shape
    config = _config(gpu, w, tokens)
    tiles = dict(config.tiles)
    grid = (triton.cdiv(N, tiles["BN"]), triton.cdiv(tokens, tiles["TOKENS"]))
    column_tiles = triton.cdiv(w.K, tiles["BK"])
    # A weight pruned by half is about half of its dense bytes.
    in_flight = tiles["BN"] * tiles["BK"] * w.values.itemsize // 2
    programs = triton.cdiv(_IN_FLIGHT, in_flight) * gpu.processors
    wanted = tiles.pop("PARTS") or min(_MOST_PARTS, max(1, programs // max(grid[0] * grid[1], 1)))
    span = triton.cdiv(column_tiles, min(wanted, column_tiles)) * tiles["BK"]
    parts = triton.cdiv(w.K, span)
    sums = out if parts == 1 else torch.empty((parts, tokens, N), dtype=torch.float32, device=x.device)
    launch(
        few_tokens_kernel,
        (grid[0], parts, grid[1]),
        {
            "out": sums,
            "x": x,
            "bias": x if bias is None else bias,
            **decode.arguments(w),
            "tokens": tokens,
            "x_stride": x.stride(0),
            "span": span,
        },
        {
            **decode.switches(w),
            "PARTS": parts,
            "BIAS": bias is not None and parts == 1,
            "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
        },
        replace(config, tiles=tiles),
    )
    if parts > 1:
        launch(
            add_parts_kernel,
            (triton.cdiv(out.numel(), 512),),
            {"out": out, "parts": sums, "bias": x if bias is None else bias, "count": out.numel(), "N": N},
            {"PARTS": parts, "BIAS": bias is not None},
            Config({"BLOCK": 512}, num_warps=4, num_stages=1),
        )


def sparse_linear(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor | None,
    layout: str,
    shape: list[int],
    bias: Tensor | None,
    offsets: Tensor | None,
) -> Tensor:
    """y [..., N] of x [..., K]: the contract of perp_kernels.ops.sparse_linear."""
    N, K = shape[-2:]
    w = contiguous(values, index, row_ptr, layout, K)
    x_rows = rows_of(x, K)
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    y_rows = y.view(len(x_rows), N)  # y itself is no view, which an autograd.Function must not return
    biases = None if bias is None else bias.reshape(-1, N)
    for expert, begin, end in expert_spans(shape, len(x_rows), offsets):
        part, tokens, out = slice_rows(w, expert * N, (expert + 1) * N), x_rows[begin:end], y_rows[begin:end]
        expert_bias = None if biases is None else biases[expert]
        if layout != "dense" and end - begin <= FUSED_TOKENS:
            few_tokens(tokens, part, expert_bias, out)
        else:
            torch.mm(tokens, effective_weight(part).t(), out=out)
            if expert_bias is not None:
                out += expert_bias
    return y


def sparse_linear_backward(
    grad_y: Tensor,
    x: Tensor | None,
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor | None,
    layout: str,
    shape: list[int],
    offsets: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [T, K], the values and the bias, each empty where `needs` does not ask for it."""
    needs_x, needs_values, needs_bias = needs
    N, K = shape[-2:]
    w = contiguous(values, index, row_ptr, layout, K)
    dy = rows_of(grad_y, N)
    dx = values.new_empty((len(dy), K) if needs_x else 0)
    dvalues = values.new_empty(values.shape if needs_values else 0)
    dbias = values.new_empty(shape[:-1] if needs_bias else 0, dtype=accumulation_dtype(values.dtype))
    for expert, begin, end in expert_spans(shape, len(dy), offsets):
        rows = expert * N, (expert + 1) * N
        part = slice_rows(w, *rows)
        if needs_x:
            torch.mm(dy[begin:end], effective_weight(part), out=dx[begin:end])
        if needs_values:
            assert x is not None
            of_part = dvalues if row_ptr is not None else dvalues[slice(*rows)]
            value_gradient(dy[begin:end], rows_of(x, K)[begin:end], part, of_part)
        if needs_bias:
            dbias.view(-1, N)[expert] = dy[begin:end].sum(0, dtype=dbias.dtype)
    return dx, dvalues, dbias
