from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import perp
from perp import data, job, report, resident_run, run
from perp.checkpoints import load_masks
from perp.errors import UserError
from perp.report import Row
from perp.settings import COMPARE, RunSettings
from perp_kernels import Pattern

from . import tiny


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> RunSettings:
    """A job of a moment; each test gives it an output directory of its own."""
    directory = tmp_path_factory.mktemp("job")
    return RunSettings(
        model=str(tiny.model_dir(directory)),
        out=directory / "out",
        data=str(tiny.text_file(directory)),
        epochs=1,
        steps=2,
        batch=1,
        windows=2,
        seqlen=16,
        eval_windows=2,
        device="cpu",
    )


def stages(settings: RunSettings, dense: list[Row] | None = None) -> list[str]:
    return [row.stage for row in run.run(settings, dense=dense or []).rows]


def test_the_rows_follow_what_was_asked_for(settings, tmp_path):
    plain = replace(settings, reconstruct="none", retrain=(), out=tmp_path / "a")
    assert stages(plain) == [report.DENSE, report.PRUNED]
    only_fitted = replace(settings, reconstruct="block", retrain=(), compare=(), out=tmp_path / "b")
    assert stages(only_fitted) == [report.DENSE, report.RECONSTRUCTED]
    only_trained = replace(settings, reconstruct="none", retrain=("norms",), out=tmp_path / "c")
    assert stages(only_trained) == [report.DENSE, report.PRUNED, report.RETRAINED]


def test_every_recovery_keeps_exactly_the_pruned_zeros(settings, tmp_path):
    found = run.run(replace(settings, pattern="2:4", compare=COMPARE, out=tmp_path / "out"))
    weights, masks = load_file(tmp_path / "out" / "model.safetensors"), load_masks(tmp_path / "out")
    assert len(masks) == 2 * 7
    for name, mask in masks.items():
        weight = weights[f"{name}.weight"]
        assert (mask.view(mask.shape[0], -1, 4).sum(-1) == 2).all()
        assert (weight[~mask] == 0).all()
        assert (weight[mask] != 0).all()
    zeros = {row.stage: row.zeros for row in found.rows}
    assert zeros == {
        report.DENSE: 0.0,
        report.DENSE_RETRAINED: 0.0,
        report.PRUNED: 0.5,
        report.RECONSTRUCTED: 0.5,
        report.RETRAINED: 0.5,
    }


