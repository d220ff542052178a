"""The plan against what really happens, and what a plan is made from."""

import json
import subprocess
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from transformers import LlamaConfig, OPTConfig
from typer.testing import CliRunner

from bench import machine as bench_machine
from bench.streaming.subjects import write_random
from bench.streaming.worker import Job
from perp import machine, models, settings
from perp.cli import app
from perp.planning import model_shape, plan_job, work_of
from perp.settings import RunSettings
from perp.workload import shape_of

from . import tiny
from .test_plan import RATES

SLOW = (
    "this cpu has no products in bf16; float32 (--dtype float32, --precision model) is several times faster here, in "
    "twice the memory."
)
OPT = OPTConfig(
    vocab_size=2000,
    hidden_size=768,
    ffn_dim=3072,
    word_embed_proj_dim=768,
    num_hidden_layers=2,
    num_attention_heads=12,
    dtype="bfloat16",
    architectures=["OPTForCausalLM"],
)
LLAMA = LlamaConfig(
    vocab_size=2000,
    hidden_size=1152,
    intermediate_size=3200,
    num_hidden_layers=2,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=False,
    dtype="float32",
    architectures=["LlamaForCausalLM"],
)


@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")
def test_memory_is_as_planned(tmp_path):
    (tmp_path / "model").mkdir()
    write_random(OPT, tmp_path / "model")
    job = Job(str(tmp_path / "model"), 4, 256, 1, "sparsegpt", True, "cpu", 1, str(tmp_path))
    path = tmp_path / "job.json"
    path.write_text(json.dumps(asdict(job)))
    subprocess.run([sys.executable, "-m", "bench.streaming.worker", str(path)], cwd=bench_machine.ROOT, check=True)
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["planned"]["host_bytes"] == pytest.approx(found["host_bytes"], rel=0.15)


def test_a_plan_needs_the_configuration_alone(tmp_path):
    LLAMA.save_pretrained(tmp_path / "model")
    job = RunSettings(model=str(tmp_path / "model"), out=tmp_path / "out", device="cpu", windows=4, cpu_memory="400MB")
    settings.check(job, weights=False)
    found = plan_job(job)
    assert (found.fits, found.plan.stream) == (True, True)
    assert not plan_job(replace(job, windows=None, cpu_memory="50MB"), found.rates).fits
    assert plan_job(replace(job, cpu_memory=None), found.rates).plan.stream is False


@pytest.mark.parametrize("here", [True, False])
def test_slow_products_in_bf16_are_warned_of(tmp_path, monkeypatch, here):
    monkeypatch.setattr(machine, "multiplies_bf16", lambda device: here)
    for name, config in (("wide", LLAMA), ("narrow", OPT)):
        config.save_pretrained(tmp_path / name)
    wide = RunSettings(model=str(tmp_path / "wide"), out=tmp_path / "out", device="cpu", windows=4)
    narrow = replace(wide, model=str(tmp_path / "narrow"))
    for job, slow in (
        (wide, False),
        (narrow, True),
        (replace(wide, precision="bf16"), True),
        (replace(narrow, dtype="float32"), False),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            plan_job(job, RATES)
        told = [str(one.message) for one in caught]
        assert told == ([] if here or not slow else [SLOW])


@pytest.mark.parametrize("family", ["opt", "llama", "mixtral"])
def test_a_shape_without_weights_is_that_of_the_model(family, tmp_path):
    """Its tied head counts once, too."""
    path = tiny.model_dir(tmp_path, family)
    found, expected = model_shape(str(path), None), shape_of(models.load(str(path))[0])
    assert replace(found, graph=None) == replace(expected, graph=None)


def test_lines_that_are_known_or_not_asked_for_are_not_planned():
    job = RunSettings(model="", out=Path(), compare=("pruned", "dense-retrained"))
    counted = [
        work_of(one, "cpu", dense) for one, dense in ((job, False), (job, True), (replace(job, compare=()), False))
    ]
    assert [(work.states, work.passes, work.trainings, work.loads) for work in counted] == [
        (5, 2, 2, 3),
        (3, 2, 1, 2),
        (3, 1, 1, 1),
    ]
    assert work_of(replace(job, refine="sparseswaps"), "cpu").statistics == "gram"


def test_cycles_distillation_and_precision_are_work():
    job = RunSettings(model="", out=Path(), pattern="0.5", cycles=3, schedule="linear", steps=7, batch=4)
    plain, best = work_of(job, "cpu"), work_of(replace(job, distil=0.5, precision="bf16"), "cpu")
    assert plain.earlier == pytest.approx((1 - 0.5 / 3, 1 - 1 / 3), abs=1e-4)
    assert (plain.taught, plain.narrow, best.taught, best.narrow) == (0, False, 28, True)
    assert work_of(replace(job, retrain=(), distil=0.5, cycles=1), "cpu").taught == 0


def test_blocks_fitted_together_are_in_memory_together(tmp_path):
    LLAMA.save_pretrained(tmp_path)
    one, two, all_of_them = (model_shape(str(tmp_path), None, False, g) for g in ("block", "2-blocks", "model"))
    assert two.block == 2 * one.block
    assert (two.blocks, one.blocks) == (1, 2)
    assert all_of_them == two
    job = RunSettings(model=str(tmp_path), out=tmp_path / "out", device="cpu", windows=4, stream=True)
    host = {g: plan_job(replace(job, reconstruct=g)).plan.host for g in ("block", "2-blocks")}
    assert host["2-blocks"] > 1.5 * host["block"]


def test_perp_plan_tells_a_stage_a_line_and_a_verdict(tmp_path):
    LLAMA.save_pretrained(tmp_path)
    asked = ["plan", str(tmp_path), "--device", "cpu", "--windows", "4", "--cpu-memory"]
    told = CliRunner().invoke(app, [*asked, "400MB"])
    assert told.exit_code == 0, told.output
    assert all(stage in told.stdout for stage in ("judge", "prune", "retrain", "may take"))
    assert "It fits: streamed, a block at a time" in told.stdout
    cycled = CliRunner().invoke(app, [*asked, "9GB", "--no-stream", "--cycles", "3", "--distil", "0.5"])
    assert cycled.exit_code == 0, cycled.output
    assert all(stage in cycled.stdout for stage in ("dense states", "prune, 3 cycles", "retrain, 3 cycles"))
    told = CliRunner().invoke(app, [*asked, "20MB"])
    assert told.exit_code == 0
    assert "It does not fit; use a machine with" in told.stdout
