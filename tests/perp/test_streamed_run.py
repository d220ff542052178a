import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from perp import checkpoints, models, packed_model, record, report, resume, run
from perp.errors import UserError
from perp.finished import Finished
from perp.lock import LOCK, locked
from perp.optim import AdamW
from perp.settings import RunSettings
from perp.streamed_run import StreamedJob

from . import families, tiny
from .kill import hashes


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> RunSettings:
    directory = tmp_path_factory.mktemp("job")
    words = tiny.tokenizer()
    path = directory / "model"
    model = families.build("llama", vocab_size=len(words), num_hidden_layers=2, dtype=torch.bfloat16)
    model.save_pretrained(path, max_shard_size="20KB")
    words.save_pretrained(path)
    return RunSettings(
        model=str(path),
        out=directory / "out",
        data=str(tiny.text_file(directory)),
        pattern="2:4",
        epochs=1,
        retrain=(),
        windows=3,
        seqlen=16,
        eval_windows=2,
        device="cpu",
        stream=True,
    )


@pytest.fixture(scope="module")
def finished(settings) -> Path:
    """The output of an uninterrupted run."""
    run.run(settings)
    return settings.out


def test_a_streamed_run_leaves_what_one_in_memory_leaves(settings, finished, tmp_path):
    out = tmp_path / "out"
    found = run.run(replace(settings, out=out, stream=False))
    ours, _ = models.load(str(finished))
    whole, _ = models.load(str(out))
    for name, weight in whole.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name
    assert (finished / checkpoints.MASKS).read_bytes() == (out / checkpoints.MASKS).read_bytes()
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (finished / name).read_bytes() == (out / name).read_bytes()
    told, expected = (json.loads((place / "perp.json").read_text()) for place in (finished, out))
    for part in ("perplexity", "sparsity", "data", "seeds", "method", "pattern"):
        assert told[part] == expected[part], part
    rows = json.loads((finished / "perp" / report.ROWS).read_text())[0]["rows"]
    assert [(row["stage"], row["zeros"], row["trained"]) for row in rows] == [
        (row.stage, row.zeros, row.trained) for row in found.rows
    ]


def test_nothing_but_the_model_is_left(settings, finished):
    assert {path.name for path in (finished / "perp").iterdir()} <= {"masks.safetensors", report.ROWS, report.PICTURE}
    index = json.loads((finished / models.INDEX).read_text())
    assert sorted(set(index["weight_map"].values())) == sorted(path.name for path in finished.glob("*.safetensors"))
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for path in finished.glob("*.safetensors") for tensor in load_file(path).values()
    )
    assert len({path.stat().st_mode for path in finished.rglob("*") if path.is_file()}) == 1


def test_the_packed_file_is_that_of_a_run_in_memory(settings, tmp_path):
    plain = replace(settings, reconstruct="none", packed=True)
    for stream in (True, False):
        run.run(replace(plain, out=tmp_path / str(stream), stream=stream))
    one, other = ((tmp_path / str(stream) / checkpoints.PACKED).read_bytes() for stream in (True, False))
    assert one == other
    packed_model.load_packed(tmp_path / "True")


def test_retraining_streams_over_the_packed_weights(settings, tmp_path):
    """The same training as in memory, to rounding: there the weights are dense, here packed."""
    job = replace(settings, retrain=("mask_lora", "norms"), steps=3, batch=2, compare=(), reconstruct="none")
    rows = [run.run(replace(job, out=tmp_path / str(stream), stream=stream)).rows for stream in (True, False)]
    assert [row.stage for row in rows[0]] == [report.DENSE, report.PRUNED, report.RETRAINED]
    assert rows[0][-1].trained == rows[1][-1].trained
    assert rows[0][-1].zeros == rows[1][-1].zeros == 0.5
    (ours, _), (whole, _) = (models.load(str(tmp_path / str(stream))) for stream in (True, False))
    before, _ = models.load(settings.model)
    for name, weight in whole.state_dict().items():
        moved = (weight - before.state_dict()[name]).float().norm()
        assert (ours.state_dict()[name] - weight).float().norm() <= 0.05 * moved, name
    assert not torch.equal(ours.model.norm.weight, before.model.norm.weight)