def test_trained_shares_are_counted_from_the_shapes(settings, tmp_path):
    found = run.run(replace(settings, pattern="2:4", out=tmp_path / "out"))
    weights = load_file(tmp_path / "out" / "model.safetensors")
    total = sum(weight.numel() for weight in weights.values())
    linears = [weight for name, weight in weights.items() if "proj" in name]
    norms = sum(weight.numel() for weight in weights.values() if weight.ndim == 1)
    shares = {row.stage: row.trained for row in found.rows}
    # The final norm is outside the blocks: reconstruction does not train it, retraining does.
    kept = sum(weight.numel() // 2 for weight in linears)
    assert shares[report.RECONSTRUCTED] == pytest.approx((kept + norms - 32) / total)
    adapters = sum(16 * sum(weight.shape) for weight in linears)
    assert shares[report.RETRAINED] == pytest.approx((adapters + norms) / total)
    assert shares[report.PRUNED] == 0
    assert {row.stage: row.parameters for row in found.rows}[report.RETRAINED] == adapters + norms


def test_a_merge_that_loses_something_is_told_as_two_rows(settings, tmp_path):
    job = replace(settings, reconstruct="none", retrain=("lora_prune",), retrain_lr=1e-2, steps=4, compare=())
    found = run.run(replace(job, out=tmp_path / "out"))
    assert [row.stage for row in found.rows] == [report.DENSE, report.PRUNED, report.UNMERGED, report.RETRAINED]
    unmerged, merged = found.rows[-2:]
    assert unmerged.perplexity != merged.perplexity
    assert merged.zeros == unmerged.zeros == 0.5


def test_lora_is_judged_unmerged_and_kept_beside_the_pruned_model(settings, tmp_path):
    job = replace(settings, reconstruct="none", retrain=("lora", "norms"), retrain_lr=1e-2, steps=4, compare=())
    with pytest.raises(UserError, match=r"lora adapters cannot be merged .* add --keep-adapters"):
        run.run(replace(job, out=tmp_path / "out"))
    with pytest.raises(UserError, match="lora is not retrained; leave it out"):
        run.run(replace(settings, keep_adapters=True, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    found = run.run(replace(job, keep_adapters=True, out=tmp_path / "out"))
    assert [row.stage for row in found.rows] == [report.DENSE, report.PRUNED, report.RETRAINED]
    model, words = perp.load(str(tmp_path / "out"))
    text = data.windows(words, data.split(data.documents(settings.data)).test, 16, 2)
    plain = perp.perplexity(model, text)
    names = perp.load_adapters(model, tmp_path / "out")
    assert set(names) == set(load_masks(tmp_path / "out"))
    assert perp.perplexity(model, text) == pytest.approx(found.rows[-1].perplexity["articles"], rel=1e-5)
    assert perp.perplexity(model, text) != plain
    told = json.loads((tmp_path / "out" / "perp" / "adapter" / "adapter_config.json").read_text())
    assert (told["r"], told["lora_alpha"]) == (16, 32)
    again = run.run(replace(settings, overwrite=True, out=tmp_path / "out"))
    assert again.rows
    assert not (tmp_path / "out" / "perp" / "adapter" / "adapter_config.json").exists()


def test_distillation_bf16_the_head_and_cycles_in_one_job(settings, tmp_path):
    parts = ("mask_lora", "norms", "head")
    job = replace(settings, retrain=parts, distil=0.5, precision="bf16", cycles=2, steps=4, pattern="2:4")
    found = run.run(replace(job, out=tmp_path / "out"))
    assert found.rows[-1].zeros == 0.5
    told = json.loads((tmp_path / "out" / "perp.json").read_text())["settings"]
    assert (told["distil"], told["precision"], told["cycles"]) == (0.5, "bf16", 2)
    masks, weights = load_masks(tmp_path / "out"), load_file(tmp_path / "out" / "model.safetensors")
    assert all((weights[f"{name}.weight"][~mask] == 0).all() for name, mask in masks.items())
    assert all((mask.view(len(mask), -1, 4).sum(-1) == 2).all() for mask in masks.values())


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"reconstruct": "quarter"}, "'quarter' is no granularity"),
        (
            {"reconstruct": "none", "targets": "dense-model"},
            "--targets is of reconstruction, and --granularity is none",
        ),
        ({"reconstruct": "matrix", "reconstruct_parts": ("norms",)}, "single matrices have no norms"),
        ({"reconstruct_parts": ("lora",)}, "reconstruct parts cannot be 'lora'"),
        ({"retrain": ("full", "mask_lora")}, "train the same weights"),
        ({"cycles": 2, "retrain": ()}, "nothing is retrained; choose parts"),
        ({"cycles": 3, "pattern": "2:4", "steps": 9}, "too few steps from dense for 3 cycles"),
        ({"cycles": 2, "steps": 1}, "1 steps cannot be divided into 2 cycles"),
        ({"inputs": "wet"}, "inputs cannot be 'wet'"),
        ({"loss": "ce"}, "'ce' is not a loss"),
        ({"precision": "int4"}, "'int4' is not a precision"),
        ({"distil": 2.0}, "weight of distillation is 2.0"),
    ],
)
def test_contradictions_are_refused_before_any_model_is_read(settings, tmp_path, wrong, message):
    job = replace(settings, model=str(tmp_path / "no such model"), out=tmp_path / "out", **wrong)
    with pytest.raises(UserError, match=message):
        run.run(job)


