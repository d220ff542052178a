"""Units other than the parts that a block is cut into: several blocks at once, and single linears."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from perp.activations import to_memory
from perp.blocks import Arguments, ArgumentsOf, Stop, find_blocks, run_block, to_block
from perp.experts import ExpertLinear
from perp.units import Unit, whole


@dataclass(frozen=True)
class Span(Unit):
    """Consecutive blocks as one unit: `block` is the list of all the model's blocks, `parts` are the span's own.

    It is called with the arguments of each of its blocks in turn. In training only the states between its blocks are
    kept: each block is computed again in the backward pass.
    """

    indices: range = range(0)
    parts: tuple[Unit, ...] = ()

    def __call__(self, hidden: Tensor, arguments: Sequence[Arguments]) -> Tensor:  # type: ignore[override]
        for unit, own in zip(self.parts, arguments, strict=True):
            if torch.is_grad_enabled():
                hidden = checkpoint(run_block, unit.block, hidden, own, use_reentrant=False)
            else:
                hidden = run_block(unit.block, hidden, own)
        return hidden


def spans(model: PreTrainedModel, count: int | None) -> Iterator[Span]:
    """The blocks of `model`, `count` at a time (all at once for None); the last span has what is left."""
    prefix, blocks = find_blocks(model)
    size = count or len(blocks)
    for start in range(0, len(blocks), size):
        indices = range(start, min(start + size, len(blocks)))
        parts = tuple(whole(blocks[i], f"{prefix}.{i}") for i in indices)
        yield Span(
            name=f"{prefix}.{indices[0]}" + (f" to {indices[-1]}" if len(indices) > 1 else ""),
            block=blocks,
            prefix=prefix,
            linear_names=tuple(
                f"{i}.{name}" for i, unit in zip(indices, parts, strict=True) for name in unit.linear_names
            ),
            norm_names=tuple(f"{i}.{name}" for i, unit in zip(indices, parts, strict=True) for name in unit.norm_names),
            indices=indices,
            parts=parts,
        )


@dataclass(frozen=True)
class Matrix(Unit):
    """One linear, from what it reads to what it gives: [b, T, in] to [b, T, out]. Norms belong to none."""

    def __call__(self, hidden: Tensor, arguments: Any) -> Tensor:
        linear = self.block.get_submodule(self.linear_names[0])
        return linear(to_block(hidden, self.block))

    def arguments(self, of_block: Callable[[Sequence[int]], Any]) -> Callable[[Sequence[int]], Any]:
        """What it is called with beside its input, by windows; `of_block`: what the block is."""
        return of_block

    def taken(self, window: int, input: Tensor) -> Tensor:
        """What is kept of a call of the linear, from its arguments."""
        return input

    @torch.no_grad()
    def reads(self, block: nn.Module, hidden: Iterable[Tensor], arguments: ArgumentsOf) -> Iterator[Tensor]:
        """What the linear reads, for each window, while `block` runs (its own, or a copy); nothing if it never runs."""
        for window, state in enumerate(hidden):
            found: list[Tensor] = []

            def take(
                _: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                found: list[Tensor] = found,
                window: int = window,
            ) -> None:
                found.append(self.taken(window, *args, **kwargs))
                raise Stop

            hook = block.get_submodule(self.linear_names[0]).register_forward_pre_hook(take, with_kwargs=True)
            try:
                with suppress(Stop):
                    run_block(block, state, arguments([window]))
            finally:
                hook.remove()
            if found:
                yield to_memory(found[0].clone())


@dataclass(frozen=True)
class ExpertMatrices(Matrix):
    """The same projection of several experts. T is the tokens times their experts, sorted by expert; `ends` has, for
    each window, where each expert's end, int64 [E]."""

    ends: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, hidden: Tensor, arguments: Sequence[Tensor]) -> Tensor:  # type: ignore[override]
        linear = self.block.get_submodule(self.linear_names[0])
        return torch.stack([linear(x, ends) for x, ends in zip(to_block(hidden, self.block), arguments, strict=True)])

    def arguments(self, of_block: Callable[[Sequence[int]], Any]) -> Callable[[Sequence[int]], Any]:
        return lambda windows: [self.ends[window] for window in windows]

    def taken(self, window: int, input: Tensor, ends: Tensor) -> Tensor:  # type: ignore[override]
        self.ends[window] = ends
        return input[None]


def matrices(unit: Unit) -> list[Matrix]:
    """The linears of a block, each as a unit, in module order; the same projection of all experts is one."""
    kinds = {name: isinstance(unit.block.get_submodule(name), ExpertLinear) for name in unit.linear_names}
    return [
        (ExpertMatrices if experts else Matrix)(
            f"{unit.prefix}.{name}", unit.block, unit.prefix, (name,), (), end=("output", name)
        )
        for name, experts in kinds.items()
    ]
