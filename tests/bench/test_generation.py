"""The generation benchmark: its turns, its rows, its check of the logits, and one contestant for real."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.generation import __main__ as generation
from bench.generation import subjects, worker
from bench.generation.subjects import Subject
from bench.generation.worker import Job
from bench.results import Row
from perp import models
from perp.blocks import all_prunable
from perp.packed_model import load_packed
from tests.perp import families, tiny
from tests.perp.test_checkpoints import save

SUBJECT = Subject("Tiny", lambda out: None, speed=1.2, memory=0.7)


def measured(rate: float, resident: float) -> dict[str, Any]:
    told = {"kernel": "cpu/portable", "device": "Some CPU, 1 thread", "own_bytes": 0, "mapped_bytes": 0}
    return {**told, "tokens_per_second": rate, "resident_bytes": resident, "weight_bytes": 1}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"vocab_size": 300}')
    return tmp_path


def rows_of(directory: Path, error: float = 0.0) -> tuple[list[Row], list[str]]:
    turns = []
    rates = {(True, "bfloat16"): [9, 30, 10], (False, "bfloat16"): [4, 5, 6], (False, "float32"): [8, 7, 1]}
    exact = torch.linspace(-1, 1, 64)
    logits = {
        (True, "bfloat16"): exact + error,
        (False, "bfloat16"): exact + 0.01,
        (False, "float32"): exact,
    }

    def run(job: Job) -> generation.Measured:
        assert max(job.prompt) < 300
        who = (job.packed, job.dtype)
        turns.append(f"{'packed' if job.packed else 'dense'} {job.dtype}")
        return measured(rates[who].pop(0), 60 if job.packed else 100), logits[who]

    return generation.measure(SUBJECT, directory, tokens=64, rounds=3, threads=1, run=run), turns


def test_contestants_take_turns_and_the_faster_peer_sets_the_targets(directory: Path) -> None:
    (rate, memory), turns = rows_of(directory)
    assert turns == ["packed bfloat16", "dense bfloat16", "dense float32"] * 3
    assert (rate.ours, rate.peers) == (10, {"transformers bf16": 5, "transformers fp32": 7})
    assert rate.target == pytest.approx(1.2 * 7)
    assert rate.met()
    assert rate.ratio("transformers bf16") == 2
    assert (memory.ours, memory.unit, memory.better, memory.target) == (60, "bytes", "lower", 70)
    assert memory.met()
    assert rate.verified
    assert memory.verified


@pytest.mark.parametrize("error", [0.1, float("nan")])
def test_other_logits_are_not_verified(directory: Path, error: float) -> None:
    assert not any(row.verified for row in rows_of(directory, error)[0])


def test_rows_of_another_model_or_machine_stay(directory: Path) -> None:
    rows, _ = rows_of(directory)
    elsewhere = [replace(row, device="Other CPU") for row in rows]
    other = [replace(row, shape="Large 50 %, 64 tokens") for row in rows]
    faster = [replace(row, ours=2 * row.ours) for row in rows]
    kept = generation.merge([*elsewhere, *other, *rows], faster)
    assert {id(row) for row in kept} == {id(row) for row in [*elsewhere, *other, *faster]}


def test_bad_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert generation.main(["--models", "huge"]) == 2
    assert generation.main(["--rounds", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err


def test_a_subject_is_made_once_or_not_at_all(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(out: Path) -> None:
        made.append(out)
        (out / "config.json").touch()
        if len(made) == 1:
            raise OSError("no room")

    subject = replace(SUBJECT, make=make)
    with pytest.raises(OSError, match="no room"):
        subject.directory(tmp_path)
    assert not list(tmp_path.iterdir())
    assert subject.directory(tmp_path) == subject.directory(tmp_path) == tmp_path / "tiny"
    assert len(made) == 2


def test_the_large_model_is_made_a_block_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, config = families.FAMILIES["llama"]()
    config.tie_word_embeddings, config.dtype = False, "bfloat16"
    monkeypatch.setattr(subjects, "CONFIG", config)
    words = tiny.model_dir(tmp_path)
    monkeypatch.setattr("perp.demo.model_dir", lambda: words)
    out = subjects.SUBJECTS["large"].directory(tmp_path / "cache")
    assert len(list(out.glob("model-*.safetensors"))) == 1 + config.num_hidden_layers
    plain, _ = models.load(str(out))
    model, _ = load_packed(out)
    linears = all_prunable(plain)
    assert len(linears) == 7 * config.num_hidden_layers
    for name, linear in linears.items():
        assert bool(((linear.weight != 0).sum(1) == linear.in_features // 2).all())
        assert torch.equal(model.get_submodule(name).weight, linear.weight)
    assert subjects.CONFIG.dtype == plain.dtype == torch.bfloat16


def test_contestants_agree_on_a_small_model(tmp_path: Path) -> None:
    save(tmp_path / "out", packed=True)
    threads = torch.get_num_threads()
    found = {}
    for packed in (True, False):
        job = Job(str(tmp_path / "out"), packed, "float32", [5, 9, 20], tokens=4, repeats=1, threads=threads)
        path = tmp_path / f"{packed}.safetensors"
        result = worker.execute(job, path)
        found[packed] = result["generated"], generation.load_file(path)["logits"], result
    assert found[True][0] == found[False][0]
    assert len(found[True][0]) == 4
    torch.testing.assert_close(found[True][1], found[False][1])
    assert found[True][2]["weight_bytes"] < found[False][2]["weight_bytes"]
    assert found[True][2]["kernel"]
