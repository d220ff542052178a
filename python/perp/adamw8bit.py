"""AdamW with moments of 8 bits (Dettmers et al. 2022, arXiv 2110.02861): torchao's, for `perp.optim`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from perp.errors import UserError

logger = logging.getLogger("perp")

# Numbers that share a scale, and the least that a tensor has for 8 bits: torchao's and the paper's.
BLOCK, LEAST = 256, 4096
# Uncompiled, a step makes 55 bytes of temporaries for each number of the tensor in hand; of a piece, they are 58 MB.
PIECE = 1 << 20
_SIGNED = {"exp_avg": True, "exp_avg_sq": False}


def load() -> tuple[Any, Any]:
    """torchao's optimiser and the class of its moments; UserError without torchao."""
    try:
        from torchao.optim import AdamW8bit as Optimiser
        from torchao.optim.subclass_8bit import OptimState8bit as Moment
    except ImportError as error:
        raise UserError("the optimizer adamw8bit needs torchao: pip install 'perp[adamw8bit]'.") from error
    # Where it is compiled, torch tells that its cache will not keep the result.
    warnings.filterwarnings("ignore", "OptimState8bit does not implement _stable_hash")
    return Optimiser, Moment


class AdamW8bit:
    """What `perp.optim.AdamW` uses of torch.optim.AdamW (weight decay 0), over fp32 `tensors` updated in place.

    A moment is a byte for each number and a scale for each 256, so that both take 2.03 bytes where fp32 ones take 8; a
    tensor of less than 4096 numbers keeps fp32 ones. Where all gradients were zero both moments are exactly zero, and
    the number stays where it is: pruned weights stay zero.

    A second moment below 1.6e-7 of its block's largest, which is what gradients below 4e-4 of the largest make, becomes
    0; their first moment does not. Left so, as published, a number whose next gradient is zero would move by its first
    moment over eps, thousands of times the rate: the embedding of a token that a batch lacks, an expert without tokens.
    Here a first moment whose second moment is 0 becomes 0 as well.
    """

    def __init__(self, tensors: Iterable[Tensor], lr: float) -> None:
        optimiser, self.moment = load()
        self.tensors = list(tensors)
        self.param_groups: list[dict[str, Any]] = [{"lr": lr}]
        large = [tensor for tensor in self.tensors if tensor.numel() >= LEAST and tensor.is_contiguous()]
        small = [tensor for tensor in self.tensors if tensor.numel() < LEAST or not tensor.is_contiguous()]
        self.compiled = bool(large) and large[0].device.type != "cpu" and compiles(large[0].device)
        self.pieces = [(tensor, self._cut(tensor)) for tensor in large]
        pieces = [piece for _, cut in self.pieces for piece in cut]
        self.small = torch.optim.AdamW(small, lr=lr, weight_decay=0.0) if small else None
        self.large: Any = optimiser(pieces, lr=lr, weight_decay=0.0, block_size=BLOCK) if pieces else None

    @torch.no_grad()
    def step(self) -> None:
        """Update all tensors that have a gradient, at the rate in `param_groups`."""
        rate = self.param_groups[0]["lr"]
        if self.small:
            self.small.param_groups[0]["lr"] = rate
            self.small.step()
        if self.large:
            self.large.param_groups[0]["lr"].fill_(rate)
            self._step_large()

    def _step_large(self) -> None:
        moved: list[Tensor] = []
        for tensor, pieces in self.pieces:
            if tensor.grad is not None:
                for piece, gradient in zip(pieces, self._cut(tensor.grad), strict=True):
                    piece.grad = gradient
                moved += pieces
        with nullcontext() if self.compiled else torch.compiler.set_stance("force_eager"):
            self.large.step()
        for piece in moved:
            piece.grad = None
            state = self.large.state[piece]
            first, second = state["exp_avg"], state["exp_avg_sq"]
            if isinstance(first, self.moment):
                first.codes.masked_fill_(second.codes == 0, torch.searchsorted(first.qmap, 0.0))

    def zero_grad(self) -> None:
        for tensor in self.tensors:
            tensor.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, shared, and numbers."""

        def plain(value: Any) -> Any:
            return {"codes": value.codes, "scale": value.scale} if isinstance(value, self.moment) else value

        states = [self.large.state[piece] for _, pieces in self.pieces for piece in pieces]
        return {
            "small": self.small.state_dict() if self.small else None,
            "large": [{name: plain(value) for name, value in state.items()} for state in states],
        }

    def load_state_dict(self, told: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave over tensors of the same shapes."""
        if self.small:
            self.small.load_state_dict(told["small"])
        every = [piece for _, pieces in self.pieces for piece in pieces]
        for piece, state in zip(every, told["large"], strict=True):
            self.large.state[piece] = {name: self._restored(name, value, piece) for name, value in state.items()}

    def _restored(self, name: str, value: Any, piece: Tensor) -> Tensor:
        if name not in _SIGNED:
            return value.clone()  # the step, which torchao has on the CPU
        if isinstance(value, Tensor):
            return value.to(piece.device, copy=True)
        moment = self.moment.zeros(piece.shape, _SIGNED[name], BLOCK, piece.device, dtype=piece.dtype)
        moment.codes.copy_(value["codes"])
        moment.scale.copy_(value["scale"])
        return moment

    def _cut(self, tensor: Tensor) -> list[Tensor]:
        """The numbers of `tensor`, shared, in pieces that torchao takes: whole blocks, then what is left."""
        flat = tensor.detach().reshape(-1)
        whole = len(flat) // BLOCK * BLOCK
        pieces = flat[:whole].split(whole if self.compiled else PIECE)
        return [*pieces, flat[whole:]] if whole < len(flat) else list(pieces)


def compiles(device: torch.device) -> bool:
    """Whether torch.compile works on `device`. Uncompiled, torchao's step takes some ten times as long.

    A CPU is not asked by `AdamW8bit`: there a first compilation takes a minute, where there is a C++ compiler at all.
    """
    try:
        torch.compile(_probe, fullgraph=True)(torch.zeros(BLOCK, device=device))
    except Exception as error:  # of torch, Triton or a compiler: any of them is a reason to do without
        logger.warning(f"adamw8bit runs uncompiled, since torch.compile fails here: {str(error).splitlines()[0]}")
        return False
    return True


def _probe(x: Tensor) -> Tensor:
    return x + 1