def test_retraining_goes_on_where_its_state_was_saved(settings, tmp_path, monkeypatch):
    job = replace(settings, retrain=("mask_lora", "norms"), steps=5, batch=2, compare=(), reconstruct="none")
    monkeypatch.setattr(resume, "SECONDS", 0.0)
    run.run(replace(job, out=tmp_path / "alone"))
    taken: list[int] = []
    write = resume.Checkpoint.write

    def then_stop(self, optimiser, losses):
        write(self, optimiser, losses)
        if len(losses) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resume.Checkpoint, "write", then_stop)
        with pytest.raises(KeyboardInterrupt):
            run.run(replace(job, out=tmp_path / "out"))
    step = AdamW.step
    monkeypatch.setattr(AdamW, "step", lambda self, losses: taken.append(self.taken) or step(self, losses))
    with monkeypatch.context() as patch:
        # Trained, and the first block written.
        patch.setattr(Finished, "write_block", counted(Finished.write_block, [1]))
        with pytest.raises(KeyboardInterrupt):
            run.run(replace(job, out=tmp_path / "out"))
    run.run(replace(job, out=tmp_path / "out"))
    assert taken == [2, 3, 4]
    assert hashes(tmp_path / "out") == hashes(tmp_path / "alone")


def counted(write, left):
    """`write`, after the last of so many calls of which the process ends, as it were."""

    def then_stop(*arguments):
        write(*arguments)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    return then_stop


def run_until(job: RunSettings, monkeypatch, units: int) -> None:
    """The process ends, as it were, once so many units and blocks are written."""
    left = [units]
    with monkeypatch.context() as patch:
        patch.setattr(Finished, "write_unit", counted(Finished.write_unit, left))
        patch.setattr(Finished, "write_block", counted(Finished.write_block, left))
        with pytest.raises(KeyboardInterrupt):
            run.run(job)


@pytest.mark.parametrize("units", [1, 2, 4])
def test_a_second_run_makes_only_what_is_left(settings, finished, tmp_path, monkeypatch, units):
    job = replace(settings, out=tmp_path / "out", compare=())
    run_until(job, monkeypatch, units)
    made = []
    finish = StreamedJob.finish
    monkeypatch.setattr(StreamedJob, "finish", lambda self, *a: made.append(self.made) or finish(self, *a))
    run.run(job)
    assert made == [4 - units]
    assert hashes(tmp_path / "out") == hashes(finished)


def test_another_run_is_refused_naming_the_setting(settings, tmp_path, monkeypatch):
    job = replace(settings, out=tmp_path / "out")
    run_until(job, monkeypatch, 1)
    before = hashes(tmp_path / "out")
    for changed, message in (
        (replace(job, epochs=2), "an unfinished run with epochs 1, not 2"),
        (replace(job, method="magnitude"), "with method 'wanda', not 'magnitude'"),
        (replace(job, windows=2), "with windows 3, not 2"),
        (replace(job, stream=False), "holds an unfinished streamed run; finish it with --stream"),
    ):
        with pytest.raises(UserError, match=message):
            run.run(changed)
    assert hashes(tmp_path / "out") == before
    run.run(replace(job, epochs=2, overwrite=True))
    assert not record.unfinished(tmp_path / "out")


def test_shards_changed_between_runs_are_refused(settings, tmp_path, monkeypatch):
    model = Path(shutil.copytree(settings.model, tmp_path / "model"))
    job = replace(settings, out=tmp_path / "out", model=str(model), compare=())
    run_until(job, monkeypatch, 3)
    shard = sorted(model.glob("*.safetensors"))[1]
    about = shard.stat()
    os.utime(shard, ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    with pytest.raises(UserError, match=rf"{shard.name} has changed since the unfinished run"):
        run.run(job)
    os.utime(shard, ns=(about.st_atime_ns, about.st_mtime_ns))
    block = next((tmp_path / "out").rglob("block-00000.safetensors"))
    content = bytearray(block.read_bytes())
    content[-1] ^= 1
    block.write_bytes(content)
    with pytest.raises(UserError, match=r"block-00000\.safetensors is not what this run wrote"):
        run.run(job)


def test_one_run_at_a_time_in_a_directory(settings, tmp_path):
    with locked(tmp_path / "out"):
        for stream in (True, False):
            with pytest.raises(UserError, match=rf"another run \(process {os.getpid()}\) is writing to"):
                run.run(replace(settings, out=tmp_path / "out", stream=stream))
        assert (tmp_path / "out" / LOCK).exists()
    assert not (tmp_path / "out").exists()


def test_a_budget_too_small_for_one_unit_is_told_before_any_work(settings, tmp_path):
    with pytest.raises(UserError, match=r"does not fit on this machine so; use a machine with .* GB of memory"):
        run.run(replace(settings, out=tmp_path / "out", cpu_memory="1kb"))
    assert not (tmp_path / "out").exists()


def test_killed_at_random_moments_the_result_is_the_same(settings, finished, tmp_path):
    """The short form of `python -m tests.perp.kill`."""
    told = subprocess.run(
        [sys.executable, "-m", "tests.perp.kill", "--kills", "2", "--seed", "1"],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert "the same" in told.stdout
