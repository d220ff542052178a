"""How much memory the stages of a job take: the tensors alive at once, counted; in bytes."""

from __future__ import annotations

from collections.abc import Iterator

from perp.loss import LOGITS
from perp.workload import Shape, UnitShape, Work

# Bytes of temporaries per element of the largest weight while its mask is chosen: fp32 scores and what ranks them.
SELECT = 14
# Activations of a unit kept for its backward pass and formed in it, as a multiple of what its linears read and give.
GRAPH = 2.0


def of_pruning(shape: Shape, work: Work) -> int:
    """The most that is allocated beside the model and the hidden states while one block is pruned and fitted."""
    held = sum(sums(shape, work.statistics))
    peaks = []
    pruned = 0
    for unit in shape.units:
        largest = max((outputs * inputs for outputs, inputs in unit.linears), default=0)
        # Its pruned weights stand beside those of the units before it, which are pruned too.
        pruned += unit.weights * shape.itemsize
        select = SELECT * largest
        if work.statistics == "gram":
            # The damped Gram, its inverse and the factor; the weight in fp32 and its mask.
            select = 3 * 4 * max((inputs for _, inputs in unit.linears), default=0) ** 2 + 6 * largest
        dense = unit.weights * shape.itemsize
        # On a GPU the whole block is there already; packed, a unit has given up its dense weights.
        beside = largest * shape.itemsize if work.gpu else pruned
        peaks.append(beside + select)
        if work.trained:
            peaks.append((0 if work.gpu else pruned) - dense + _fit(unit, shape, work))
    return held + max(peaks, default=0)


def _fit(unit: UnitShape, shape: Shape, work: Work) -> int:
    kept, wide = work.kept * unit.weights, 4 if shape.itemsize < 4 else 0
    packed = kept * shape.itemsize + unit.weights / 8
    graph = _graph_of(unit, shape, work.batch * work.seqlen)
    masks = 0 if work.gpu else unit.weights  # a byte each, in memory
    if work.trained == "mask_lora":
        adapters = work.rank * sum(outputs + inputs for outputs, inputs in unit.linears)
        # Beside adapters weights are dense, with their zeros.
        packed = unit.weights * (shape.itemsize + 1 / 8)
        return round(2 * packed + masks + adapters * 4 * 4 + graph)
    largest = work.kept * max((outputs * inputs for outputs, inputs in unit.linears), default=0)
    begun = kept * shape.itemsize
    masters, moments = kept * wide, 8 * kept
    backward = kept * shape.itemsize + graph
    step = 4 * kept + 2 * 4 * largest
    return round(packed + begun + masks + masters + moments + max(backward, step))


def of_retraining(shape: Shape, work: Work) -> int:
    """Adapters with gradient and moments in fp32, the graphs alive at once, and a chunk of logits."""
    adapters = work.rank * sum(outputs + inputs for unit in shape.units for outputs, inputs in unit.linears)
    graph = sum(_graph_of(unit, shape, work.seqlen) for unit in shape.units)
    entering = shape.blocks * work.seqlen * shape.hidden * shape.itemsize
    # What is kept for the backward pass is half of a graph at its peak; the rest is formed for one block at a time.
    alive = graph + entering if work.checkpointing else (shape.blocks + 1) * graph / 2
    return round(16 * shape.blocks * adapters + alive + _logits(shape, work))


def of_judging(shape: Shape, work: Work) -> int:
    """A chunk of logits, or the largest unit's activations."""
    forward = max(_graph_of(unit, shape, work.seqlen) for unit in shape.units) / 2
    return round(max(_logits(shape, work), forward))


def _logits(shape: Shape, work: Work) -> int:
    return 3 * 4 * min(LOGITS, work.seqlen * shape.vocabulary)


def _graph_of(unit: UnitShape, shape: Shape, tokens: int) -> float:
    return GRAPH * tokens * shape.itemsize * sum(outputs + inputs for outputs, inputs in unit.linears)


def sums(shape: Shape, statistics: str | None) -> Iterator[int]:
    """Bytes of each linear's statistics; those that read the same share one."""
    seen = set()
    for at, unit in enumerate(shape.units):
        for _, inputs in unit.linears:
            if statistics and (at, inputs) not in seen:
                seen.add((at, inputs))
                yield 4 * inputs * (inputs if statistics == "gram" else 1)