def test_the_dense_rows_of_an_earlier_job_are_taken_over(settings, tmp_path):
    known = [Row(report.DENSE, {"articles": 1.5}, 0.0), Row(report.DENSE_RETRAINED, {"articles": 1.25}, 0.0)]
    found = run.run(replace(settings, retrain=(), compare=COMPARE, out=tmp_path / "out"), dense=known)
    assert found.rows[:2] == known
    assert [row.stage for row in found.rows[2:]] == [report.PRUNED, report.RECONSTRUCTED]


def test_the_manifest_tells_the_sizes_that_were_used(settings, tmp_path):
    run.run(replace(settings, seqlen=None, windows=None, retrain=(), compare=(), out=tmp_path / "out"))
    told = json.loads((tmp_path / "out" / "perp.json").read_text())
    # The model knows 64 positions, fewer than the machine's usual 512.
    assert told["settings"]["seqlen"] == 64
    assert told["settings"]["windows"] == 32
    assert told["data"]["train"]["split_by"] == "document"
    assert told["seeds"] == {"calibration": 0, "training": 1}


def test_judged_text_is_never_trained_on(settings, tmp_path, monkeypatch):
    """Every token that calibration, reconstruction or training sees comes from the train part."""
    seen: list[torch.Tensor] = []
    for owner, name in ((job, "prune_model"), (resident_run, "retrain")):
        own = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda m, ids, *a, own=own, **k: seen.append(ids) or own(m, ids, *a, **k))
    run.run(replace(settings, compare=COMPARE, out=tmp_path / "out"))
    words = tiny.tokenizer()
    train = data.windows(words, data.split(data.documents(settings.data)).train, 16).tolist()
    assert len(seen) == 4
    assert all(window in train for windows in seen for window in windows.tolist())


def test_further_text_is_judged_whole_under_its_own_name(settings, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(tiny.article(number) for number in range(100, 104)))
    found = run.run(replace(settings, eval_data=(str(other),), retrain=(), compare=(), out=tmp_path / "out"))
    assert found.texts == ["articles", "other"]


def test_nothing_is_written_where_pruning_fails(settings, tmp_path, monkeypatch):
    def fail(*arguments, **named):
        raise UserError("on purpose")

    monkeypatch.setattr(job, "prune_model", fail)
    with pytest.raises(UserError, match="on purpose"):
        run.run(replace(settings, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_fewer_windows_than_asked_for_are_told(settings, tmp_path):
    plenty = replace(settings, windows=100_000, eval_windows=1, reconstruct="none", method="magnitude", retrain=())
    with pytest.warns(UserWarning, match=r"the text gives \d+ windows of 16 tokens, fewer than 100000"):
        run.run(replace(plenty, out=tmp_path / "out"))


def test_a_tokenizer_of_another_model_is_refused(settings, tmp_path):
    model = tiny.model_dir(tmp_path)
    tiny.tokenizer(vocabulary=600).save_pretrained(model)
    with pytest.raises(UserError, match=r"gives token \d+ where the model has"):
        run.run(replace(settings, model=str(model), out=tmp_path / "out"))


def test_the_demo_is_two_jobs_that_share_the_dense_rows(settings, tmp_path, monkeypatch):
    def job(demo: RunSettings, progress, dense):
        small = replace(settings, pattern=demo.pattern, compare=demo.compare, out=demo.out, overwrite=demo.overwrite)
        return run_job(small, progress, dense)

    run_job = run.run
    monkeypatch.setattr(run, "run", job)
    monkeypatch.setattr(run.settings, "check", lambda job: Pattern.parse(job.pattern))
    first, second = run.run_demo(tmp_path)
    told = [report.DENSE, report.DENSE_RETRAINED, report.PRUNED, report.RECONSTRUCTED, report.RETRAINED]
    assert [row.stage for row in second.rows] == told
    assert first.rows[:2] == second.rows[:2]
    assert (tmp_path / "wanda-0.5" / "config.json").exists()
    assert (tmp_path / "wanda-2-4" / "config.json").exists()
    assert (tmp_path / "report.json").exists()
    run.run_demo(Path(tmp_path))
