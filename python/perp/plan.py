"""What a job will take, before it begins: memory, disk and time from shapes, settings and a few rates of the machine.

`predict` is a pure function. Its memory is what the process or torch allocates beyond what it has when torch and
transformers are imported and the text is read; files that are mapped are not counted, since the system takes their
pages back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from perp.blocks import find_blocks

# What is allocated beside the tensors counted here: code paths run for the first time, buffers of torch's products.
OVERHEAD = 25_000_000
# What a process takes for each byte in use where freed memory stays in the heap.
HEAP = 1.5
# From so many bytes on, memory goes back at once (machine.give_back_memory). Less work is left alone: taking each block
# of memory anew cost SmolLM2-135M 15 % of the time, to save 50 MB.
GIVES_BACK = 150_000_000
# Bytes of temporaries per element of the largest weight while its mask is chosen: fp32 scores and what ranks them.
SELECT = 14
# Activations of a unit kept for its backward pass and formed in it, as a multiple of what its linears read and give.
GRAPH = 2.0
# A chunk of fp32 logits with what their loss takes: see perp.loss.
LOGITS = 3 * 4 << 23
# The share of the rate of a product alone that whole passes reach, fitted to a 135M and a 1.1B model on one core.
EFFICIENCY = 0.6
# Passes of a training step in units of a forward pass.
STEP = 3


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
    often the model is pruned (a second time for the line without recovery). `steps`: of retraining with adapters, of
    `step_batch` windows each, one at a time and with activations recomputed.
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


@dataclass(frozen=True)
class Rates:
    """Of the machine: products in the model's dtype (FLOP/s), memory and disk (bytes/s)."""

    flops: float
    memory: float
    disk: float


@dataclass(frozen=True)
class Budget:
    """Bytes that may be taken: of the GPU (0 without one), of memory, of the disk."""

    device: int
    host: int
    disk: int


@dataclass(frozen=True)
class Stage:
    """Peaks in bytes, and seconds, of one stage."""

    name: str
    device: int
    host: int
    disk: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """How the job is to be done, and what that takes. `activations`: "device", "memory" or "disk".

    `gives_back`: whether freed memory is to go back to the system at once.
    """

    stream: bool
    activations: str
    stages: tuple[Stage, ...]
    gives_back: bool = False

    @property
    def device(self) -> int:
        return max(stage.device for stage in self.stages)

    @property
    def host(self) -> int:
        return max(stage.host for stage in self.stages)

    @property
    def disk(self) -> int:
        return max(stage.disk for stage in self.stages)

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def fits(self, budget: Budget) -> bool:
        return self.device <= budget.device and self.host <= budget.host and self.disk <= budget.disk


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


def predict(shape: Shape, work: Work, rates: Rates, stream: bool, activations: str) -> Plan:
    """What the job takes with the model in memory or streamed, and the hidden states in that place."""
    model = shape.bytes
    # A weight read from its file as it is stays mapped until it is pruned; a mask takes a byte for each.
    whole = shape.inside * (shape.itemsize + 1)
    states = work.windows * work.seqlen * shape.hidden * shape.itemsize
    # Inputs and targets; each branch beyond the first has targets of its own.
    held = states * (2 if work.trained else 1)
    judged = work.judged * work.seqlen * shape.hidden * shape.itemsize if stream else 0
    disk = model * (2 if work.packed else 1) + round(shape.inside / 8)
    spilled = max(held, judged) if activations == "disk" else 0

    gives_back = stream and OVERHEAD + _prune_memory(shape, work) >= GIVES_BACK

    def stage(name: str, working: int, waiting: int, seconds: float) -> Stage:
        """`working`: beside the model, where it computes; `waiting`: hidden states."""
        device = host = 0
        resident = shape.block * shape.itemsize if stream else model
        if work.gpu:
            device = working + resident
            host = OVERHEAD + (shape.block if stream else shape.inside)
            device += waiting if activations == "device" else 0
        else:
            host = OVERHEAD + (0 if stream else whole) + round((1 if gives_back else HEAP) * working)
        host += waiting if activations == "memory" else 0
        return Stage(name, device, host, disk + spilled, seconds)

    read = model / rates.disk
    stages = []
    if work.judged:
        each = _forward(shape, work.judged, work.seqlen, rates) + read
        each += 2 * work.judged * work.seqlen * shape.hidden * shape.vocabulary / rates.flops
        working = max(LOGITS, _graph(shape, 1, work.seqlen))
        stages.append(stage("judge", working, judged, each * work.states))
    seconds = _prune_seconds(shape, work, rates) + (2 if stream else 1) * read
    stages.append(stage("prune", _prune_memory(shape, work), held, seconds * work.passes))
    if work.steps:
        seconds = work.steps * work.step_batch * (STEP + 1) * _forward(shape, 1, work.seqlen, rates)
        own = stage("retrain", _retrain_memory(shape, work), 0, seconds)
        if stream:
            # The packed weights stay mapped from their file, or are on the GPU.
            packed = round(shape.inside * (work.kept * shape.itemsize + 1 / 8)) if work.gpu else 0
            outside = shape.outside * shape.itemsize if work.gpu else 0
            own = replace(
                own, device=own.device + packed + outside, disk=own.disk + round(shape.bytes * (work.kept + 1))
            )
        stages.append(own)
    return Plan(stream, activations, tuple(stages), gives_back)


