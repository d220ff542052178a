"""What the linears of a block are fed: the calibration statistics that the pruning methods read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

import perp_kernels as pk
from perp import distributed
from perp.blocks import ArgumentsOf, run_block
from perp.errors import UserError

Kind = Literal["norms", "gram"]


@dataclass
class Statistics:
    """fp32 sums over the tokens a linear was fed: x² per input ("norms", [K]) or the Gram XᵀX ("gram", [K, K]).

    For the projection of several experts each has its own, from the tokens routed to it: [E, K] or [E, K, K], and
    `routed` counts them, int64 [E].
    `held_out`: those of the windows that were held out, which are not in `sums`.
    """

    sums: Tensor
    tokens: int = 0
    routed: Tensor | None = None
    held_out: Statistics | None = None

    def pooled(self) -> Statistics:
        """Those of all windows."""
        other = self.held_out
        if other is None:
            return self
        routed = None if self.routed is None or other.routed is None else self.routed + other.routed
        return Statistics(self.sums + other.sums, self.tokens + other.tokens, routed)

    @property
    def square_sums(self) -> Tensor:
        """The sums of squares per input, [K], of either kind."""
        return self.sums if self.sums.ndim == 1 else self.sums.diagonal()

    def of_expert(self, number: int) -> Statistics:
        """Those of one expert alone."""
        held_out = self.held_out and self.held_out.of_expert(number)
        return Statistics(self.sums[number], 0 if self.routed is None else int(self.routed[number]), held_out=held_out)

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

    def finish(self) -> None:
        """Add up what the ranks have seen, once each has seen its windows."""
        distributed.add_up_([self.sums])
        self.sums = self.sums.float()
        self.tokens = int(distributed.total(self.tokens))
        if self.routed is not None:
            distributed.add_up_([self.routed])


@torch.no_grad()
def collect(
    block: nn.Module,
    linears: Mapping[str, Any],
    inputs: Sequence[Tensor],
    arguments: ArgumentsOf,
    kind: Kind,
    held_out: Collection[int] = (),
) -> dict[str, Statistics]:
    """Run the block over this rank's windows; each linear's statistics of all ranks, by its name in `linears`.

    `inputs`: hidden states [1, T, H], one per window; `arguments(window_ids)`: the rest of the block's call. Linears
    that read the very same tensors in the first window (queries, keys and values do) share one object. The windows in
    `held_out` are summed apart. A linear that never ran has 0 tokens. UserError, naming the linear, where activations
    are NaN or infinite.
    """
    found = {name: _empty(linear, kind) for name, linear in linears.items()}
    for name, linear in linears.items():
        found[name].held_out = _empty(linear, kind) if held_out else None
    apart = False
    read: dict[str, list[Tensor]] = {name: [] for name in linears}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            ((apart and found[name].held_out) or found[name]).add(x, *args[1:])
            if name in read:
                read[name].append(x)

        return take

    hooks = {name: linear.register_forward_pre_hook(hook(name), with_kwargs=True) for name, linear in linears.items()}
    try:
        for window, hidden in enumerate(inputs):
            apart = distributed.number(window) in held_out
            run_block(block, hidden, arguments([window]))
            if window == 0:
                for name, same in distributed.agreed(_alike(read)).items():
                    found[name] = found[same]
                    hooks.pop(name).remove()
                read.clear()
    finally:
        for handle in hooks.values():
            handle.remove()
    for statistics in {id(one): one for one in found.values()}.values():
        for part in filter(None, (statistics, statistics.held_out)):
            part.finish()
    for name, statistics in found.items():
        parts = (statistics, statistics.held_out or statistics)
        if not all(part.sums.isfinite().all() for part in parts):
            raise UserError(f"the activations that {name} reads are NaN or infinite; load the model in float32.")
    return found


def _empty(linear: Any, kind: Kind) -> Statistics:
    K, experts = linear.in_features, linear.weight.shape[:-2]
    routed = torch.zeros(experts, dtype=torch.int64) if experts else None
    shape, dtype = ((*experts, K), torch.float64) if kind == "norms" else ((*experts, K, K), torch.float32)
    return Statistics(torch.zeros(shape, dtype=dtype, device=linear.weight.device), routed=routed)


def _alike(read: Mapping[str, list[Tensor]]) -> dict[str, str]:
    """Each linear that read the very same tensors, in the same order, as one before it -> the first of those."""
    first: dict[tuple[int, ...], str] = {}
    same: dict[str, str] = {}
    for name, tensors in read.items():
        leader = first.setdefault(tuple(id(tensor) for tensor in tensors), name)
        if tensors and leader != name:
            same[name] = leader
    return same
