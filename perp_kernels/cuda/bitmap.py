"""sparse_linear on a bitmap weight for 1 to 16 tokens by the CUDA kernels; perp_kernels.ops.sparse_linear has the
contract."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from perp_kernels.cuda import bitmap_plans
from perp_kernels.cuda.launch import ALIGNMENT, aligned_rows, gpu_of, run


def takes(x: Tensor, values: Tensor, layout: str, shape: list[int]) -> bool:
    """Whether a call is one for these kernels, whatever the device: the values lie as 16-byte copies want them, and
    an expert's, which begin anywhere, do not."""
    if layout != "bitmap" or len(shape) != 2 or x.dtype not in bitmap_plans.TYPES:
        return False
    tokens = math.prod(x.shape[:-1])
    return (
        1 <= tokens <= bitmap_plans.MAX_TOKENS
        and shape[0] > 0
        and values.is_contiguous()
        and values.data_ptr() % ALIGNMENT == 0
    )


def _whole_words(index: Tensor) -> Tensor:
    """The index with rows of whole 4-byte words: itself or a copy."""
    if index.shape[1] % 4:
        return F.pad(index, (0, -index.shape[1] % 4))
    aligned = index.is_contiguous() and index.data_ptr() % 4 == 0
    return index if aligned else index.clone(memory_format=torch.contiguous_format)


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
    """y [..., N] of x [..., K].

    The kernels read tokens in chunks of 16 bytes and the index in words of 4. What has other rows is copied: the index
    of a layer whose inputs are no multiple of 32, a sixteenth of its dense bytes, in every call.
    """
    N, K = shape
    tokens = x.detach().reshape(-1, K)
    tokens = F.pad(tokens, (0, -K % 8)) if K % 8 else aligned_rows(tokens)
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    own_bias = None if bias is None else bias.detach().contiguous()
    launches = bitmap_plans.linear(
        tokens, values.detach(), _whole_words(index), row_ptr, K, own_bias, y.view(-1, N), gpu_of(x)
    )
    run(launches, x.device)
    return y
