"""What decides what a job takes: the shape of the model, from its configuration alone, and what is to be done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from perp.blocks import find_blocks


@dataclass(frozen=True)
class UnitShape:
    """`linears`: (outputs, inputs) of each; `other`: numbers in its norms and biases."""

    linears: tuple[tuple[int, int], ...]
    other: int = 0

    @property
    def weights(self) -> int:
        return sum(outputs * inputs for outputs, inputs in self.linears)


@dataclass(frozen=True)
class Shape:
    """A model: the units of its largest block, and the numbers in all blocks and in what is outside them."""

    blocks: int
    units: tuple[UnitShape, ...]
    inside: int
    outside: int
    hidden: int
    vocabulary: int
    itemsize: int

    @property
    def block(self) -> int:
        """Numbers in the largest block."""
        return sum(unit.weights + unit.other for unit in self.units)

    @property
    def bytes(self) -> int:
        return (self.inside + self.outside) * self.itemsize


@dataclass(frozen=True)
class Work:
    """What is to be done. `states`: how many states of the model are judged, on `judged` windows in all.

    `statistics`: what the method needs; `trained`: "kept", "mask_lora" or None where nothing is fitted; `passes`: how
    often the model is pruned, the first time with what is fitted, the others for the line without recovery. `steps`: of
    retraining with adapters, of `step_batch` windows each, one at a time, `trainings` times in all; `checkpointing`:
    with activations recomputed. `loads`: how often the model is read.
    """

    windows: int
    seqlen: int
    kept: float = 0.5
    statistics: str | None = "norms"
    trained: str | None = "kept"
    epochs: int = 3
    batch: int = 2
    rank: int = 16
    judged: int = 0
    states: int = 0
    passes: int = 1
    packed: bool = False
    gpu: bool = False
    steps: int = 0
    step_batch: int = 4
    trainings: int = 1
    checkpointing: bool = True
    loads: int = 1


def shape_of(model: Any, granularity: str = "half-block") -> Shape:
    """The shape of a model of transformers, which may be without data."""
    _, blocks = find_blocks(model)
    largest = max(blocks, key=_count)
    config = model.config.get_text_config()
    inside = _count(blocks)
    return Shape(
        blocks=len(blocks),
        units=tuple(_units(largest, granularity)),
        inside=inside,
        outside=sum(weight.numel() for weight in model.parameters()) - inside,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        itemsize=model.dtype.itemsize,
    )


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _units(block: nn.Module, granularity: str) -> Iterator[UnitShape]:
    """The block's halves as its children's names tell them, since nothing can be computed without data.

    `perp.units` finds the real ones; where it finds no halves, the plan is that of smaller units than there are.
    """
    groups: dict[bool, list[tuple[int, int]]] = {}
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            child = block.get_submodule(name.partition(".")[0])
            mixes = granularity == "half-block" and "attention" in type(child).__name__.lower()
            groups.setdefault(mixes, []).append((module.out_features, module.in_features))
    inside = sum(outputs * inputs for linears in groups.values() for outputs, inputs in linears)
    other = _count(block) - inside
    for number, mixes in enumerate(sorted(groups, reverse=True)):
        yield UnitShape(tuple(groups[mixes]), other if number == 0 else 0)
