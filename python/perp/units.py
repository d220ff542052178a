"""Units: the parts of a block that are fitted one at a time, found from what the block does with a probe.

A sequential block is cut where the normalisation that feeds its second part begins (attention and MLP apart, as in A
Free Lunch in LLM Compression, arXiv 2510.14444); a parallel block falls into its branches; any other block is one unit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from perp.blocks import (
    Arguments,
    Calls,
    Enter,
    Stop,
    close,
    find_blocks,
    hidden_of,
    is_norm,
    replaced_forwards,
    run_block,
    to_block,
)
from perp.errors import UserError
from perp.experts import linears
from perp.models import load
from perp.tracing import ChildCall, trace

# A prime number of probe tokens, so that no head count or width of a model is mistaken for it.
PROBE = 13


@dataclass(frozen=True)
class Unit:
    """A part of a block with an input and an output of its own, both hidden states [b, T, H].

    It is the block, run with each child in `stubs` returning zeros (or its input) instead of its result, up to its
    `end`: the end of the block (None), or the input or the output of one child. `follows`: its input is the output of
    the unit before it, otherwise the block's. Modules are held by name, so that a unit stays valid when its linears are
    swapped.
    """

    name: str
    block: nn.Module
    prefix: str
    linear_names: tuple[str, ...]
    norm_names: tuple[str, ...]
    stubs: dict[str, Callable[[Tensor], Any]] = field(default_factory=dict)
    end: tuple[Literal["input", "output"], str] | None = None
    follows: bool = False

    @property
    def linears(self) -> dict[str, Any]:
        """The unit's linears by qualified name: nn.Linear, those of open experts, or what they were swapped for."""
        return {f"{self.prefix}.{name}": self.block.get_submodule(name) for name in self.linear_names}

    @property
    def norms(self) -> dict[str, nn.Module]:
        """The norms that are trained with this unit, by qualified name."""
        return {f"{self.prefix}.{name}": self.block.get_submodule(name) for name in self.norm_names}

    def __call__(self, hidden: Tensor, arguments: Arguments) -> Tensor:
        """The unit's output [b, T, H] for `hidden` [b, T, H]; the block is run no further than its `end`."""
        hidden = to_block(hidden, self.block)
        zeros = [make(hidden) for make in self.stubs.values()]
        stubbed = [self.block.get_submodule(name) for name in self.stubs]
        with replaced_forwards(stubbed, lambda index, _: lambda *args, **kwargs: zeros[index]):
            if self.end is None:
                return run_block(self.block, hidden, arguments)
            found: list[Tensor] = []

            def stop(tensor: Tensor) -> None:
                found.append(tensor)
                raise Stop

            with self.tapped(stop, hidden.shape), suppress(Stop):
                run_block(self.block, hidden, arguments)
            return found[0]

    @contextmanager
    def tapped(self, sink: Callable[[Tensor], None], shape: torch.Size) -> Iterator[None]:
        """For the duration, every run of the block hands this unit's output, viewed as `shape`, to `sink`."""
        side, child = self.end or ("output", "")
        module = self.block.get_submodule(child)
        if side == "output":
            hook = module.register_forward_hook(lambda _, args, output: sink(hidden_of(output, shape)))
        else:
            hook = module.register_forward_pre_hook(
                lambda _, args, kwargs: sink(hidden_of((*args, *kwargs.values()), shape)), with_kwargs=True
            )
        try:
            yield
        finally:
            hook.remove()


def units(
    source: PreTrainedModel | str | Path,
    windows: Tensor | None = None,
    granularity: str = "half-block",
    calls: Calls | None = None,
    enter: Enter | None = None,
) -> Iterator[tuple[int, list[Unit]]]:
    """Walk a model, in memory or in a directory (which is loaded): yields each block's index and its units.

    `granularity`: "half-block" or "block"; `perp.spans` has single matrices and several blocks.

    `windows` (int64 [n, T]) lends the tokens of the probe; without it they are the first of the vocabulary. The probe
    advances when the caller is done with a block, so a caller may change blocks as it goes. The first block that cannot
    be cut gives the only warning. `calls`: those of the model with other windows. `enter` brings a block's weights
    until the caller is done with the block.
    """
    if granularity not in ("block", "half-block"):
        raise UserError(f"{granularity!r} is no granularity of a single block; choose block or half-block.")
    if not isinstance(source, PreTrainedModel):
        source, _ = load(str(source))
    prefix, blocks = find_blocks(source)
    enter = enter or (lambda index: nullcontext())
    if granularity == "block":
        for index, block in enumerate(blocks):
            with enter(index):
                yield index, [whole(block, f"{prefix}.{index}")]
        return
    probe = torch.arange(PROBE)[None] if windows is None else windows[:1, :PROBE]
    calls = Calls(source, probe, enter, forms=calls.forms if calls else None)
    warned = False
    for index, block in enumerate(blocks):
        with enter(index):
            arguments = calls.arguments(index, [0])
            parts = split(block, f"{prefix}.{index}", calls.hidden[0], arguments)
            if len(parts) == 1 and not warned:
                warnings.warn(
                    f"{prefix}.{index} cannot be cut in halves or branches; such blocks stay whole.", stacklevel=2
                )
                warned = True
            yield index, parts
            with torch.no_grad():
                calls.hidden[0] = run_block(block, calls.hidden[0], arguments)


