"""The probe: it runs whatever a job may ask for, and turns seconds into rates as the plan turns rates into seconds."""

import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from perp import pace, probe
from perp.settings import RunSettings
from perp.workload import Shape, UnitShape, Work

JOB = RunSettings(model="", out=Path())
# Attention of 64 and an MLP of 3 x 192.
UNITS = (UnitShape(((64, 64),) * 4), UnitShape(((192, 64), (192, 64), (64, 192))))
SHAPE = Shape(3, UNITS, 3 * 53248, 64 * 500, 64, 500, 4)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "sparsegpt", "pattern": "2:4", "reconstruct_parts": ("mask_lora", "norms"), "precision": "bf16"},
        {"method": "magnitude", "reconstruct": "none", "retrain": ()},
        {"refine": "sparseswaps", "refit": True, "retrain": ("biases",), "checkpointing": False},
        {"reconstruct": "block", "retrain": ("mask_lora", "head"), "pattern": "0.6"},
        {"pattern": "3:6"},
    ],
)
def test_every_kind_of_job_has_rates(settings, itemsize):
    before = torch.get_rng_state()
    rates = asdict(probe.measure(replace(JOB, **settings), replace(SHAPE, itemsize=itemsize), "cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    assert rates.pop("build") == 0
    assert rates["busy"] >= 1
    assert all(math.isfinite(rate) and rate > 0 for rate in rates.values()), rates


def test_a_plan_of_the_probe_s_own_block_is_what_the_probe_took():
    """One block of the stand-in's size: the plan's seconds are those that were measured, put together by hand."""
    with torch.no_grad():
        subject = probe._Subject(JOB, probe._stand_in(SHAPE, 64, torch.float32), 32, 500)
    sizes = {name: tuple(weight.shape) for name, weight in subject.dense.items()}
    assert sorted(sizes.values()) == sorted(size for unit in UNITS for size in unit.linears)
    kept = 53248 // 2
    assert subject.kept.numel() == kept
    once, step, update, pack = 0.5, 4.0, 0.25, 3.0
    seconds = {
        "forward": once,
        "gram": 1.0,
        "choose": 7.0,
        "fit": 2 * once + step + update + pack,
        "fit on": 2 * once + (1 + probe.MORE) * (step + update) + pack,
        "update": update,
        "retrain": 6.0,
        "head": 2.0,
        "lesson": 5.0,
        "teach": 0.4,
    }
    rates = subject.rates(seconds)
    one = replace(SHAPE, blocks=1, inside=53248)
    work = Work(windows=5, seqlen=32, epochs=2, batch=1, judged=3, steps=2, step_batch=2, rank=0)
    told = pace.of_pruning(one, work, rates, fitted=True)
    assert told == pytest.approx(5 * 3.5 * once + 7.0 + pack + 2 * 5 * (step + update))
    assert pace.of_judging(one, work, rates) == pytest.approx(3 * (once + 2.0))
    assert pace.of_retraining(one, work, rates) == pytest.approx(4 * (6.0 + 5.0))
    assert pace.of_teaching(one, replace(work, taught=7), rates) == pytest.approx(7 * 0.4)
    assert pace.of_teaching(one, work, rates) == 0
