"""sparse_linear by the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from perp_kernels.cpu import native
from perp_kernels.cpu.tiles import DTYPES, DecodedTiles
from perp_kernels.ops._rows import expert_spans

ANY = 1 << 62


def _served(check: str) -> bool:
    """Whether torch's 16-bit products are oneDNN's on this CPU, as its own check says."""
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, check)())


# Tokens up to which our kernel on the packed weight beats decoding it for torch's product, by code path (measured on
# Zen 4 at 4096 x 4096, where fp32 decides for AVX2). Without oneDNN torch emulates 16-bit products, at a fifth of our
# kernel's speed (Zen 3, 512 tokens, 1536 x 1536: 4 GFLOP/s against 22 in bf16, 5 against 18 in fp16).
_AVX2_TOKENS = 96
PACKED_TOKENS = {
    "avx512": {torch.bfloat16: ANY, torch.float32: ANY, torch.float16: ANY},
    "avx2": {
        torch.bfloat16: _AVX2_TOKENS if _served("_is_mkldnn_bf16_supported") else ANY,
        torch.float32: _AVX2_TOKENS,
        torch.float16: _AVX2_TOKENS if _served("_is_mkldnn_fp16_supported") else ANY,
    },
    "portable": {torch.bfloat16: 2, torch.float32: 4, torch.float16: 2},
}


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
    """y = x W^T + bias for the packed weight `shape` = [N, K] or [E, N, K], by the contract of the op sparse_linear.

    Up to `PACKED_TOKENS` tokens the weight is multiplied from its packed form; above, it is decoded a tile at a time
    into memory that is kept, and multiplied there by torch.
    """
    N, K = shape[-2:]
    y = x.new_empty((*x.shape[:-1], N))
    count, most = x.numel() // K, PACKED_TOKENS[native.active_path()][x.dtype]
    if bias is not None:
        bias = bias.contiguous()
    if offsets is None and count <= most and x.is_contiguous():
        # One token of a small layer takes a few microseconds: no views of tensors here.
        weight = native.weight(values, index, row_ptr, K, layout)
        own = None if bias is None else native.view("bias", bias)
        weight.linear(native.matrix("x", x, count, K), native.matrix("y", y, count, N), own, 0)
        return y
    tokens, out = x.reshape(count, K).contiguous(), y.view(count, N)
    for expert, begin, end in expert_spans(shape, count, offsets):
        part, part_out = tokens[begin:end], out[begin:end]
        part_bias = None if bias is None else bias if offsets is None else bias[expert]
        if end - begin <= most:
            weight = native.weight(values, index, row_ptr, K, layout)
            own = None if part_bias is None else native.view("bias", part_bias)
            weight.linear(native.view("x", part), native.view("y", part_out), own, expert * N)
            continue
        w = DecodedTiles(values, index, row_ptr, layout, shape)
        for tile in w.row_tiles:
            torch.mm(part, w.form(expert, tile).t(), out=part_out[:, tile.rows])
        if part_bias is not None:
            part_out += part_bias
    return y


def _supports(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    row_ptr: Tensor | None,
    layout: str,
    shape: list[int],
    bias: Tensor | None,
    offsets: Tensor | None,
) -> bool:
    # The dense layout, which torch multiplies as it is, is left to the reference.
    packed = layout != "dense" and values.is_contiguous() and index.is_contiguous()
    return x.is_cpu and x.dtype in DTYPES and packed


native.register("sparse_linear", sparse_linear, _supports)
