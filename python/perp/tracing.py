"""What the children of a block do with a probe: in which order they run, what feeds what, where tokens are mixed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perp.blocks import Arguments, run_block


@dataclass
class ChildCall:
    """One run of a child of the block. The tensors are kept alive, so that no two of them share memory by accident."""

    child: str
    module: nn.Module
    inputs: list[Tensor]
    values: list[Tensor]
    output: Any
    mixed: bool = False

    @property
    def holds_weights(self) -> bool:
        return any(parameter.ndim >= 2 for parameter in self.module.parameters())

    def feeds(self, other: ChildCall) -> bool:
        """Whether `other` reads the very memory that this call returned, be it reshaped."""
        returned = {tensor.untyped_storage().data_ptr() for tensor in tensors(self.output)}
        return any(tensor.untyped_storage().data_ptr() in returned for tensor in other.inputs)


def trace(block: nn.Module, probe: Tensor, arguments: Arguments) -> tuple[list[ChildCall], Tensor]:
    """The calls of the block's children on `probe` [1, T, H], in order, and the block's output.

    A call is `mixed` where its input at later positions depends on the first token: seen by running the block a second
    time on a probe that differs in that token alone. No calls are returned where the two runs took different ways.
    """
    calls, output = _run(block, probe, arguments)
    changed = probe.clone()
    # A norm would make the same of zeros, such as the embedding of padding, and of a constant.
    ramp = torch.linspace(-1, 1, probe.shape[-1], dtype=probe.dtype, device=probe.device)
    changed[:, 0] = ramp - 2 * changed[:, 0]
    again, _ = _run(block, changed, arguments)
    if [call.child for call in calls] != [call.child for call in again]:
        return [], output
    for call, other in zip(calls, again, strict=True):
        call.mixed = _differ_later(call.values, other.values, probe.shape[1])
    return calls, output


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def _children(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The direct children; in place of a container, which is never called itself, the modules it holds."""
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _children(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _run(block: nn.Module, probe: Tensor, arguments: Arguments) -> tuple[list[ChildCall], Tensor]:
    calls: list[ChildCall] = []

    def watch(name: str, child: nn.Module) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs = list(tensors((args, kwargs)))
            # Copies for the comparison: the block may go on to write into the originals.
            calls.append(ChildCall(name, module, inputs, [tensor.clone() for tensor in inputs], output))

        return child.register_forward_hook(hook, with_kwargs=True)

    hooks = [watch(name, child) for name, child in _children(block)]
    try:
        return calls, run_block(block, probe, arguments)
    finally:
        for hook in hooks:
            hook.remove()


def _differ_later(ones: list[Tensor], others: list[Tensor], tokens: int) -> bool:
    """Whether any pair differs beyond the first token, tensors being [1, tokens, ...] or [tokens, ...]."""
    if len(ones) != len(others):
        return True
    for one, other in zip(ones, others, strict=True):
        if one.shape[:2] == (1, tokens):
            one, other = one[:, 1:], other[:, 1:]
        elif one.shape[:1] == (tokens,):
            one, other = one[1:], other[1:]
        if not torch.equal(one, other):
            return True
    return False
