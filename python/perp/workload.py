"""What decides what a job takes: the shape of the model, from its configuration alone, and what is to be done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from perp import experts, graph
from perp.blocks import find_blocks
from perp.graph import Graph

# What the configurations of transformers call the number of experts that a token goes through.
_USED = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")


@dataclass(frozen=True)
class UnitShape:
    """`linears`: (outputs, inputs) of each; `other`: numbers in its norms and biases.

    `experts`: (how many, outputs, inputs) of each projection of several experts, of which a token goes through `used`.
    """

    linears: tuple[tuple[int, int], ...]
    other: int = 0
    experts: tuple[tuple[int, int, int], ...] = ()
    used: int = 1

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(outputs, inputs) of every matrix that is pruned by itself, each expert's among them."""
        return (*self.linears, *((outputs, inputs) for count, outputs, inputs in self.experts for _ in range(count)))

    @property
    def weights(self) -> int:
        return sum(outputs * inputs for outputs, inputs in self.matrices)

    @property
    def passed(self) -> tuple[tuple[int, int], ...]:
        """(outputs, inputs) of the matrices that a token goes through."""
        used = ((min(count, self.used), outputs, inputs) for count, outputs, inputs in self.experts)
        return (*self.linears, *((outputs, inputs) for count, outputs, inputs in used for _ in range(count)))

    @property
    def active(self) -> int:
        """Weights that a token is multiplied with."""
        return sum(outputs * inputs for outputs, inputs in self.passed)


@dataclass(frozen=True)
class Shape:
    """A model: the units of its largest block, and the numbers in all blocks and in what is outside them.

    `active`: of the numbers in all blocks, those that a token meets (None: all). `graph`: of the largest block (None:
    not known). `head_keeps`: how many tensors as large as the logits the head keeps for its backward pass, beside those
    of the loss; soft-capping keeps one.
    """

    blocks: int
    units: tuple[UnitShape, ...]
    inside: int
    outside: int
    hidden: int
    vocabulary: int
    itemsize: int
    active: int | None = None
    graph: Graph | None = None
    head_keeps: int = 0

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

    `earlier`: the shares of weights kept in the cycles before the last one, each with a pruning like the last; the
    steps are of all cycles together. `taught`: windows whose states the dense model leaves for distillation, 0 without
    it. `narrow`: whether a wider model is trained in bf16. `moments`: bytes of retraining's optimiser for each number
    trained.
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
    earlier: tuple[float, ...] = ()
    taught: int = 0
    narrow: bool = False
    moments: int = 8

    @property
    def most_kept(self) -> float:
        """The largest share of weights that a cycle leaves."""
        return max(self.kept, *self.earlier) if self.earlier else self.kept

    def trained_itemsize(self, itemsize: int) -> int:
        """Bytes of a number of a model, of that many otherwise, while it is retrained."""
        return min(itemsize, 2) if self.narrow else itemsize


def shape_of(model: Any, granularity: str = "half-block") -> Shape:
    """The shape of a model of transformers, which may be without data."""
    _, blocks = find_blocks(model)
    largest = max(blocks, key=_count)
    config = model.config.get_text_config()
    inside, used = _count(blocks), experts_used(config)
    unused = sum(unit.weights - unit.active for block in blocks for unit in _units(block, granularity, used))
    return Shape(
        blocks=len(blocks),
        units=tuple(_units(largest, granularity, used)),
        inside=inside,
        outside=sum(weight.numel() for weight in model.parameters()) - inside,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        itemsize=model.dtype.itemsize,
        active=inside - unused if unused else None,
        graph=graph.of_block(model, largest),
        head_keeps=graph.of_head(model),
    )


def experts_used(config: Any) -> int | None:
    """How many experts a token goes through, as the configuration says; None where it does not say, so: all."""
    found = [getattr(config, name, None) for name in _USED]
    counts = [max(value) if isinstance(value, (list, tuple)) else value for value in found if value]
    return next((count for count in counts if isinstance(count, int) and count > 0), None)


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _units(block: nn.Module, granularity: str, used: int | None) -> Iterator[UnitShape]:
    """The block's halves as its children's names tell them, since nothing can be computed without data.

    `perp.units` finds the real ones; where it finds no halves, the plan is that of smaller units than there are.
    """
    groups: dict[bool, tuple[list[Any], Counter[tuple[int, int, int]]]] = {}
    listed = experts.listed(block)
    for name, linear in experts.linears(block).items():
        child = block.get_submodule(name.partition(".")[0])
        mixes = granularity == "half-block" and "attention" in type(child).__name__.lower()
        linears, several = groups.setdefault(mixes, ([], Counter()))
        size = (linear.out_features, linear.in_features)
        if linear.weight.ndim > 2:
            several[len(linear.weight), *size] += 1
        elif name in listed:
            several[listed[name], *size] += 1
        else:
            linears.append(size)
    found = []
    for mixes in sorted(groups, reverse=True):
        linears, several = groups[mixes]
        # Of a list of experts each has been counted, as often as there are experts.
        fused = [size for size, times in several.items() for _ in range(-(-times // (size[0] if listed else 1)))]
        found.append(UnitShape(tuple(linears), 0, tuple(fused), used or max((size[0] for size in fused), default=1)))
    other = _count(block) - sum(unit.weights for unit in found)
    for number, unit in enumerate(found):
        yield replace(unit, other=other if number == 0 else 0)
