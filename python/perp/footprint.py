"""How much memory the stages of a job take: the tensors alive at once, counted; in bytes."""

from __future__ import annotations

from collections.abc import Iterator

from perp.loss import LOGITS
from perp.workload import Shape, UnitShape, Work

# Bytes of AdamW's moments for each number trained, in fp32; of torchao's 8-bit ones with their scales.
MOMENTS, MOMENTS_8BIT = 8, 2
# Bytes of temporaries per element of the largest weight while its mask is chosen: fp32 scores and what ranks them.
SELECT = 14
# What a backward pass forms where that is not known, as a share of what is kept for it: between 0.35 and 0.57 in seven
# families.
FORMED = 0.5
# What a forward pass without gradients has in hand, as a share of what one with gradients keeps.
FORWARD = 0.5
# Tensors as large as a chunk of logits that are alive at once: judging (logits, fp32 and log-softmax), the step of the
# cross-entropy (log-softmax and two gradients), and what the divergence from a teacher adds to that.
JUDGED, STEP, TAUGHT = 2.5, 3, 3
# As many are made in a step, and twice for each that the head keeps.
MADE, MADE_TAUGHT, MADE_KEPT = 4, 12, 6
# What each training step leaves free in the heap between what is in use, as a share of its activations, and the most of
# all steps: a unit of SmolLM2-135M had 0.6 of them after 2 steps and up to 1.7 after 8.
HOLE, MOST_HOLES = 0.2, 1.6
# Blocks of memory up to this size come from the C library's heap; larger ones are mapped, and go back when freed.
MAPPED = 1 << 25


def of_pruning(shape: Shape, work: Work, stream: bool = True) -> int:
    """The most that is allocated beside the model and the hidden states while one block is pruned and fitted."""
    held = sum(sums(shape, work.statistics))
    peaks = []
    pruned = 0
    for unit in shape.units:
        largest = max((outputs * inputs for outputs, inputs in unit.matrices), default=0)
        fused = max([largest, *(count * outputs * inputs for count, outputs, inputs in unit.experts)])
        dense = unit.weights * shape.itemsize
        # Its pruned weights stand beside those of the units before it, which are pruned too; in memory the model
        # counts as pruned already.
        pruned += dense if stream else 0
        select = SELECT * largest
        if work.statistics == "gram":
            # The damped Gram, its inverse and the factor; the weight in fp32 and its mask.
            select = 3 * 4 * max((inputs for _, inputs in unit.matrices), default=0) ** 2 + 6 * largest
        # On a GPU the whole block is there already; packed, a unit has given up its dense weights.
        beside = fused * shape.itemsize if work.gpu else pruned
        peaks.append(beside + select)
        if work.trained:
            peaks.append((0 if work.gpu else pruned) - dense + _fit(unit, shape, work, stream))
    return held + max(peaks, default=0)


def _fit(unit: UnitShape, shape: Shape, work: Work, stream: bool = True) -> int:
    share, wide = work.most_kept, 4 if shape.itemsize < 4 else 0
    kept = share * unit.weights
    packed = kept * shape.itemsize + unit.weights / 8
    tokens = work.batch * work.seqlen
    graph = _kept(unit, shape, work, tokens) + _formed(shape, work, tokens)
    masks = unit.weights if stream and not work.gpu else 0  # a byte each, in memory; the model's own count with it
    narrow = kept * 2 if work.narrow and not wide else 0
    if work.trained == "mask_lora":
        adapters = work.rank * sum(outputs + inputs for outputs, inputs in unit.matrices)
        # Beside adapters weights are dense, with their zeros.
        packed = unit.weights * (shape.itemsize + 1 / 8)
        return round(2 * packed + masks + narrow + adapters * (8 + MOMENTS) + graph)
    largest = share * max((outputs * inputs for outputs, inputs in unit.matrices), default=0)
    begun = kept * shape.itemsize
    masters, moments = kept * wide, MOMENTS * kept
    backward = kept * shape.itemsize + graph
    step = 4 * kept + 2 * 4 * largest
    return round(packed + begun + masks + masters + narrow + moments + max(backward, step))


