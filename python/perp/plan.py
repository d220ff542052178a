"""What a job will take, before it begins: memory, disk and time from shapes, settings and a few rates of the machine.

`predict` is a pure function. Its memory is what the process or torch allocates beyond what it has when torch and
transformers are imported and the text is read; files that are mapped are not counted, since the system takes their
pages back. Its time is that of a machine that does nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from perp import footprint, pace
from perp.pace import Rates
from perp.workload import Shape, Work

# What is allocated beside the tensors counted here: code paths run for the first time, buffers of torch's products.
OVERHEAD = 25_000_000
# Where freed memory stays in the heap: what the windows and their making leave free there before the first stage.
HOLES = 25_000_000
# From so many bytes on, memory goes back at once (machine.give_back_memory). Less work is left alone: taking each block
# of memory anew cost SmolLM2-135M 15 % of the time, to save 50 MB.
GIVES_BACK = 150_000_000


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

    `gives_back`: whether freed memory is to go back to the system at once. `ahead`: whether each block is read while
    the one before it computes; `offload`: whether the packed weights are in memory while the model is retrained, and on
    the device two blocks at a time.
    """

    stream: bool
    activations: str
    stages: tuple[Stage, ...]
    gives_back: bool = False
    ahead: bool = False
    offload: bool = False

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


def predict(
    shape: Shape,
    work: Work,
    rates: Rates,
    stream: bool,
    activations: str,
    ahead: bool = False,
    offload: bool = False,
) -> Plan:
    """What the job takes with the model in memory or streamed, and the hidden states in that place: see `Plan`."""
    model = shape.bytes
    # A weight read from its file as it is stays mapped until it is pruned; a mask takes a byte for each.
    whole = shape.inside * (shape.itemsize + 1)
    states = work.windows * work.seqlen * shape.hidden * shape.itemsize
    # Inputs and targets; each branch beyond the first has targets of its own.
    held = states * (2 if work.trained else 1)
    judged = work.judged * work.seqlen * shape.hidden * shape.itemsize if stream else 0
    taught = footprint.of_teacher(shape, work, stream)
    # Each cycle before the last leaves its blocks; streamed, pruned and retrained ones, until the next has ended.
    stages_kept = min(2 * len(work.earlier), 3) if stream else len(work.earlier)
    disk = model * ((2 if work.packed else 1) + stages_kept) + round(shape.inside / 8)
    spilled = max(held, judged, taught) if activations == "disk" else 0
    pruning = footprint.of_pruning(shape, work, stream)

    gives_back = stream and OVERHEAD + pruning >= GIVES_BACK

    def stage(name: str, working: int, waiting: int, seconds: float, holes: int = 0, taught: int = 0) -> Stage:
        """`working`: beside the model, where it computes; `waiting`: hidden states, and `taught`, those of the teacher,
        which never wait on the device; `holes`: what is free in the heap between what is in use."""
        device = host = 0
        resident = shape.block * shape.itemsize if stream else model
        if work.gpu:
            # The block read ahead is on its way through pinned memory.
            next_one = resident if ahead else 0
            device = working + resident + next_one
            host = OVERHEAD + (shape.block if stream else shape.inside) + next_one
            device += waiting if activations == "device" else 0
        else:
            host = OVERHEAD + (0 if stream else whole)
            host += working + (0 if gives_back else HOLES + holes)
        host += waiting if activations == "memory" else 0
        host += taught if activations != "disk" else 0
        return Stage(name, device, host, disk + spilled, seconds)

    stages = [stage("load and save", 0, 0, pace.of_reading(shape, work, rates, stream, ahead))]
    if work.judged:
        seconds = work.states * pace.of_judging(shape, work, rates)
        stages.append(stage("judge", footprint.of_judging(shape, work), judged, seconds))
    if work.taught:
        narrow = 0 if stream else footprint.of_narrowing(shape, work)
        working = footprint.of_forward(shape, work) + narrow
        stages.append(stage("dense states", working, 0, pace.of_teaching(shape, work, rates), taught=taught))
    turns = [(share, bool(work.trained)) for share in work.earlier]
    turns += [(work.kept, bool(work.trained) and not turn) for turn in range(work.passes)]
    seconds = sum(pace.of_pruning(shape, replace(work, kept=share), rates, fitted) for share, fitted in turns)
    fits = work.epochs * -(-work.windows // work.batch) if work.trained else 0
    # In memory the teacher waits from before the first pruning; streamed it is made when training begins, which with
    # cycles is before the next pruning.
    waits = taught if work.earlier or not stream else 0
    stages.append(stage("prune", pruning, held, seconds, footprint.of_holes(shape, work, work.batch, fits), waits))
    if work.steps:
        seconds = work.trainings * pace.of_retraining(shape, work, rates)
        narrow = footprint.of_narrowing(shape, work, work.most_kept if stream else 1.0)
        working = footprint.of_retraining(shape, work, heap=not (work.gpu or gives_back)) + narrow
        passed = work.steps * work.step_batch
        own = stage("retrain", working, 0, seconds, footprint.of_holes(shape, work, 1, passed), taught)
        if stream:
            # The packed weights stay mapped from their file; or they are on the GPU, or two blocks of them.
            packed = round(shape.inside * (work.most_kept * shape.itemsize + 1 / 8)) if work.gpu else 0
            there = min(packed, 2 * round(packed / shape.inside * shape.block)) if offload else packed
            outside = shape.outside * shape.itemsize if work.gpu else 0
            own = replace(
                own,
                device=own.device + there + outside,
                host=own.host + (packed if offload else 0),
                disk=own.disk + round(shape.bytes * (work.most_kept + 1)),
            )
        stages.append(own)
    return Plan(stream, activations, tuple(stages), gives_back, ahead, offload)


def choose(shape: Shape, work: Work, rates: Rates, budget: Budget, stream: bool | None = None) -> tuple[Plan, bool]:
    """The first way that fits the budget, from the fastest to the most sparing, and whether it does fit.

    `stream` settles that much beforehand. Where nothing fits, the plan is the most sparing one.
    """
    places = ("device", "memory", "disk") if work.gpu else ("memory", "disk")
    ways: list[tuple[Any, ...]] = [(False, "memory")] if stream is not True else []
    if stream is not False:
        # On a CPU a block of 14 MB is read in 6 ms, from the disk, and computed with for seconds.
        aheads = (True, False) if work.gpu else (False,)
        offloads = (False, True) if work.gpu and work.steps and work.checkpointing else (False,)
        ways += [(True, place, ahead, offload) for offload in offloads for place in places for ahead in aheads]
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
    if work.taught:
        milder["--distil 0"] = replace(work, taught=0)
    for setting, other in milder.items():
        if choose(shape, other, rates, budget)[1]:
            return f"pass {setting}"
    plan, _ = choose(shape, work, rates, budget)
    if plan.disk > budget.disk:
        return f"choose an output directory on a disk with {plan.disk / 1e9:.3g} GB free"
    what = "GPU memory" if plan.device > budget.device else "memory"
    need = plan.device if plan.device > budget.device else plan.host
    return f"use a machine with {need / 1e9:.3g} GB of {what}"
