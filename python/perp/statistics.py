"""What the linears of a block are fed: the calibration statistics that the pruning methods read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

import perp_kernels as pk
from perp.blocks import ArgumentsOf, run_block
from perp.errors import UserError

Kind = Literal["norms", "gram"]


@dataclass
class Statistics:
    """fp32 sums over the tokens a linear was fed: x² per input ("norms", [K]) or the Gram XᵀX ("gram", [K, K]).

    For the projection of several experts each has its own, from the tokens routed to it: [E, K] or [E, K, K], and
    `routed` counts them, int64 [E].
    """

    sums: Tensor
    tokens: int = 0
    routed: Tensor | None = None

    @property
    def square_sums(self) -> Tensor:
        """The sums of squares per input, [K], of either kind."""
        return self.sums if self.sums.ndim == 1 else self.sums.diagonal()

    def of_expert(self, number: int) -> Statistics:
        """Those of one expert alone."""
        return Statistics(self.sums[number], 0 if self.routed is None else int(self.routed[number]))

    def add(self, x: Tensor, offsets: Tensor | None = None) -> None:
        """Take in the tokens `x` [..., K]; with experts sorted by expert, whose tokens end at `offsets`, int64 [E]."""
        x = x.reshape(-1, x.shape[-1])
        self.tokens += len(x)
        if offsets is not None:
            assert self.routed is not None
            self.routed += offsets.diff(prepend=offsets.new_zeros(1)).to(self.routed.device)
        if self.sums.ndim == (2 if self.routed is None else 3):
            pk.gram_(self.sums, x, offsets)
        elif offsets is None:
            self.sums += x.float().square().sum(0)
        else:
            for own, (start, stop) in zip(self.sums, pairwise([0, *offsets.tolist()]), strict=True):
                own += x[start:stop].float().square().sum(0)


@torch.no_grad()
def collect(
    block: nn.Module,
    linears: Mapping[str, Any],
    inputs: Sequence[Tensor],
    arguments: ArgumentsOf,
    kind: Kind,
) -> dict[str, Statistics]:
    """Run the block over all windows and return each linear's statistics by its name in `linears`.

    `inputs`: hidden states [1, T, H], one per window; `arguments(window_ids)`: the rest of the block's call. Linears
    that read the very same tensors in the first window (queries, keys and values do) share one object. A linear that
    never ran has 0 tokens. UserError, naming the linear, where activations are NaN or infinite.
    """
    found = {name: _empty(linear, kind) for name, linear in linears.items()}
    read: dict[str, list[Tensor]] = {name: [] for name in linears}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            found[name].add(x, *args[1:])
            if name in read:
                read[name].append(x)

        return take

    hooks = {name: linear.register_forward_pre_hook(hook(name), with_kwargs=True) for name, linear in linears.items()}
    try:
        for window, hidden in enumerate(inputs):
            run_block(block, hidden, arguments([window]))
            if window == 0:
                for name, same in _alike(read).items():
                    found[name] = found[same]
                    hooks.pop(name).remove()
                read.clear()
    finally:
        for handle in hooks.values():
            handle.remove()
    for name, statistics in found.items():
        if not statistics.sums.isfinite().all():
            raise UserError(f"the activations that {name} reads are NaN or infinite; load the model in float32.")
    return found


def _empty(linear: Any, kind: Kind) -> Statistics:
    K, experts = linear.in_features, linear.weight.shape[:-2]
    routed = torch.zeros(experts, dtype=torch.int64) if experts else None
    sums = torch.zeros((*experts, K) if kind == "norms" else (*experts, K, K), device=linear.weight.device)
    return Statistics(sums, routed=routed)


def _alike(read: Mapping[str, list[Tensor]]) -> dict[str, str]:
    """Each linear that read the very same tensors, in the same order, as one before it -> the first of those."""
    first: dict[tuple[int, ...], str] = {}
    same: dict[str, str] = {}
    for name, tensors in read.items():
        leader = first.setdefault(tuple(id(tensor) for tensor in tensors), name)
        if tensors and leader != name:
            same[name] = leader
    return same