def choose(shape: Shape, work: Work, rates: Rates, budget: Budget, stream: bool | None = None) -> tuple[Plan, bool]:
    """The first way that fits the budget, from the fastest to the most sparing, and whether it does fit.

    `stream` settles that much beforehand. Where nothing fits, the plan is the most sparing one.
    """
    places = ("device", "memory", "disk") if work.gpu else ("memory", "disk")
    ways = [(False, "memory")] if stream is not True else []
    ways += [(True, place) for place in places] if stream is not False else []
    plans = [predict(shape, work, rates, *way) for way in ways]
    found = next((plan for plan in plans if plan.fits(budget)), None)
    return found or plans[-1], found is not None


def advice(shape: Shape, work: Work, rates: Rates, budget: Budget) -> str:
    """The setting to change where nothing fits: the mildest that helps."""
    milder: dict[str, Work] = {}
    if work.trained:
        milder["--reconstruct-batch 1"] = replace(work, batch=1)
        for part in (2, 4, 8):
            if work.windows >= part:
                milder[f"--windows {work.windows // part}"] = replace(work, windows=work.windows // part, batch=1)
        milder["--reconstruct-parts mask_lora,norms"] = replace(work, batch=1, trained="mask_lora")
        milder["--reconstruct none"] = replace(work, trained=None)
    for setting, other in milder.items():
        if choose(shape, other, rates, budget)[1]:
            return f"pass {setting}"
    plan, _ = choose(shape, work, rates, budget)
    if plan.disk > budget.disk:
        return f"choose an output directory on a disk with {plan.disk / 1e9:.3g} GB free"
    what = "GPU memory" if plan.device > budget.device else "memory"
    need = plan.device if plan.device > budget.device else plan.host
    return f"use a machine with {need / 1e9:.3g} GB of {what}"


def _prune_memory(shape: Shape, work: Work) -> int:
    """The most that is allocated beside the model and the hidden states while one block is pruned and fitted."""
    sums = sum(_inputs(shape, work.statistics))
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
            peaks.append((0 if work.gpu else pruned) - dense + _fit_memory(unit, shape, work))
    return sums + max(peaks, default=0)


def _fit_memory(unit: UnitShape, shape: Shape, work: Work) -> int:
    kept, wide = work.kept * unit.weights, 4 if shape.itemsize < 4 else 0
    packed = kept * shape.itemsize + unit.weights / 8
    graph = _unit_graph(unit, shape, work.batch * work.seqlen)
    masks = 0 if work.gpu else unit.weights  # a byte each, in memory
    if work.trained == "mask_lora":
        adapters = work.rank * sum(outputs + inputs for outputs, inputs in unit.linears)
        return round(2 * packed + masks + adapters * 4 * 4 + graph)
    largest = work.kept * max((outputs * inputs for outputs, inputs in unit.linears), default=0)
    begun = kept * shape.itemsize
    masters, moments = kept * wide, 8 * kept
    backward = kept * shape.itemsize + graph
    step = 4 * kept + 2 * 4 * largest
    return round(packed + begun + masks + masters + moments + max(backward, step))


def _retrain_memory(shape: Shape, work: Work) -> int:
    """Adapters with gradient and moments in fp32, what enters each block, one block's graph, and a chunk of logits."""
    adapters = work.rank * sum(outputs + inputs for unit in shape.units for outputs, inputs in unit.linears)
    graph = sum(_unit_graph(unit, shape, work.seqlen) for unit in shape.units)
    entering = shape.blocks * work.seqlen * shape.hidden * shape.itemsize
    return round(16 * shape.blocks * adapters + graph + entering + LOGITS)


def _unit_graph(unit: UnitShape, shape: Shape, tokens: int) -> float:
    return GRAPH * tokens * shape.itemsize * sum(outputs + inputs for outputs, inputs in unit.linears)


def _graph(shape: Shape, batch: int, seqlen: int) -> int:
    """A forward pass alone."""
    return round(max(_unit_graph(unit, shape, batch * seqlen) for unit in shape.units) / 2)


def _inputs(shape: Shape, statistics: str | None) -> Iterator[int]:
    """Bytes of each linear's statistics; those that read the same share one."""
    seen = set()
    for at, unit in enumerate(shape.units):
        for _, inputs in unit.linears:
            if statistics and (at, inputs) not in seen:
                seen.add((at, inputs))
                yield 4 * inputs * (inputs if statistics == "gram" else 1)


def _forward(shape: Shape, windows: int, seqlen: int, rates: Rates, share: float = 1.0) -> float:
    """Seconds of a forward pass of that share of the blocks."""
    tokens = windows * seqlen
    attention = 2 * seqlen * shape.hidden * shape.blocks
    return share * 2 * tokens * (shape.inside + attention) / (EFFICIENCY * rates.flops)


def _prune_seconds(shape: Shape, work: Work, rates: Rates) -> float:
    once = _forward(shape, work.windows, work.seqlen, rates)
    seconds = once if work.statistics else 0.0
    if work.statistics == "gram":
        sums = sum(size / 4 for size in _inputs(shape, "gram"))
        seconds += 2 * work.windows * work.seqlen * sums * shape.blocks / rates.flops
    # Scores are formed, ranked and applied in a few passes over the weights.
    seconds += 40 * shape.inside / rates.memory
    if not work.trained:
        return seconds + once
    # The targets of the second unit, the loss before and after, and the training.
    seconds += once * (0.5 + 2 + STEP * work.epochs)
    steps = work.epochs * -(-work.windows // work.batch)
    moved = 40 if work.trained == "kept" else 1
    return seconds + steps * moved * work.kept * shape.inside / rates.memory


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
