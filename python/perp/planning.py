"""The plan of a job on this machine: shapes from the configuration, rates from a short probe, what is free."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from perp import machine, models, pruners
from perp.granularity import Granularity
from perp.plan import Budget, Plan, Rates, Shape, UnitShape, Work, advice, choose, shape_of
from perp.progress import duration
from perp.settings import RunSettings
from perp_kernels import Pattern

# The share of what is free that a job may plan with; the rest is for what the plan does not know of.
USABLE = 0.9
# Seconds for each of the probe's measurements.
PROBE = 0.1
# Of a disk that nothing has been read from yet: that of a plain NVMe drive.
DISK = 1.5e9


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


def plan_job(job: RunSettings, rates: Rates | None = None) -> Planned:
    """The plan of a job that `perp.settings.check` has passed. `rates` None: measured now, in half a second."""
    device = machine.find_device(job.device)
    shape = model_shape(job.model, job.dtype, job.trust_remote_code, job.reconstruct)
    work = work_of(job, device)
    rates = rates or measure(device, shape)
    budget = budget_of(job, device)
    plan, fits = choose(shape, work, rates, budget, job.stream)
    return Planned(plan, fits, shape, work, rates, budget)


def model_shape(
    name: str, dtype: str | None, trust_remote_code: bool = False, granularity: str = "half-block"
) -> Shape:
    """From the configuration alone: nothing of the weights is read."""
    with models.quiet(), torch.device("meta"):
        config = AutoConfig.from_pretrained(models.source(name), trust_remote_code=trust_remote_code)
        found = getattr(torch, dtype) if dtype else config.dtype or torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=found, trust_remote_code=trust_remote_code)
    return _together(shape_of(model, granularity), granularity)


def _together(shape: Shape, granularity: str) -> Shape:
    """Where several blocks are fitted at once, they are one unit. Its graph is told too large: in a span of blocks only
    one is computed at a time."""
    count = 1 if granularity == "none" else Granularity.parse(granularity).blocks
    if count == 1:
        return shape
    count = min(count or shape.blocks, shape.blocks)
    linears = tuple(size for unit in shape.units for size in unit.linears)
    unit = UnitShape(linears * count, sum(unit.other for unit in shape.units) * count)
    return replace(shape, blocks=-(-shape.blocks // count), units=(unit,))


def work_of(job: RunSettings, device: str) -> Work:
    windows, seqlen = machine.usual_sizes(device)
    pattern, fitted = Pattern.parse(job.pattern), job.reconstruct != "none"
    trained = "kept" if "kept" in job.reconstruct_parts else "mask_lora"
    texts = 1 + len(job.eval_data or (("demo:sotu",) if job.data == "demo" else ()))
    again = fitted and "pruned" in job.compare
    return Work(
        windows=job.windows or windows,
        seqlen=job.seqlen or seqlen,
        kept=float(1 - pattern.sparsity),
        statistics=pruners.get(job.method).NEEDS,
        trained=trained if fitted else None,
        epochs=job.epochs,
        batch=job.reconstruct_batch,
        rank=job.rank,
        judged=job.eval_windows * texts,
        states=2 + again + bool(job.retrain),
        passes=1 + again,
        packed=job.packed,
        gpu=device != "cpu",
        steps=job.steps if job.retrain else 0,
        step_batch=job.batch,
    )


def budget_of(job: RunSettings, device: str) -> Budget:
    """What the job may take: as told, or most of what is free."""
    host = machine.parse_size(job.cpu_memory) or int(USABLE * machine.free_memory())
    gpu = 0
    if device != "cpu":
        gpu = machine.parse_size(job.gpu_memory) or int(USABLE * torch.cuda.mem_get_info(device)[0])
    nearest = next(path for path in (job.out, *job.out.absolute().parents) if path.exists())
    return Budget(gpu, host, shutil.disk_usage(nearest).free)


def measure(device: str, shape: Shape) -> Rates:
    """Rates of products of the model's own sizes and dtype, and of copying."""
    dtype = {2: torch.bfloat16, 8: torch.float64}.get(shape.itemsize, torch.float32)
    outputs, inputs = max((size for unit in shape.units for size in unit.linears), key=lambda size: size[0] * size[1])
    # A slice of a large weight runs at its rate, and a whole one could take longer than the probe may.
    tokens, outputs, inputs = 512, min(outputs, 4096), min(inputs, 4096)
    x = torch.ones(tokens, inputs, dtype=dtype, device=device)
    weight = torch.ones(outputs, inputs, dtype=dtype, device=device)
    buffer = torch.ones(1 << 24, dtype=torch.uint8, device=device)
    flops = 2 * tokens * outputs * inputs / _seconds(lambda: x @ weight.t(), device)
    return Rates(flops, 2 * buffer.nbytes / _seconds(buffer.clone, device), DISK)


def told(plan: Plan, bytes: int, device_bytes: int, seconds: float) -> str:
    """Plan against actual, in one line."""
    parts = [f"memory {plan.host / 1e9:.2f} GB planned, {bytes / 1e9:.2f} GB taken"]
    if plan.device:
        parts.append(f"GPU {plan.device / 1e9:.2f} GB planned, {device_bytes / 1e9:.2f} GB taken")
    parts.append(f"{duration(plan.seconds)} planned, {duration(seconds)} taken")
    return "; ".join(parts)


def _seconds(call: Callable[[], Tensor], device: str) -> float:
    """The best time of a call within the time of the probe."""
    call()  # torch prepares its first product of a shape
    best, ended, calls = float("inf"), time.perf_counter() + PROBE, 0
    while calls < 3 or time.perf_counter() < ended:
        calls += 1
        started = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best
