"""The plan of a job on this machine: shapes from the configuration, rates from a short probe, what is free."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from perp import distributed, footprint, machine, models, precision, pruners, skipped
from perp.granularity import Granularity
from perp.graph import Graph
from perp.iterate import schedule
from perp.pace import Rates
from perp.plan import Budget, Plan, advice, choose
from perp.probe import measure
from perp.progress import duration
from perp.settings import RunSettings
from perp.workload import Shape, UnitShape, Work, shape_of
from perp_kernels import Pattern

# The share of what is free that a job may plan with; the rest is for what the plan does not know of.
USABLE = 0.9
# From so many times as long as alone, work on a machine with other work is worth a word.
SHARED = 1.25


@dataclass(frozen=True)
class Planned:
    """A plan with all it was made from; `fits` the budget or not."""

    plan: Plan
    fits: bool
    shape: Shape
    work: Work
    rates: Rates
    budget: Budget

    @property
    def advice(self) -> str:
        return advice(self.shape, self.work, self.rates, self.budget)


def plan_job(job: RunSettings, rates: Rates | None = None, dense: bool = False) -> Planned:
    """The plan of a job that `perp.settings.check` has passed. `rates` None: measured now, in a second or two.
    PatternError, naming the layer, where an N:M does not divide it.

    `dense`: the rows of the dense model are known, from an earlier job.
    """
    device = machine.find_device(job.device)
    _, pattern = pruners.resolve(job.method, job.pattern)
    with _bare_model(job.model, job.dtype, job.trust_remote_code) as model:
        skipped.find(model, pattern, job.skip)
        if torch.bfloat16 in (model.dtype, precision.get(job.precision)) and not machine.multiplies_bf16(device):
            warnings.warn(
                f"this {device} has no products in bf16; float32 (--dtype float32, --precision model) is several times "
                "faster here, in twice the memory.",
                stacklevel=2,
            )
        shape = _together(shape_of(model, job.reconstruct), job.reconstruct)
    work = work_of(job, device, dense)
    if rates is None:
        begun = time.thread_time()
        with torch.device("meta"):
            _built(job.model, job.dtype, job.trust_remote_code)
        build = time.thread_time() - begun
        rates = replace(measure(job, shape, device), build=build)
    budget = budget_of(job, device)
    plan, fits = choose(shape, work, rates, budget, job.stream)
    return Planned(plan, fits, shape, work, rates, budget)


def model_shape(
    name: str, dtype: str | None, trust_remote_code: bool = False, granularity: str = "half-block"
) -> Shape:
    """From the configuration alone: nothing of the weights is read."""
    with _bare_model(name, dtype, trust_remote_code) as model:
        return _together(shape_of(model, granularity), granularity)


@contextmanager
def _bare_model(name: str, dtype: str | None, trust_remote_code: bool) -> Iterator[Any]:
    """The model without weights; for the duration, it can be run, to shapes instead of numbers."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        # Some towers draw their weights until all are in range, which without numbers is never.
        with no_init_weights():
            model = _built(name, dtype, trust_remote_code)
        model.tie_weights()
        yield model


def _built(name: str, dtype: str | None, trust_remote_code: bool) -> Any:
    with models.quiet():
        config = AutoConfig.from_pretrained(models.source(name), trust_remote_code=trust_remote_code)
        found = getattr(torch, dtype) if dtype else config.dtype or torch.float32
        return AutoModelForCausalLM.from_config(config, dtype=found, trust_remote_code=trust_remote_code)


def _together(shape: Shape, granularity: str) -> Shape:
    """Where several blocks are fitted at once, they are one unit. Its graph is told too large: in a span of blocks only
    one is computed at a time."""
    count = 1 if granularity == "none" else Granularity.parse(granularity).blocks
    if count == 1:
        return shape
    count = min(count or shape.blocks, shape.blocks)
    linears = tuple(size for unit in shape.units for size in unit.linears)
    experts = tuple(size for unit in shape.units for size in unit.experts)
    used = max(unit.used for unit in shape.units)
    unit = UnitShape(linears * count, sum(unit.other for unit in shape.units) * count, experts * count, used)
    graph = shape.graph and Graph(shape.graph.kept.times(count), shape.graph.formed.times(count))
    return replace(shape, blocks=-(-shape.blocks // count), units=(unit,), graph=graph)


def work_of(job: RunSettings, device: str, dense: bool = False) -> Work:
    windows, seqlen = machine.usual_sizes(device)
    pattern, fitted = Pattern.parse(job.pattern), job.reconstruct != "none"
    trained = "kept" if "kept" in job.reconstruct_parts else "mask_lora"
    texts = 1 + len(job.eval_data or (("demo:sotu",) if job.data == "demo" else ()))
    again = fitted and "pruned" in job.compare
    retrained = bool(job.retrain) and "dense-retrained" in job.compare and not dense
    steps = job.steps if job.retrain else 0
    *earlier, _ = schedule(pattern, job.cycles, job.schedule)
    return Work(
        windows=distributed.most(job.windows or windows),
        seqlen=job.seqlen or seqlen,
        kept=float(1 - pattern.sparsity),
        statistics="gram" if job.refit or job.for_refine else pruners.get(job.method).NEEDS,
        trained=trained if fitted else None,
        epochs=job.epochs,
        batch=job.reconstruct_batch,
        rank=job.rank,
        judged=distributed.most(job.eval_windows) * texts,
        states=(1 if dense else 2) + again + retrained + bool(job.retrain),
        passes=1 + again,
        packed=job.packed,
        gpu=device != "cpu",
        steps=steps,
        step_batch=distributed.most(job.batch),
        trainings=1 + retrained,
        checkpointing=job.checkpointing,
        loads=1 + again + retrained,
        earlier=tuple(float(1 - one.sparsity) for one in earlier),
        # No window twice where the text has enough of them.
        taught=distributed.most(steps * job.batch) if job.distil else 0,
        narrow=job.precision == "bf16",
        moments=footprint.MOMENTS_8BIT if job.optimizer == "adamw8bit" else footprint.MOMENTS,
    )


def budget_of(job: RunSettings, device: str) -> Budget:
    """What the job may take: as told, or most of what is free."""
    host = machine.parse_size(job.cpu_memory) or int(USABLE * machine.free_memory()) // distributed.neighbours()
    gpu = 0
    if device != "cpu":
        gpu = machine.parse_size(job.gpu_memory) or int(USABLE * torch.cuda.mem_get_info(device)[0])
    nearest = next(path for path in (job.out, *job.out.absolute().parents) if path.exists())
    return Budget(gpu, host, shutil.disk_usage(nearest).free)


@dataclass(frozen=True)
class Taken:
    """What a job took: bytes of memory and of the GPU at the peak, seconds on the clock, and those it computed in."""

    host: int
    device: int
    seconds: float
    own: float


def told(plan: Plan, taken: Taken) -> str:
    """Plan against actual, in one line."""
    parts = [f"memory {plan.host / 1e9:.2f} GB planned, {taken.host / 1e9:.2f} GB taken"]
    if plan.device:
        parts.append(f"GPU {plan.device / 1e9:.2f} GB planned, {taken.device / 1e9:.2f} GB taken")
    parts.append(f"{duration(plan.seconds)} planned, {duration(taken.seconds)} taken")
    if not plan.device and taken.seconds > SHARED * taken.own:
        parts[-1] += f" (beside other work: {duration(taken.own)} of computing)"
    return "; ".join(parts)