@torch.no_grad()
def split(block: nn.Module, prefix: str, probe: Tensor, arguments: Arguments) -> list[Unit]:
    """The half-blocks or the parallel branches of `block`, or the block as one unit where neither is found.

    `probe`: a hidden state [1, T, H] with T >= 2, on which the block is run a few times; `arguments`: its call's rest.
    What is found is verified on the probe: the halves one after the other must compute what the block does, and each
    branch alone what it does beside the others.
    """
    calls, output = trace(block, probe, arguments)
    tokens = probe.shape[1]
    for boundary in range(len(calls)):
        if not _begins_second_half(calls, boundary):
            continue
        # Most blocks add the stream to what attention gives; some hand the stream to attention, which adds it.
        for stream in (None, probe.shape):
            first, second = _halves(block, prefix, calls, boundary, tokens, stream)
            if close(second(first(probe, arguments), arguments), output):
                return [first, second]
    branches = _branches(block, prefix, calls, tokens)
    if branches and all(close(unit(probe, arguments), hidden_of(result, probe.shape)) for unit, result in branches):
        return [unit for unit, _ in branches]
    return [whole(block, prefix)]


def _begins_second_half(calls: list[ChildCall], at: int) -> bool:
    """A norm of what attention has already mixed, whose output is read by a child with weights.

    The norms after a sub-layer, whose output only joins the residual stream, feed no child.
    """
    norm = calls[at]
    return (
        norm.mixed and is_norm(norm.module) and any(norm.feeds(call) for call in calls[at + 1 :] if call.holds_weights)
    )


def _halves(
    block: nn.Module, prefix: str, calls: list[ChildCall], at: int, tokens: int, stream: torch.Size | None
) -> tuple[Unit, Unit]:
    """The block up to the input of the norm at `at`, and the rest, in which all that ran before that adds nothing.

    With `stream`, the shape of a hidden state, the last child with weights before the norm lets the stream through.
    """
    earlier = {call.child: call.output for call in calls[:at]}
    later = {call.child for call in calls[at:]}
    stubs = {child: _zeros(output, tokens) for child, output in earlier.items() if child not in later}
    last = next((call for call in reversed(calls[:at]) if call.holds_weights and call.child in stubs), None)
    if last and stream:
        stubs[last.child] = _zeros(last.output, tokens, stream)
    first, second = _share_out(block, dict.fromkeys(earlier, 0), default=1, count=2)
    return (
        Unit(f"{prefix} (first half)", block, prefix, *first, end=("input", calls[at].child)),
        Unit(f"{prefix} (second half)", block, prefix, *second, stubs=stubs, follows=True),
    )


def _branches(block: nn.Module, prefix: str, calls: list[ChildCall], tokens: int) -> list[tuple[Unit, Any]]:
    """Each child with weights as a unit, and what it returned, if they are two or more and none reads mixed tokens.

    A norm belongs to the branch it feeds: to the first where branches share one. A linear directly in the block is half
    a branch at most, so there is no branch to name.
    """
    parallel = [call for call in calls if call.holds_weights]
    children = [call.child for call in parallel]
    if len(children) < 2 or len(set(children)) < len(children):
        return []
    if any(call.mixed or isinstance(call.module, nn.Linear) for call in parallel):
        return []
    owner = {call.child: next((i for i, branch in enumerate(parallel) if call.feeds(branch)), 0) for call in calls}
    owner |= {child: i for i, child in enumerate(children)}
    zeros = {call.child: _zeros(call.output, tokens) for call in parallel}
    shares = _share_out(block, owner, default=0, count=len(children))
    return [
        (
            Unit(
                f"{prefix}.{call.child}",
                block,
                prefix,
                *share,
                stubs={child: zeros[child] for child in children if child != call.child},
                end=("output", call.child),
            ),
            call.output,
        )
        for call, share in zip(parallel, shares, strict=True)
    ]


def whole(block: nn.Module, prefix: str) -> Unit:
    """The whole of `block` as one unit."""
    return Unit(prefix, block, prefix, *_share_out(block, {}, default=0, count=1)[0])


_Names = tuple[str, ...]


def _share_out(block: nn.Module, owner: dict[str, int], default: int, count: int) -> list[tuple[_Names, _Names]]:
    """The names of the linears and of the norms of each of `count` units.

    `owner`: which unit has what is in a child of the block; `default` has what is in children that never ran.
    """

    def of(name: str) -> int:
        return next((i for child, i in owner.items() if f"{name}.".startswith(f"{child}.")), default)

    own = linears(block)
    norms = [name for name, module in block.named_modules() if is_norm(module)]
    return [
        (tuple(name for name in own if of(name) == i), tuple(name for name in norms if of(name) == i))
        for i in range(count)
    ]


def _zeros(output: Any, tokens: int, stream: torch.Size | None = None) -> Callable[[Tensor], Any]:
    """For a hidden state [b, T, H]: zeros in the structure of `output`, which a child returned for [1, tokens, H].

    Only tensors of one row per token are made; others (attention weights, say) become None. A tensor of the shape
    `stream` is the hidden state itself in place of zeros.
    """
    if isinstance(output, (tuple, list)):
        items = [_zeros(item, tokens, stream) for item in output]
        return lambda hidden: type(output)(make(hidden) for make in items)
    if isinstance(output, Tensor) and output.shape == stream:
        return lambda hidden: hidden
    if isinstance(output, Tensor) and output.shape[:2] == (1, tokens):
        return lambda hidden: hidden.new_zeros(*hidden.shape[:2], *output.shape[2:])
    if isinstance(output, Tensor) and output.shape[:1] == (tokens,):
        return lambda hidden: hidden.new_zeros(hidden.shape[:2].numel(), *output.shape[1:])
    return lambda hidden: None