def of_retraining(shape: Shape, work: Work, heap: bool = False) -> int:
    """Adapters with gradient and moments in fp32, the graphs alive at once or a chunk of logits, and narrow copies.

    `heap`: freed logits stay in the heap. An aligned block that glibc has freed (before 2.38) does not serve the next
    of its size while what it was aligned by is in use: so all that a step makes count, not those alive.
    """
    adapters = work.rank * sum(outputs + inputs for unit in shape.units for outputs, inputs in unit.matrices)
    narrowed = work.trained_itemsize(shape.itemsize) / shape.itemsize
    graph = narrowed * sum(_kept(unit, shape, work, work.seqlen) for unit in shape.units)
    entering = narrowed * shape.blocks * work.seqlen * shape.hidden * shape.itemsize
    each = _chunk(shape, work)
    logits = (STEP + (TAUGHT if work.taught else 0) + shape.head_keeps) * each
    # Without checkpoints all graphs are there when the last block is gone back through; else one is made again.
    before = entering if work.checkpointing else shape.blocks * graph
    formed = narrowed * _formed(shape, work, work.seqlen)
    again = graph + formed if work.checkpointing else formed
    alive = (8 + work.moments) * shape.blocks * adapters + before + max(logits, again)
    if heap and each < MAPPED:
        made = MADE + (MADE_TAUGHT if work.taught else 0) + MADE_KEPT * shape.head_keeps
        alive += made * each - logits
    return round(alive)


def of_narrowing(shape: Shape, work: Work, share: float = 1.0) -> int:
    """The 16-bit copies of a wider model that computes in bf16, of which that share of the blocks' weights is held."""
    if work.trained_itemsize(shape.itemsize) == shape.itemsize:
        return 0
    return round(2 * (share * shape.inside + shape.outside))


def of_holes(shape: Shape, work: Work, batch: int, steps: int) -> int:
    """What so many training steps on the largest unit leave free in the heap; in memory, not to be had by others."""
    tokens = batch * work.seqlen
    graph = max(_kept(unit, shape, work, tokens) for unit in shape.units) + _formed(shape, work, tokens)
    return round(min(MOST_HOLES, HOLE * steps) * graph)


def of_judging(shape: Shape, work: Work) -> int:
    """A chunk of logits, or the largest unit's activations."""
    return round(max(JUDGED * _chunk(shape, work), of_forward(shape, work)))


def of_forward(shape: Shape, work: Work) -> int:
    """The activations that a window leaves behind it in the largest unit."""
    return round(max(FORWARD * _kept(unit, shape, work, work.seqlen) for unit in shape.units))


def of_teacher(shape: Shape, work: Work, stream: bool) -> int:
    """The dense model's states that wait for distillation: as it computes them, streamed in its own dtype."""
    itemsize = shape.itemsize if stream else work.trained_itemsize(shape.itemsize)
    return work.taught * work.seqlen * shape.hidden * itemsize


def _chunk(shape: Shape, work: Work) -> int:
    """Bytes of the logits held at once, in fp32."""
    return 4 * shape.vocabulary * min(max(1, LOGITS // shape.vocabulary), work.seqlen)


def _kept(unit: UnitShape, shape: Shape, work: Work, tokens: int) -> float:
    """Bytes kept for the unit's backward pass: its share of the block's, by what its linears read and give."""
    own, whole = _through(unit), sum(map(_through, shape.units))
    if shape.graph is None or not whole:
        return float(tokens * shape.itemsize * own)
    return shape.graph.kept.at(tokens, work.seqlen) * own / whole


def _formed(shape: Shape, work: Work, tokens: int) -> float:
    """Bytes that the backward pass of a block has in hand at most, in whichever of its units."""
    if shape.graph is None:
        return FORMED * max((_kept(unit, shape, work, tokens) for unit in shape.units), default=0.0)
    return shape.graph.formed.at(tokens, work.seqlen)


def _through(unit: UnitShape) -> int:
    return sum(outputs + inputs for outputs, inputs in unit.passed)


def sums(shape: Shape, statistics: str | None) -> Iterator[int]:
    """Bytes of each linear's statistics; those that read the same share one, of experts each has its own."""
    seen = set()
    for at, unit in enumerate(shape.units):
        for _, inputs in unit.linears:
            if statistics and (at, inputs) not in seen:
                seen.add((at, inputs))
                yield 4 * inputs * (inputs if statistics == "gram" else 1)
        for count, _, inputs in unit.experts:
            if statistics:
                yield 4 * count * inputs * (inputs if statistics == "gram" else 1)
