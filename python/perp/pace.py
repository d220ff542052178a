"""How long the stages of a job take: their products, counted, at the rates of this machine; in seconds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from perp.footprint import sums
from perp.workload import Shape, Work

# Of a training step's head, in forward passes of it: logits, then the gradient of what they are made from.
HEAD_STEP = 2.5
# What a job takes beside its work: the text, the tokenizer, the report. Of one machine, measured.
BEGIN = 2.0
# What reading a model anew takes beside its bytes.
LOAD = 0.3


@dataclass(frozen=True)
class Rates:
    """Of the machine at the kinds of work of one job; `perp.probe` measures them.

    FLOP/s, each by the products of a forward pass: `forward` (with statistics), `fit` (a training step of units),
    `retrain` (a training step of blocks with adapters), `head`. `gram`: its own FLOP/s. `choose`: `effort` per second
    of choosing masks; `pack`: weights per second put into a unit's fit and taken out again; `update`: trained numbers
    per second of the optimiser. `disk`: bytes/s. `build`: seconds until a model without data is made, as each block of
    a streamed one asks for. `busy`: how many times longer all takes now, beside other work.
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
    seconds = shape.blocks * effort((size for unit in shape.units for size in unit.linears), work.statistics)
    seconds /= rates.choose
    seconds += once if work.statistics else 0.0
    if work.statistics == "gram":
        numbers = sum(size / 4 for size in sums(shape, "gram"))
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
    head = HEAD_STEP * 2 * windows * work.seqlen * shape.hidden * shape.vocabulary
    trained = work.rank * shape.blocks * _sides(shape)
    return (
        _passed(shape, windows, work.seqlen) / rates.retrain + head / rates.head + work.steps * trained / rates.update
    )


def of_reading(shape: Shape, work: Work, rates: Rates, stream: bool, ahead: bool = False) -> float:
    """Reading the model and writing what becomes of it; what is read ahead takes no time of its own."""
    seconds = BEGIN + work.loads * (LOAD + shape.bytes / rates.disk)
    if stream:
        # Each pass reads each block on its own: to judge, to learn its calls, to prune it, to write it.
        reads = work.states + 3 * work.passes + (2 if work.steps else 0)
        seconds += reads * (shape.blocks * rates.build + (0 if ahead else shape.bytes / rates.disk))
    return seconds


def _passed(shape: Shape, windows: int, seqlen: int) -> float:
    """FLOPs of a forward pass of all blocks."""
    each = forward_flops(windows * seqlen, seqlen, round(shape.inside / shape.blocks), shape.hidden)
    return shape.blocks * each


def _sides(shape: Shape) -> int:
    return sum(outputs + inputs for unit in shape.units for outputs, inputs in unit.linears)
