"""LoraLinear: a dense nn.Linear with a classical LoRA adapter beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perp.modes import low_rank


class LoraLinear(nn.Linear):
    """y = x (W + scale · B A)^T + bias over the parameters of an nn.Linear, which are shared and not copied.

    A = `lora_A` [r, in_features], B = `lora_B` [out_features, r], both fp32 (fp64 beside fp64 weights). W may be
    pruned: its zeros stay, since B A, which has none, is never added to it.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, linear: nn.Linear, A: Tensor, B: Tensor, scale: float) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.scale = linear.weight, scale
        self.register_parameter("bias", linear.bias)
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(A.to(linear.weight.device, dtype))
        self.lora_B = nn.Parameter(B.to(linear.weight.device, dtype))
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self.scale * low_rank(x, self.lora_A, self.lora_B)
