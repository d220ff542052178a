"""The column loop of sparsegpt by the native kernels; the rest of the solve is torch's linear algebra as elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from perp_kernels.cpu import native
from perp_kernels.ops.sparsegpt import solve
from perp_kernels.pattern import Pattern


def sparsegpt_block_(W: Tensor, U: Tensor, pattern: str, errors: Tensor, kept: Tensor) -> None:
    """Prunes and compensates the columns W [N, b] in place, the contract of perp_kernels.ops.sparsegpt."""
    parsed, extension = Pattern.parse(pattern), native.extension()
    U = U.contiguous()
    block = native.view("W", W), native.view("U", U)
    results = native.view("errors", errors), native.view("kept", kept.view(torch.uint8))
    if parsed.m is not None and parsed.n is not None:
        extension.sparsegpt_groups(*block, parsed.m, parsed.m - parsed.n, *results)
    else:
        jointly = parsed.scope != "row"
        extension.sparsegpt_share(*block, parsed.pruned(W.numel() if jointly else W.shape[1]), jointly, *results)
    native.written(W, errors, kept)


def _supports_block(W: Tensor, U: Tensor, pattern: str, errors: Tensor, kept: Tensor) -> bool:
    return W.device.type == "cpu" and W.dtype == torch.float32


def _supports(weight: Tensor, H: Tensor, *_: object) -> bool:
    on_cpu = weight.device.type == "cpu" and H.device.type == "cpu"
    return on_cpu and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)


native.register("sparsegpt_block_", sparsegpt_block_, _supports_block)
native.register("sparsegpt", solve, _supports)
