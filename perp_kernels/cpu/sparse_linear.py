"""sparse_linear by the native kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perp_kernels.cpu import native
from perp_kernels.ops._rows import expert_spans

# Tokens up to which the fused kernel beats unpacking and torch's product (measured on Zen 4 at 4096 x 4096; torch's
# fp16 product is a third as fast as its bf16 one).
FUSED_TOKENS = {torch.bfloat16: 256, torch.float32: 512, torch.float16: 4096}

# Rows unpacked at a time for torch's product, which loses a tenth of its rate on a quarter of this.
_CHUNK_BYTES = 16 << 20


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

    Up to `FUSED_TOKENS` tokens the weight is multiplied from its packed form; above, runs of rows are unpacked into
    cache and multiplied there by torch.
    """
    N, K = shape[-2:]
    weight = native.weight(values, index, row_ptr, K, layout)
    tokens = x.reshape(-1, K)
    if K > 1 and tokens.stride(1) != 1:
        tokens = tokens.contiguous()
    y = torch.empty((len(tokens), N), dtype=x.dtype)
    for expert, begin, end in expert_spans(shape, len(tokens), offsets):
        own = None if bias is None else bias.view(-1, N)[expert]
        _multiply(tokens[begin:end], weight, expert * N, own, y[begin:end])
    return y.view(*x.shape[:-1], N)


def _multiply(tokens: Tensor, weight: Any, first_row: int, bias: Tensor | None, y: Tensor) -> None:
    """y [T, N] of tokens [T, K] and the N rows of the weight from `first_row` on."""
    (N, K), item = (y.shape[1], tokens.shape[1]), y.element_size()
    if len(tokens) <= FUSED_TOKENS[y.dtype]:
        own = None if bias is None else native.view("bias", bias)
        weight.linear(native.view("x", tokens), native.view("y", y), own, first_row)
        return
    rows = max(1, _CHUNK_BYTES // (K * item))
    chunk = torch.empty((min(rows, N), K), dtype=y.dtype)
    for first in range(0, N, rows):
        part = chunk[: N - first]
        weight.unpack(native.view("chunk", part), first_row + first)
        torch.mm(tokens, part.t(), out=y[:, first : first + rows])
    if bias is not None:
        y += bias


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
    return x.device.type == "cpu" and x.dtype in FUSED_TOKENS and layout != "dense"


native.register("sparse_linear", sparse_linear, _supports)
