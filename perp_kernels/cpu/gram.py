"""gram_ on the CPU: one triangle of the product, added to both places of each entry."""

from __future__ import annotations

import torch
from torch import Tensor

from perp_kernels.cpu import native
from perp_kernels.ops._rows import expert_spans

ELEMENTS = (torch.float32, torch.bfloat16, torch.float16)

# Tokens widened, and columns multiplied, at a time without AVX-512: products this wide run at torch's full rate.
_TOKENS = 1024
_COLUMNS = 512


def gram(H: Tensor, x: Tensor, offsets: Tensor | None) -> None:
    """H += X^T X, the contract of perp_kernels.ops.gram. An H that was symmetric stays so to the bit."""
    K = x.shape[-1]
    tokens, grams = native.by_rows(x.reshape(-1, K)), H.view(-1, K, K)
    add = _add_native if native.active_path() == "avx512" else _add_by_columns
    for expert, begin, end in expert_spans(list(H.shape[:-2]), len(tokens), offsets):
        add(grams[expert], tokens[begin:end])


def _add_native(H: Tensor, tokens: Tensor) -> None:
    native.extension().gram(native.view("H", H), native.view("x", tokens))
    native.written(H)


def _add_by_columns(H: Tensor, tokens: Tensor) -> None:
    K = len(H)
    for part in tokens.split(_TOKENS):
        wide = part.to(H.dtype)
        for begin in range(0, K, _COLUMNS):
            end = min(begin + _COLUMNS, K)
            product = wide[:, begin:].t() @ wide[:, begin:end]
            square, below = product[: end - begin], product[end - begin :]
            # A product need not come out symmetric to the last bit: its lower triangle serves for both.
            H[begin:end, begin:end] += square.tril() + square.tril(-1).t()
            H[end:, begin:end] += below
            H[begin:end, end:] += below.t()


def _supports(H: Tensor, x: Tensor, offsets: Tensor | None) -> bool:
    return x.device.type == "cpu" and H.device.type == "cpu" and x.dtype in ELEMENTS


native.register("gram_", gram, _supports)
