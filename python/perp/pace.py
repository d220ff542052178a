"""How long the stages of a job take: their products, counted, at the rates of this machine; in seconds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from perp.footprint import sums
from perp.workload import Shape, UnitShape, Work

# What a job takes beside its work: the text, the tokenizer, the report. Of one machine, measured.
BEGIN = 2.0
# What reading a model anew takes beside its bytes.
LOAD = 0.3


@dataclass(frozen=True)
class Rates:
    """Of the machine at the kinds of work of one job; `perp.probe` measures them.

    FLOP/s, each by the products of a forward pass: `forward` (with statistics), `fit` (a training step of units),
    `retrain` (a training step of blocks with adapters), `head`, `lesson` (a training step of the head, with the
    teacher's logits where there is one), `teach` (a forward pass as narrow as retraining is). `gram`: its own FLOP/s.
    `choose`: `effort` per second of choosing masks; `pack`: weights per second put into a unit's fit and taken out
    again; `update`: trained numbers per second of the optimiser. `disk`: bytes/s. `build`: seconds until a model
    without data is made, as each block of a streamed one asks for. `busy`: how many times longer all takes now, beside
    other work.
    """

    forward: float
    fit: float
    retrain: float
    head: float
    gram: float
    choose: float
    pack: float
    update: float
    disk: float
    lesson: float
    teach: float
    build: float = 0.0
    busy: float = 1.0


def forward_flops(tokens: int, seqlen: int, weights: int, hidden: int) -> float:
    """Of the products of one block, attention's own among them."""
    return 2.0 * tokens * (weights + 2 * seqlen * hidden)


def effort(linears: Iterable[tuple[int, int]], statistics: str | None) -> float:
    """What the time of choosing the masks of linears (outputs, inputs) grows with."""
    if statistics != "gram":
        return float(sum(outputs * inputs for outputs, inputs in linears))
    return float(sum(inputs**3 + outputs * inputs**2 for outputs, inputs in linears))


def of_judging(shape: Shape, work: Work, rates: Rates) -> float:
    """One state of the model."""
    head = 2 * work.judged * work.seqlen * shape.hidden * shape.vocabulary
    return _passed(shape, work.judged, work.seqlen) / rates.forward + head / rates.head


def of_pruning(shape: Shape, work: Work, rates: Rates, fitted: bool) -> float:
    """One pass over the model."""
    once = _passed(shape, work.windows, work.seqlen) / rates.forward
    seconds = shape.blocks * effort((size for unit in shape.units for size in unit.matrices), work.statistics)
    seconds /= rates.choose
    seconds += once if work.statistics else 0.0
    if work.statistics == "gram":
        # Experts share the tokens out: each Gram is of those that go through its own.
        parts = (replace(shape, units=(replace(unit, experts=_used(unit)),)) for unit in shape.units)
        numbers = sum(size / 4 for part in parts for size in sums(part, "gram"))
        seconds += 2 * work.windows * work.seqlen * numbers * shape.blocks / rates.gram
    if not fitted:
        return seconds + once
    kept = work.kept * shape.inside
    trained = kept if work.trained == "kept" else work.rank * shape.blocks * _sides(shape)
    steps = work.epochs * -(-work.windows // work.batch)
    # The targets of the second unit, and the losses before and after.
    seconds += once * 2.5 + shape.inside / rates.pack
    seconds += work.epochs * _passed(shape, work.windows, work.seqlen) / rates.fit
    return seconds + steps * trained / rates.update


def of_retraining(shape: Shape, work: Work, rates: Rates) -> float:
    """One training."""
    windows = work.steps * work.step_batch
    head = 2 * windows * work.seqlen * shape.hidden * shape.vocabulary
    trained = work.rank * shape.blocks * _sides(shape)
    return (
        _passed(shape, windows, work.seqlen) / rates.retrain + head / rates.lesson + work.steps * trained / rates.update
    )


def of_teaching(shape: Shape, work: Work, rates: Rates) -> float:
    """The dense model's pass over the windows that it teaches."""
    return _passed(shape, work.taught, work.seqlen) / rates.teach if work.taught else 0.0


def of_reading(shape: Shape, work: Work, rates: Rates, stream: bool, ahead: bool = False) -> float:
    """Reading the model and writing what becomes of it; what is read ahead takes no time of its own."""
    seconds = BEGIN + work.loads * (LOAD + shape.bytes / rates.disk)
    if stream:
        # Each pass reads each block on its own: to judge, to learn its calls, to prune it, to write it.
        cycles = 1 + len(work.earlier)
        reads = work.states + 3 * (work.passes + cycles - 1) + (2 * cycles if work.steps else 0)
        reads += 1 if work.taught else 0
        seconds += reads * (shape.blocks * rates.build + (0 if ahead else shape.bytes / rates.disk))
    return seconds


def _passed(shape: Shape, windows: int, seqlen: int) -> float:
    """FLOPs of a forward pass of all blocks, through the experts that are used."""
    active = shape.inside if shape.active is None else shape.active
    each = forward_flops(windows * seqlen, seqlen, round(active / shape.blocks), shape.hidden)
    return shape.blocks * each


def _sides(shape: Shape) -> int:
    return sum(outputs + inputs for unit in shape.units for outputs, inputs in unit.matrices)


def _used(unit: UnitShape) -> tuple[tuple[int, int, int], ...]:
    return tuple((min(count, unit.used), outputs, inputs) for count, outputs, inputs in unit.experts)
