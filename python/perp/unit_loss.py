"""How far what a unit gives is from what it should give, in fp32 at least; the last dimension is a token's state."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Error = Callable[[Tensor, Tensor], Tensor]


def _mse(output: Tensor, target: Tensor) -> Tensor:
    """The mean squared difference."""
    output, target = _wide(output, target)
    return (output - target).square().mean()


def _nmse(output: Tensor, target: Tensor) -> Tensor:
    """The squared difference over the squared target, both summed: 1 for an output of zeros."""
    output, target = _wide(output, target)
    return (output - target).square().sum() / target.square().sum().clamp_min(torch.finfo(target.dtype).eps)


def _cosine(output: Tensor, target: Tensor) -> Tensor:
    """1 minus the cosine between a token's states, the mean over the tokens; blind to their lengths."""
    output, target = _wide(output, target)
    return 1 - F.cosine_similarity(output, target, dim=-1).mean()


def _wide(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(output.dtype, torch.float32)
    return output.to(dtype), target.to(output.device, dtype)


LOSSES: dict[str, Error] = {"mse": _mse, "nmse": _nmse, "cosine": _cosine}


def weight(loss: str, target: Tensor) -> float:
    """How much a window's loss counts for that of several at once, which is their mean with these weights."""
    return float(_wide(target, target)[1].square().sum()) if loss == "nmse" else 1.0
